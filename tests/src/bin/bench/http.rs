//! HTTP through the gateway: requests a second, what they take, and what they cost
//! the gateway.

use std::{
    fmt,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Result, ensure};
use bg_tests::lab::{Place, listener};
use nix::sched::CpuSet;
use serde::Serialize;

use crate::{
    Effort,
    account::Account,
    clients::{self, Outcome},
    gateway::{Gateway, PORT, Peer, on},
    report::{Figure, spread, verdict},
};

/// Clients at once.
const CLIENTS: u32 = 64;
/// What they do: one connection, or one for each request.
const KEEP_ALIVE: [bool; 2] = [true, false];
/// At least so many times the requests per CPU second of HAProxy.
const TIMES_HAPROXY: f64 = 3.0;
/// At least so many requests a second, in parts of those through nftables.
const TIMES_NFTABLES: f64 = 1.0;
/// A request is at least some packets, which cannot take less than so many
/// nanoseconds of the gateway's kernel threads: else others received them.
const LEAST_NS: u64 = 100;
/// Rounds, at most.
const ROUNDS: u32 = 5;

/// All of it.
#[derive(Debug, Serialize)]
pub struct Http {
    clients: u32,
    pub lines: Vec<Line>,
    ratios: Vec<Ratio>,
}

/// One peer, one way of connecting.
#[derive(Debug, Serialize)]
pub struct Line {
    pub peer: Peer,
    pub keep_alive: bool,
    /// Requests a second.
    pub rate: Figure,
    /// Microseconds.
    pub p50: Figure,
    pub p99: Figure,
    pub p999: Figure,
    /// Seconds of the gateway's CPU for a million requests.
    pub cpu: Figure,
    /// What of it processes use, not the kernel's threads.
    processes: Figure,
    failed: u64,
    #[serde(skip)]
    values: Vec<Values>,
}

#[derive(Debug, Serialize)]
struct Ratio {
    name: &'static str,
    keep_alive: bool,
    goal: f64,
    times: Figure,
    met: bool,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Values {
    rate: f64,
    latency: [f64; 3],
    cpu: f64,
    processes: f64,
    failed: u64,
}

/// Measures everything. The labs are gone when it returns.
pub fn measure(effort: &Effort, interrupted: &AtomicBool) -> Result<Http> {
    let [others, own] = cpus()?;
    let length = Duration::from_millis(if effort.quick { 500 } else { 2000 });
    let mut stands = Vec::new();
    for peer in Peer::ALL {
        eprintln!("bench: http, {}", peer.name());
        let gateway = Gateway::new(peer, &own, &others)?;
        let account = Account::open(gateway.lab(), &own, &others)?;
        stands.push((gateway, account));
    }
    let mut values = [const { [const { Vec::new() }; 4] }; 2];
    for _ in 0..effort.rounds.min(ROUNDS) {
        for (keep_alive, values) in KEEP_ALIVE.into_iter().zip(&mut values) {
            for ((gateway, account), values) in stands.iter().zip(values) {
                ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
                values.push(once(gateway, account, keep_alive, length, &others)?);
            }
        }
    }
    let mut lines = Vec::new();
    for (keep_alive, values) in KEEP_ALIVE.into_iter().zip(values) {
        for (peer, values) in Peer::ALL.into_iter().zip(values) {
            lines.push(Line::new(peer, keep_alive, values));
        }
    }
    Ok(Http {
        clients: CLIENTS,
        ratios: ratios(&lines),
        lines,
    })
}

/// CPUs of clients and servers, and the gateway's.
fn cpus() -> Result<[CpuSet; 2]> {
    let count = std::thread::available_parallelism()?.get();
    ensure!(
        count > 1,
        "the gateway needs a CPU of its own: this machine has one"
    );
    let (mut others, mut own) = (CpuSet::new(), CpuSet::new());
    for cpu in 0..count - 1 {
        others.set(cpu)?;
    }
    own.set(count - 1)?;
    Ok([others, own])
}

fn once(
    gateway: &Gateway,
    account: &Account,
    keep_alive: bool,
    length: Duration,
    others: &CpuSet,
) -> Result<Values> {
    let client = gateway.lab().enter(Place::Client)?;
    let to: SocketAddr = listener(PORT);
    let before = account.used(gateway)?;
    let Outcome {
        answers,
        all,
        took,
        failed,
        why,
        latency,
    } = on(others, || {
        clients::ask(client, to, CLIENTS, keep_alive, length)
    })?;
    let after = account.used(gateway)?;
    let [kernel, own] = [after[0] - before[0], after[1] - before[1]];
    if let Some(why) = why {
        eprintln!("bench: {failed} requests failed: {why}");
    }
    ensure!(answers > 0, "nobody was answered");
    ensure!(
        kernel > all * LEAST_NS,
        "the gateway's threads have not received what clients sent"
    );
    Ok(Values {
        rate: answers as f64 / took.as_secs_f64(),
        latency: [0.5, 0.99, 0.999].map(|part| latency.value_at_quantile(part) as f64),
        cpu: (kernel + own) as f64 / all as f64 / 1e3,
        processes: own as f64 / all as f64 / 1e3,
        failed,
    })
}

impl Line {
    fn new(peer: Peer, keep_alive: bool, values: Vec<Values>) -> Self {
        let figure =
            |of: fn(&Values) -> f64| Figure::of(&values.iter().map(of).collect::<Vec<_>>());
        Self {
            peer,
            keep_alive,
            rate: figure(|values| values.rate),
            p50: figure(|values| values.latency[0]),
            p99: figure(|values| values.latency[1]),
            p999: figure(|values| values.latency[2]),
            cpu: figure(|values| values.cpu),
            processes: figure(|values| values.processes),
            failed: values.iter().map(|values| values.failed).sum(),
            values,
        }
    }
}

/// Ours in parts of others, round by round.
fn ratios(lines: &[Line]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for keep_alive in KEEP_ALIVE {
        let line = |peer| {
            let mut found = lines.iter();
            found.find(|line| line.peer == peer && line.keep_alive == keep_alive)
        };
        let mut add = |name, other, goal, of: fn(&Values, &Values) -> f64| {
            let (Some(ours), Some(theirs)) = (line(Peer::Bgswitch), line(other)) else {
                return;
            };
            let pairs = ours.values.iter().zip(&theirs.values);
            let times = Figure::of(&pairs.map(|(a, b)| of(a, b)).collect::<Vec<_>>());
            ratios.push(Ratio {
                name,
                keep_alive,
                goal,
                times,
                met: times.median >= goal,
            });
        };
        add(
            "requests/s : nftables'",
            Peer::Nftables,
            TIMES_NFTABLES,
            |ours, theirs| ours.rate / theirs.rate,
        );
        add(
            "requests per CPU second : HAProxy's",
            Peer::Haproxy,
            TIMES_HAPROXY,
            |ours, theirs| theirs.cpu / ours.cpu,
        );
    }
    ratios
}

/// How clients connect, in words.
pub const fn connects(keep_alive: bool) -> &'static str {
    if keep_alive {
        "keep-alive"
    } else {
        "a connection per request"
    }
}

impl fmt::Display for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for keep_alive in KEEP_ALIVE {
            writeln!(
                f,
                "\nHTTP, {} clients, {}; the gateway has one CPU, clients and servers the others\n",
                self.clients,
                connects(keep_alive)
            )?;
            writeln!(
                f,
                "{:<36} {:>10} {:>15} {:>8} {:>8} {:>8} {:>13} {:>15} {:>9} {:>6}",
                "",
                "requests/s",
                "min..max",
                "p50 us",
                "p99",
                "p99.9",
                "CPU s/million",
                "min..max",
                "processes",
                "failed"
            )?;
            for line in self
                .lines
                .iter()
                .filter(|line| line.keep_alive == keep_alive)
            {
                writeln!(
                    f,
                    "{:<36} {:>10.0} {:>15} {:>8.0} {:>8.0} {:>8.0} {:>13.2} {:>15} {:>9.2} {:>6}",
                    line.peer.name(),
                    line.rate.median,
                    spread(line.rate, 0),
                    line.p50.median,
                    line.p99.median,
                    line.p999.median,
                    line.cpu.median,
                    spread(line.cpu, 2),
                    line.processes.median,
                    line.failed
                )?;
            }
            for ratio in self
                .ratios
                .iter()
                .filter(|ratio| ratio.keep_alive == keep_alive)
            {
                writeln!(
                    f,
                    "{:<36} {:>10.2} {:>15}  goal {}  {}",
                    ratio.name,
                    ratio.times.median,
                    spread(ratio.times, 2),
                    ratio.goal,
                    verdict(Some(ratio.met))
                )?;
            }
        }
        Ok(())
    }
}
