//! bgswitch: the daemon, its command line, and the only code that talks to the kernel.

pub mod object;
pub mod plan;
