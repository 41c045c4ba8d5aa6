//! Figures beside their targets: for people, and as JSON. Measures nothing, and a missed target is no error.

use super::Context;
use serde_json::{Value, json};
use std::fmt::Write as _;

#[derive(Clone, Copy)]
pub(super) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(most) => format!("<= {}", number(most)),
            Self::AtLeast(least) => format!(">= {}", number(least)),
        }
    }
}

struct Figure {
    group: &'static str,
    name: String,
    unit: &'static str,
    /// None: it could not be measured.
    value: Option<f64>,
    target: Option<Target>,
}

#[derive(Default)]
pub(super) struct Table {
    group: &'static str,
    figures: Vec<Figure>,
}

impl Table {
    /// What follows belongs to this.
    pub(super) fn group(&mut self, group: &'static str) {
        self.group = group;
    }

    pub(super) fn say(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        value: impl Into<Option<f64>>,
    ) {
        self.push(name.into(), unit, value.into(), None);
    }

    pub(super) fn hold(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        value: impl Into<Option<f64>>,
        target: Target,
    ) {
        self.push(name.into(), unit, value.into(), Some(target));
    }

    fn push(
        &mut self,
        name: String,
        unit: &'static str,
        value: Option<f64>,
        target: Option<Target>,
    ) {
        let value = value.filter(|value| value.is_finite());
        let group = self.group;
        self.figures.push(Figure {
            group,
            name,
            unit,
            value,
            target,
        });
    }

    /// Names of what could not be measured.
    pub(super) fn missing(&self) -> Vec<&str> {
        let missing = self.figures.iter().filter(|f| f.value.is_none());
        missing.map(|f| f.name.as_str()).collect()
    }

    pub(super) fn text(&self) -> String {
        let mut text =
            String::from("|  | figure | measured | target |  |\n|---|---|--:|--:|---|\n");
        let mut before = "";
        for figure in &self.figures {
            let group = if figure.group == before {
                ""
            } else {
                figure.group
            };
            before = figure.group;
            let value = figure.value.map_or("?".into(), number);
            let target = figure.target.map(Target::text).unwrap_or_default();
            let met = match (figure.target, figure.value) {
                (Some(target), Some(value)) if target.is_met(value) => "met",
                (Some(_), Some(_)) => "missed",
                _ => "",
            };
            let (name, unit) = (&figure.name, figure.unit);
            writeln!(
                text,
                "| {group} | {name} | {value} {unit} | {target} | {met} |"
            )
            .expect("writing to a string");
        }
        text
    }

    pub(super) fn json(&self, context: &Context) -> Value {
        let figures = self.figures.iter().map(|figure| {
            let (target, met) = match figure.target {
                None => (Value::Null, Value::Null),
                Some(target) => (
                    target.text().into(),
                    figure.value.map(|v| target.is_met(v)).into(),
                ),
            };
            json!({ "group": figure.group, "name": figure.name, "unit": figure.unit, "value": figure.value,
                "target": target, "met": met })
        });
        json!({ "context": context.lines, "figures": figures.collect::<Vec<_>>() })
    }
}

/// Three digits are all that such figures are worth.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 || v.fract() == 0.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_shown_beside_its_figure() {
        let mut table = Table::default();
        table.group("flash");
        table.hold("syncs", "a task", 3.5, Target::AtMost(3.0));
        table.hold("rate", "tasks/s", 812.4, Target::AtLeast(500.0));
        table.say("nothing", "", f64::NAN);
        let text = table.text();
        assert!(text.contains("| flash | syncs | 3.50 a task | <= 3 | missed |"));
        assert!(text.contains("|  | rate | 812 tasks/s | >= 500 | met |"));
        assert_eq!(table.missing(), ["nothing"]);
    }
}
