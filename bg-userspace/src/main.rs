//! The `bgswitch` command.

use std::{
    panic,
    process::{self, ExitCode},
};

fn main() -> ExitCode {
    let tell = panic::take_hook();
    // A daemon of which one thread is gone is none: systemd starts it anew, and
    // forwarding goes on meanwhile.
    panic::set_hook(Box::new(move |panic| {
        tell(panic);
        process::abort();
    }));
    bg_userspace::cli::run(bg_userspace::cli::arguments())
}
