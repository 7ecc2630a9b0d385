//! Whose CPU time is whose: the gateway's work is done by threads of its own.
//!
//! The kernel receives for an interface in a thread (`threaded` NAPI, kernel 5.12):
//! for the gateway's interfaces on the gateway's CPU, for their far ends on the
//! others'. So a packet's way through the gateway, from the frame's arrival to its
//! arrival at the far end of the next link, is in the time of such a thread, be it
//! XDP, forwarding, NAT or the TCP of a proxy; and a proxy's own work is in its
//! processes' time.

use std::{collections::BTreeSet, fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use bg_tests::lab::{Lab, Place};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

use crate::gateway::Gateway;

/// Interfaces of the gateway, and the places at their other ends.
const LINKS: [(&str, Place); 3] = [
    ("clients", Place::Client),
    ("blue", Place::Blue),
    ("green", Place::Green),
];

/// The kernel's threads of a gateway.
pub struct Account {
    threads: BTreeSet<u32>,
}

impl Account {
    /// Gives every link's end a thread: the gateway's on `gateway`, the others on
    /// `others`.
    pub fn open(lab: &Lab, gateway: &CpuSet, others: &CpuSet) -> Result<Self> {
        for (_, place) in LINKS {
            put(&thread_of(lab, place, "eth0")?, others)?;
        }
        let mut threads = BTreeSet::new();
        for (interface, _) in LINKS {
            let new = thread_of(lab, Place::Gateway, interface)?;
            put(&new, gateway)?;
            threads.extend(new);
        }
        Ok(Self { threads })
    }

    /// Nanoseconds that the gateway has used so far: the kernel's threads, and
    /// processes.
    pub fn used(&self, gateway: &Gateway) -> Result<[u64; 2]> {
        let threads = self.threads.iter();
        let kernel = threads
            .map(|thread| used_by(*thread))
            .sum::<Result<u64>>()?;
        let processes = gateway.processes()?;
        let own = processes
            .iter()
            .map(|process| used_by(*process))
            .sum::<Result<u64>>()?;
        Ok([kernel, own])
    }
}

/// Nanoseconds that all threads of a process, or one of the kernel's, were on a CPU.
pub fn used_by(process: u32) -> Result<u64> {
    let clock = clock_getcpuclockid(Pid::from_raw(process as i32));
    let used = clock.and_then(clock_gettime);
    let used = used.with_context(|| format!("asking for the CPU time of {process}"))?;
    Ok(used.tv_sec() as u64 * 1_000_000_000 + used.tv_nsec() as u64)
}

/// Makes the kernel receive in a thread, and finds that thread.
fn thread_of(lab: &Lab, place: Place, interface: &str) -> Result<BTreeSet<u32>> {
    let before = receivers()?;
    // In the namespace's own view of /sys.
    let status = Command::new("ip")
        .args(["netns", "exec", &lab.namespace(place), "sh", "-c"])
        .arg(format!("echo 1 > /sys/class/net/{interface}/threaded"))
        .status()?;
    ensure!(status.success(), "no threads for {interface} in {place:?}");
    let new: BTreeSet<u32> = receivers()?.difference(&before).copied().collect();
    ensure!(!new.is_empty(), "no thread for {interface} in {place:?}");
    Ok(new)
}

/// The kernel's threads that receive.
fn receivers() -> Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(process) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.starts_with("napi/") {
            found.insert(process);
        }
    }
    Ok(found)
}

fn put(threads: &BTreeSet<u32>, cpus: &CpuSet) -> Result<()> {
    for thread in threads {
        sched_setaffinity(Pid::from_raw(*thread as i32), cpus)
            .with_context(|| format!("moving thread {thread}"))?;
    }
    Ok(())
}
