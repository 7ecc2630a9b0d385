//! Pictures of the figures: packets beside peers, HTTP beside peers, and a flip under
//! a magnifying glass.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use bg_tests::picture::{
    BLUE, GREEN, GREY, INK, LEFT, Panel, RIGHT, Svg, WIDTH, axis, round_up, thousands,
};

use crate::{
    flips::{Flips, GLASS_US, Packets},
    gateway::Peer,
    growth::{Curve, FLOOR, Growth, Point},
    http::{Http, Line, connects},
    peers::Peers,
    report::{Figure, Report},
};

/// What is not ours.
const THEIRS: &str = "#9ca3af";
/// Where bars begin: names stand left of it.
const BARS: f64 = 330.0;
/// Bars' thickness, and from one to the next.
const THICK: f64 = 20.0;
const STEP: f64 = 30.0;

/// Draws what the report has: `growth`, `peers`, `http` and `flip`, as SVG and PNG.
pub fn draw(report: &Report, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    let save = |svg: Svg, name: &str| -> Result<()> {
        let path = directory.join(name);
        svg.save(&path)
            .with_context(|| format!("drawing {}", path.display()))?;
        eprintln!("bench: {}.svg, .png", path.display());
        Ok(())
    };
    let machine = report.machine();
    if let Some(growth) = &report.growth {
        save(curves(growth, &machine), "growth")?;
    }
    if let Some(peers) = &report.peers {
        save(throughput(peers, &machine), "peers")?;
    }
    if let Some(http) = &report.http {
        save(requests(http, &machine), "http")?;
    }
    if let Some(flips) = &report.flips {
        save(glasses(flips, &machine), "flip")?;
    }
    Ok(())
}

/// A bar with its name, its value, and a thin line from the smallest to the largest.
struct Bar<'a> {
    name: &'a str,
    value: Figure,
    text: String,
    ours: bool,
}

fn head(svg: &mut Svg, title: &str, about: &str, machine: &str) {
    svg.text(48.0, 58.0, 26.0, INK, "start", 700, title);
    svg.text(48.0, 84.0, 14.0, GREY, "start", 400, about);
    svg.text(48.0, 104.0, 12.0, GREY, "start", 400, machine);
}

/// Bars below a title; returns where they end.
fn bars(svg: &mut Svg, top: f64, title: &str, bars: &[Bar<'_>]) -> f64 {
    svg.text(48.0, top, 14.0, INK, "start", 600, title);
    let most = bars.iter().map(|bar| bar.value.max).fold(0.0, f64::max);
    let width = RIGHT - BARS - 90.0;
    let x = |value: f64| BARS + value / most * width;
    for (number, bar) in bars.iter().enumerate() {
        let y = top + 18.0 + STEP * number as f64;
        let (fill, weight) = if bar.ours { (BLUE, 600) } else { (THEIRS, 400) };
        let middle = y + THICK / 2.0;
        svg.text(
            BARS - 12.0,
            middle + 4.0,
            13.0,
            INK,
            "end",
            weight,
            bar.name,
        );
        svg.rect(BARS, y, x(bar.value.median) - BARS, THICK, fill);
        let spread = [bar.value.min, bar.value.max].map(|value| (x(value), middle));
        svg.line(spread.into_iter(), INK, 1.5);
        svg.text(
            x(bar.value.max.max(bar.value.median)) + 10.0,
            middle + 4.0,
            13.0,
            INK,
            "start",
            600,
            &bar.text,
        );
    }
    top + 18.0 + STEP * bars.len() as f64
}

/// What a packet costs against what grows, a panel each.
fn curves(growth: &Growth, machine: &str) -> Svg {
    let mut svg = Svg::new(190.0 + 300.0 * Curve::ALL.len() as f64);
    let about = "nanoseconds a packet net of bare XDP_DROP on one core, 100 000 flows where something else grows; median, and smallest to largest";
    head(
        &mut svg,
        "What a packet costs, and how that grows",
        about,
        machine,
    );
    for (number, curve) in Curve::ALL.into_iter().enumerate() {
        let panel = Panel {
            top: 170.0 + 300.0 * number as f64,
            height: 200.0,
        };
        let points: Vec<_> = growth.points.iter().filter(|p| p.curve == curve).collect();
        let title = format!("against the number of {}", curve.name());
        svg.text(LEFT, panel.top - 20.0, 14.0, INK, "start", 600, &title);
        grown(&mut svg, panel, &points);
    }
    svg
}

/// Lines of one panel: numbers to the right, each ten times the one before as far as the
/// next.
fn grown(svg: &mut Svg, panel: Panel, points: &[&Point]) {
    let most = points.iter().map(|point| point.ns.max).fold(0.0, f64::max);
    let top = round_up(most);
    axis(svg, panel, top, &thousands(top as usize));
    let log = |number: u32| f64::from(number).log10();
    let numbers = || points.iter().map(|point| log(point.number));
    let (low, high) = (
        numbers().fold(f64::INFINITY, f64::min),
        numbers().fold(0.0, f64::max),
    );
    let x = |number| LEFT + 40.0 + (log(number) - low) / (high - low) * (RIGHT - LEFT - 260.0);
    let y = |ns: f64| panel.bottom() - ns / top * panel.height;
    let mut labelled = Vec::new();
    let mut named: Vec<f64> = Vec::new();
    for (name, stroke) in [
        ("forward", BLUE),
        ("return", GREEN),
        ("first packet", INK),
        (FLOOR, THEIRS),
    ] {
        let line: Vec<_> = points.iter().filter(|point| point.name == name).collect();
        let places = line
            .iter()
            .map(|point| (x(point.number), y(point.ns.median)));
        svg.line(places, stroke, 2.0);
        for point in &line {
            let ends = [point.ns.min, point.ns.max].map(|ns| (x(point.number), y(ns)));
            svg.line(ends.into_iter(), stroke, 1.0);
            if !labelled.contains(&point.number) {
                labelled.push(point.number);
                let text = thousands(point.number as usize);
                svg.text(
                    x(point.number),
                    panel.bottom() + 18.0,
                    11.0,
                    GREY,
                    "middle",
                    400,
                    &text,
                );
            }
        }
        if let Some(last) = line.last() {
            let text = format!("{name}, {:.0} ns", last.ns.median);
            let mut at = y(last.ns.median) + 4.0;
            // No name on another one.
            while named.iter().any(|other| (other - at).abs() < 14.0) {
                at -= 1.0;
            }
            named.push(at);
            svg.text(x(last.number) + 12.0, at, 12.0, stroke, "start", 600, &text);
        }
    }
}

fn throughput(peers: &Peers, machine: &str) -> Svg {
    let mut flows: Vec<u32> = peers.rates().map(|(_, flows, _)| flows).collect();
    flows.dedup();
    let count = peers.rates().count() as f64;
    let mut svg = Svg::new(130.0 + 60.0 * flows.len() as f64 + STEP * count);
    head(
        &mut svg,
        "Packets per second on one core",
        "64-byte TCP segments of established flows that arrive at the server's end of the two-arm lab; median, and smallest to largest",
        machine,
    );
    let mut top = 148.0;
    for flows in flows {
        let rows: Vec<_> = peers
            .rates()
            .filter(|(_, of, _)| *of == flows)
            .map(|(name, _, value)| Bar {
                name,
                value,
                text: format!("{:.2} M/s", value.median),
                ours: name == Peer::Bgswitch.name(),
            })
            .collect();
        let title = format!("{} flows", thousands(flows as usize));
        top = bars(&mut svg, top, &title, &rows) + 36.0;
    }
    svg
}

/// A title, and what of a line is drawn and written.
type Part = (&'static str, fn(&Line) -> (Figure, String));

fn requests(http: &Http, machine: &str) -> Svg {
    let parts: [Part; 4] = [
        ("requests a second", |line| {
            let text = thousands(line.rate.median as usize);
            (line.rate, text)
        }),
        ("median latency, \u{b5}s", |line| {
            (line.p50, format!("{:.0}", line.p50.median))
        }),
        ("p99 latency, \u{b5}s", |line| {
            (line.p99, format!("{:.0}", line.p99.median))
        }),
        (
            "CPU seconds of the gateway for a million requests",
            |line| (line.cpu, format!("{:.1}", line.cpu.median)),
        ),
    ];
    let part = 36.0 + 18.0 + STEP * 4.0;
    let mut svg = Svg::new(140.0 + 2.0 * parts.len() as f64 * part);
    head(
        &mut svg,
        "HTTP through the gateway",
        "64 clients ask as fast as they are answered; the gateway has one CPU, clients and servers the others; median of the rounds, and smallest to largest",
        machine,
    );
    let mut top = 148.0;
    for keep_alive in [true, false] {
        for (title, of) in parts {
            let lines = http.lines.iter();
            let rows: Vec<_> = lines
                .filter(|line| line.keep_alive == keep_alive)
                .map(|line| {
                    let (value, text) = of(line);
                    Bar {
                        name: line.peer.name(),
                        value,
                        text,
                        ours: line.peer == Peer::Bgswitch,
                    }
                })
                .collect();
            let title = format!("{}: {title}", connects(keep_alive));
            top = bars(&mut svg, top, &title, &rows) + 36.0;
        }
    }
    svg
}

/// Packets of every microsecond around the store, all flips on each other.
fn glasses(flips: &Flips, machine: &str) -> Svg {
    let height = 190.0 + 300.0 * flips.packets.len() as f64;
    let mut svg = Svg::new(height);
    let count: usize = flips.packets.iter().map(|packets| packets.flips).sum();
    let title = format!("{count} flips under full load, under the magnifying glass");
    let about = "every packet is a new flow; what arrives at the far ends in each microsecond, mean of all flips";
    head(&mut svg, &title, about, machine);
    for (number, packets) in flips.packets.iter().enumerate() {
        let panel = Panel {
            top: 170.0 + 300.0 * number as f64,
            height: 200.0,
        };
        glass(&mut svg, panel, packets);
    }
    let legend = height - 28.0;
    for (x, fill, text) in [
        (LEFT, BLUE, "\u{25a0} at the colour that is left"),
        (LEFT + 220.0, GREEN, "\u{25a0} at the new colour"),
    ] {
        svg.text(x, legend, 12.0, fill, "start", 600, text);
    }
    svg.text(
        WIDTH - 48.0,
        legend,
        11.0,
        GREY,
        "end",
        400,
        "times of the store and of packets are of one clock; drawn by cargo xtask bench",
    );
    svg
}

fn glass(svg: &mut Svg, panel: Panel, packets: &Packets) {
    let glass = &packets.glass;
    let title = format!(
        "Batches of {}, {:.2} million a second: first on the new colour {:.0} \u{b5}s after the store, last on the old one {:.0} \u{b5}s (p50); {:.0} and {:.0} \u{b5}s (p99)",
        packets.batch,
        packets.mpps.median,
        packets.first_us.p50,
        packets.last_us.p50,
        packets.first_us.p99,
        packets.last_us.p99
    );
    svg.text(LEFT, panel.top - 20.0, 14.0, INK, "start", 600, &title);
    let mean = |count: u32| f64::from(count) / glass.flips.max(1) as f64;
    let most = glass.bins.iter().map(|[old, new]| mean(old + new));
    let top = round_up(most.fold(0.0, f64::max));
    axis(svg, panel, top, &format!("{top}"));
    let width = (RIGHT - LEFT) / glass.bins.len() as f64;
    for (number, [old, new]) in glass.bins.iter().enumerate() {
        let x = LEFT + width * number as f64;
        let mut base = panel.bottom();
        for (count, fill) in [(*old, BLUE), (*new, GREEN)] {
            let height = mean(count) / top * panel.height;
            base -= height;
            svg.rect(x, base, width - 0.8, height, fill);
        }
    }
    let middle = f64::midpoint(LEFT, RIGHT);
    svg.dashes(middle, panel.top - 8.0, panel.bottom());
    for us in [-GLASS_US, -GLASS_US / 2, 0, GLASS_US / 2, GLASS_US] {
        let x = middle + us as f64 * width;
        let text = if us == 0 {
            "the store".to_owned()
        } else {
            format!("{us:+} \u{b5}s")
        };
        svg.text(x, panel.bottom() + 18.0, 11.0, GREY, "middle", 400, &text);
    }
}
