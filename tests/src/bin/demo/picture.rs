//! The picture: who answered when, around each flip. SVG by hand, PNG from it.

use std::path::Path;

use anyhow::Result;
use bg_tests::{
    load::Answer,
    picture::{
        BLUE, GREEN, GREY, INK, LEFT, Panel, RED, RIGHT, Svg, WIDTH, axis, round_up, thousands,
    },
};
use bg_userspace::api::Flipped;

use crate::summary::{Summary, ns, us};

const HEIGHT: f64 = 1010.0;

/// Width of a bar, where no flip cuts it.
const STEP_NS: u64 = 50_000_000;
/// How far the magnifying glass sees, on each side of the store.
const GLASS_NS: i64 = 10_000_000;
/// Flips under the glass, at most.
const GLASSES: usize = 6;

/// Writes `path`.svg and `path`.png.
pub fn draw(
    path: &Path,
    summary: &Summary,
    answers: &[Answer],
    flips: &[Flipped],
    begun_ns: u64,
    clients: u32,
) -> Result<()> {
    let end_ns = answers
        .iter()
        .map(|answer| answer.done_ns)
        .max()
        .unwrap_or(begun_ns);
    let story = Story {
        answers,
        flips,
        begun_ns,
        length_ns: end_ns.saturating_sub(begun_ns).max(STEP_NS),
    };
    story.svg(summary, clients).save(path)
}

/// What happened, on one time axis.
struct Story<'a> {
    answers: &'a [Answer],
    flips: &'a [Flipped],
    begun_ns: u64,
    length_ns: u64,
}

impl Story<'_> {
    fn svg(&self, summary: &Summary, clients: u32) -> Svg {
        let mut svg = Svg::new(HEIGHT);
        self.head(&mut svg, summary, clients);
        let fresh = Panel {
            top: 236.0,
            height: 150.0,
        };
        let kept = Panel {
            top: 452.0,
            height: 110.0,
        };
        let latency = Panel {
            top: 628.0,
            height: 100.0,
        };
        self.bars(
            &mut svg,
            fresh,
            "New connections a second, by the colour that answered",
            |answer| answer.first,
        );
        self.bars(
            &mut svg,
            kept,
            "Requests a second on connections kept alive: they stay where they are until they end",
            |answer| !answer.first,
        );
        self.latencies(&mut svg, latency);
        self.marks(&mut svg, fresh, latency);
        self.glasses(
            &mut svg,
            Panel {
                top: 820.0,
                height: 110.0,
            },
        );
        svg
    }

    fn head(&self, svg: &mut Svg, summary: &Summary, clients: u32) {
        let flips = self.flips.len();
        let title = format!(
            "{flips} flips under load, {} requests, {} failed",
            thousands(summary.requests),
            summary.failed
        );
        svg.text(48.0, 58.0, 26.0, INK, "start", 700, &title);
        let about = format!(
            "bgswitch on one host: {clients} clients over IPv4 and IPv6 on two ports, half of them with a new connection for each request"
        );
        svg.text(48.0, 84.0, 14.0, GREY, "start", 400, &about);
        let median = |mut values: Vec<f64>| -> Option<f64> {
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        let stores = summary
            .flips
            .iter()
            .filter_map(|flip| flip.store_ns)
            .map(|ns| ns as f64)
            .collect();
        let firsts = summary
            .flips
            .iter()
            .filter_map(|flip| flip.first_new_flow_us)
            .collect();
        let stale: usize = summary.flips.iter().map(|flip| flip.stale_new_flows).sum();
        let streams = &summary.streams;
        let tiles = [
            ("the store, median", ns(median(stores).map(|ns| ns as u64))),
            ("first new flow, median", us(median(firsts))),
            ("new flows gone wrong", stale.to_string()),
            (
                "streams unbroken",
                format!("{} of {}", streams.opened - streams.broken, streams.opened),
            ),
            ("latency p50", us(Some(summary.latency_us.p50 as f64))),
            ("latency p99", us(Some(summary.latency_us.p99 as f64))),
            ("latency p99.9", us(Some(summary.latency_us.p999 as f64))),
        ];
        let step = (WIDTH - 96.0) / tiles.len() as f64;
        for (number, (name, value)) in tiles.iter().enumerate() {
            let x = 48.0 + step * number as f64;
            svg.text(x, 140.0, 22.0, INK, "start", 600, value);
            svg.text(x, 160.0, 12.0, GREY, "start", 400, name);
        }
    }

    fn x(&self, at_ns: u64) -> f64 {
        let share = at_ns.saturating_sub(self.begun_ns) as f64 / self.length_ns as f64;
        LEFT + share.min(1.0) * (RIGHT - LEFT)
    }

    /// Where one bar ends and the next begins, ns since the begin: every
    /// [`STEP_NS`], and at each flip, so that no bar mixes before and after.
    fn edges(&self) -> Vec<u64> {
        let flips: Vec<u64> = self
            .flips
            .iter()
            .filter_map(|flip| flip.at_ns)
            .map(|at| at - self.begun_ns)
            .collect();
        let mut edges: Vec<u64> = (0..=self.length_ns.div_ceil(STEP_NS))
            .map(|step| step * STEP_NS)
            .filter(|edge| flips.iter().all(|flip| flip.abs_diff(*edge) > STEP_NS / 2))
            .chain(flips.iter().copied())
            .collect();
        edges.sort_unstable();
        edges
    }

    /// Answers between each two edges, by colour, as bars on each other.
    fn bars(&self, svg: &mut Svg, panel: Panel, title: &str, which: impl Fn(&Answer) -> bool) {
        svg.text(LEFT, panel.top - 14.0, 14.0, INK, "start", 600, title);
        let edges = self.edges();
        let mut rates = vec![[0.0; 3]; edges.len()];
        for answer in self.answers.iter().filter(|answer| which(answer)) {
            // A connection belongs to the moment it was begun, a request to that of its answer.
            let at = if answer.first {
                answer.connected_ns
            } else {
                answer.done_ns
            };
            let bar = bar_of(&edges, at.saturating_sub(self.begun_ns));
            let kind = match answer.result.as_deref() {
                Ok("blue") => 0,
                Ok(_) => 1,
                Err(_) => 2,
            };
            rates[bar][kind] += 1e9 / width_of(&edges, bar);
        }
        let most = rates
            .iter()
            .map(|kinds| kinds.iter().sum())
            .fold(0.0, f64::max);
        let top = round_up(most);
        axis(svg, panel, top, &thousands(top as usize));
        for (bar, kinds) in rates.iter().enumerate() {
            let left = self.x(self.begun_ns + edges[bar]);
            let right = self.x(self.begun_ns + edges[bar] + width_of(&edges, bar) as u64);
            let mut base = panel.bottom();
            for (rate, fill) in kinds
                .iter()
                .zip([BLUE, GREEN, RED])
                .filter(|(rate, _)| **rate > 0.0)
            {
                let height = rate / top * panel.height;
                base -= height;
                svg.rect(left, base, right - left + 0.2, height, fill);
            }
        }
    }

    fn latencies(&self, svg: &mut Svg, panel: Panel) {
        let title = "Latency of all requests, ms: median and p99 of each 50 ms";
        svg.text(LEFT, panel.top - 14.0, 14.0, INK, "start", 600, title);
        let edges = self.edges();
        let mut taken: Vec<Vec<f64>> = vec![Vec::new(); edges.len()];
        for answer in self.answers.iter().filter(|answer| answer.result.is_ok()) {
            let bar = bar_of(&edges, answer.done_ns.saturating_sub(self.begun_ns));
            taken[bar].push(answer.latency.as_secs_f64() * 1e3);
        }
        let mut lines = [Vec::new(), Vec::new()];
        for (bar, values) in taken
            .iter_mut()
            .enumerate()
            .filter(|(_, values)| !values.is_empty())
        {
            values.sort_by(f64::total_cmp);
            let x = self.x(self.begun_ns + edges[bar] + width_of(&edges, bar) as u64 / 2);
            lines[0].push((x, values[values.len() / 2]));
            lines[1].push((x, values[(values.len() - 1) * 99 / 100]));
        }
        let top = round_up(lines[1].iter().map(|(_, y)| *y).fold(0.0, f64::max));
        axis(svg, panel, top, &format!("{top}"));
        let y = |value: f64| panel.bottom() - value / top * panel.height;
        for (line, stroke) in lines.iter().zip([INK, "#9ca3af"]).rev() {
            svg.line(line.iter().map(|(x, value)| (*x, y(*value))), stroke, 1.5);
        }
        let last = |line: &[(f64, f64)]| line.last().map_or(panel.bottom(), |(_, value)| y(*value));
        svg.text(
            RIGHT + 6.0,
            last(&lines[0]) + 4.0,
            11.0,
            INK,
            "start",
            500,
            "p50",
        );
        let above = last(&lines[0]) - 8.0;
        svg.text(
            RIGHT + 6.0,
            (last(&lines[1]) + 4.0).min(above),
            11.0,
            GREY,
            "start",
            500,
            "p99",
        );
    }

    /// A line through all panels at each flip, and the seconds below them.
    fn marks(&self, svg: &mut Svg, first: Panel, last: Panel) {
        for flip in self.flips {
            let Some(at) = flip.at_ns else { continue };
            let x = self.x(at);
            svg.dashes(x, first.top - 2.0, last.bottom());
            let fill = colour(&flip.to);
            svg.text(
                x + 4.0,
                first.top + 10.0,
                11.0,
                fill,
                "start",
                600,
                &format!("flip to {}", flip.to),
            );
        }
        let seconds = self.length_ns as f64 / 1e9;
        let every = (seconds / 14.0).ceil().max(1.0) as usize;
        for second in (0..=seconds as usize).step_by(every) {
            let x = self.x(self.begun_ns + second as u64 * 1_000_000_000);
            svg.text(
                x,
                last.bottom() + 18.0,
                11.0,
                GREY,
                "middle",
                400,
                &format!("{second} s"),
            );
        }
    }

    /// Each flip from near: a dot for every new connection, by when it was begun
    /// and how long its request took.
    fn glasses(&self, svg: &mut Svg, panel: Panel) {
        let title = "Under the magnifying glass: every new connection in the 10 ms before and after the store, by the colour that answered";
        svg.text(LEFT, panel.top - 34.0, 14.0, INK, "start", 600, title);
        let flips: Vec<_> = self
            .flips
            .iter()
            .filter_map(|flip| Some((flip, flip.at_ns?)))
            .take(GLASSES)
            .collect();
        let gap = 18.0;
        let width = (RIGHT - LEFT + gap) / flips.len().max(1) as f64 - gap;
        let near = |at: u64| {
            self.answers
                .iter()
                .filter(|answer| answer.first)
                .map(move |answer| (answer, answer.connected_ns as i64 - at as i64))
                .filter(|(_, delta)| delta.abs() <= GLASS_NS)
        };
        let slowest = flips
            .iter()
            .flat_map(|(_, at)| near(*at))
            .map(|(answer, _)| answer.latency.as_secs_f64() * 1e3)
            .fold(0.0, f64::max);
        let top = round_up(slowest);
        for (number, (flip, at)) in flips.iter().enumerate() {
            let left = LEFT + (width + gap) * number as f64;
            svg.frame(left, panel.top, width, panel.height);
            let middle = left + width / 2.0;
            svg.dashes(middle, panel.top - 4.0, panel.bottom());
            svg.text(
                middle,
                panel.top - 9.0,
                11.0,
                colour(&flip.to),
                "middle",
                600,
                &format!("{} to {}", flip.from, flip.to),
            );
            for (answer, delta) in near(*at) {
                let x = middle + delta as f64 / GLASS_NS as f64 * width / 2.0;
                let y = panel.bottom() - answer.latency.as_secs_f64() * 1e3 / top * panel.height;
                let fill = answer.result.as_deref().map_or(RED, colour);
                svg.dot(x, y.max(panel.top), fill);
            }
            svg.text(
                left,
                panel.bottom() + 16.0,
                11.0,
                GREY,
                "start",
                400,
                "-10 ms",
            );
            svg.text(
                middle,
                panel.bottom() + 16.0,
                11.0,
                GREY,
                "middle",
                400,
                "store",
            );
            svg.text(
                left + width,
                panel.bottom() + 16.0,
                11.0,
                GREY,
                "end",
                400,
                "+10 ms",
            );
        }
        svg.text(
            LEFT - 8.0,
            panel.top + 8.0,
            11.0,
            GREY,
            "end",
            400,
            &format!("{top} ms"),
        );
        svg.text(LEFT - 8.0, panel.bottom(), 11.0, GREY, "end", 400, "0");
        svg.text(
            LEFT,
            HEIGHT - 28.0,
            12.0,
            BLUE,
            "start",
            600,
            "\u{25a0} blue",
        );
        svg.text(
            LEFT + 60.0,
            HEIGHT - 28.0,
            12.0,
            GREEN,
            "start",
            600,
            "\u{25a0} green",
        );
        svg.text(
            LEFT + 130.0,
            HEIGHT - 28.0,
            12.0,
            RED,
            "start",
            600,
            "\u{25a0} failed",
        );
        svg.text(RIGHT, HEIGHT - 28.0, 11.0, GREY, "end", 400, "times of clients, flips and the packet path are of one clock; drawn by cargo xtask demo");
    }
}

/// The bar that a moment falls into.
fn bar_of(edges: &[u64], at: u64) -> usize {
    edges.partition_point(|edge| *edge <= at).saturating_sub(1)
}

/// Width of a bar, ns.
fn width_of(edges: &[u64], bar: usize) -> f64 {
    edges.get(bar + 1).map_or(STEP_NS, |next| next - edges[bar]) as f64
}

fn colour(name: &str) -> &'static str {
    if name == "blue" { BLUE } else { GREEN }
}
