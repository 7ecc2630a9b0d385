//! `cargo xtask VERB`: what a developer of this repository types.
//!
//! Everything is said on stderr, so that `cargo xtask demo -o json` leaves
//! stdout to the summary. The exit code is the one of the command that failed.

mod bench;
mod command;
mod demo;
mod fuzz;
mod inference;
mod kernels;
mod lint;
mod panics;
mod peers;
mod setup;
mod test;
mod toolchain;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Sets up, shows, tests, fuzzes, measures and lints bgswitch"
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Find or install what the eBPF build, the demo and the tests need
    Setup,
    /// Flip under load in network namespaces, and draw what happened
    #[command(disable_help_flag = true)]
    Demo {
        /// Handed to the demo: --seconds, --flips, --clients, --release-story, --inference, -o json, --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure what the packet path costs a packet, and compare with peers
    #[command(disable_help_flag = true)]
    Bench {
        /// Handed to the benchmark: packets, peers, http, flips, --rounds, --quick, -o json, --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run every test; those that need root and BPF included
    Test {
        /// Handed to the test harness: a filter, --nocapture, --exact ...
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run the packet path on other kernels, each in a virtual machine
    Kernels {
        /// Which ones; all, unless named
        kernels: Vec<kernels::Kernel>,
    },
    /// Look for inputs that break the packet path's laws, or a parser
    Fuzz(fuzz::Fuzz),
    /// Formatting, clippy on the host and the BPF target, no reachable panic
    Lint,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().verb {
        Verb::Setup => setup::run(),
        Verb::Demo { arguments } => demo::run(&arguments),
        Verb::Bench { arguments } => bench::run(&arguments),
        Verb::Test { arguments } => test::run(&arguments),
        Verb::Kernels { kernels } => kernels::run(&kernels),
        Verb::Fuzz(fuzz) => fuzz::run(&fuzz),
        Verb::Lint => lint::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::from(command::exit_code(&error))
        }
    }
}
