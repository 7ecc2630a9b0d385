//! `cargo xtask demo`.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result};

use crate::{command, inference, setup};

/// Sets up, builds, and becomes the demo, so that its exit code, its output and
/// Ctrl-C are its own.
pub fn run(arguments: &[OsString]) -> Result<()> {
    setup::run()?;
    let has = |word: &str| arguments.iter().any(|given| given == word);
    if has("--inference") && !has("-h") && !has("--help") {
        inference::install()?;
    }
    command::run(command::cargo().args(["build", "--release"]))?;
    let mut demo = Command::new(command::target().join("release/bgswitch-demo"));
    demo.args(arguments);
    Err(demo.exec()).with_context(|| format!("starting `{}`", command::line(&demo)))
}
