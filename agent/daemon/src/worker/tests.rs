//! What takes effect between which steps, on a model whose steps a test lets through one by one: counted, not timed.

use super::*;
use millwright_engine::Finish;
use std::sync::mpsc as std_mpsc;

/// Tokens to make, and those that were.
struct Count(usize, usize);

impl Work for Count {
    fn prompt_tokens(&self) -> usize {
        1
    }
    fn tokens_max(&self) -> usize {
        self.0 + 1
    }
    fn kv_tokens(&self) -> usize {
        self.tokens_max()
    }
}

/// One slot; says when a step begins, and waits until it may end.
struct Gated {
    running: Option<Count>,
    steps: std_mpsc::SyncSender<()>,
    go: std_mpsc::Receiver<()>,
}

impl Gated {
    fn completion(made: usize, finish: Finish) -> Completion {
        Completion {
            text: "x".repeat(made),
            tokens: vec![0; made],
            finish,
            prompt_tokens: 1,
            prefill: std::time::Duration::ZERO,
            decode: std::time::Duration::ZERO,
        }
    }
}

impl Brain for Gated {
    type Work = Count;
    type Slot = ();
    fn start(&mut self, work: Count) -> Result<(), Count> {
        if self.running.is_some() {
            return Err(work);
        }
        self.running = Some(work);
        Ok(())
    }
    fn step(&mut self) -> Result<Vec<((), Event)>, String> {
        let _ = self.steps.send(());
        let _ = self.go.recv();
        let work = self.running.as_mut().ok_or("nothing runs")?;
        work.1 += 1;
        let mut events = vec![((), Event::Text("x".into()))];
        if work.1 == work.0 {
            let done = Self::completion(work.1, Finish::Length);
            self.running = None;
            events.push(((), Event::Done(done)));
        }
        Ok(events)
    }
    fn cancel(&mut self, (): ()) -> Completion {
        let work = self.running.take().unwrap();
        Self::completion(work.1, Finish::Cancelled)
    }
    fn suspend(&mut self, (): ()) -> (Count, Completion) {
        let work = self.running.take().unwrap();
        let completion = Self::completion(work.1, Finish::Cancelled);
        (work, completion)
    }
    fn ease(&mut self, _: Level) {}
    fn is_idle(&self) -> bool {
        self.running.is_none()
    }
    fn load(&self) -> Load {
        Load::default()
    }
}

struct Rig {
    worker: Worker<Count>,
    /// Late whenever it doesn't rest.
    pulse: Pulse,
    steps: std_mpsc::Receiver<()>,
    go: std_mpsc::SyncSender<()>,
}

impl Rig {
    fn new() -> Self {
        let (step, steps) = std_mpsc::sync_channel(8);
        let (go, gone) = std_mpsc::sync_channel(8);
        let brain = Gated {
            running: None,
            steps: step,
            go: gone,
        };
        let pulse = Pulse::new(std::time::Duration::ZERO);
        let worker = spawn(brain, pulse.clone()).unwrap();
        Self {
            worker,
            pulse,
            steps,
            go,
        }
    }

    fn tell(&self, command: Command<Count>) {
        assert!(self.worker.commands.try_send(command).is_ok());
    }

    /// Waits until a step has begun.
    fn begun(&self) {
        self.steps.recv().unwrap();
    }

    fn end_step(&self) {
        self.go.send(()).unwrap();
    }

    fn report(&mut self) -> Report<Count> {
        self.worker.reports.blocking_recv().unwrap()
    }

    /// Skips the step's text.
    fn text(&mut self, ticket: u64) {
        assert!(matches!(self.report(), Report::Text(Ticket(t), _) if t == ticket));
    }
}

#[test]
fn a_cancel_ends_its_task_with_the_step_that_runs_and_the_next_has_its_slot() {
    let mut rig = Rig::new();
    rig.tell(Command::Start(Ticket(1), Count(100, 0)));
    rig.begun();
    rig.tell(Command::Start(Ticket(2), Count(100, 0)));
    rig.tell(Command::Stop(Ticket(1)));
    rig.end_step();
    rig.text(1);
    let stopped = rig.report();
    assert!(matches!(stopped, Report::Stopped(Ticket(1), Some(c)) if c.tokens.len() == 1));
    // The next step is the other's.
    rig.begun();
    rig.end_step();
    rig.text(2);
}

#[test]
fn one_gives_way_with_the_step_that_runs_and_goes_on_where_it_was() {
    let mut rig = Rig::new();
    rig.tell(Command::Start(Ticket(1), Count(3, 0)));
    rig.begun();
    rig.tell(Command::Suspend(Ticket(1)));
    rig.tell(Command::Start(Ticket(2), Count(1, 0)));
    rig.end_step();
    rig.text(1);
    let Report::Suspended(Ticket(1), work, Some(partial)) = rig.report() else {
        panic!("it did not give way");
    };
    assert_eq!(partial.text, "x");
    rig.begun();
    rig.end_step();
    rig.text(2);
    assert!(matches!(rig.report(), Report::Done(Ticket(2), _)));
    rig.tell(Command::Start(Ticket(1), work));
    for _ in 0..2 {
        rig.begun();
        rig.end_step();
        rig.text(1);
    }
    assert!(matches!(rig.report(), Report::Done(Ticket(1), c) if c.text == "xxx"));
}

#[test]
fn one_that_was_never_begun_is_given_back_whole_and_one_that_is_done_not_at_all() {
    let mut rig = Rig::new();
    rig.tell(Command::Start(Ticket(1), Count(1, 0)));
    rig.begun();
    rig.tell(Command::Start(Ticket(2), Count(1, 0)));
    rig.tell(Command::Suspend(Ticket(2)));
    rig.tell(Command::Suspend(Ticket(1)));
    rig.tell(Command::Stop(Ticket(1)));
    rig.end_step();
    rig.text(1);
    assert!(matches!(rig.report(), Report::Done(Ticket(1), _)));
    assert!(matches!(
        rig.report(),
        Report::Suspended(Ticket(2), Count(1, 0), None)
    ));
    rig.tell(Command::Start(Ticket(3), Count(1, 0)));
    rig.begun();
    rig.end_step();
    rig.text(3);
}

#[test]
fn a_step_that_does_not_end_is_late_and_a_model_without_work_is_not() {
    let mut rig = Rig::new();
    assert_eq!(rig.pulse.overdue(), None);
    rig.tell(Command::Start(Ticket(1), Count(1, 0)));
    rig.begun();
    std::thread::sleep(std::time::Duration::from_millis(2));
    assert!(rig.pulse.overdue().is_some());
    rig.end_step();
    rig.text(1);
    assert!(matches!(rig.report(), Report::Done(Ticket(1), _)));
    // Its turn ends a moment later.
    while rig.pulse.overdue().is_some() {
        std::thread::yield_now();
    }
}
