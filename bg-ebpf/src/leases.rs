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
    snat::{CANDIDATES, GRACE, HALF, LATE, Lease, RESERVED, RUN, STUCK},
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
        self.since.set(now);
        self.table.set(table as u32);
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.id.as_ptr(), key.id) }
        // Last: who looked at a half of this has seen the turn before.
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.turn.as_ptr(), self.turn.get().wrapping_add(1)) }
    }
}

/// How dispensable the flow is that has a port: [`FREE`] when it is over, [`KEPT`]
/// when the port must not be taken from it, and between the two the silence of a
/// handshake that has not ended.
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
    let table = lease.table.get();
    if table == RESERVED {
        return KEPT;
    }
    if lease.id.get() == 0 {
        return FREE;
    }
    if is_fresh(lease, now) {
        return KEPT;
    }
    let has = |table| find(table).filter(|flow| flow.via.get() == via && !flow.is_over(table, now));
    if table == FlowTable::Udp as u32 {
        // Nothing in a datagram tells a late answer from one to the next flow.
        let silent = match find(FlowTable::Udp).filter(|flow| flow.via.get() == via) {
            Some(flow) => flow.silence(now).saturating_sub(flow.proof.get()),
            None => now.wrapping_sub(lease.since.get()),
        };
        return if silent > LATE { FREE } else { KEPT };
    }
    if has(FlowTable::Established).is_some() {
        return KEPT;
    }
    match has(FlowTable::HalfOpen) {
        None => FREE,
        Some(half) if half.is_proven() => KEPT,
        // 1 at the least, so that it is more than KEPT.
        Some(half) => half.silence(now) + 1,
    }
}

/// The index of the port that a new flow, whose key has this hash and which is to be in
/// `table`, may have as number `n`, and how dispensable it must be. First those that
/// are free; when none of [`CANDIDATES`] was, the same again for one whose handshake
/// got no further for [`STUCK`].
#[inline(always)]
pub const fn candidate(hash: u64, table: FlowTable, n: u32) -> (u32, Hold) {
    let least = if n < CANDIDATES { FREE } else { STUCK };
    let n = n % CANDIDATES;
    // Runs of neighbours: they share cache lines.
    let start = (mix(hash.wrapping_add((n / RUN) as u64)) >> 32) as u32;
    let index = start.wrapping_add(n % RUN) % HALF;
    match table {
        FlowTable::Udp => (HALF + index, least),
        FlowTable::Established | FlowTable::HalfOpen => (index, least),
    }
}

/// True for a port that was lent a moment ago: its flow may not be remembered yet.
#[inline(always)]
fn is_fresh(lease: &LeaseCell, now: u32) -> bool {
    let age = now.wrapping_sub(lease.since.get());
    age <= GRACE || age > u32::MAX / 2
}

#[cfg(test)]
mod tests {
    use bg_common::{flow::Flow, snat::PORTS};

    use super::*;

    const NOW: u32 = 1_000_000;
    const VIA: u16 = 2000;

    /// How dispensable a handshake is that was silent for so long.
    fn of_handshake(silence: u32) -> Hold {
        let lease = LeaseCell::default();
        lease.lend(
            &FlowKey::new([1, 2], [3, 4], 5),
            FlowTable::HalfOpen,
            NOW - 100,
        );
        let half = FlowCell::default();
        half.set(&Flow {
            seen: NOW - silence,
            via: VIA,
            ..Flow::default()
        });
        let find = |table| (table == FlowTable::HalfOpen).then_some(&half);
        hold(&lease, VIA, NOW, find)
    }

    #[test]
    fn a_handshake_is_stuck_after_a_third_of_a_second() {
        for (silence, is_stuck) in [(0, false), (STUCK - 2, false), (STUCK - 1, true)] {
            let hold = of_handshake(silence);
            assert!(KEPT < hold && hold < FREE, "{silence}: {hold}");
            assert_eq!(hold >= STUCK, is_stuck, "{silence}: {hold}");
        }
        let ms = |ticks: u32| bg_common::abi::tick_ns(ticks) / 1_000_000;
        assert!((250..400).contains(&ms(STUCK)), "{} ms", ms(STUCK));
    }

    #[test]
    fn candidates_are_of_their_tables_half_and_stuck_ones_come_last() {
        for hash in 0..200 {
            let hash = mix(hash);
            for n in 0..2 * CANDIDATES {
                let (tcp, least) = candidate(hash, FlowTable::HalfOpen, n);
                let (udp, same) = candidate(hash, FlowTable::Udp, n);
                assert!(tcp < HALF && (HALF..PORTS).contains(&udp));
                let wanted = if n < CANDIDATES { FREE } else { STUCK };
                assert_eq!((least, same), (wanted, wanted));
            }
        }
    }
}
