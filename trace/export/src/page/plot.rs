//! Plots as SVG, drawn without any script: what a pointer rests on is told by titles.
//!
//! Colours are classes, which the page's style gives a value for light and dark.

use std::fmt::Write as _;

/// A plot's size in its own units; a page scales it to its width.
const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 30.0;
/// Lines across a plot, about.
const TICKS: f64 = 5.0;

/// A line or an area of a plot.
pub(super) struct Series<'a> {
    /// What it is.
    pub(super) name: &'a str,
    /// Which colour it has.
    pub(super) class: &'a str,
    /// A value for each place on the horizontal axis.
    pub(super) values: Vec<f64>,
}

/// How a plot shows its series.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Areas on top of each other.
    Stacked,
    /// Lines.
    Lines,
}

/// What a plot is drawn from.
pub(super) struct Plot<'a> {
    /// Where each value begins on the horizontal axis, and where the last one ends.
    pub(super) edges: Vec<f64>,
    /// What it shows.
    pub(super) series: Vec<Series<'a>>,
    /// How it shows that.
    pub(super) shape: Shape,
    /// The top of the vertical axis; `None` for what the values need.
    pub(super) top: Option<f64>,
    /// What values are in.
    pub(super) unit: Unit,
}

/// What a plot's values are in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Counts.
    Count,
    /// Per cent.
    Percent,
    /// Bytes, with binary prefixes.
    Bytes,
}

impl Unit {
    /// A value for a person.
    pub(super) fn show(self, value: f64) -> String {
        match self {
            Self::Count => short(value),
            Self::Percent => format!("{value:.0}%"),
            Self::Bytes => bytes(value),
        }
    }

    /// A distance between lines that reads well.
    fn step(self, range: f64) -> f64 {
        let prefix = match self {
            Self::Bytes => PREFIXES.iter().find(|(_, factor)| range >= *factor),
            _ => None,
        };
        let factor = prefix.map_or(1.0, |(_, factor)| *factor);
        factor * step(range / factor)
    }
}

/// Binary prefixes, the largest first.
const PREFIXES: [(&str, f64); 3] =
    [("GiB", 1_073_741_824.0), ("MiB", 1_048_576.0), ("KiB", 1024.0)];

/// Bytes in the unit that suits.
pub(super) fn bytes(count: f64) -> String {
    match PREFIXES.into_iter().find(|(_, factor)| count >= *factor) {
        Some((unit, factor)) if count / factor >= 99.95 => format!("{:.0} {unit}", count / factor),
        Some((unit, factor)) => {
            let text = format!("{:.1}", count / factor);
            format!("{} {unit}", text.strip_suffix(".0").unwrap_or(&text))
        }
        None => format!("{count:.0} B"),
    }
}

/// A number in three digits or so, with the letter of its thousands.
pub(super) fn short(number: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (scaled, unit) = units
        .into_iter()
        .find(|(factor, _)| number >= *factor * 0.9995)
        .map_or((number, ""), |(factor, unit)| (number / factor, unit));
    let text = match scaled {
        scaled if scaled >= 99.95 || scaled == scaled.trunc() => format!("{scaled:.0}"),
        scaled if scaled >= 9.995 => format!("{scaled:.1}"),
        _ => format!("{scaled:.2}"),
    };
    let space = if unit.is_empty() { "" } else { "\u{202f}" };
    format!("{text}{space}{unit}")
}

/// A number at a line, which needs no zeros at its end.
fn round(short: &str) -> String {
    match short.split_once('\u{202f}') {
        Some((number, unit)) if number.contains('.') => {
            let number = number.trim_end_matches('0').trim_end_matches('.');
            format!("{number}\u{202f}{unit}")
        }
        _ => short.to_owned(),
    }
}

/// A distance between lines that reads well: 1, 2 or 5 times a power of ten.
fn step(range: f64) -> f64 {
    let rough = (range / TICKS).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|one| one * power >= rough * 0.999);
    factor.unwrap_or(10.0) * power
}

impl Plot<'_> {
    /// The plot, with what its colours mean above it.
    pub(super) fn draw(&self) -> String {
        let mut out = String::from("<div class=\"legend\">");
        for series in &self.series {
            let (class, name) = (series.class, series.name);
            let _ = write!(out, "<span><i class=\"{class}\"></i>{name}</span>");
        }
        let _ = write!(
            out,
            "</div>\n<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n"
        );
        let top = self.top.unwrap_or_else(|| self.highest());
        self.draw_grid(&mut out, top);
        match self.shape {
            Shape::Stacked => self.draw_areas(&mut out, top),
            Shape::Lines => self.draw_lines(&mut out, top),
        }
        self.draw_titles(&mut out);
        out.push_str("</svg>\n");
        out
    }

    fn sum(&self, index: usize) -> f64 {
        self.series.iter().map(|series| series.values[index]).sum()
    }

    /// A top that all values stay below.
    fn highest(&self) -> f64 {
        let places = self.edges.len().saturating_sub(1);
        let highest = match self.shape {
            Shape::Stacked => (0..places).map(|index| self.sum(index)).fold(0.0, f64::max),
            Shape::Lines => {
                let all = self.series.iter().flat_map(|series| &series.values);
                all.copied().fold(0.0, f64::max)
            }
        };
        let highest = if highest > 0.0 { highest } else { 1.0 };
        let step = self.unit.step(highest);
        (highest / step).ceil() * step
    }

    fn x(&self, value: f64) -> f64 {
        let (first, last) = (self.edges[0], self.edges[self.edges.len() - 1]);
        LEFT + (value - first) / (last - first).max(f64::MIN_POSITIVE) * (WIDTH - LEFT - RIGHT)
    }

    fn draw_grid(&self, out: &mut String, top: f64) {
        let (first, last) = (self.edges[0], self.edges[self.edges.len() - 1]);
        let right = WIDTH - RIGHT;
        let down = self.unit.step(top);
        let mut value = 0.0;
        while value <= top * 1.001 {
            let (y, label) = (y(value, top), self.unit.show(value));
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT - 8.0,
                y + 4.0
            );
            value += down;
        }
        let across = step((last - first) / 2.0);
        let mut value = (first / across).ceil() * across;
        while value <= last {
            let (x, label) = (self.x(value), round(&short(value)));
            // A label at the very edge would be cut off.
            let anchor = if x > right - 30.0 { "end" } else { "middle" };
            let _ = writeln!(
                out,
                "<text class=\"axis\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{label}</text>",
                HEIGHT - 9.0
            );
            value += across;
        }
    }

    /// A path along steps: each value holds from its edge to the next.
    fn steps(&self, values: impl Iterator<Item = f64>, top: f64) -> Vec<(f64, f64)> {
        let ends = self.edges.windows(2).map(|pair| (self.x(pair[0]), self.x(pair[1])));
        ends.zip(values)
            .flat_map(|((from, to), value)| [(from, y(value, top)), (to, y(value, top))])
            .collect()
    }

    fn draw_areas(&self, out: &mut String, top: f64) {
        let places = self.edges.len() - 1;
        let mut below = vec![0.0; places];
        for series in &self.series {
            let above: Vec<f64> =
                below.iter().zip(&series.values).map(|(below, value)| below + value).collect();
            let mut points = self.steps(above.iter().copied(), top);
            let mut back = self.steps(below.iter().copied(), top);
            back.reverse();
            points.append(&mut back);
            let class = series.class;
            let _ = writeln!(out, "<path class=\"area {class}\" d=\"{}Z\"/>", path(&points));
            below = above;
        }
    }

    fn draw_lines(&self, out: &mut String, top: f64) {
        for series in &self.series {
            let points = self.steps(series.values.iter().copied(), top);
            let class = series.class;
            let _ = writeln!(out, "<path class=\"line {class}\" d=\"{}\"/>", path(&points));
        }
    }

    /// Over everything stand strips that nobody sees and whose titles say what is below.
    fn draw_titles(&self, out: &mut String) {
        for (index, pair) in self.edges.windows(2).enumerate() {
            let (from, to) = (self.x(pair[0]), self.x(pair[1]));
            let values = self
                .series
                .iter()
                .map(|series| format!("{} {}", series.name, self.unit.show(series.values[index])));
            let title = values.collect::<Vec<_>>().join("\n");
            let _ = writeln!(
                out,
                "<rect class=\"strip\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{:.2}\" height=\"{:.1}\">\
                 <title>instruction {}\n{title}</title></rect>",
                (to - from).max(0.5),
                HEIGHT - TOP - BOTTOM,
                pair[0]
            );
        }
    }
}

fn y(value: f64, top: f64) -> f64 {
    let height = HEIGHT - TOP - BOTTOM;
    TOP + height * (1.0 - (value / top).clamp(0.0, 1.0))
}

fn path(points: &[(f64, f64)]) -> String {
    let mut path = String::new();
    for (number, (x, y)) in points.iter().enumerate() {
        let letter = if number == 0 { 'M' } else { 'L' };
        let _ = write!(path, "{letter}{x:.1} {y:.1}");
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_binary_prefixes() {
        let texts = [12.0, 1536.0, 1_048_576.0, 2e8].map(bytes);
        assert_eq!(texts, ["12 B", "1.5 KiB", "1 MiB", "191 MiB"]);
    }

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (7.0, "7"),
            (0.25, "0.25"),
            (999.0, "999"),
            (1000.0, "1\u{202f}k"),
            (1234.0, "1.23\u{202f}k"),
            (999_999.0, "1.00\u{202f}M"),
            (6.1e9, "6.10\u{202f}G"),
        ] {
            assert_eq!(short(number), text, "{number}");
        }
    }

    #[test]
    fn lines_across_stand_at_round_numbers() {
        for (unit, range, expected) in [
            (Unit::Percent, 100.0, 20.0),
            (Unit::Count, 1.0, 0.2),
            (Unit::Count, 37.0, 10.0),
            (Unit::Bytes, 9.0 * 1_048_576.0, 2.0 * 1_048_576.0),
            (Unit::Bytes, 900.0, 200.0),
        ] {
            let step = unit.step(range);
            assert!((step / expected - 1.0).abs() < 1e-9, "{range}: {step}");
        }
        assert_eq!((round("1.20\u{202f}G"), round("200")), ("1.2\u{202f}G".into(), "200".into()));
    }

    #[test]
    fn a_plot_of_nothing_and_of_one_value_is_drawn() {
        for value in [0.0, 5.0] {
            let series = vec![Series { name: "all", class: "user", values: vec![value] }];
            let (edges, unit) = (vec![10.0, 10.0], Unit::Count);
            let plot = Plot { edges, series, shape: Shape::Stacked, top: None, unit };
            let drawn = plot.draw();
            assert!(drawn.ends_with("</svg>\n") && !drawn.contains("NaN"), "{drawn}");
        }
    }
}
