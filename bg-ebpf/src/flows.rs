//! Flow tables: finding a flow, and the line for a new one.
//!
//! [`bg_common::flow`] says how a table is laid out. Looking up takes no lock.
//! Who remembers a flow counts the changes of a region, chooses a line, and then
//! writes it under the region's lock if nothing was changed in between; so no
//! key is in a table twice, and no two flows share a line. A look-up on another
//! CPU in the moment in which a line changes hands may still see the old flow's
//! key and the new flow's value, as with the kernel's own LRU tables; that only
//! happens to a flow that is over.
#![allow(unsafe_code)]

use core::{cell::Cell, mem::offset_of, ptr};

use bg_common::{
    flow::{Flow, FlowKey, FlowTable, LINES, Line, Place, bits, is_silent, patience},
    service::{Colour, CutoverWord},
};

/// Bits of one direction of a flow ([`bg_common::flow::bits`]).
pub trait Bits {
    /// True when one of `bits` is set.
    fn has(&self, bits: u8) -> bool;
    /// Sets bits; writes only a change.
    fn add(&self, bits: u8);
    /// Clears bits; writes only a change.
    fn remove(&self, bits: u8);
}

impl Bits for Cell<u8> {
    #[inline(always)]
    fn has(&self, bits: u8) -> bool {
        self.get() & bits != 0
    }

    #[inline(always)]
    fn add(&self, bits: u8) {
        let old = self.get();
        if old & bits != bits {
            self.set(old | bits);
        }
    }

    #[inline(always)]
    fn remove(&self, bits: u8) {
        let old = self.get();
        if old & bits != 0 {
            self.set(old & !bits);
        }
    }
}

/// A [`Flow`] in a table, shared with the other CPUs: fields are read and
/// written one by one, so two CPUs never lose each other's whole entry.
#[repr(C)]
#[derive(Debug, Default)]
pub struct FlowCell {
    /// See [`Flow::client_hop`].
    pub client_hop: Cell<u64>,
    /// See [`Flow::backend`].
    pub backend: Cell<u32>,
    /// See [`Flow::seen`].
    pub seen: Cell<u32>,
    /// See [`Flow::proof`].
    pub proof: Cell<u32>,
    /// See [`Flow::service`].
    pub service: Cell<u16>,
    /// See [`Flow::via`].
    pub via: Cell<u16>,
    /// See [`Flow::client_next`].
    pub client_next: Cell<u32>,
    /// See [`Flow::backend_next`].
    pub backend_next: Cell<u32>,
    /// See [`Flow::generation`].
    pub generation: Cell<u16>,
    /// See [`Flow::routed`].
    pub routed: Cell<u16>,
    /// See [`Flow::colour_spread`].
    pub colour_spread: Cell<u8>,
    /// See [`Flow::from_client`].
    pub from_client: Cell<u8>,
    /// See [`Flow::from_backend`].
    pub from_backend: Cell<u8>,
    /// Zero.
    pub zero: Cell<u8>,
}

/// A [`Line`] in a table.
#[repr(C)]
#[derive(Debug, Default)]
pub struct LineCell {
    /// See [`Line::client`].
    pub client: [Cell<u64>; 2],
    /// See [`Line::id`].
    pub id: Cell<u32>,
    /// See [`Line::reach`].
    pub reach: Cell<u32>,
    /// See [`Line::flow`].
    pub flow: FlowCell,
}

/// The lines that are searched together.
pub type BucketCell = [LineCell; LINES];

const _: () = {
    assert!(size_of::<FlowCell>() == size_of::<Flow>());
    assert!(offset_of!(FlowCell, proof) == offset_of!(Flow, proof));
    assert!(offset_of!(FlowCell, via) == offset_of!(Flow, via));
    assert!(offset_of!(FlowCell, backend_next) == offset_of!(Flow, backend_next));
    assert!(offset_of!(FlowCell, from_backend) == offset_of!(Flow, from_backend));
    assert!(size_of::<LineCell>() == size_of::<Line>());
    assert!(offset_of!(LineCell, reach) == offset_of!(Line, reach));
    assert!(offset_of!(LineCell, flow) == offset_of!(Line, flow));
};

impl FlowCell {
    /// The flow's colour.
    #[inline(always)]
    pub fn colour(&self) -> Colour {
        Colour::from_bit(self.colour_spread.get())
    }

    /// True when the word says that the flow is to be reset.
    #[inline(always)]
    pub fn is_reset(&self, word: CutoverWord) -> bool {
        word.resets(self.colour_spread.get(), self.generation.get())
    }

    /// True when the flow is over at tick `now`.
    #[inline(always)]
    pub fn is_over(&self, table: FlowTable, now: u32) -> bool {
        let patience = patience(
            table,
            self.from_client.get(),
            self.from_backend.get(),
            self.proof.get(),
        );
        is_silent(self.seen.get(), now, patience)
    }

    /// True when its client has proven to be there, in this table.
    #[inline(always)]
    pub fn is_proven(&self) -> bool {
        (self.from_client.get() | self.from_backend.get()) & bits::PROVEN != 0
    }

    /// Ticks since its last packet, at tick `now`: less than half of what fits.
    #[inline(always)]
    pub fn silence(&self, now: u32) -> u32 {
        let silent = now.wrapping_sub(self.seen.get());
        // Seen by a CPU whose clock is a tick ahead: not silent at all.
        if silent > u32::MAX / 2 - 1 { 0 } else { silent }
    }

    /// Takes over another flow, field by field.
    #[inline(always)]
    pub fn copy(&self, from: &Self) {
        self.client_hop.set(from.client_hop.get());
        self.backend.set(from.backend.get());
        self.seen.set(from.seen.get());
        self.proof.set(from.proof.get());
        self.service.set(from.service.get());
        self.via.set(from.via.get());
        self.client_next.set(from.client_next.get());
        self.backend_next.set(from.backend_next.get());
        self.generation.set(from.generation.get());
        self.routed.set(from.routed.get());
        self.colour_spread.set(from.colour_spread.get());
        self.from_client.set(from.from_client.get());
        self.from_backend.set(from.from_backend.get());
        self.zero.set(from.zero.get());
    }

    /// Takes over a flow.
    #[inline(always)]
    pub fn set(&self, flow: &Flow) {
        self.client_hop.set(flow.client_hop);
        self.backend.set(flow.backend);
        self.seen.set(flow.seen);
        self.proof.set(flow.proof);
        self.service.set(flow.service);
        self.via.set(flow.via);
        self.client_next.set(flow.client_next);
        self.backend_next.set(flow.backend_next);
        self.generation.set(flow.generation);
        self.routed.set(flow.routed);
        self.colour_spread.set(flow.colour_spread);
        self.from_client.set(flow.from_client);
        self.from_backend.set(flow.from_backend);
        self.zero.set(flow.zero);
    }

    /// The flow as it is now.
    pub const fn get(&self) -> Flow {
        Flow {
            client_hop: self.client_hop.get(),
            backend: self.backend.get(),
            seen: self.seen.get(),
            proof: self.proof.get(),
            service: self.service.get(),
            via: self.via.get(),
            client_next: self.client_next.get(),
            backend_next: self.backend_next.get(),
            generation: self.generation.get(),
            routed: self.routed.get(),
            colour_spread: self.colour_spread.get(),
            from_client: self.from_client.get(),
            from_backend: self.from_backend.get(),
            zero: self.zero.get(),
        }
    }
}

impl LineCell {
    #[inline(always)]
    fn holds(&self, key: &FlowKey) -> bool {
        self.id.get() == key.id
            && self.client[1].get() == key.client[1]
            && self.client[0].get() == key.client[0]
    }

    /// True when a new flow may have the line.
    #[inline(always)]
    fn is_free(&self, table: FlowTable, now: u32) -> bool {
        self.id.get() == 0 || self.flow.is_over(table, now)
    }

    /// True when the line is that of a flow that is neither over nor moved to another
    /// table.
    #[inline(always)]
    pub fn is_lived_in(&self, table: FlowTable, now: u32) -> bool {
        let both = self.flow.from_client.get() | self.flow.from_backend.get();
        let moved = table == FlowTable::HalfOpen && both & bits::MOVED != 0;
        !moved && !self.is_free(table, now)
    }

    /// Makes the line this flow's; a look-up in between finds nobody.
    #[inline(always)]
    pub fn fill(&self, key: &FlowKey, flow: &FlowCell) {
        // SAFETY: a cell's own pointer; volatile, so that the optimiser neither
        // drops the first store nor moves what lies between the two.
        unsafe { ptr::write_volatile(self.id.as_ptr(), 0) }
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.client[0].as_ptr(), key.client[0]) }
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.client[1].as_ptr(), key.client[1]) }
        self.flow.copy(flow);
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.id.as_ptr(), key.id) }
    }
}

/// The flow tables' lines.
pub trait Buckets {
    /// A bucket of a table.
    fn bucket(&self, table: FlowTable, index: u32) -> Option<&BucketCell>;

    /// The free lines of a bucket at tick `now`, for a search that starts at `start`.
    #[inline(always)]
    fn room(&self, table: FlowTable, index: u32, start: u32, now: u32) -> Room {
        let Some(bucket) = self.bucket(table, index) else {
            return Room::NONE;
        };
        let (mut free, mut first) = (0u64, 0u32);
        for distance in (0..LINES as u32).rev() {
            if line(bucket, start + distance).is_free(table, now) {
                (free, first) = (free + 1, distance);
            }
        }
        Room(free << 8 | u64::from(first))
    }
}

/// How many lines of a bucket are free, and how far the first of them lies from the
/// start of the search: in one word, as a BPF function can return it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Room(pub u64);

impl Room {
    /// No line is free.
    const NONE: Self = Self(0);

    #[inline(always)]
    const fn free(self) -> u64 {
        self.0 >> 8
    }

    #[inline(always)]
    const fn first(self) -> u32 {
        self.0 as u32 & (LINES as u32 - 1)
    }
}

/// A line of a table, in one word: bucket, and how far it lies from the start of
/// the search (0 to 7 in the home bucket, 8 to 15 in the other one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Spot(pub u64);

/// What a search looks at, at most: both buckets.
const FAR: u32 = 2 * LINES as u32;

impl Spot {
    /// No line.
    pub const NONE: Self = Self(u64::MAX);

    #[inline(always)]
    const fn new(bucket: u32, distance: u32) -> Self {
        Self((bucket as u64) << 8 | distance as u64)
    }

    /// True unless it is [`Spot::NONE`].
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.0 != u64::MAX
    }

    /// Index of the bucket.
    #[inline(always)]
    pub const fn bucket(self) -> u32 {
        (self.0 >> 8) as u32
    }

    /// How far from the start of the search.
    #[inline(always)]
    pub const fn distance(self) -> u32 {
        self.0 as u32 & (FAR - 1)
    }

    /// The line in its bucket, for a search that starts at `start`.
    #[inline(always)]
    pub fn line(self, bucket: &BucketCell, start: u32) -> &LineCell {
        line(bucket, start + self.0 as u32)
    }
}

#[inline(always)]
fn line(bucket: &BucketCell, index: u32) -> &LineCell {
    &bucket[(index & (LINES as u32 - 1)) as usize]
}

/// The line at which the search for a key starts, if it is the key's: most flows lie
/// there, and are found without a call.
#[inline(always)]
pub fn first<'a>(home: &'a BucketCell, key: &FlowKey, start: u32) -> Option<&'a LineCell> {
    let first = line(home, start);
    first.holds(key).then_some(first)
}

/// Finds the line of a key.
#[inline(always)]
pub fn find<B: Buckets>(buckets: &B, table: FlowTable, key: &FlowKey, place: &Place) -> Spot {
    let Some(home) = buckets.bucket(table, place.home) else {
        return Spot::NONE;
    };
    let first = line(home, place.start);
    if first.holds(key) {
        return Spot::new(place.home, 0);
    }
    let reach = first.reach.get();
    for distance in 1..LINES as u32 {
        if distance >= reach {
            return Spot::NONE;
        }
        if line(home, place.start + distance).holds(key) {
            return Spot::new(place.home, distance);
        }
    }
    let Some(other) = buckets.bucket(table, place.other) else {
        return Spot::NONE;
    };
    for distance in LINES as u32..FAR {
        if distance >= reach {
            return Spot::NONE;
        }
        if line(other, place.start + distance).holds(key) {
            return Spot::new(place.other, distance);
        }
    }
    Spot::NONE
}

/// A home bucket with so many free lines takes a new flow without a look at the other
/// one.
const ROOMY: u64 = 4;

/// Chooses a line for a key that is not there yet, at tick `now`. In a table that
/// evicts, the first free one of the home bucket, or the one that was silent longest.
/// Else a free one of the emptier of both buckets, so that all of them fill up alike
/// (the power of two choices; Azar and others, 1999).
#[inline(always)]
pub fn choose<B: Buckets>(buckets: &B, table: FlowTable, place: &Place, now: u32) -> Spot {
    if table.evicts() {
        return longest_silent(buckets, table, place, now);
    }
    let home = buckets.room(table, place.home, place.start, now);
    if home.free() >= ROOMY {
        return Spot::new(place.home, home.first());
    }
    let other = buckets.room(table, place.other, place.start, now);
    if other.free() > home.free() {
        Spot::new(place.other, LINES as u32 + other.first())
    } else if home.free() > 0 {
        Spot::new(place.home, home.first())
    } else {
        Spot::NONE
    }
}

#[inline(always)]
fn longest_silent<B: Buckets>(buckets: &B, table: FlowTable, place: &Place, now: u32) -> Spot {
    let Some(home) = buckets.bucket(table, place.home) else {
        return Spot::NONE;
    };
    let (mut best, mut longest) = (0, 0);
    for distance in 0..LINES as u32 {
        let line = line(home, place.start + distance);
        if line.is_free(table, now) {
            return Spot::new(place.home, distance);
        }
        // What is proven goes after all that is not.
        let first = if line.flow.is_proven() {
            0
        } else {
            u32::MAX / 2
        };
        let silent = line.flow.silence(now) + first;
        if silent > longest {
            (best, longest) = (distance, silent);
        }
    }
    Spot::new(place.home, best)
}

/// Lets searches that start at `place` look as far as `spot`. To be done before the
/// line there is filled.
#[inline(always)]
pub fn reach_out(home: &BucketCell, place: &Place, spot: Spot) {
    let first = line(home, place.start);
    if first.reach.get() <= spot.distance() {
        first.reach.set(spot.distance() + 1);
    }
}
