//! `cargo xtask lint`.

use std::{env, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{command, panics, setup, toolchain};

type Check = (&'static str, fn() -> Result<()>);

const CHECKS: [Check; 5] = [
    ("formatting", format),
    ("what is shipped compiles by itself", check_shipped),
    ("clippy on the host", clippy_host),
    ("clippy on the BPF target", clippy_bpf),
    ("no reachable panic", panics::check),
];

/// Runs every check, also after one failed, and names those that did.
pub fn run() -> Result<()> {
    setup::run()?;
    let failed: Vec<_> = CHECKS
        .into_iter()
        .filter_map(|(name, check)| match check() {
            Ok(()) => None,
            Err(error) => {
                eprintln!("lint: {name}: {error:#}");
                Some(name)
            }
        })
        .collect();
    if failed.is_empty() {
        eprintln!("lint: all {} checks passed", CHECKS.len());
        return Ok(());
    }
    bail!("failed: {}", failed.join(", "));
}

fn format() -> Result<()> {
    command::run(command::cargo().args(["fmt", "--all", "--check"]))
}

/// With the features that the programs ask for, and without those of the tests.
fn check_shipped() -> Result<()> {
    command::run(command::cargo().args(["check", "--release"]))
}

fn clippy_host() -> Result<()> {
    command::run(
        command::cargo()
            .args(["clippy", "--release", "--workspace", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )
}

/// Lints the kernel shell with the compiler that builds it.
fn clippy_bpf() -> Result<()> {
    let rustc = toolchain::compiler().context("no eBPF compiler")?;
    let bin = rustc
        .parent()
        .context("the eBPF compiler has no directory")?;
    if !bin.join("cargo-clippy").exists() {
        bail!(
            "{} has no clippy beside it; install it: `rustup component add clippy --toolchain nightly`, \
             or for Debian's compiler `apt-get install rust-web-clippy`",
            rustc.display()
        );
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([bin.to_owned()].into_iter().chain(env::split_paths(&path)))?;
    command::run(
        Command::new(bin.join("cargo"))
            .current_dir(command::root())
            .env("PATH", path)
            .env("RUSTC_BOOTSTRAP", "1")
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("RUSTC")
            .args(["clippy", "--package", "bg-ebpf", "--features", "kernel"])
            .args(["--target", "bpfel-unknown-none", "-Zbuild-std=core"])
            .arg("--target-dir")
            .arg(command::target().join("lint-bpf"))
            .args(["--", "-D", "warnings"]),
    )
}
