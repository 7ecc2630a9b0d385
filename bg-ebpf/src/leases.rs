//! Lending source ports to flows that `snat` hides their client of.
//!
//! [`bg_common::snat`] says what a block of ports is. Looking up takes no lock. Who
//! lends a port looks for one, and then writes it under a lock if nobody has
//! changed it in between: a port never has two flows.
#![allow(unsafe_code)]

use core::{cell::Cell, mem::offset_of, ptr};

use bg_common::{
    flow::{FlowKey, FlowTable},
    maglev::mix,
    snat::{GRACE, Lease, PORTS, TRIES},
};

use crate::flows::FlowCell;

/// A [`Lease`] in a block, shared with the other CPUs.
#[repr(C)]
#[derive(Debug, Default)]
pub struct LeaseCell {
    /// See [`Lease::client`].
    pub client: [Cell<u64>; 2],
    /// See [`Lease::id`].
    pub id: Cell<u32>,
    /// See [`Lease::turn`].
    pub turn: Cell<u32>,
    /// See [`Lease::since`].
    pub since: Cell<u32>,
    /// See [`Lease::table`].
    pub table: Cell<u32>,
}

const _: () = {
    assert!(size_of::<LeaseCell>() == size_of::<Lease>());
    assert!(offset_of!(LeaseCell, turn) == offset_of!(Lease, turn));
    assert!(offset_of!(LeaseCell, since) == offset_of!(Lease, since));
};

impl LeaseCell {
    /// True when the port is this flow's.
    #[inline(always)]
    pub fn is_of(&self, key: &FlowKey) -> bool {
        self.id.get() == key.id
            && self.client[1].get() == key.client[1]
            && self.client[0].get() == key.client[0]
    }

    /// Keeps the port for its flow, which is proven: who was about to take it sees
    /// that something changed. To be done under the lock.
    #[inline(always)]
    pub fn keep(&self) {
        self.turn.set(self.turn.get().wrapping_add(1));
    }

    /// The key of the flow that has the port.
    #[inline(always)]
    pub const fn key(&self) -> FlowKey {
        FlowKey::of([self.client[0].get(), self.client[1].get()], self.id.get())
    }

    /// Makes the port this flow's; a look-up in between finds nobody. To be done
    /// under the lock.
    #[inline(always)]
    pub fn lend(&self, key: &FlowKey, table: FlowTable, now: u32) {
        // SAFETY: a cell's own pointer; volatile, so that the optimiser neither
        // drops the first store nor moves what lies between the two.
        unsafe { ptr::write_volatile(self.id.as_ptr(), 0) }
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.client[0].as_ptr(), key.client[0]) }
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.client[1].as_ptr(), key.client[1]) }
        self.turn.set(self.turn.get().wrapping_add(1));
        self.since.set(now);
        self.table.set(table as u32);
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.id.as_ptr(), key.id) }
    }
}

/// How dispensable the flow is that has a port: [`FREE`] when it is over, [`KEPT`]
/// when the port must not be taken from it, and between the two the silence of a
/// flow without proof.
pub type Hold = u32;
/// Nobody has the port.
pub const FREE: Hold = u32::MAX;
/// It is somebody's.
pub const KEPT: Hold = 0;

/// How dispensable the flow is that has this lease of port `via`; `find` looks it up.
#[inline(always)]
pub fn hold<'a>(
    lease: &LeaseCell,
    via: u16,
    now: u32,
    find: impl Fn(FlowTable) -> Option<&'a FlowCell>,
) -> Hold {
    if lease.id.get() == 0 {
        return FREE;
    }
    if is_fresh(lease, now) {
        return KEPT;
    }
    let has = |table| find(table).filter(|flow| flow.via.get() == via && !flow.is_over(table, now));
    // 1 at the least, so that it is more than KEPT.
    let silence = |flow: &FlowCell| flow.silence(now) + 1;
    if lease.table.get() == FlowTable::Udp as u32 {
        return has(FlowTable::Udp).map_or(FREE, silence);
    }
    if has(FlowTable::Established).is_some() {
        return KEPT;
    }
    match has(FlowTable::HalfOpen) {
        None => FREE,
        Some(half) if half.is_proven() => KEPT,
        Some(half) => silence(half),
    }
}

/// A block of ports, and the flows that have them.
pub trait Block {
    /// How dispensable the flow with this port is at tick `now`.
    fn hold(&self, index: u32, now: u32) -> Hold;
}

/// The index of the port that is looked at as number `step` of a round.
#[inline(always)]
pub const fn candidate(hash: u64, round: u32, step: u32) -> u32 {
    let start = (mix(hash.wrapping_add(round as u64)) >> 32) as u32;
    start.wrapping_add(step) % PORTS
}

/// The index of a port for a new flow whose key has this hash: one that is free, else
/// the one whose flow without proof was silent longest. `None` when all that are looked
/// at in this round are kept.
#[inline(always)]
pub fn choose<B: Block>(block: &B, hash: u64, round: u32, now: u32) -> Option<u32> {
    let (mut best, mut longest) = (None, KEPT);
    for step in 0..TRIES {
        let index = candidate(hash, round, step);
        let hold = block.hold(index, now);
        if hold == FREE {
            return Some(index);
        }
        if hold > longest {
            (best, longest) = (Some(index), hold);
        }
    }
    best
}

/// True for a port that was lent a moment ago: its flow may not be remembered yet.
#[inline(always)]
fn is_fresh(lease: &LeaseCell, now: u32) -> bool {
    let age = now.wrapping_sub(lease.since.get());
    age <= GRACE || age > u32::MAX / 2
}
