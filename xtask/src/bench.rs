//! `cargo xtask bench`.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result};

use crate::{command, peers, setup};

/// Sets up, builds, and becomes the benchmark, so that its exit code, its output
/// and Ctrl-C are its own.
pub fn run(arguments: &[OsString]) -> Result<()> {
    setup::run()?;
    if compares(arguments) {
        peers::fetch()?;
    }
    command::run(command::cargo().args(["build", "--release"]))?;
    let mut bench = Command::new(command::target().join("release/bgswitch-bench"));
    bench.args(arguments);
    Err(bench.exec()).with_context(|| format!("starting `{}`", command::line(&bench)))
}

/// Whether peers are measured: unless only packets are named, or help is asked for.
fn compares(arguments: &[OsString]) -> bool {
    let has = |word: &str| arguments.iter().any(|given| given == word);
    let others = ["peers", "http", "flips", "all"].into_iter().any(has);
    !has("-h") && !has("--help") && (others || !has("packets"))
}
