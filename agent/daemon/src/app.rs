//! The whole agent on one screen: its tasks, its channels, its drain. What happens in each case is the
//! dispatcher's. It connects at once; the model comes when it is loaded.

use crate::broker::{self, Inbox, Will};
use crate::card::{self, Model, State};
use crate::clock::Clock;
use crate::config::Config;
use crate::dispatcher::{Dispatcher, Equipment, Parts};
use crate::journal::Journal;
use crate::loader;
use crate::pool::Via;
use crate::probe::{Machine, Probe};
use crate::service::{Pulse, Service};
use crate::worker::{self, Brain, Prepare, Report, Worker};
use anyhow::{Result, anyhow};
use millwright_task::limits::RUNNING_TASKS_MAX;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long a lost connection may come back before the plant is told.
const WILL_DELAY: Duration = Duration::from_secs(10);
/// The longest between two turns of the loop.
const TURN: Duration = Duration::from_secs(1);
/// How often it is looked whether the machine is hard pressed.
const LOOK: Duration = Duration::from_secs(5);
/// The model may take this many times what the main loop may between two signs of life: a step with a prompt in it is long
/// on a small board.
const STEP: u32 = 4;
/// What the goodbye may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// Work that takes longer lets the connections have their turn before there is more.
const LONG: Duration = Duration::from_millis(5);

/// A model that is ready to work.
pub struct Mind<B, P> {
    pub model: Model,
    pub brain: B,
    pub preparer: P,
    /// Tasks at the same time.
    pub slots: usize,
}

/// Where the agent is in its life.
#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Serving,
    /// New tasks are refused; those that run may finish until then, and go on at the next start otherwise.
    Draining(Instant),
}

/// Serves with what `models` bring, until `shutdown` resolves and the drain is done. An error means that the agent can't go on and
/// should be started anew.
pub async fn run<B, P>(
    config: Config,
    mut models: mpsc::Receiver<loader::Outcome<Mind<B, P>>>,
    shutdown: impl Future<Output = ()>,
) -> Result<()>
where
    B: Brain,
    P: Prepare<Work = B::Work>,
{
    let config = Arc::new(config);
    let mut service = Service::from_env();
    let (journal, past, mut written) = Journal::open(&config.model.state_dir)?;
    let clock = Clock::new(config.clock, past.stamp.as_ref());
    let will = Will {
        topic: config.base.state(),
        payload: card::state(
            &config,
            State::Offline,
            "the connection was lost",
            clock.boot_id(),
            None,
        ),
        delay: WILL_DELAY,
    };
    let (link, poller, mut inbox) = broker::open(&broker::Settings {
        will: Some(will),
        ..config.broker.clone()
    });
    let mut pollers = JoinSet::new();
    let (pool, mut pool_inbox) = match &config.pool {
        Some(pool) => {
            let (link, poller, inbox) = broker::open(&pool.broker);
            pollers.spawn(poller.run());
            (Some(link), inbox)
        }
        None => (None, Inbox::closed()),
    };
    let mut work: Option<AtWork<B>> = None;
    let steps = service.steps(STEP);
    let mut health = health(config.model.state_dir.clone(), config.health_interval);
    let mut agent = Dispatcher::<P>::new(Parts {
        journal,
        link: link.clone(),
        pool: pool.clone(),
        config: Arc::clone(&config),
        clock,
    });
    agent.resume(past);
    let own_poller = pollers.spawn(poller.run());
    tokio::pin!(shutdown);

    let mut phase = Phase::Serving;
    service.ready();
    let outcome = loop {
        tokio::select! {
            Some(signal) = inbox.signals.recv() => agent.on_signal(signal),
            Some(message) = inbox.messages.recv(), if agent.has_room() => {
                at_length(|| agent.on_message(Via::Own, &message)).await;
            }
            Some(signal) = pool_inbox.signals.recv() => agent.on_pool_signal(signal),
            Some(message) = pool_inbox.messages.recv(), if agent.has_room() => {
                at_length(|| agent.on_message(Via::Pool, &message)).await;
            }
            outcome = models.recv(), if work.is_none() => match outcome {
                Some(Ok(mind)) => match begin(mind, steps.clone()) {
                    Ok((kv_tokens_max, equipment, at_work)) => {
                        agent.equip(kv_tokens_max, equipment);
                        work = Some(at_work);
                    }
                    Err(e) => break Err(e),
                },
                Some(Err(why)) => agent.lack(&why),
                None => break Err(anyhow!("the thread that loads the model died; the log above says of what")),
            },
            report = report(&mut work) => match report {
                Some(report) => agent.on_report(report),
                None => break Err(anyhow!("the model's thread died; the log above says of what")),
            },
            news = written.recv() => match news {
                Some(news) => agent.on_written(news),
                None => break Err(anyhow!("the journal's thread died; the log above says of what")),
            },
            Some((machine, is_due)) = health.recv() => {
                agent.watch(&machine);
                if is_due {
                    agent.say_health(&machine);
                }
            }
            _ = pollers.join_next() => break Err(anyhow!("the connection's task died; the log above says of what")),
            () = link.room() => {}
            () = sleep(agent.patience().min(service.patience()).min(TURN)) => agent.tick(),
            () = &mut shutdown, if phase == Phase::Serving => {
                tracing::info!("draining for at most {:?}", config.drain_grace);
                agent.drain();
                service.stopping(config.drain_grace);
                phase = Phase::Draining(Instant::now() + config.drain_grace);
            }
            () = until(phase) => break Ok(()),
        }
        agent.pump();
        service.turn(|| agent.status());
        if phase != Phase::Serving && agent.is_done() {
            break Ok(());
        }
    };

    agent.drain();
    match &outcome {
        Ok(()) => agent.say_goodbye(State::Offline, "shut down"),
        Err(e) => agent.say_goodbye(State::Degraded, &e.to_string()),
    }
    // What was noted last is written without a broker, too.
    agent.pump();
    let goodbye = async {
        while !(agent.is_flushed() && agent.has_said_goodbye()) && link.is_online() {
            agent.pump();
            tokio::select! {
                Some(signal) = inbox.signals.recv() => agent.on_signal(signal),
                Some(news) = written.recv() => agent.on_written(news),
                else => return,
            }
        }
    };
    let _ = timeout(FAREWELL, goodbye).await;
    if agent.has_said_goodbye() || !link.is_online() {
        link.close();
    } else {
        // The will says what could not be said; a DISCONNECT would take it back.
        own_poller.abort();
    }
    if let Some(pool) = &pool {
        pool.close();
    }
    // With nobody to listen to its signals a poller ends too.
    drop(pool_inbox);
    let _ = timeout(FAREWELL, async {
        while pollers.join_next().await.is_some() {}
    })
    .await;
    drop(pollers);
    // Their threads may wait for somebody to listen, and are waited for in turn.
    drop((written, models));
    drop(agent);
    if let Some(AtWork { reports, thread }) = work {
        drop(reports);
        // Without its commands the thread ends after its step; a panic was reported as it happened.
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
    outcome
}

/// The model's thread, and what it tells.
struct AtWork<B: Brain> {
    reports: mpsc::Receiver<Report<B::Work>>,
    thread: JoinHandle<()>,
}

/// Does what may be long, such as the preparation of a prompt.
async fn at_length(work: impl FnOnce()) {
    let began = Instant::now();
    work();
    if began.elapsed() > LONG {
        tokio::task::yield_now().await;
    }
}

/// Puts a model to work: how many tokens its cache has, what the dispatcher needs of it, and its thread.
fn begin<B, P>(mind: Mind<B, P>, pulse: Pulse) -> Result<(usize, Equipment<P>, AtWork<B>)>
where
    B: Brain,
    P: Prepare<Work = B::Work>,
{
    let Mind {
        model,
        brain,
        preparer,
        slots,
    } = mind;
    let Worker {
        commands,
        reports,
        load,
        thread,
    } = worker::spawn(brain, pulse)?;
    let kv_tokens_max = load.borrow().kv_tokens_max;
    let equipment = Equipment {
        slots: slots.clamp(1, RUNNING_TASKS_MAX),
        context: model.context_length.min(kv_tokens_max),
        model,
        preparer,
        commands,
        load,
    };
    Ok((kv_tokens_max, equipment, AtWork { reports, thread }))
}

/// The next report of the model's thread; none comes while there is no model.
async fn report<B: Brain>(work: &mut Option<AtWork<B>>) -> Option<Report<B::Work>> {
    match work {
        Some(work) => work.reports.recv().await,
        None => std::future::pending().await,
    }
}

async fn until(phase: Phase) {
    match phase {
        Phase::Serving => std::future::pending().await,
        Phase::Draining(at) => sleep_until(at).await,
    }
}

/// Looks at the machine in the background, and says whether a sample is due. Ends with its receiver.
fn health(state_dir: PathBuf, interval: Duration) -> mpsc::Receiver<(Machine, bool)> {
    let (samples, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut probe = None;
        let mut due = Instant::now();
        while !samples.is_closed() {
            let dir = state_dir.clone();
            let look = move |probe: Option<Probe>| {
                let mut probe = probe.unwrap_or_else(|| Probe::new(&dir));
                let machine = probe.look();
                (probe, machine)
            };
            let taken = probe.take();
            let Ok((used, machine)) = tokio::task::spawn_blocking(move || look(taken)).await else {
                return;
            };
            probe = Some(used);
            let now = Instant::now();
            let is_due = now >= due;
            if is_due {
                due = now + interval;
            }
            if samples.send((machine, is_due)).await.is_err() {
                return;
            }
            sleep_until(due.min(now + LOOK)).await;
        }
    });
    receiver
}
