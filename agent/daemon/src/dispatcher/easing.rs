//! What becomes of it when the machine is hard pressed: the level goes to admission, to the model, and to the plant. Decides no
//! level.

use super::Dispatcher;
use crate::alarms::Alarm;
use crate::probe::Machine;
use crate::worker::{Command, Prepare};
use millwright_task::pressure::{Cause, Finding, Level};

impl<P: Prepare> Dispatcher<P> {
    /// Takes a look at the machine.
    pub fn watch(&mut self, machine: &Machine) {
        let now = self.parts.clock.now();
        let before = self.governor.level();
        let reading = machine.reading(self.parts.config.temperature_limit);
        let findings = self.governor.watch(now.own, reading);
        self.raise_causes(&findings);
        let level = self.governor.level();
        if level == before {
            return;
        }
        let causes: Vec<_> = findings.iter().map(ToString::to_string).collect();
        self.hardship = causes.join("; ");
        let (name, why) = (level.name(), &self.hardship);
        if level > before {
            tracing::warn!("the machine is hard pressed ({why}): {name} now");
        } else {
            tracing::info!("the machine has it easier: {name} now");
        }
        self.admission.ease(level);
        self.say_state();
    }

    /// An alarm for each cause that costs more than speed.
    fn raise_causes(&mut self, findings: &[Finding]) {
        let now = self.parts.clock.now();
        for cause in Cause::ALL {
            let alarm = Alarm::Pressed(cause);
            let finding = findings.iter().find(|finding| finding.cause == cause);
            match finding.filter(|finding| finding.level >= Level::Strained) {
                None => self.alarms.clear(alarm),
                Some(_) if self.alarms.is_raised(alarm) => {}
                Some(finding) => self.alarms.raise(now, alarm, &finding.to_string()),
            }
        }
    }

    /// Tells the model how much it may take; later, where it has much to hear before.
    pub(super) fn tell_level(&mut self) {
        let level = self.governor.level();
        if level != self.told && self.parts.commands.try_send(Command::Ease(level)).is_ok() {
            self.told = level;
        }
    }
}
