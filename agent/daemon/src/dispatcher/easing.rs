//! What becomes of it when the machine is hard pressed: the level goes to admission, to the model, and to the plant. Decides no
//! level.

use super::Dispatcher;
use crate::alarms::Alarm;
use crate::probe::Machine;
use crate::worker::{Command, Prepare};
use millwright_task::pressure::{Cause, Finding, Governor, Level, Reading};
use std::time::Duration;

/// Sensors that have said nothing for so long say nothing bad any more.
const SILENCE: Duration = Duration::from_mins(1);

/// The governor, and what was done and said of it.
#[derive(Default)]
pub(super) struct Easing {
    governor: Governor,
    /// When the machine was last looked at.
    looked: Duration,
    /// What was last said: the causes with their levels, and why.
    causes: Vec<(Cause, Level)>,
    pub(super) reason: String,
    /// The level that the model was last told.
    told: Level,
}

impl Easing {
    pub(super) fn level(&self) -> Level {
        self.governor.level()
    }

    fn was(&self, cause: Cause) -> Level {
        let said = self.causes.iter().find(|(said, _)| *said == cause);
        said.map_or(Level::Normal, |(_, level)| *level)
    }
}

impl<P: Prepare> Dispatcher<P> {
    /// Takes a look at the machine.
    pub fn watch(&mut self, machine: &Machine) {
        if self.parts.config.governor {
            self.judge(machine.reading(self.parts.config.temperature_limit));
        }
    }

    /// Gets over it where the machine can't be looked at any more.
    pub(super) fn miss_sensors(&mut self) {
        let now = self.parts.clock.now().own;
        if self.easing.level() > Level::Normal && now.saturating_sub(self.easing.looked) > SILENCE {
            self.judge(Reading::default());
        }
    }

    fn judge(&mut self, reading: Reading) {
        let now = self.parts.clock.now();
        let before = self.easing.level();
        self.easing.looked = now.own;
        let findings = self.easing.governor.watch(now.own, reading);
        let causes: Vec<_> = findings.iter().map(|f| (f.cause, f.level)).collect();
        if causes == self.easing.causes {
            return;
        }
        self.raise_causes(&findings);
        let why: Vec<_> = findings.iter().map(ToString::to_string).collect();
        self.easing.causes = causes;
        self.easing.reason = why.join("; ");
        let (level, why) = (self.easing.level(), &self.easing.reason);
        if level > before {
            tracing::warn!("the machine is hard pressed ({why}): {} now", level.name());
        } else if level < before {
            tracing::info!("the machine has it easier: {} now", level.name());
        }
        self.admission.ease(level);
        self.say_state();
    }

    /// An alarm for each cause that costs more than speed.
    fn raise_causes(&mut self, findings: &[Finding]) {
        let now = self.parts.clock.now();
        for cause in Cause::ALL {
            let finding = findings.iter().find(|finding| finding.cause == cause);
            match finding.filter(|finding| finding.level >= Level::Strained) {
                None => self.alarms.clear(Alarm::Pressed(cause)),
                Some(finding) if finding.level > self.easing.was(cause) => {
                    let reason = finding.to_string();
                    self.alarms.raise(now, Alarm::Pressed(cause), &reason);
                }
                Some(_) => {}
            }
        }
    }

    /// Tells the model how much it may take; later, where it has much to hear before.
    pub(super) fn tell_level(&mut self) {
        let level = self.easing.level();
        if level != self.easing.told && self.standing.tell(Command::Ease(level)) {
            self.easing.told = level;
        }
    }
}
