//! bgswitch: the daemon, its command line, and the only code that talks to the
//! kernel.

pub mod api;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod doctor;
pub mod drain;
pub mod figures;
pub mod file;
pub mod golden;
pub mod health;
pub mod journal;
pub mod keeper;
pub mod object;
pub mod plan;
pub mod release;
mod sighting;
pub mod signals;
pub mod state;
pub mod switch;
pub mod time;
mod uri;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what is whole at every moment, also when somebody panicked who held it.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
