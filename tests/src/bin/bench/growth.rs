//! How costs grow: a packet's with flows, services and backends, and a start's with
//! services.

use std::{
    fmt::{self, Write as _},
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bg_common::abi::Room;
use bg_tests::{
    lab::{Lab, SERVERS, SERVICE},
    load::PATIENCE,
};
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::{
    Effort, MAX_FLOWS,
    account::used_by,
    cases::{Case, Kind, LEAST, Ports, Program, STRANGER_FLOWS},
    packets::Bench,
    report::{Figure, spread},
    stand::{Setup, Stand, usual_services},
};

/// How many services there are beside the usual ones, of one server a colour.
const SERVICES: u16 = 10_000;
/// Where the first of them listens.
const FIRST_PORT: u16 = 10_000;
/// Pools of other services: so many servers a colour.
const POOLS: [u8; 3] = [1, 8, 64];
/// A pool's service listens so far above its number of servers.
const POOL_PORT: u16 = 9_000;
/// Where the addresses of their servers begin.
const FIRST_HOST: u8 = 100;
/// Flows, where something else grows.
const FLOWS: u32 = 100_000;
/// What the program that does the least of a translation is called.
pub const FLOOR: &str = "floor";
/// For so long the daemon is left alone.
const IDLE: Duration = Duration::from_secs(3);

/// What grew, and how costs did.
#[derive(Debug, Serialize)]
pub struct Growth {
    pub starts: Vec<Start>,
    pub points: Vec<Point>,
}

/// The daemon with so many services.
#[derive(Debug, Serialize)]
pub struct Start {
    services: u32,
    /// From its start to its first answer, with no pins: seconds.
    fresh_s: f64,
    /// The same over pins that are there.
    adopted_s: f64,
    /// `bgswitch status`, of all services: milliseconds.
    status_ms: f64,
    /// Memory of the daemon, flow tables that it has mapped left out: MB.
    resident_mb: f64,
    /// CPU time of the daemon with nothing to do, in parts of a hundred of a core.
    idle_percent: f64,
}

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Curve {
    Flows,
    Services,
    Backends,
}

impl Curve {
    /// All.
    pub const ALL: [Self; 3] = [Self::Flows, Self::Services, Self::Backends];

    /// What is counted.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flows => "flows",
            Self::Services => "services",
            Self::Backends => "backends a colour",
        }
    }

    /// Which numbers of it, and the services of each.
    fn numbers(self) -> Vec<(u32, Ports)> {
        let many = |count| Ports {
            first: FIRST_PORT,
            count,
        };
        match self {
            Self::Flows => [1_000, 10_000, 100_000, 1_000_000]
                .map(|flows| (flows, many(1)))
                .to_vec(),
            Self::Services => [1, 100, 1_000, SERVICES]
                .map(|count| (count.into(), many(count)))
                .to_vec(),
            Self::Backends => POOLS
                .map(|servers| {
                    let first = POOL_PORT + u16::from(servers);
                    (servers.into(), Ports { first, count: 1 })
                })
                .to_vec(),
        }
    }

    /// What is measured of each number: packets, and what looks after them.
    fn kinds(self, ports: Ports) -> Vec<(Kind, Program)> {
        let (forward, back) = (Kind::ForwardOver(ports), Kind::ReturnOver(ports));
        let first = Kind::FirstOver(ports);
        let floor = (forward, Program::Part(LEAST));
        let [forward, back, first] = [forward, back, first].map(|kind| (kind, Program::Ours));
        match self {
            Self::Flows => vec![forward, floor, back],
            Self::Services => vec![forward, floor, back, first],
            Self::Backends => vec![forward, first],
        }
    }
}

/// One figure.
#[derive(Debug, Serialize)]
pub struct Point {
    pub curve: Curve,
    /// How many.
    pub number: u32,
    /// Which kind of packet, or [`FLOOR`].
    pub name: &'static str,
    /// Nanoseconds a packet, net of `XDP_DROP`.
    pub ns: Figure,
}

/// Measures all of it.
pub fn measure(effort: &Effort, interrupted: &AtomicBool) -> Result<Growth> {
    let mut starts = vec![few_services()?];
    let services = services();
    let count = services.matches(".blue]").count() as u32;
    let setup = Setup {
        max_flows: MAX_FLOWS,
        max_services: Room::MOST.services,
        services: &services,
        hosts: (FIRST_HOST, FIRST_HOST + POOLS[2]),
    };
    eprintln!("bench: {count} services");
    let stand = Stand::new(&setup, |lab| {
        starts.push(Start::measure(lab, count)?);
        Ok(())
    })?;
    let mut bench = Bench::new(stand, effort, interrupted);
    let mut points = Vec::new();
    for curve in Curve::ALL {
        eprintln!("bench: {}", curve.name());
        let numbers = curve.numbers();
        let few = |flows: u32| !effort.quick || flows <= FLOWS;
        let over = |number| if curve == Curve::Flows { number } else { FLOWS };
        let numbers: Vec<_> = numbers
            .into_iter()
            .filter(|(number, _)| few(over(*number)))
            .collect();
        bench.stand.forget()?;
        if curve == Curve::Flows {
            for (flows, ports) in &numbers {
                bench.stand.remember_over(*flows, &[*ports])?;
            }
        } else {
            let services: Vec<_> = numbers.iter().map(|(_, ports)| *ports).collect();
            bench.stand.remember_over(FLOWS, &services)?;
        }
        let mut of_cases = Vec::new();
        let mut cases = Vec::new();
        for (number, ports) in numbers {
            for (kind, program) in curve.kinds(ports) {
                let flows = if kind.is_first() {
                    STRANGER_FLOWS
                } else {
                    over(number)
                };
                of_cases.push(number);
                cases.push(Case {
                    name: if program.is_ours() {
                        kind.name()
                    } else {
                        FLOOR
                    },
                    program,
                    kind,
                    flows,
                    goal: None,
                });
            }
        }
        let costs = bench.costs(&cases, &mut [Vec::new(), Vec::new()])?;
        for ((case, number), net) in cases.iter().zip(of_cases).zip(costs) {
            points.push(Point {
                curve,
                number,
                name: case.name,
                ns: Figure::of(&net),
            });
        }
    }
    Ok(Growth { starts, points })
}

/// A start with the usual services.
fn few_services() -> Result<Start> {
    let mut lab = Lab::new()?;
    let services = usual_services();
    lab.configure_with(&format!("max_flows = {MAX_FLOWS}"), &services)?;
    Start::measure(&mut lab, services.matches(".blue]").count() as u32)
}

/// The usual services, many small ones, and some with large pools.
fn services() -> String {
    let mut text = usual_services();
    let mut add = |name: String, port: u16, [blue, green]: [Vec<String>; 2]| {
        let _ = write!(
            text,
            "[service.{name}]\nlisten = [\"tcp://{SERVICE}:{port}\"]\n\
             [service.{name}.blue]\nbackends = {blue:?}\n\
             [service.{name}.green]\nbackends = {green:?}\n"
        );
    };
    for (number, port) in (0..SERVICES).zip(FIRST_PORT..) {
        let servers = SERVERS.map(|[first, ..]| vec![first.to_owned()]);
        add(format!("s{number}"), port, servers);
    }
    for servers in POOLS {
        let pool = |network: &str| {
            let hosts = FIRST_HOST..FIRST_HOST + servers;
            hosts.map(|host| format!("{network}.{host}")).collect()
        };
        let port = POOL_PORT + u16::from(servers);
        add(
            format!("pool{servers}"),
            port,
            [pool("10.0.1"), pool("10.0.2")],
        );
    }
    text
}

impl Start {
    /// Starts the daemon twice, and leaves it running.
    fn measure(lab: &mut Lab, services: u32) -> Result<Self> {
        let fresh_s = started(lab)?;
        lab.end_daemon(Signal::SIGTERM)?;
        let adopted_s = started(lab)?;
        let begun = Instant::now();
        lab.status()?;
        let status_ms = begun.elapsed().as_secs_f64() * 1e3;
        let daemon = lab.daemon_pid().context("no daemon")?;
        let before = used_by(daemon)?;
        thread::sleep(IDLE);
        let used = used_by(daemon)? - before;
        let idle_percent = used as f64 / IDLE.as_nanos() as f64 * 100.0;
        Ok(Self {
            services,
            fresh_s,
            adopted_s,
            status_ms,
            resident_mb: private_mb(daemon)?,
            idle_percent,
        })
    }
}

/// Seconds from the daemon's start to its first answer.
fn started(lab: &mut Lab) -> Result<f64> {
    let socket = lab.directory().join("sock");
    let begun = Instant::now();
    let answered = thread::scope(|scope| {
        let answer = scope.spawn(|| answer(&socket, begun));
        lab.start()?;
        let joined = answer.join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(answered.as_secs_f64())
}

fn answer(socket: &Path, begun: Instant) -> Result<Duration> {
    while begun.elapsed() < PATIENCE {
        if let Ok(mut stream) = UnixStream::connect(socket) {
            stream.write_all(b"GET /v1/services/llm HTTP/1.1\r\nHost: gateway\r\n\r\n")?;
            stream.read_exact(&mut [0])?;
            return Ok(begun.elapsed());
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("the daemon does not answer")
}

/// Memory that only this process has.
fn private_mb(process: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let text = line.context("no RssAnon")?.trim().trim_end_matches(" kB");
    Ok(text.parse::<f64>()? / 1e3)
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nhow costs grow; ns a packet, net of bare XDP_DROP, {FLOWS} flows unless said otherwise\n"
        )?;
        writeln!(
            f,
            "{:<18} {:<14} {:>9}  {:>7}  {:>15}  {:>14}",
            "what grows", "packet", "number", "median", "min..max", "times the first"
        )?;
        for point in &self.points {
            let same = |of: &&Point| of.curve == point.curve && of.name == point.name;
            let first = self.points.iter().find(same).unwrap_or(point);
            writeln!(
                f,
                "{:<18} {:<14} {:>9}  {:>7.1}  {:>15}  {:>14.2}",
                point.curve.name(),
                point.name,
                point.number,
                point.ns.median,
                spread(point.ns, 1),
                point.ns.median / first.ns.median
            )?;
        }
        writeln!(
            f,
            "\n{:<10} {:>16} {:>16} {:>14} {:>14} {:>12}",
            "services", "first start, s", "over pins, s", "status, ms", "memory, MB", "idle, % CPU"
        )?;
        for start in &self.starts {
            writeln!(
                f,
                "{:<10} {:>16.2} {:>16.2} {:>14.0} {:>14.1} {:>12.1}",
                start.services,
                start.fresh_s,
                start.adopted_s,
                start.status_ms,
                start.resident_mb,
                start.idle_percent
            )?;
        }
        Ok(())
    }
}
