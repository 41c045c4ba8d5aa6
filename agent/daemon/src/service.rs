//! What the service manager is told, by systemd's protocol: that the agent serves, how it is, and, while all of its loops
//! come round, that it lives. Says nothing where nobody listens; judges nothing else.

use sd_notify::NotifyState;
use std::fmt::Write;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a stop may take beyond the drain: the step that runs, the goodbyes, the threads' ends.
const LEAVING: Duration = Duration::from_secs(30);
/// How often the manager hears how the agent is, where that changes.
const STATUS: Duration = Duration::from_secs(1);
/// How often a late loop is looked at again, in the watchdog's period.
const BEATS: u32 = 4;

/// When a loop last came round: it says so, and somebody else looks.
#[derive(Clone)]
pub struct Pulse {
    began: Instant,
    /// Milliseconds since `began`.
    beat: Arc<AtomicU64>,
    patience: Duration,
}

/// In the place of a time: nothing is to be done, so nothing can be late.
const RESTING: u64 = u64::MAX;

impl Pulse {
    pub(crate) fn new(patience: Duration) -> Self {
        Self {
            began: Instant::now(),
            beat: Arc::new(AtomicU64::new(RESTING)),
            patience,
        }
    }

    pub fn beat(&self) {
        let now = self.began.elapsed().as_millis() as u64;
        self.beat.store(now, Ordering::Relaxed);
    }

    /// Until the next beat it waits for others, for as long as that takes.
    pub fn rest(&self) {
        self.beat.store(RESTING, Ordering::Relaxed);
    }

    /// For how long it has been silent, if that is longer than it may be.
    pub(crate) fn overdue(&self) -> Option<Duration> {
        let beat = self.beat.load(Ordering::Relaxed);
        let now = self.began.elapsed();
        let silence = now.saturating_sub(Duration::from_millis(beat));
        (beat != RESTING && silence > self.patience).then_some(silence)
    }
}

/// The manager's end. One loop calls [`Self::turn`] whenever it comes round, and is thereby watched itself.
pub struct Service {
    /// Never waited for: a manager that is busy must not hold the agent up. (`sd_notify::notify` would wait.)
    socket: Option<UnixDatagram>,
    /// What must be said and found no room.
    unsaid: String,
    /// Half of the time after which the manager takes the agent for dead.
    period: Option<Duration>,
    /// When the watchdog is to be fed next; at once if never before.
    due: Option<Instant>,
    /// The model's thread.
    steps: Option<Pulse>,
    status: String,
    looked: Option<Instant>,
    is_starved: bool,
    /// What was said last could not be sent, and the log knows.
    is_unheard: bool,
}

impl Service {
    /// As the environment says: `NOTIFY_SOCKET` and `WATCHDOG_USEC`.
    pub fn from_env() -> Self {
        Self {
            socket: socket(),
            unsaid: String::new(),
            period: sd_notify::watchdog_enabled().map(|after| after / 2),
            due: None,
            steps: None,
            status: String::new(),
            looked: None,
            is_starved: false,
            is_unheard: false,
        }
    }

    /// Watches the model's thread, of which a step may take `times` half of the watchdog's time.
    pub fn steps(&mut self, times: u32) -> Pulse {
        let patience = self.period.map_or(Duration::MAX, |period| period * times);
        let pulse = Pulse::new(patience);
        self.steps = Some(pulse.clone());
        pulse
    }

    /// The agent serves from now on.
    pub fn ready(&mut self) {
        self.must_say(&[NotifyState::Ready]);
    }

    /// The agent leaves, and may take as long as its configuration says, whatever the manager's own limit.
    pub fn stopping(&mut self, grace: Duration) {
        let most = u32::try_from((grace + LEAVING).as_micros()).unwrap_or(u32::MAX);
        self.must_say(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(most)]);
    }

    /// Until [`Self::turn`] has something to do.
    pub fn patience(&self) -> Duration {
        let due = self.due.map_or(Duration::ZERO, |at| {
            at.saturating_duration_since(Instant::now())
        });
        self.period.map_or(Duration::MAX, |_| due)
    }

    /// Says how the agent is, and feeds the watchdog unless a loop is late.
    pub fn turn(&mut self, status: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.socket.is_some() && self.looked.is_none_or(|at| now - at >= STATUS) {
            self.looked = Some(now);
            let status = status();
            if !self.unsaid.is_empty() {
                self.say(&[]);
            }
            if status != self.status && self.say(&[NotifyState::Status(&status)]) {
                self.status = status;
            }
        }
        let Some(period) = self.period else { return };
        if self.due.is_some_and(|at| now < at) {
            return;
        }
        if let Some(silence) = self.steps.as_ref().and_then(Pulse::overdue) {
            if !self.is_starved {
                tracing::error!(
                    "the model's thread has not come round for {silence:.0?}: the watchdog is not fed until it does"
                );
            }
            self.is_starved = true;
            self.due = Some(now + period / BEATS);
            return;
        }
        self.is_starved = false;
        // A manager that had no room for it must not wait for the next one: that would be too late.
        let fed = self.say(&[NotifyState::Watchdog]);
        self.due = Some(now + if fed { period } else { period / BEATS });
    }

    fn must_say(&mut self, what: &[NotifyState<'_>]) {
        self.unsaid.push_str(&words(what));
        self.say(&[]);
    }

    /// Says what was left unsaid, and this. Whether there was room for it.
    fn say(&mut self, what: &[NotifyState<'_>]) -> bool {
        let Some(socket) = &self.socket else {
            return true;
        };
        let message = format!("{}{}", self.unsaid, words(what));
        match socket.send(message.as_bytes()) {
            Ok(_) => self.unsaid.clear(),
            Err(e) => {
                // It will take the agent for dead, should it wait for a watchdog; so it is tried again.
                if e.kind() != ErrorKind::WouldBlock && !self.is_unheard {
                    tracing::warn!("the service manager can't be told how the agent is: {e}");
                    self.is_unheard = true;
                }
                return false;
            }
        }
        self.is_unheard = false;
        true
    }
}

fn words(what: &[NotifyState<'_>]) -> String {
    what.iter().fold(String::new(), |mut all, state| {
        let _ = writeln!(all, "{state}");
        all
    })
}

fn socket() -> Option<UnixDatagram> {
    let path = std::env::var_os("NOTIFY_SOCKET")?;
    let open = || -> io::Result<UnixDatagram> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(&path)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    open()
        .inspect_err(|e| tracing::warn!("the service manager can't be told how the agent is: {e}"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_that_does_not_listen_holds_nothing_up_and_hears_later_what_it_must() {
        let (manager, socket) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut service = Service::from_env();
        service.socket = Some(socket);
        let is_full = |service: &mut Service| !service.say(&[NotifyState::Watchdog]);
        assert!((0..10_000).any(|_| is_full(&mut service)), "it has no end");
        service.ready();
        let status = || "serving".to_owned();
        service.turn(status);
        assert!(service.status.is_empty());
        manager.set_nonblocking(true).unwrap();
        let hear = || {
            let mut bytes = [0; 100];
            let n = manager.recv(&mut bytes).ok()?;
            String::from_utf8(bytes[..n].to_vec()).ok()
        };
        while hear().is_some() {}
        service.looked = None;
        service.turn(status);
        assert_eq!(hear().as_deref(), Some("READY=1\n"));
        assert_eq!(hear().as_deref(), Some("STATUS=serving\n"));
    }

    #[test]
    fn the_watchdog_is_fed_at_half_its_time_unless_a_loop_is_late() {
        let mut service = Service::from_env();
        assert_eq!(service.patience(), Duration::MAX, "nobody waits for it");
        let hour = Duration::from_hours(1);
        service.period = Some(hour);
        let pulse = service.steps(2);
        assert_eq!(pulse.patience, 2 * hour);
        assert!(service.patience().is_zero(), "at once");
        service.turn(String::new);
        let (due, patience) = (service.due, service.patience());
        assert!(patience <= hour && patience > hour / 2);
        service.turn(String::new);
        assert_eq!(service.due, due, "not before it is due");

        service.due = None;
        let pulse = Pulse::new(Duration::ZERO);
        service.steps = Some(pulse.clone());
        service.turn(String::new);
        assert!(!service.is_starved, "one that rests is not late");
        service.due = None;
        pulse.beat();
        std::thread::sleep(Duration::from_millis(2));
        service.turn(String::new);
        assert!(service.is_starved);
        let patience = service.patience();
        assert!(
            !patience.is_zero() && patience <= hour / 4,
            "it is looked again, and not without a pause"
        );
        service.due = None;
        pulse.rest();
        service.turn(String::new);
        assert!(!service.is_starved);
    }
}
