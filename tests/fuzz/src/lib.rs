//! What fuzzing runs, and what must be true of it.
//!
//! A target is a function of bytes that panics when something is wrong. `cargo
//! xtask fuzz` runs it under libFuzzer, which looks for bytes that reach new code;
//! the tests of this crate run it on its seeds, and on seeds that were changed here
//! and there.

#[cfg(feature = "daemon")]
pub mod api;
mod bytes;
#[cfg(feature = "daemon")]
pub mod config;
pub mod packets;
pub mod seeds;
