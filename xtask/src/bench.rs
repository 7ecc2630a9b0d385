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

/// Whether peers are measured: always, unless only other sections are named, or help
/// is asked for.
fn compares(arguments: &[OsString]) -> bool {
    const WITHOUT: [&str; 1] = ["packets"];
    const HELP: [&str; 2] = ["-h", "--help"];
    let is_one_of = |words: &[&str], word: &OsString| words.iter().any(|one| word == one);
    let named = arguments.iter().any(|word| is_one_of(&WITHOUT, word));
    let others = ["peers", "http", "flips", "all"];
    !arguments.iter().any(|word| is_one_of(&HELP, word))
        && (!named || arguments.iter().any(|word| is_one_of(&others, word)))
}
