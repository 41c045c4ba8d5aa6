//! How hard the machine has it, and how far the agent steps back before harm comes: level by level, up at once and down
//! slowly. Reads no sensor; its readings are an argument, as time is.
//!
//! CPU pressure is not watched: where the model uses all cores it is the agent's own, and it harms nobody whom the unit's weights
//! and limits don't protect.

use std::fmt;
use std::time::Duration;

/// How long all must have been better before the agent does more again, by one level.
pub const CALM: Duration = Duration::from_mins(1);

/// One look at the sensors; `None` where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Reading {
    /// °C of the processor, and the °C at which it throttles or worse.
    pub temperature: Option<(f32, f32)>,
    pub throttling: Option<Throttling>,
    /// Bytes of memory that programs could still have, and of all.
    pub memory: Option<(u64, u64)>,
    /// Share of the last ten seconds in which somebody waited for memory, and for the disk, in percent.
    pub memory_stall: Option<f32>,
    pub io_stall: Option<f32>,
}

/// What the board's firmware says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Throttling {
    None,
    /// Its power is too weak or its soft limit of heat is reached.
    Warned,
    /// It holds its clock down.
    Held,
}

/// What makes the agent step back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    Temperature,
    Throttling,
    Memory,
    Stall,
}

impl Cause {
    pub const ALL: [Self; 4] = [
        Self::Temperature,
        Self::Throttling,
        Self::Memory,
        Self::Stall,
    ];
}

/// How far the agent has stepped back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Level {
    #[default]
    Normal,
    /// Somewhat slower.
    Eased,
    /// Half as much, and nothing that may wait.
    Strained,
    /// What was accepted goes on, slowly; nothing more is.
    Critical,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Eased => "eased",
            Self::Strained => "strained",
            Self::Critical => "critical",
        }
    }

    /// Of the threads, of a step's room for prompts, and of the slots: how many quarters are used.
    pub fn quarters(self) -> usize {
        match self {
            Self::Normal => 4,
            Self::Eased => 3,
            Self::Strained => 2,
            Self::Critical => 1,
        }
    }

    /// So much of `whole`, and one at least.
    pub fn of(self, whole: usize) -> usize {
        (whole * self.quarters() / 4).max(1)
    }

    fn below(self) -> Self {
        match self {
            Self::Critical => Self::Strained,
            Self::Strained => Self::Eased,
            Self::Eased | Self::Normal => Self::Normal,
        }
    }
}

/// What one cause says, with a sentence for people.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    pub cause: Cause,
    pub level: Level,
    /// The last that was as bad as that.
    reading: Reading,
    is_calming: bool,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reading = &self.reading;
        match self.cause {
            Cause::Temperature => {
                let (degrees, limit) = reading.temperature.unwrap_or_default();
                write!(f, "{degrees:.0} °C, the limit is {limit:.0}")
            }
            Cause::Throttling if reading.throttling == Some(Throttling::Held) => {
                f.write_str("the board holds its clock down")
            }
            Cause::Throttling => f.write_str("the board warns of heat or of too little power"),
            Cause::Memory => {
                let (free, all) = reading.memory.unwrap_or_default();
                write!(
                    f,
                    "{} of {} MiB of memory are available",
                    free >> 20,
                    all >> 20
                )
            }
            Cause::Stall => write!(
                f,
                "programs wait for memory {:.0} % and for the disk {:.0} % of the time",
                reading.memory_stall.unwrap_or_default(),
                reading.io_stall.unwrap_or_default()
            ),
        }?;
        f.write_str(if self.is_calming {
            ", and better since"
        } else {
            ""
        })
    }
}

/// Where a level begins, and how much better it must be to end.
struct Ladder {
    /// Of [`Level::Eased`], [`Level::Strained`] and [`Level::Critical`].
    steps: [f32; 3],
    margin: f32,
}

/// °C above the limit.
const HEAT: Ladder = Ladder {
    steps: [-10.0, -5.0, 0.0],
    margin: 3.0,
};
/// Share of memory in use, and MiB that are left, below zero: both must be bad, since a share of much is much.
const USED: Ladder = Ladder {
    steps: [0.85, 0.92, 0.96],
    margin: 0.03,
};
const LEFT: Ladder = Ladder {
    steps: [-512.0, -256.0, -128.0],
    margin: 64.0,
};
/// Percent of time. A disk that is busy is slow, not in danger: it never makes more than the first step.
const MEMORY_STALL: Ladder = Ladder {
    steps: [10.0, 30.0, 60.0],
    margin: 5.0,
};
const IO_STALL: Ladder = Ladder {
    steps: [80.0, f32::INFINITY, f32::INFINITY],
    margin: 10.0,
};

impl Ladder {
    /// The level of a value; where a level is to end, of one that is worse by the margin.
    fn level(&self, value: f32, leaving: bool) -> Level {
        let value = value + if leaving { self.margin } else { 0.0 };
        let [eased, strained, critical] = self.steps.map(|step| value >= step);
        match (eased, strained, critical) {
            (_, _, true) => Level::Critical,
            (_, true, _) => Level::Strained,
            (true, ..) => Level::Eased,
            _ => Level::Normal,
        }
    }
}

impl Reading {
    /// What each cause says; `leaving` asks whether a level may end.
    fn levels(&self, leaving: bool) -> [(Cause, Level); 4] {
        let at = |ladder: &Ladder, value: Option<f32>| {
            value.map_or(Level::Normal, |value| ladder.level(value, leaving))
        };
        let heat = self.temperature.map(|(degrees, limit)| degrees - limit);
        let throttling = match self.throttling {
            None | Some(Throttling::None) => Level::Normal,
            Some(Throttling::Warned) => Level::Eased,
            Some(Throttling::Held) => Level::Strained,
        };
        let used = self
            .memory
            .map(|(free, all)| 1.0 - free as f32 / all.max(1) as f32);
        let left = self.memory.map(|(free, _)| -((free >> 20) as f32));
        let memory = at(&USED, used).min(at(&LEFT, left));
        let stall = at(&MEMORY_STALL, self.memory_stall).max(at(&IO_STALL, self.io_stall));
        [
            (Cause::Temperature, at(&HEAT, heat)),
            (Cause::Throttling, throttling),
            (Cause::Memory, memory),
            (Cause::Stall, stall),
        ]
    }
}

/// The level, and since when it could be a lower one.
#[derive(Debug, Default)]
pub struct Governor {
    /// Of each cause by itself.
    levels: [Climb; 4],
}

#[derive(Debug, Default)]
struct Climb {
    level: Level,
    /// The last reading that was as bad as the level.
    reading: Reading,
    calm_since: Option<Duration>,
}

impl Climb {
    fn watch(&mut self, now: Duration, reading: Reading, level: Level, leaving: Level) {
        if level >= self.level {
            (self.level, self.reading) = (level, reading);
        }
        if leaving >= self.level {
            self.calm_since = None;
            return;
        }
        let since = *self.calm_since.get_or_insert(now);
        if now.saturating_sub(since) >= CALM {
            self.level = self.level.below();
            self.calm_since = Some(now);
        }
    }
}

impl Governor {
    /// Takes a reading. What there is to say of each cause that isn't normal, the worst first.
    pub fn watch(&mut self, now: Duration, reading: Reading) -> Vec<Finding> {
        let entered = reading.levels(false);
        let left = reading.levels(true);
        let each = self.levels.iter_mut().zip(entered.into_iter().zip(left));
        let mut findings = Vec::new();
        for (climb, ((cause, entered), (_, left))) in each {
            climb.watch(now, reading, entered, left);
            findings.push(Finding {
                cause,
                level: climb.level,
                reading: climb.reading,
                is_calming: climb.calm_since.is_some(),
            });
        }
        findings.retain(|finding| finding.level > Level::Normal);
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
        findings
    }

    /// The worst cause's.
    pub fn level(&self) -> Level {
        let levels = self.levels.iter().map(|climb| climb.level);
        levels.max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn warm(degrees: f32) -> Reading {
        Reading {
            temperature: Some((degrees, 85.0)),
            ..Reading::default()
        }
    }

    fn level(reading: Reading) -> Level {
        let mut governor = Governor::default();
        governor.watch(seconds(0), reading);
        governor.level()
    }

    #[test]
    fn each_sensor_has_its_steps() {
        use Level::{Critical, Eased, Normal, Strained};
        assert_eq!(level(Reading::default()), Normal);
        for (degrees, wanted) in [
            (74.0, Normal),
            (75.0, Eased),
            (80.0, Strained),
            (85.0, Critical),
        ] {
            assert_eq!(level(warm(degrees)), wanted, "{degrees}");
        }
        let mib = |n: u64| n << 20;
        for (free, all, wanted) in [
            (300, 1000, Normal),
            (150, 1000, Eased),
            (80, 1000, Strained),
            (39, 1000, Critical),
            // A share of much is much, and so is what a small board may have left.
            (2000, 32_000, Normal),
            (250, 32_000, Strained),
            (100, 256, Normal),
        ] {
            let reading = Reading {
                memory: Some((mib(free), mib(all))),
                ..Reading::default()
            };
            assert_eq!(level(reading), wanted, "{free} of {all}");
        }
        for (memory, io, wanted) in [
            (9.0, 79.0, Normal),
            (10.0, 0.0, Eased),
            (0.0, 100.0, Eased),
            (30.0, 0.0, Strained),
            (61.0, 0.0, Critical),
        ] {
            let reading = Reading {
                memory_stall: Some(memory),
                io_stall: Some(io),
                ..Reading::default()
            };
            assert_eq!(level(reading), wanted, "{memory} {io}");
        }
        for (throttling, wanted) in [
            (Throttling::None, Normal),
            (Throttling::Warned, Eased),
            (Throttling::Held, Strained),
        ] {
            let reading = Reading {
                throttling: Some(throttling),
                ..Reading::default()
            };
            assert_eq!(level(reading), wanted);
        }
    }

    #[test]
    fn it_goes_up_at_once_and_down_step_by_step() {
        let mut governor = Governor::default();
        let mut at = |now, degrees| {
            governor.watch(seconds(now), warm(degrees));
            governor.level()
        };
        assert_eq!(at(0, 86.0), Level::Critical);
        // Below the step, but not by the margin.
        assert_eq!(at(200, 83.0), Level::Critical);
        assert_eq!(at(201, 60.0), Level::Critical);
        assert_eq!(at(260, 60.0), Level::Critical);
        assert_eq!(at(261, 60.0), Level::Strained);
        assert_eq!(at(320, 60.0), Level::Strained);
        assert_eq!(at(321, 60.0), Level::Eased);
        // Calm is counted anew after a relapse.
        assert_eq!(at(330, 74.0), Level::Eased);
        assert_eq!(at(382, 60.0), Level::Eased);
        assert_eq!(at(442, 60.0), Level::Normal);
    }

    #[test]
    fn the_worst_cause_comes_first_and_says_what_it_is() {
        let mut governor = Governor::default();
        let reading = Reading {
            temperature: Some((76.0, 85.0)),
            memory: Some((80 << 20, 1000 << 20)),
            ..Reading::default()
        };
        let findings = governor.watch(seconds(0), reading);
        let said: Vec<_> = findings.iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "80 of 1000 MiB of memory are available",
                "76 °C, the limit is 85"
            ]
        );
        // One cause's calm is its own.
        let findings = governor.watch(seconds(1), warm(76.0));
        let said: Vec<_> = findings.iter().map(ToString::to_string).collect();
        let memory = "80 of 1000 MiB of memory are available, and better since";
        assert_eq!(said, [memory, "76 °C, the limit is 85"]);
        let findings = governor.watch(seconds(61), warm(76.0));
        assert_eq!(findings[0].level, Level::Eased);
        assert_eq!(governor.level(), Level::Eased);
    }

    #[test]
    fn a_share_is_never_nothing() {
        assert_eq!([1, 2, 4, 8].map(|n| Level::Eased.of(n)), [1, 1, 3, 6]);
        assert_eq!([1, 2, 4, 8].map(|n| Level::Critical.of(n)), [1, 1, 1, 2]);
    }

    proptest! {
        /// Never lower than the reading says, whatever came before, and never down by more than a step.
        #[test]
        fn it_is_never_below_what_it_sees(readings in proptest::collection::vec((0u64..100, 20.0f32..100.0, 0u64..1000), 1..60)) {
            let mut governor = Governor::default();
            let mut now = 0;
            for (passed, degrees, free) in readings {
                now += passed;
                let reading = Reading { memory: Some((free << 20, 1000 << 20)), ..warm(degrees) };
                let before = governor.level();
                governor.watch(seconds(now), reading);
                prop_assert!(governor.level() >= level(reading));
                prop_assert!(governor.level() >= before.below());
            }
        }
    }
}
