//! The benchmark: what the packet path costs a packet, in nanoseconds, and how it
//! compares with its peers. `cargo xtask bench` runs it.

mod account;
mod arrivals;
mod cases;
mod clients;
mod flips;
mod gateway;
mod growth;
mod http;
mod packets;
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
};

use anyhow::{Context as _, Result};
use bg_tests::lab::beside_the_build;
use cases::STAGES;
use clap::{Parser, ValueEnum};
use report::Report;

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
    /// How that grows with flows, services and backends; and how a start does.
    Growth,
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
/// Established flows that fit: a million over each address family, and a thousand of the
/// other service.
const MAX_FLOWS: u32 = 2_001_000;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    if let Err(error) = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)) {
        eprintln!("bench: Ctrl-C will not clean up: {error}");
    }
    match run(&arguments, &interrupted) {
        Ok(()) => ExitCode::SUCCESS,
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

/// Measures, and shows what was measured: also what came before a section that failed.
fn run(arguments: &Arguments, interrupted: &AtomicBool) -> Result<()> {
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
    let mut report = Report::new(effort.rounds, effort.frames);
    let measured = measure(arguments, &effort, interrupted, &mut report);
    report.end();
    match arguments.output {
        Output::Text => print!("{report}"),
        Output::Json if measured.is_ok() => println!("{}", serde_json::to_string(&report)?),
        Output::Json => {}
    }
    measured?;
    let pictures = match &arguments.pictures {
        Some(directory) => directory.clone(),
        None => beside_the_build("bench")?,
    };
    pictures::draw(&report, &pictures)?;
    if let Some(file) = &arguments.keep {
        keep(&report, file)
            .with_context(|| format!("keeping the figures in {}", file.display()))?;
    }
    Ok(())
}

/// Measures what is wanted. The labs are gone when it returns.
fn measure(
    arguments: &Arguments,
    effort: &Effort,
    interrupted: &AtomicBool,
    report: &mut Report,
) -> Result<()> {
    let wanted = |section| {
        let named = &arguments.sections;
        named.is_empty() || named.contains(&section) || named.contains(&Section::All)
    };
    if [Section::Peers, Section::Http, Section::Flips]
        .into_iter()
        .any(wanted)
    {
        tools::check()?;
    }
    if wanted(Section::Packets) {
        let stages = if arguments.quick {
            &STAGES[..2]
        } else {
            &STAGES
        };
        packets::measure(arguments, effort, stages, interrupted, report)?;
    }
    if wanted(Section::Growth) {
        report.growth = Some(growth::measure(effort, interrupted)?);
    }
    if wanted(Section::Peers) {
        report.peers = Some(peers::measure(effort, interrupted)?);
    }
    if wanted(Section::Http) {
        report.http = Some(http::measure(effort, interrupted)?);
    }
    if wanted(Section::Flips) {
        report.flips = Some(flips::measure(effort, interrupted)?);
    }
    Ok(())
}

/// Adds the report to those of other runs.
fn keep(report: &Report, file: &Path) -> Result<()> {
    let line = serde_json::to_string(report)? + "\n";
    let mut kept = OpenOptions::new().create(true).append(true).open(file)?;
    Ok(kept.write_all(line.as_bytes())?)
}
