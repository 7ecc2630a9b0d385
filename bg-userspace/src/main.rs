//! The `bgswitch` command.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    bg_userspace::cli::run(bg_userspace::cli::Arguments::parse())
}
