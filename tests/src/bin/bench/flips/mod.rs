//! Flips: what the command takes, what clients see of a hundred of them, how soon
//! packets follow the store, and the same of peers.

mod clients;
mod packets;
mod report;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Result, ensure};
use bg_tests::{
    lab::{Place, listener},
    load::{Load, Reuse, now_ns},
};
use bg_userspace::api::Flipped;
use nix::sched::CpuSet;

use crate::{
    Effort,
    gateway::{Gateway, MAX_FLOWS, PORT, Peer},
};
pub use packets::GLASS_US;
use report::Command;
pub use report::{Flips, Packets};

/// Measures everything. The labs are gone when it returns.
pub fn measure(effort: &Effort, interrupted: &AtomicBool) -> Result<Flips> {
    let commands = COMMANDS
        .into_iter()
        .map(|(room, clients)| command(room, clients, effort, interrupted))
        .collect::<Result<_>>()?;
    let packets = packets::measure(effort, interrupted)?;
    let loads = clients::ours(effort, interrupted)?;
    let peers = clients::peers(effort, interrupted)?;
    Ok(Flips {
        commands,
        packets,
        loads,
        peers,
    })
}

/// Room for flows, and clients that connect: as many as keep two processors busy, and
/// one.
const COMMANDS: [(u32, usize); 3] = [(MAX_FLOWS, 16), (100_000, 16), (MAX_FLOWS, 1)];

/// `bgswitch flip`, from the process's start to its exit, while some clients connect
/// all the time: the command waits for a first new flow.
fn command(
    room: u32,
    clients: usize,
    effort: &Effort,
    interrupted: &AtomicBool,
) -> Result<Command> {
    /// One client, too, connects every millisecond or two.
    const PAUSE: Duration = Duration::from_millis(4);
    const SHORT: Duration = Duration::from_millis(1);
    let pause = if clients == 1 { SHORT } else { PAUSE };
    eprintln!("bench: flips, the command, room for {room} flows, {clients} clients");
    let flips = if effort.quick { 30 } else { 150 };
    let all = everywhere()?;
    let gateway = Gateway::with_room(room, Peer::Bgswitch, &all, &all)?;
    let lab = gateway.lab();
    let load = Load::start(
        lab.enter(Place::Client)?,
        vec![(listener(PORT), Reuse::Never); clients],
        pause,
    );
    let (mut whole, mut until_stored) = (Vec::new(), Vec::new());
    let (mut store, mut first) = (Vec::new(), Vec::new());
    for _ in 0..flips {
        ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
        let mut command = lab.bgswitch(&["-o", "json", "flip", "llm", "-m", "bench"])?;
        let begun = now_ns();
        let output = command.output()?;
        let milliseconds = |until: u64| until.saturating_sub(begun) as f64 / 1e6;
        whole.push(milliseconds(now_ns()));
        ensure!(
            output.status.success(),
            "bgswitch flip: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let flipped: Flipped = serde_json::from_slice(&output.stdout)?;
        store.extend(flipped.store_ns.map(|ns| ns as f64));
        until_stored.extend(flipped.at_ns.map(milliseconds));
        first.extend(flipped.first_new_flow_us);
    }
    let answers = load.finish()?;
    let failed = answers.iter().filter(|answer| answer.result.is_err());
    Ok(Command::new(
        (room, clients),
        &store,
        &whole,
        &until_stored,
        &first,
        failed.count(),
    ))
}

/// Every CPU.
fn everywhere() -> Result<CpuSet> {
    let mut all = CpuSet::new();
    for cpu in 0..std::thread::available_parallelism()?.get() {
        all.set(cpu)?;
    }
    Ok(all)
}
