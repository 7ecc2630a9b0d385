//! `cargo xtask fuzz`.
//!
//! Plain libFuzzer, and the compiler's own coverage instrumentation: rustup's stable
//! can do it, once it is told to allow the unstable flags.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    command::{self, capture, cargo},
    setup,
};

/// What libFuzzer needs: a counter on each edge, the table of their places, and to
/// see what is compared.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";

/// Bytes of an input, at most: a few of the longest packets.
const LONGEST: &str = "-max_len=3072";
/// Seconds of a run that is not told how long.
const SECONDS: u64 = 60;

/// What is fuzzed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    /// The packet path on the host
    Packets,
    /// The configuration's parser
    Config,
    /// The API's parsers
    Api,
}

impl Target {
    const fn name(self) -> &'static str {
        match self {
            Self::Packets => "packets",
            Self::Config => "config",
            Self::Api => "api",
        }
    }

    const fn features(self) -> &'static str {
        match self {
            Self::Packets => "fuzzer",
            Self::Config | Self::Api => "fuzzer,daemon",
        }
    }
}

/// What is asked for.
#[derive(clap::Args)]
pub struct Fuzz {
    /// What is fuzzed
    #[arg(value_enum, default_value = "packets")]
    target: Target,
    /// Stop after so many inputs
    #[arg(long)]
    runs: Option<u64>,
    /// Stop after so many seconds; 60 unless --runs or --input says how long
    #[arg(long)]
    seconds: Option<u64>,
    /// Find accesses out of bounds, too; eight times slower, wants rustup's compiler
    #[arg(long)]
    asan: bool,
    /// Run this input only: what a crash left behind
    #[arg(long, conflicts_with_all = ["runs", "seconds"])]
    input: Option<PathBuf>,
}

/// Builds a target, runs it for a bounded time, and says how to repeat a crash.
pub fn run(fuzz: &Fuzz) -> Result<()> {
    setup::cxx()?;
    let binary = build(fuzz.target, fuzz.asan)?;
    let name = fuzz.target.name();
    if let Some(input) = &fuzz.input {
        return command::run(Command::new(&binary).arg(input));
    }

    let kept = command::target().join("fuzz-inputs").join(name);
    let (corpus, seeds, crashes) = (
        kept.join("corpus"),
        kept.join("seeds"),
        kept.join("crashes"),
    );
    for directory in [&corpus, &seeds, &crashes] {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    }
    let mut fuzzer = Command::new(&binary);
    fuzzer
        .env("BG_FUZZ_SEEDS", &seeds)
        .args([LONGEST, "-print_final_stats=1", "-timeout=10"])
        .arg(format!("-artifact_prefix={}/", crashes.display()));
    if let Some(runs) = fuzz.runs {
        fuzzer.arg(format!("-runs={runs}"));
    }
    let seconds = fuzz.seconds.or(fuzz.runs.is_none().then_some(SECONDS));
    if let Some(seconds) = seconds {
        fuzzer.arg(format!("-max_total_time={seconds}"));
    }
    let before = files(&crashes);
    let done = command::run(fuzzer.args([&corpus, &seeds]));
    for crash in files(&crashes).iter().filter(|file| !before.contains(file)) {
        let crash = crash.display();
        eprintln!("fuzz: kept {crash}\nfuzz: repeat it: cargo xtask fuzz {name} --input {crash}");
    }
    done
}

fn build(target: Target, asan: bool) -> Result<PathBuf> {
    let host = host()?;
    let directory = command::target().join("fuzz");
    let flags = if asan {
        format!("{COVERAGE} -Zsanitizer=address")
    } else {
        COVERAGE.to_owned()
    };
    let rustflags = format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        host.to_uppercase().replace('-', "_")
    );
    let binary = format!("fuzz-{}", target.name());
    // With a target named, build scripts and macros are not instrumented.
    command::run(
        cargo()
            .env("RUSTC_BOOTSTRAP", "1")
            .env(rustflags, flags)
            .args(["build", "--profile", "fuzz", "--package", "bg-fuzz"])
            .args(["--no-default-features", "--features", target.features()])
            .args(["--bin", &binary, "--target", &host])
            .arg("--target-dir")
            .arg(&directory),
    )?;
    Ok(directory.join(host).join("fuzz").join(binary))
}

/// The compiler that cargo runs.
fn rustc() -> PathBuf {
    env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from)
}

fn host() -> Result<String> {
    let version = capture(rustc(), &["-vV"]).context("asking rustc for its version")?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not name its host")?.to_owned())
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}
