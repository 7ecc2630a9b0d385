//! Figures, as a table and as JSON.

use std::{fmt, fs, process::Command};

use serde::Serialize;

use crate::{cases::Case, flips::Flips, growth::Growth, http::Http, peers::Peers};

/// Version of the JSON.
const SCHEMA: u32 = 1;

/// One run of the benchmark.
#[derive(Debug, Serialize)]
pub struct Report {
    schema: u32,
    kernel: String,
    cpu: String,
    cpus: usize,
    /// `git describe` of the directory it ran in.
    commit: Option<String>,
    /// Load averages when it began and when it ended: others' work blurs figures.
    load: [f64; 2],
    rounds: u32,
    /// Frames of one measurement.
    frames: u32,
    /// Bare `XDP_DROP` with the kernel's bookkeeping, which is what is
    /// subtracted, by interface; nanoseconds a packet.
    drop_ns: Vec<Figure>,
    /// Bytes of memory for each flow that fits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_of_a_flow: Option<f64>,
    /// Costs.
    cases: Vec<Line>,
    /// Frames per second through the two-arm lab, on one core.
    delivered: Vec<Delivered>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth: Option<Growth>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers: Option<Peers>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<Http>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flips: Option<Flips>,
}

/// Values of one figure over the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figure {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    flows: u32,
    goal_ns: Option<u32>,
    /// Net of `XDP_DROP`, nanoseconds a packet.
    ns: Figure,
    met: Option<bool>,
}

/// Millions of frames per second.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Delivered {
    /// Over how many flows.
    pub flows: u32,
    /// Dropped by a bare program on the gateway's interface.
    pub drop: Figure,
    /// Sent by a bare program to the servers.
    pub redirect: Figure,
    /// Sent by a program that does the least of a translation.
    pub least: Figure,
    /// Sent by the packet path to the servers, IPv4 TCP.
    pub forward: Figure,
    /// `least` in parts of `redirect`, round by round.
    pub floor: Figure,
    /// `forward` in parts of `redirect`, round by round.
    pub ratio: Figure,
    /// On two cores, in times of one: dropped, `redirect`, `least`, `forward`.
    pub two_cores: [Figure; 4],
}

/// What [`Delivered::ratio`] is to reach.
const RATIO_GOAL: f64 = 0.88;
/// What two cores are to reach, in times of one.
const TWO_CORES_GOAL: f64 = 1.8;
/// Bytes of memory a flow, at most.
const MEMORY_GOAL: f64 = 128.0;

impl Figure {
    /// Out of one value a round.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        Self {
            median: f64::midpoint(at(last / 2), at(last.div_ceil(2))),
            min: at(0),
            max: at(last),
        }
    }
}

impl Report {
    /// An empty report of this machine.
    pub fn new(rounds: u32, frames: u32) -> Self {
        let load = load();
        Self {
            schema: SCHEMA,
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: read("/proc/cpuinfo")
                .lines()
                .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
                .map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            commit: commit(),
            load: [load; 2],
            rounds,
            frames,
            drop_ns: Vec::new(),
            memory_of_a_flow: None,
            cases: Vec::new(),
            delivered: Vec::new(),
            growth: None,
            peers: None,
            http: None,
            flips: None,
        }
    }

    /// Adds what bare `XDP_DROP` took on an interface.
    pub fn add_drop(&mut self, ns: &[f64]) {
        self.drop_ns.push(Figure::of(ns));
    }

    /// Adds what a case took.
    pub fn add(&mut self, case: &Case, ns: &[f64]) {
        let ns = Figure::of(ns);
        self.cases.push(Line {
            name: case.name,
            flows: case.flows,
            goal_ns: case.goal,
            ns,
            met: case.goal.map(|goal| ns.median <= f64::from(goal)),
        });
    }

    /// Adds what came out.
    pub fn add_delivered(&mut self, delivered: Delivered) {
        self.delivered.push(delivered);
    }

    /// Where and of what these figures are.
    pub fn machine(&self) -> String {
        let commit = self.commit.as_deref().unwrap_or("unknown commit");
        format!(
            "{} CPUs, {}; Linux {}; {commit}; load {:.2} to {:.2}",
            self.cpus, self.cpu, self.kernel, self.load[0], self.load[1]
        )
    }

    /// Ends the report.
    pub fn end(&mut self) {
        self.load[1] = load();
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.machine())?;
        if !self.cases.is_empty() {
            self.packets(f)?;
        }
        if let Some(growth) = &self.growth {
            growth.fmt(f)?;
        }
        if let Some(peers) = &self.peers {
            peers.fmt(f)?;
        }
        if let Some(http) = &self.http {
            http.fmt(f)?;
        }
        if let Some(flips) = &self.flips {
            flips.fmt(f)?;
        }
        Ok(())
    }
}

impl Report {
    fn packets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} rounds of {} frames a case; ns a packet, net of bare XDP_DROP in the same round\n",
            self.rounds, self.frames
        )?;
        writeln!(
            f,
            "{:<34} {:>9}  {:>6}  {:>7}  {:>15}",
            "", "flows", "goal", "median", "min..max"
        )?;
        for line in &self.cases {
            let goal = line.goal_ns.map_or_else(String::new, |ns| ns.to_string());
            writeln!(
                f,
                "{:<34} {:>9}  {goal:>6}  {:>7.1}  {:>15}  {}",
                line.name,
                line.flows,
                line.ns.median,
                spread(line.ns, 1),
                verdict(line.met)
            )?;
        }
        if let Some(bytes) = self.memory_of_a_flow {
            let met = verdict(Some(bytes <= MEMORY_GOAL));
            writeln!(
                f,
                "\nmemory a flow: {bytes:.1} bytes, goal {MEMORY_GOAL}, {met}"
            )?;
        }
        writeln!(
            f,
            "\nmillions of frames per second, one core unless said otherwise, statistics off"
        )?;
        for delivered in &self.delivered {
            let mut line = |name: &str, goal: Option<f64>, figure: Figure| {
                let met = goal.map(|goal| figure.median >= goal);
                let goal = goal.map_or_else(String::new, |goal| goal.to_string());
                writeln!(
                    f,
                    "{name:<34} {:>9}  {goal:>6}  {:>7.2}  {:>15}  {}",
                    delivered.flows,
                    figure.median,
                    spread(figure, 2),
                    verdict(met)
                )
            };
            line("bare XDP_DROP", None, delivered.drop)?;
            line("bare XDP_REDIRECT", None, delivered.redirect)?;
            line("floor: least of a translation", None, delivered.least)?;
            line("forward, IPv4 TCP", None, delivered.forward)?;
            line("floor : XDP_REDIRECT", None, delivered.floor)?;
            line("forward : XDP_REDIRECT", Some(RATIO_GOAL), delivered.ratio)?;
            let [drop, redirect, least, forward] = delivered.two_cores;
            line("two cores : one, XDP_DROP", None, drop)?;
            line("two cores : one, XDP_REDIRECT", None, redirect)?;
            line("two cores : one, floor", None, least)?;
            line("two cores : one, forward", Some(TWO_CORES_GOAL), forward)?;
        }
        Ok(())
    }
}

/// The smallest and the largest value.
pub fn spread(figure: Figure, digits: usize) -> String {
    format!("{:.digits$}..{:.digits$}", figure.min, figure.max)
}

/// Whether a goal was met, in a word.
pub const fn verdict(met: Option<bool>) -> &'static str {
    match met {
        None => "",
        Some(true) => "met",
        Some(false) => "missed",
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path)
        .map(|text| text.trim_end().to_owned())
        .unwrap_or_default()
}

/// The load average of the last minute.
fn load() -> f64 {
    read("/proc/loadavg")
        .split(' ')
        .next()
        .and_then(|text| text.parse().ok())
        .unwrap_or(f64::NAN)
}

fn commit() -> Option<String> {
    let output = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=10"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::Figure;

    #[test]
    fn the_median_is_the_middle_one_or_between_the_middle_two() {
        let median = |values: &[f64]| Figure::of(values).median;
        assert!((median(&[9.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[9.0, 1.0, 2.0, 4.0]) - 3.0).abs() < 1e-9);
    }
}
