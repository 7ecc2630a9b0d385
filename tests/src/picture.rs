//! Pictures: SVG by hand, PNG from it.

use std::{fmt::Write as _, fs, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use resvg::{tiny_skia, usvg};

/// Every picture's width.
pub const WIDTH: f64 = 1200.0;
/// Where plots begin, ...
pub const LEFT: f64 = 76.0;
/// ... and end.
pub const RIGHT: f64 = WIDTH - 48.0;

/// Blue servers.
pub const BLUE: &str = "#2563eb";
/// Green servers.
pub const GREEN: &str = "#16a34a";
/// What is to be read first.
pub const INK: &str = "#111827";
/// What is to be read after.
pub const GREY: &str = "#6b7280";
/// What is not to be read.
pub const GRID: &str = "#e5e7eb";
/// What is wrong.
pub const RED: &str = "#dc2626";

/// A panel's place: top and height of its plot.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// Distance of its upper edge from the picture's.
    pub top: f64,
    /// From its upper edge to its lower one.
    pub height: f64,
}

impl Panel {
    /// Distance of its lower edge from the picture's upper one.
    pub const fn bottom(self) -> f64 {
        self.top + self.height
    }
}

/// Rules at the bottom, the middle and the top of a plot, and what they stand for.
pub fn axis(svg: &mut Svg, panel: Panel, top: f64, label: &str) {
    for share in [0.0, 0.5, 1.0] {
        svg.rule(LEFT, RIGHT, panel.bottom() - share * panel.height);
    }
    svg.text(LEFT - 8.0, panel.top + 4.0, 11.0, GREY, "end", 400, label);
    let half = if top >= 2.0 {
        thousands((top / 2.0) as usize)
    } else {
        format!("{}", top / 2.0)
    };
    svg.text(
        LEFT - 8.0,
        panel.top + panel.height / 2.0 + 4.0,
        11.0,
        GREY,
        "end",
        400,
        &half,
    );
    svg.text(
        LEFT - 8.0,
        panel.bottom() + 4.0,
        11.0,
        GREY,
        "end",
        400,
        "0",
    );
}

/// A time axis; nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    begun: u64,
    length: u64,
    step: u64,
}

impl Time {
    /// From a time to the last of others, in steps.
    pub fn new(begun_ns: u64, step_ns: u64, times: impl Iterator<Item = u64>) -> Self {
        let end_ns = times.max().unwrap_or(begun_ns);
        Self {
            begun: begun_ns,
            length: end_ns.saturating_sub(begun_ns).max(step_ns),
            step: step_ns,
        }
    }

    /// Where a time lies.
    pub fn x(&self, at_ns: u64) -> f64 {
        let share = at_ns.saturating_sub(self.begun) as f64 / self.length as f64;
        LEFT + (RIGHT - LEFT) * share
    }

    /// Bars for each step: what came when, a second's worth drawn, and who answered: 0, blue;
    /// 1, green; 2, nobody.
    pub fn stacks(&self, svg: &mut Svg, panel: Panel, came: impl Iterator<Item = (u64, usize)>) {
        let mut bins = vec![[0u32; 3]; (self.length / self.step) as usize + 1];
        for (at_ns, who) in came {
            let bin = at_ns.saturating_sub(self.begun) / self.step;
            if let Some(bin) = bins.get_mut(bin as usize) {
                bin[who] += 1;
            }
        }
        let per_second = 1e9 / self.step as f64;
        let most = bins.iter().map(|bin| bin.iter().sum::<u32>()).max();
        let top = round_up(f64::from(most.unwrap_or(1)) * per_second);
        axis(svg, panel, top, &thousands(top as usize));
        for (number, bin) in (0..).zip(&bins) {
            let mut base = panel.bottom();
            let edge = |number: u64| self.x(self.begun + number * self.step);
            let (from, to) = (edge(number), edge(number + 1));
            for (count, fill) in bin.iter().zip([BLUE, GREEN, RED]) {
                let height = panel.height * f64::from(*count) * per_second / top;
                base -= height;
                svg.rect(from, base, to - from, height, fill);
            }
        }
    }
}

/// The next of 1, 2, 4, 6, 8, 10 times a power of ten.
pub fn round_up(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 4.0, 6.0, 8.0, 10.0];
    steps
        .iter()
        // No number of more digits than it has.
        .map(|step| (step * power * 1e6).round() / 1e6)
        .find(|top| *top >= value)
        .unwrap_or(10.0 * power)
}

/// A number with commas.
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The few shapes that a picture is made of.
#[derive(Debug)]
pub struct Svg {
    text: String,
    height: f64,
}

impl Svg {
    /// An empty picture, [`WIDTH`] wide.
    pub fn new(height: f64) -> Self {
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"Inter, sans-serif\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
        );
        Self { text, height }
    }

    /// Writes `path`.svg and `path`.png.
    pub fn save(mut self, path: &Path) -> Result<()> {
        self.text.push_str("</svg>\n");
        fs::write(path.with_extension("svg"), &self.text)?;
        self.png()?.save_png(path.with_extension("png"))?;
        Ok(())
    }

    /// Renders at twice the size, for screens of today.
    fn png(&self) -> Result<tiny_skia::Pixmap> {
        let mut options = usvg::Options {
            font_family: "Inter".to_owned(),
            ..usvg::Options::default()
        };
        Arc::make_mut(&mut options.fontdb).load_system_fonts();
        let tree = usvg::Tree::from_str(&self.text, &options)?;
        let mut pixmap = tiny_skia::Pixmap::new(WIDTH as u32 * 2, self.height as u32 * 2)
            .context("no room for the picture")?;
        resvg::render(
            &tree,
            tiny_skia::Transform::from_scale(2.0, 2.0),
            &mut pixmap.as_mut(),
        );
        Ok(pixmap)
    }

    fn add(&mut self, shape: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.text, "{shape}");
    }

    /// Words at a place; `anchor` is `start`, `middle` or `end`.
    #[expect(clippy::too_many_arguments, reason = "place, look and words of a text")]
    pub fn text(
        &mut self,
        x: f64,
        y: f64,
        size: f64,
        fill: &str,
        anchor: &str,
        weight: u32,
        text: &str,
    ) {
        self.add(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" fill=\"{fill}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\">{text}</text>"
        ));
    }

    /// A filled rectangle.
    pub fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        self.add(format_args!(
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill=\"{fill}\"/>"
        ));
    }

    /// A rectangle of thin lines.
    pub fn frame(&mut self, x: f64, y: f64, width: f64, height: f64) {
        self.add(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"none\" stroke=\"{GRID}\"/>"
        ));
    }

    /// A thin line from left to right.
    pub fn rule(&mut self, from: f64, to: f64, y: f64) {
        self.add(format_args!(
            "<path d=\"M{from:.1} {y:.1}H{to:.1}\" stroke=\"{GRID}\"/>"
        ));
    }

    /// A dashed line from top to bottom.
    pub fn dashes(&mut self, x: f64, from: f64, to: f64) {
        self.add(format_args!(
            "<path d=\"M{x:.1} {from:.1}V{to:.1}\" stroke=\"{INK}\" stroke-width=\"1\" stroke-dasharray=\"3 3\" opacity=\"0.55\"/>"
        ));
    }

    /// A dot.
    pub fn dot(&mut self, x: f64, y: f64, fill: &str) {
        self.add(format_args!(
            "<circle cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"2.2\" fill=\"{fill}\" fill-opacity=\"0.8\"/>"
        ));
    }

    /// A line through points.
    pub fn line(&mut self, points: impl Iterator<Item = (f64, f64)>, stroke: &str, width: f64) {
        let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.add(format_args!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"{width}\"/>",
            points.join(" ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(thousands(12), "12");
        assert!((round_up(3100.0) - 4000.0).abs() < 1e-6);
        assert_eq!(round_up(0.7).to_string(), "0.8");
    }
}
