//! `cargo xtask bench`.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result};

use crate::{command, setup};

/// Sets up, builds, and becomes the benchmark, so that its exit code, its output
/// and Ctrl-C are its own.
pub fn run(arguments: &[OsString]) -> Result<()> {
    setup::run()?;
    command::run(command::cargo().args(["build", "--release"]))?;
    let mut bench = Command::new(command::root().join("target/release/bgswitch-bench"));
    bench.args(arguments);
    Err(bench.exec()).with_context(|| format!("starting `{}`", command::line(&bench)))
}
