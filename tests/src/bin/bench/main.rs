//! The benchmark: what the packet path costs a packet, in nanoseconds, and how it
//! compares with its peers. `cargo xtask bench` runs it.

mod account;
mod arrivals;
mod cases;
mod clients;
mod flips;
mod gateway;
mod http;
mod peers;
mod pictures;
mod report;
mod stand;
mod tools;

use std::{
    fs::OpenOptions,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};
use bg_common::reason::Reason;
use bg_tests::lab::beside_the_build;
use cases::{Case, Kind, Program, STAGES, Side, Stage};
use clap::{Parser, ValueEnum};
use report::{Delivered, Figure, Report};
use stand::Stand;

/// Measures what the packet path costs a packet, in network namespaces.
///
/// Frames are made in the kernel at the far end of the gateway's interface. Each
/// round measures a bare XDP_DROP first, then every case; a figure is the median
/// over the rounds of the difference. A figure whose packets took another way
/// than the intended one is refused.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    /// What is measured; everything, unless named.
    #[arg(value_enum)]
    sections: Vec<Section>,
    /// How often everything is measured.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// A rough answer in seconds: 3 short rounds, no million flows.
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Of packets, only what has this in its name, and no frames per second.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Of packets, only with at most so many flows.
    #[arg(long, value_name = "FLOWS")]
    flows: Option<u32>,
    /// How the figures are printed.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
    /// Where the figures are kept, too: a line of JSON a run, with commit, kernel and CPU.
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,
    /// Where pictures go, as SVG and PNG [default: target/bench].
    #[arg(long, value_name = "DIRECTORY")]
    pictures: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    /// What the packet path costs a packet.
    Packets,
    /// Packets per second beside bare XDP, the kernel's forwarding and nftables.
    Peers,
    /// HTTP through the gateway, beside nftables, HAProxy and nginx.
    Http,
    /// What flips take, and what is seen of them; of ours and of peers'.
    Flips,
    /// All of it.
    All,
}

/// How much is done for a figure.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// How often everything is measured.
    rounds: u32,
    /// Frames of one measurement.
    frames: u32,
    /// A rough answer will do.
    quick: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For scripts.
    Json,
}

/// What a shell expects of a program ended by Ctrl-C.
const INTERRUPTED: u8 = 130;
/// Frames before a measurement: every flow once, and at least so many.
const WARM_UP: u32 = 20_000;
/// Before SYNs are measured, so many of them have filled the half-open table.
const STRANGERS_BEFORE: u32 = 200_000;
/// Established flows that fit: a million over each address family.
const MAX_FLOWS: u32 = 2_000_000;
/// Frames per second are measured over so many times more frames: a test run
/// takes tens of milliseconds to begin and end.
const RATE_FRAMES: u32 = 4;
/// Parts of a thousand of the packets that must count the intended reason:
/// what else comes in is the stacks' own.
const INTENDED: u64 = 999;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    if let Err(error) = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)) {
        eprintln!("bench: Ctrl-C will not clean up: {error}");
    }
    match run(&arguments, &interrupted) {
        Ok(report) => {
            match arguments.output {
                Output::Text => print!("{report}"),
                Output::Json => match serde_json::to_string(&report) {
                    Ok(json) => println!("{json}"),
                    Err(error) => {
                        eprintln!("bench: {error}");
                        return ExitCode::FAILURE;
                    }
                },
            }
            ExitCode::SUCCESS
        }
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            eprintln!("\nbench: interrupted; namespaces, pins and programs are removed");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Measures everything. The lab is gone when it returns.
fn run(arguments: &Arguments, interrupted: &AtomicBool) -> Result<Report> {
    let effort = if arguments.quick {
        Effort {
            rounds: 3,
            frames: 200_000,
            quick: true,
        }
    } else {
        Effort {
            rounds: arguments.rounds,
            frames: 1_000_000,
            quick: false,
        }
    };
    let wanted = |section| {
        let named = &arguments.sections;
        named.is_empty() || named.contains(&section) || named.contains(&Section::All)
    };
    let mut report = Report::new(effort.rounds, effort.frames);
    if wanted(Section::Packets) {
        let stages = if arguments.quick {
            &STAGES[..2]
        } else {
            &STAGES
        };
        packets(arguments, &effort, stages, interrupted, &mut report)?;
    }
    if wanted(Section::Peers) {
        report.peers = Some(peers::measure(&effort, interrupted)?);
    }
    if wanted(Section::Http) {
        report.http = Some(http::measure(&effort, interrupted)?);
    }
    if wanted(Section::Flips) {
        report.flips = Some(flips::measure(&effort, interrupted)?);
    }
    report.end();
    let pictures = match &arguments.pictures {
        Some(directory) => directory.clone(),
        None => beside_the_build("bench")?,
    };
    pictures::draw(&report, &pictures)?;
    if let Some(file) = &arguments.keep {
        keep(&report, file)
            .with_context(|| format!("keeping the figures in {}", file.display()))?;
    }
    Ok(report)
}

/// Adds the report to those of other runs.
fn keep(report: &Report, file: &Path) -> Result<()> {
    let line = serde_json::to_string(report)? + "\n";
    let mut kept = OpenOptions::new().create(true).append(true).open(file)?;
    Ok(kept.write_all(line.as_bytes())?)
}

/// Measures what the packet path costs a packet.
fn packets(
    arguments: &Arguments,
    effort: &Effort,
    stages: &[Stage],
    interrupted: &AtomicBool,
    report: &mut Report,
) -> Result<()> {
    let Effort { rounds, frames, .. } = *effort;
    let mut bench = Bench {
        stand: Stand::new(MAX_FLOWS)?,
        interrupted,
        rounds,
        frames,
    };
    let mut drops = [Vec::new(), Vec::new()];
    let most = arguments.flows.unwrap_or(u32::MAX);
    for stage in stages.iter().filter(|stage| stage.0 <= most) {
        eprintln!("bench: {} flows", stage.0);
        bench.stand.remember(stage.0)?;
        let mut cases = cases::of_stage(*stage);
        match &arguments.only {
            Some(text) => cases.retain(|case| case.name.contains(text.as_str())),
            None => report.add_delivered(bench.delivered(stage.0)?),
        }
        bench.stage(&cases, &mut drops, report)?;
    }
    for drops in &drops {
        report.add_drop(drops);
    }
    Ok(())
}

struct Bench<'a> {
    stand: Stand,
    interrupted: &'a AtomicBool,
    rounds: u32,
    frames: u32,
}

impl Bench<'_> {
    /// Measures cases side by side, round by round.
    fn stage(
        &mut self,
        cases: &[Case],
        drops: &mut [Vec<f64>; 2],
        report: &mut Report,
    ) -> Result<()> {
        // The kernel's bookkeeping is on for as long as this lives, whatever
        // becomes of the process.
        let _statistics = enable_stats(Stats::RunTime)?;
        let mut net = vec![Vec::new(); cases.len()];
        for _ in 0..self.rounds {
            for side in Side::ALL {
                let of_side = || {
                    cases
                        .iter()
                        .enumerate()
                        .filter(move |(_, case)| case.kind.side() == side)
                };
                let Some((_, any)) = of_side().next() else {
                    continue;
                };
                let bare = self.cost(&Case {
                    program: Program::Drop,
                    ..any.clone()
                })?;
                drops[side as usize].push(bare);
                for (index, case) in of_side() {
                    net[index].push(self.cost(case)? - bare);
                }
            }
        }
        for (case, net) in cases.iter().zip(&net) {
            report.add(case, net);
        }
        Ok(())
    }

    /// Nanoseconds a packet, bookkeeping included.
    fn cost(&mut self, case: &Case) -> Result<f64> {
        let side = case.kind.side();
        self.stand.put(side, case.program)?;
        self.stand.feed(case.kind, case.flows)?;
        let before = if case.kind == Kind::First {
            STRANGERS_BEFORE
        } else {
            case.flows.max(WARM_UP)
        };
        self.send(side, before)?;
        let reasons = self.stand.reasons()?;
        let runs = self.stand.runs(case.program)?;
        self.send(side, self.frames)?;
        let after = self.stand.runs(case.program)?;
        let (ns, count) = (after.ns - runs.ns, after.count - runs.count);
        ensure!(
            count >= u64::from(self.frames) / 2,
            "{}: {count} of {} frames came in",
            case.name,
            self.frames
        );
        if matches!(case.program, Program::Ours | Program::Listening) {
            let after = self.stand.reasons()?;
            intended(case, count, &reasons, &after)?;
        }
        Ok(ns as f64 / count as f64)
    }

    /// Frames per second that come out, with the kernel's bookkeeping off.
    fn delivered(&mut self, flows: u32) -> Result<Delivered> {
        let programs = [Program::Drop, Program::Redirect, Program::Ours];
        let mut rates = [const { Vec::new() }; 3];
        let mut ratios = Vec::new();
        let frames = self.frames * RATE_FRAMES;
        self.stand.feed(Kind::Forward, flows)?;
        for _ in 0..self.rounds {
            for (program, rates) in programs.iter().zip(&mut rates) {
                self.stand.put(Side::Clients, *program)?;
                self.send(Side::Clients, flows.max(WARM_UP))?;
                let (side, far) = match program {
                    Program::Drop => (Side::Clients, false),
                    _ => (Side::Servers, true),
                };
                let before = self.stand.received(side, far)?;
                let took = self.send(Side::Clients, frames)?;
                let came = self.stand.received(side, far)? - before;
                rates.push(came as f64 / took.as_secs_f64() / 1e6);
            }
            let last = |index: usize| rates[index].last().copied().unwrap_or(f64::NAN);
            ratios.push(last(2) / last(1));
        }
        let [drop, redirect, forward] = rates.map(|rates| Figure::of(&rates));
        Ok(Delivered {
            flows,
            drop,
            redirect,
            forward,
            ratio: Figure::of(&ratios),
        })
    }

    fn send(&self, side: Side, frames: u32) -> Result<Duration> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        self.stand.run(side, frames)
    }
}

/// Refuses a figure unless nearly all packets took the intended way.
fn intended(case: &Case, count: u64, before: &[u64], after: &[u64]) -> Result<()> {
    let taken = |reason: Reason| after[reason as usize] - before[reason as usize];
    let wanted = case.kind.reason();
    ensure!(
        taken(wanted) * 1000 >= count * INTENDED,
        "{}, {} flows: {} of {count} packets are {}; all: {}",
        case.name,
        case.flows,
        taken(wanted),
        wanted.as_str(),
        Reason::ALL
            .iter()
            .filter(|reason| taken(**reason) > 0)
            .map(|reason| format!("{} {}", reason.as_str(), taken(*reason)))
            .collect::<Vec<_>>()
            .join(", ")
    );
    Ok(())
}
