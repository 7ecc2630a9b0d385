//! The inference server of `cargo xtask demo --inference`: MLServer from the package
//! index, in a virtual environment beside the build. Nothing else uses it.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    command::{self, capture},
    setup, toolchain,
};

/// Versions of everything, down to the last dependency.
const REQUIREMENTS: &str = include_str!("../../tests/src/bin/demo/inference/requirements.txt");
/// Interpreters, the first that will do is taken.
const PYTHONS: [&str; 4] = ["python3", "/usr/bin/python3", "python3.12", "python3.11"];
/// What an interpreter must have: a version that MLServer and the numbers in
/// `REQUIREMENTS` run on, and the means to make an environment.
const WILL_DO: &str =
    "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))";

/// Finds or installs it; says what it installs.
pub fn install() -> Result<()> {
    let environment = command::target().join("inference/venv");
    let done = environment.join("requirements.txt");
    let python = environment.join("bin/python");
    let installed = fs::read_to_string(&done).is_ok_and(|installed| installed == REQUIREMENTS);
    if installed && capture(&python, &["--version"]).is_some() {
        return Ok(());
    }
    let interpreter = interpreter()?;
    eprintln!(
        "setup: installing MLServer and what it needs into {} (about 530 MB, a minute or two)",
        environment.display()
    );
    command::run(
        Command::new(interpreter)
            .args(["-m", "venv", "--clear"])
            .arg(&environment),
    )?;
    let wanted = environment.join("wanted.txt");
    fs::write(&wanted, REQUIREMENTS).with_context(|| format!("writing {}", wanted.display()))?;
    // Wheels only: what has to be compiled fails at once, and says so.
    command::run(
        Command::new(&python)
            .args([
                "-m",
                "pip",
                "install",
                "--no-deps",
                "--only-binary",
                ":all:",
            ])
            .arg("--requirement")
            .arg(&wanted),
    )
    .context("MLServer could not be installed; only `demo --inference` needs it")?;
    fs::rename(&wanted, &done).with_context(|| format!("writing {}", done.display()))
}

fn interpreter() -> Result<PathBuf> {
    if let Some(found) = look() {
        return Ok(found);
    }
    setup::packages(vec!["python3", "python3-venv"])?;
    look().context(
        "MLServer runs on Python 3.11 or 3.12, as Debian 12 has it; none with `venv` is here",
    )
}

fn look() -> Option<PathBuf> {
    let programs = PYTHONS.into_iter().filter_map(toolchain::program);
    programs
        .into_iter()
        .find(|python| capture(python, &["-c", WILL_DO]).is_some())
}
