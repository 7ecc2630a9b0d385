//! What was seen of flips, as tables and as JSON.

use std::fmt;

use bg_tests::load::Answer;
use serde::Serialize;

use super::packets::Glass;
use crate::{
    gateway,
    http::connects,
    report::{Figure, spread, verdict},
};

/// The store, at most, ns; p99.
const STORE_NS: f64 = 1000.0;
/// The command, at most, ms; p99.
const COMMAND_MS: f64 = 5.0;
/// From the store to what the far ends see of it, at most, us; p99.
const FOLLOWED_US: f64 = 20.0;
/// p99 of requests, at most so many times that without flips.
const CALM: f64 = 1.2;

/// All of it.
#[derive(Debug, Serialize)]
pub struct Flips {
    pub commands: Vec<Command>,
    pub packets: Vec<Packets>,
    pub loads: Vec<UnderLoad>,
    pub peers: Vec<Peer>,
}

/// How many values there are, and how they spread.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quantiles {
    pub count: usize,
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// `bgswitch flip`.
#[derive(Debug, Serialize)]
pub struct Command {
    /// `max_flows`.
    room: u32,
    /// Clients that connect all the time.
    clients: usize,
    store_ns: Quantiles,
    store_met: bool,
    /// From the process's start to its exit.
    whole_ms: Quantiles,
    whole_met: bool,
    /// From the process's start to its store: from then on, new flows go elsewhere, and
    /// what follows is said of it.
    until_stored_ms: Quantiles,
    /// From the store to the first new flow, as the packet path stamps it, while
    /// some clients connect.
    first_new_flow_us: Quantiles,
    failed: usize,
}

/// Under the generator's load.
#[derive(Debug, Serialize)]
pub struct Packets {
    /// Frames that are made before the first of them leaves.
    pub batch: u32,
    /// Millions of new flows a second.
    pub mpps: Figure,
    pub flips: usize,
    /// From the store to the first new flow, as the packet path stamps it.
    pub stamped_us: Quantiles,
    /// From the store to the first packet at the far end of the new colour.
    pub first_us: Quantiles,
    /// From the store to the last packet at the far end of the old one.
    pub last_us: Quantiles,
    #[serde(skip)]
    pub glass: Glass,
}

/// Who flips.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// `bgswitch flip`: a process, the daemon, its journal, and counting flows.
    Command,
    /// The store alone.
    Store,
}

/// Requests while the service is flipped, and while it is not.
#[derive(Debug, Serialize)]
pub struct UnderLoad {
    by: By,
    keep_alive: bool,
    connections: usize,
    flips: usize,
    requests: usize,
    failed: usize,
    /// Why the first of them failed.
    why: Option<String>,
    failed_met: bool,
    /// New connections after a flip that reached the colour that was left.
    strays: usize,
    /// Latency, ms.
    flipping_ms: Quantiles,
    calm_ms: Quantiles,
    /// p99 while flipping in parts of p99 without.
    ratio: f64,
    ratio_met: bool,
}

/// One peer's flips.
#[derive(Debug, Serialize)]
pub struct Peer {
    #[serde(rename = "peer")]
    pub of: gateway::Peer,
    pub flips: usize,
    /// From the begin of the command to its end.
    pub command_ms: Quantiles,
    pub requests: usize,
    pub failed: usize,
    /// Why the first of them failed.
    pub why: Option<String>,
    /// New connections after the command that reached the colour that was left, ...
    pub strays: usize,
    /// ... and how long after it the last of them was begun.
    pub last_stray_ms: f64,
    /// Which part of the requests on connections from before the first flip was still
    /// answered by the first colour.
    pub kept: f64,
    /// Processes that are there after the flips and were not before.
    pub processes_left: usize,
}

impl Quantiles {
    /// Sorts values in.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        let at = |part: f64| {
            let index = (last as f64 * part).ceil() as usize;
            sorted.get(index).copied().unwrap_or(f64::NAN)
        };
        Self {
            count: sorted.len(),
            p50: at(0.5),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

impl Command {
    /// Out of one value a flip: nanoseconds, milliseconds twice, microseconds.
    pub fn new(
        (room, clients): (u32, usize),
        store: &[f64],
        whole: &[f64],
        until_stored: &[f64],
        first: &[f64],
        failed: usize,
    ) -> Self {
        let (store_ns, whole_ms) = (Quantiles::of(store), Quantiles::of(whole));
        Self {
            room,
            clients,
            store_met: store_ns.p99 <= STORE_NS,
            store_ns,
            whole_met: whole_ms.p99 <= COMMAND_MS,
            whole_ms,
            until_stored_ms: Quantiles::of(until_stored),
            first_new_flow_us: Quantiles::of(first),
            failed,
        }
    }
}

impl UnderLoad {
    /// Out of the answers while flipping, and without.
    pub fn new(
        by: By,
        keep_alive: bool,
        connections: usize,
        flips: usize,
        flipping: &[&Answer],
        calm: &[&Answer],
        strays: usize,
    ) -> Self {
        let latency = |answers: &[&Answer]| {
            let took = answers
                .iter()
                .map(|answer| answer.latency.as_secs_f64() * 1e3);
            Quantiles::of(&took.collect::<Vec<_>>())
        };
        let all = flipping.iter().chain(calm);
        let failures: Vec<_> = all
            .filter_map(|answer| answer.result.as_ref().err())
            .collect();
        let failed = failures.len();
        let (flipping_ms, calm_ms) = (latency(flipping), latency(calm));
        let ratio = flipping_ms.p99 / calm_ms.p99;
        Self {
            by,
            keep_alive,
            connections,
            flips,
            requests: flipping.len() + calm.len(),
            failed,
            why: failures.first().map(|why| (*why).clone()),
            failed_met: failed == 0,
            strays,
            flipping_ms,
            calm_ms,
            ratio,
            ratio_met: ratio <= CALM,
        }
    }
}

impl fmt::Display for Flips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<46} {:>6} {:>8} {:>9} {:>9} {:>9}",
            "a flip", "flips", "goal p99", "p50", "p99", "max"
        )?;
        let mut line = |name: &str, goal: Option<f64>, values: Quantiles, unit: &str| {
            let met = goal.map(|goal| values.p99 <= goal);
            let goal = goal.map_or_else(String::new, |goal| goal.to_string());
            writeln!(
                f,
                "{:<46} {:>6} {goal:>8} {:>9.2} {:>9.2} {:>9.2}  {}",
                format!("{name}, {unit}"),
                values.count,
                values.p50,
                values.p99,
                values.max,
                verdict(met)
            )
        };
        for command in &self.commands {
            let Command { room, clients, .. } = command;
            let plural = if *clients == 1 { "" } else { "s" };
            let name = format!("command, room for {room} flows, {clients} client{plural}");
            line(&name, Some(COMMAND_MS), command.whole_ms, "ms")?;
            line(
                "  its start to its store",
                None,
                command.until_stored_ms,
                "ms",
            )?;
            line("  its store", Some(STORE_NS), command.store_ns, "ns")?;
            let first = command.first_new_flow_us;
            line("  store to first new flow, few clients", None, first, "us")?;
        }
        for packets in &self.packets {
            let name = format!("full load, batches of {}", packets.batch);
            let stamped = packets.stamped_us;
            line(&format!("{name}: first, as stamped"), None, stamped, "us")?;
            let goal = Some(FOLLOWED_US);
            line(
                "  to first at the new far end",
                goal,
                packets.first_us,
                "us",
            )?;
            line("  to last at the old far end", goal, packets.last_us, "us")?;
        }
        for packets in &self.packets {
            writeln!(
                f,
                "full load, batches of {}: {:.2} ({}) million new flows a second arrive",
                packets.batch,
                packets.mpps.median,
                spread(packets.mpps, 2)
            )?;
        }
        for load in &self.loads {
            writeln!(
                f,
                "\n{} flips by {} in {} requests on {} connections, {}",
                load.flips,
                match load.by {
                    By::Command => "bgswitch flip",
                    By::Store => "the store alone",
                },
                load.requests,
                load.connections,
                connects(load.keep_alive)
            )?;
            writeln!(
                f,
                "  failed {}, goal 0, {}; new connections gone to the old colour {}",
                load.failed,
                verdict(Some(load.failed_met)),
                load.strays
            )?;
            if let Some(why) = &load.why {
                writeln!(f, "  first failure: {why}")?;
            }
            writeln!(
                f,
                "  p50 {:.2} ms and p99 {:.2} ms, without flips {:.2} and {:.2}: p99 {:.2} times, goal {CALM}, {}",
                load.flipping_ms.p50,
                load.flipping_ms.p99,
                load.calm_ms.p50,
                load.calm_ms.p99,
                load.ratio,
                verdict(Some(load.ratio_met))
            )?;
        }
        writeln!(
            f,
            "\n{:<31} {:>5} {:>10} {:>8} {:>9} {:>7} {:>7} {:>13} {:>6} {:>10}",
            "peers' flips",
            "flips",
            "command ms",
            "max",
            "requests",
            "failed",
            "strays",
            "last stray ms",
            "kept",
            "processes+"
        )?;
        for peer in &self.peers {
            writeln!(
                f,
                "{:<31} {:>5} {:>10.2} {:>8.2} {:>9} {:>7} {:>7} {:>13.1} {:>5.0}% {:>10}",
                peer.of.flip(),
                peer.flips,
                peer.command_ms.p50,
                peer.command_ms.max,
                peer.requests,
                peer.failed,
                peer.strays,
                peer.last_stray_ms,
                peer.kept * 100.0,
                peer.processes_left
            )?;
            if let Some(why) = &peer.why {
                writeln!(f, "  first failure: {why}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Quantiles;

    #[test]
    fn the_99th_of_a_hundred_values_is_not_the_largest() {
        let values: Vec<f64> = (0..=100).map(f64::from).collect();
        let quantiles = Quantiles::of(&values);
        assert_eq!(
            (quantiles.p50, quantiles.p99, quantiles.max),
            (50.0, 99.0, 100.0)
        );
    }
}
