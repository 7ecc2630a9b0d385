//! The first process of a virtual machine that `cargo xtask kernels` boots: shows
//! what the packet path can do on its kernel, a line a check, and ends the machine.
//!
//! A check runs in a process of its own, so that its end is not the machine's.

mod checks;
mod machine;

use std::process::ExitCode;

use anyhow::Result;
use checks::CHECKS;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return match machine::run(CHECKS.iter().map(|(name, _)| *name)) {
            Ok(never) => match never {},
            Err(error) => {
                // The kernel panics when its first process ends, and QEMU ends too.
                println!("guest: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let named = std::env::args().nth(1).unwrap_or_default();
    let Some((_, check)) = CHECKS.iter().find(|(name, _)| *name == named) else {
        eprintln!("this runs in a virtual machine: `cargo xtask kernels`");
        return ExitCode::from(2);
    };
    finish(check())
}

/// The last line on stdout is what the check found, or why it failed.
fn finish(found: Result<String>) -> ExitCode {
    match found {
        Ok(found) => {
            println!("{found}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{}", format!("{error:#}").replace('\n', "; "));
            ExitCode::FAILURE
        }
    }
}
