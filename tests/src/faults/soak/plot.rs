//! The soak as a picture: four series over time, one above the other, faults as ticks below. Plain SVG, nothing read.

use super::Fault;
use super::samples::{Diary, Sample};
use std::fmt::Write as _;

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 980.0;
const TOP: f64 = 70.0;
const PANEL: f64 = 130.0;
const STEP: f64 = 184.0;
/// More columns than that no screen shows.
const COLUMNS: f64 = 800.0;
const STRONG: &str = "#1f5fa8";
const LIGHT: &str = "#7fb2e5";

fn colour(fault: Fault) -> &'static str {
    match fault {
        Fault::Kill => "#c4261d",
        Fault::Broker => "#8a4fbf",
        Fault::Cut => "#d98200",
        Fault::Stop => "#2a8f5b",
        Fault::Disk => "#555555",
    }
}

struct Line {
    label: &'static str,
    colour: &'static str,
    value: fn(&Sample) -> Option<f64>,
}

struct Panel {
    title: &'static str,
    logarithmic: bool,
    lines: Vec<Line>,
}

fn panels() -> [Panel; 4] {
    const MIB: f64 = 1024.0 * 1024.0;
    let line = |label, colour, value| Line {
        label,
        colour,
        value,
    };
    let panel = |title, lines| Panel {
        title,
        logarithmic: false,
        lines,
    };
    [
        panel(
            "memory of the agent, MiB",
            vec![
                line("resident", STRONG, |s| Some(s.resident?.0 as f64 / 1024.0)),
                line("not a file's", LIGHT, |s| {
                    Some(s.resident?.1 as f64 / 1024.0)
                }),
            ],
        ),
        panel(
            "open descriptors",
            vec![line("", STRONG, |s| Some(s.descriptors? as f64))],
        ),
        panel(
            "journal, MiB",
            vec![
                line("length", STRONG, |s| Some(s.journal?.0 as f64 / MIB)),
                line("on disk", LIGHT, |s| Some(s.journal?.1 as f64 / MIB)),
            ],
        ),
        Panel {
            title: "from sending a task to its first event, ms",
            logarithmic: true,
            lines: vec![
                line("99th percentile", LIGHT, |s| Some(s.latency?.p99)),
                line("median", STRONG, |s| Some(s.latency?.median)),
            ],
        },
    ]
}

/// The whole picture.
pub(super) fn draw(diary: &Diary, title: &str) -> String {
    let (samples, faults) = (diary.samples(), diary.faults());
    let last = samples.last().map_or(0.0, |s| s.seconds);
    let end = diary.total().as_secs_f64().max(last).max(1.0);
    let height = TOP + 4.0 * STEP + 30.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(
        &mut svg,
        (LEFT, 20.0),
        "start",
        "#222",
        &format!("<tspan font-size=\"15\">{title}</tspan>"),
    );
    legend(&mut svg, &faults);
    for (n, panel) in panels().iter().enumerate() {
        let top = TOP + n as f64 * STEP;
        draw_panel(&mut svg, panel, top, (&samples, &faults), end);
    }
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String, faults: &[(f64, Fault)]) {
    let mut at = LEFT;
    for fault in Fault::ALL {
        let times = faults.iter().filter(|(_, of)| *of == fault).count();
        let label = format!("{} × {times}", fault.name());
        mark(svg, (at, 32.0), 10.0, colour(fault), 2.0);
        text(svg, (at + 6.0, 41.0), "start", "#222", &label);
        at += 26.0 + 6.6 * label.chars().count() as f64;
    }
}

fn draw_panel(
    svg: &mut String,
    panel: &Panel,
    top: f64,
    (samples, faults): (&[Sample], &[(f64, Fault)]),
    end: f64,
) {
    let bottom = top + PANEL;
    let x = |seconds: f64| LEFT + seconds / end * (RIGHT - LEFT);
    let values = panel
        .lines
        .iter()
        .flat_map(|line| samples.iter().filter_map(line.value));
    let most = values.clone().fold(f64::MIN_POSITIVE, f64::max);
    let least = values.fold(most, f64::min);
    let ticks = if panel.logarithmic {
        decades(least, most)
    } else {
        even(0.0, most)
    };
    let scale = |value: f64| {
        if panel.logarithmic {
            value.max(1e-3).log10()
        } else {
            value
        }
    };
    let (low, high) = (scale(ticks[0]), scale(ticks[ticks.len() - 1]));
    let y = |value: f64| bottom - (scale(value) - low) / (high - low) * PANEL;
    text(svg, (LEFT, top - 7.0), "start", "#222", panel.title);
    for &tick in &ticks {
        rule(svg, (LEFT, y(tick)), (RIGHT, y(tick)), "#e2e2e2");
        text(
            svg,
            (LEFT - 6.0, y(tick) + 4.0),
            "end",
            "#555",
            &plain(tick),
        );
    }
    let (unit, per) = if end > 3.0 * 3600.0 {
        ("h", 3600.0)
    } else {
        ("min", 60.0)
    };
    for tick in even(0.0, end / per) {
        let at = x(tick * per);
        if at <= RIGHT + 1.0 {
            rule(svg, (at, bottom), (at, bottom + 4.0), "#555");
            text(
                svg,
                (at, bottom + 26.0),
                "middle",
                "#555",
                &format!("{} {unit}", plain(tick)),
            );
        }
    }
    for &(at, fault) in faults {
        mark(svg, (x(at), bottom + 5.0), 7.0, colour(fault), 1.4);
        if fault == Fault::Kill {
            rule(svg, (x(at), top), (x(at), bottom), "#f0c4c1");
        }
    }
    rule(svg, (LEFT, bottom), (RIGHT, bottom), "#555");
    rule(svg, (LEFT, top), (LEFT, bottom), "#555");
    let mut label_at = RIGHT;
    for line in &panel.lines {
        curve(svg, line, samples, end, (&x, &y));
        text(svg, (label_at, top - 7.0), "end", line.colour, line.label);
        label_at -= 14.0 + 6.6 * line.label.chars().count() as f64;
    }
}

/// Broken where the agent was away. Of samples in the same column the highest, so that no peak is lost.
fn curve(
    svg: &mut String,
    line: &Line,
    samples: &[Sample],
    end: f64,
    (x, y): (&dyn Fn(f64) -> f64, &dyn Fn(f64) -> f64),
) {
    let column = |sample: &Sample| (sample.seconds / end * COLUMNS) as u32;
    let mut path = String::new();
    let mut pen = 'M';
    for same in samples.chunk_by(|a, b| column(a) == column(b)) {
        let Some(highest) = same.iter().filter_map(line.value).reduce(f64::max) else {
            pen = 'M';
            continue;
        };
        write!(path, "{pen}{:.1} {:.1}", x(same[0].seconds), y(highest)).expect("a string");
        pen = 'L';
    }
    writeln!(
        svg,
        "<path d=\"{path}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.3\"/>",
        line.colour
    )
    .expect("a string");
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, colour: &str, what: &str) {
    writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{what}</text>"
    )
    .expect("a string");
}

fn rule(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
    )
    .expect("a string");
}

/// A tick of a fault.
fn mark(svg: &mut String, (x, y): (f64, f64), length: f64, colour: &str, width: f64) {
    let end = y + length;
    writeln!(
        svg,
        "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{x:.1}\" y2=\"{end:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\"/>"
    )
    .expect("a string");
}

/// Four to nine round numbers from `low` to no less than `high`.
fn even(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10_f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|n| n * power);
    let step = steps
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(10.0 * power);
    let count = ((high - low) / step).ceil() as u32;
    (0..=count).map(|n| low + f64::from(n) * step).collect()
}

/// Powers of ten around both.
fn decades(least: f64, most: f64) -> Vec<f64> {
    let from = least.max(0.01).log10().floor() as i32;
    let to = (most.max(0.1).log10().ceil() as i32).max(from + 1);
    (from..=to).map(|n| 10_f64.powi(n)).collect()
}

fn plain(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers_around_the_values() {
        assert_eq!(even(0.0, 41.4), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        assert_eq!(decades(1.8, 830.0), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!((plain(0.5).as_str(), plain(20.0).as_str()), ("0.5", "20"));
    }
}
