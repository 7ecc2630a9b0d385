//! Packets per second that come out of the two-arm lab, on one core: ours, bare XDP
//! programs, the kernel's forwarding, and nftables.

mod report;
mod stack;

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use bg_common::reason::Reason;
use bg_tests::lab::{Place, SERVERS, SERVICE};

use crate::{
    Effort, MAX_FLOWS,
    arrivals::FarEnd,
    cases::{Kind, Program, Side},
    packets::{INTENDED, WARM_UP},
    stand::Stand,
};
pub use report::Peers;
use report::Rate;
use stack::Stack;

/// Who carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A bare XDP program, or the packet path.
    Xdp(Program),
    /// The kernel's forwarding, no address is changed.
    Forwarding,
    /// nftables, destination NAT by map.
    Nftables,
}

/// All ways, and their names.
const WAYS: [(Way, &str); 6] = [
    (Way::Xdp(Program::Drop), "bare XDP_DROP, at the gateway"),
    (
        Way::Xdp(Program::Transmit),
        "bare XDP_TX, back to the client",
    ),
    (Way::Xdp(Program::Redirect), "bare XDP_REDIRECT"),
    (Way::Xdp(Program::Ours), "bgswitch"),
    (Way::Forwarding, "kernel forwarding, no NAT"),
    (Way::Nftables, "nftables, DNAT by map"),
];

/// Flows that packets belong to, in turn.
const FLOWS: [u32; 2] = [1_000, 100_000];

/// A bare program takes so many times more frames: a test run takes tens of
/// milliseconds to begin and end.
const FAST: u32 = 4;

/// Where clients' packets arrive, at the far ends.
const PORT: u16 = 8000;

/// Measures everything. The labs are gone when it returns.
pub fn measure(effort: &Effort, interrupted: &AtomicBool) -> Result<Peers> {
    let mut lanes = Lanes::new(effort.frames)?;
    let mut rates = Vec::new();
    for flows in FLOWS {
        eprintln!("bench: peers, {flows} flows");
        lanes.prepare(flows)?;
        let mut values = [const { Vec::new() }; WAYS.len()];
        for _ in 0..effort.rounds {
            for ((way, _), values) in WAYS.iter().zip(&mut values) {
                ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
                values.push(lanes.rate(*way, flows)?);
            }
        }
        for ((way, name), values) in WAYS.iter().zip(&values) {
            rates.push(Rate::new(*way, name, flows, values));
        }
    }
    Ok(Peers::new(rates))
}

/// What one measurement of a way says.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Millions of frames a second that arrived.
    rate: f64,
    /// Which part of the frames sent did not arrive.
    lost: f64,
}

/// A lab for each way; ours is shared with the bare programs.
struct Lanes {
    frames: u32,
    /// At the client's end, and at the server's.
    far_ends: [FarEnd; 2],
    stand: Stand,
    forwarding: Stack,
    nftables: Stack,
}

impl Lanes {
    fn new(frames: u32) -> Result<Self> {
        let mut stand = Stand::usual(MAX_FLOWS)?;
        stand.free_far_ends();
        let end = |place| FarEnd::attach(&stand.lab().enter(place)?, "eth0", 0);
        Ok(Self {
            frames,
            far_ends: [end(Place::Client)?, end(Place::Blue)?],
            forwarding: Stack::forwarding()?,
            nftables: Stack::nftables()?,
            stand,
        })
    }

    /// Makes every way know `flows` flows.
    fn prepare(&mut self, flows: u32) -> Result<()> {
        self.stand.remember(flows)?;
        self.stand.feed(Kind::Forward, flows)?;
        self.forwarding.feed(flows)?;
        self.nftables.feed(flows)
    }

    /// Measures a way once, after every flow was seen once.
    fn rate(&mut self, way: Way, flows: u32) -> Result<Measured> {
        let before = flows.max(WARM_UP);
        match way {
            Way::Xdp(program) => self.xdp(program, before),
            Way::Forwarding => self.forwarding.rate(before, self.frames),
            Way::Nftables => self.nftables.rate(before, self.frames),
        }
    }

    fn xdp(&mut self, program: Program, before: u32) -> Result<Measured> {
        self.stand.put(Side::Clients, program)?;
        self.stand.run(Side::Clients, before)?;
        let frames = self.frames * FAST;
        let server = if program == Program::Ours {
            SERVERS[0][0]
        } else {
            SERVICE
        };
        let [client_end, server_end] = &mut self.far_ends;
        client_end.expect(SERVICE, PORT, false)?;
        server_end.expect(server, PORT, false)?;
        let reasons = self.stand.reasons()?;
        let dropped = self.stand.received(Side::Clients, false)?;
        let took = self.stand.run(Side::Clients, frames)?;
        let arrived = match program {
            Program::Drop => self.stand.received(Side::Clients, false)? - dropped,
            Program::Transmit => client_end.arrived()?,
            _ => server_end.arrived()?,
        };
        if program == Program::Ours {
            let forwarded = Reason::Forwarded as usize;
            let established = self.stand.reasons()?[forwarded] - reasons[forwarded];
            ensure!(
                established * 1000 >= arrived * INTENDED,
                "{established} of {arrived} packets were of established flows"
            );
        }
        Ok(Measured::new(arrived, frames, took))
    }
}

impl Measured {
    fn new(arrived: u64, frames: u32, took: std::time::Duration) -> Self {
        Self {
            rate: arrived as f64 / took.as_secs_f64() / 1e6,
            lost: 1.0 - arrived as f64 / f64::from(frames),
        }
    }
}
