//! The flow tables in the kernel.
//!
//! The functions with C's calling convention are global to the verifier: it
//! proves each of them once, for all arguments, instead of once on every path that
//! leads there.

use core::ptr;

use aya_ebpf::helpers::generated::{bpf_spin_lock, bpf_spin_unlock};
use bg_common::{
    flow::{Bucket, FlowKey, FlowTable, MARK_ROW, Place, REGIONS, TableShape, start},
    monitor::Pressure,
};
use bg_ebpf::{
    flows::{BucketCell, Buckets, FlowCell, Room, Spot, choose, find, first, reach_out},
    tables::Scratch,
};

use crate::maps;

/// How often a flow is tried to be remembered while other CPUs change its region.
const TRIES: u32 = 4;

struct Lines;

impl Buckets for Lines {
    #[inline(always)]
    fn bucket(&self, table: FlowTable, index: u32) -> Option<&BucketCell> {
        let bucket: *const Bucket = match table {
            FlowTable::Established => maps::FLOWS.get_ptr(index),
            FlowTable::HalfOpen => maps::HALF_OPEN.get_ptr(index),
            FlowTable::Udp => maps::UDP.get_ptr(index),
        }?;
        // SAFETY: an array's values live as long as the program; BucketCell has
        // Bucket's layout, and cells allow the writes of other CPUs.
        Some(unsafe { &*bucket.cast::<BucketCell>() })
    }

    #[inline(always)]
    fn room(&self, table: FlowTable, index: u32, start: u32, now: u32) -> Room {
        Room(room_in(table as u32, index, start, now))
    }
}

/// This CPU's memory for the packet at hand.
#[inline(always)]
pub fn scratch() -> Option<*mut Scratch> {
    maps::SCRATCH.get_ptr_mut(0)
}

#[inline(always)]
fn place(table: FlowTable, hash: u64) -> Option<Place> {
    let shape: &TableShape = maps::SHAPES.get(table as u32)?;
    Some(shape.place(hash))
}

/// Notes the key that is sought, in this CPU's own scratch memory.
#[inline(always)]
pub fn seek(scratch: *mut Scratch, key: &FlowKey) {
    let seed = maps::SHAPES.get(0).map_or(0, |shape| shape.seed);
    // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
    unsafe {
        (*scratch).key = *key;
        (*scratch).hash = key.hash(seed);
    }
}

/// Reads from each line of the sought key's home bucket, and does nothing with it: lines
/// that are in no cache come side by side, and beside what the processor does next,
/// instead of one after the other when they are looked at. The result means nothing.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn fetch(table: u32) -> u64 {
    let table = FlowTable::from_index(table);
    let (Some(scratch), Some(shape)) = (scratch(), maps::SHAPES.get(table as u32)) else {
        return 0;
    };
    // SAFETY: this CPU's own value.
    let home = shape.home(unsafe { (*scratch).hash });
    if let Some(bucket) = Lines.bucket(table, home) {
        for line in bucket {
            // SAFETY: a word of a map value; volatile, so that it is read though nobody
            // wants it.
            unsafe { ptr::read_volatile(line.id.as_ptr()) };
        }
    }
    1
}

/// The flow that is sought. A flow of the half-open table is looked for once or twice in
/// its life, the others with every packet: for them the first line is looked at here.
#[inline(always)]
pub fn flow(scratch: *mut Scratch, table: FlowTable) -> Option<&'static FlowCell> {
    // SAFETY: this CPU's own value.
    let (key, hash) = unsafe { (&(*scratch).key, (*scratch).hash) };
    if table != FlowTable::HalfOpen {
        let shape: &TableShape = maps::SHAPES.get(table as u32)?;
        let home = Lines.bucket(table, shape.home(hash))?;
        // SAFETY: the values of an array map are never freed while the program runs.
        let home = unsafe { &*ptr::from_ref(home) };
        if let Some(line) = first(home, key, start(hash)) {
            return Some(&line.flow);
        }
    }
    flow_by_call(scratch, table)
}

/// The same, with little stack: for those who call from deep down.
#[inline(always)]
pub fn flow_by_call(scratch: *mut Scratch, table: FlowTable) -> Option<&'static FlowCell> {
    let spot = Spot(find_line(table as u32));
    if !spot.is_some() {
        return None;
    }
    let bucket = Lines.bucket(table, spot.bucket())?;
    // SAFETY: the values of an array map are never freed while the program runs.
    let bucket = unsafe { &*ptr::from_ref(bucket) };
    // SAFETY: this CPU's own value; read here, as it would be kept over the call.
    let hash = unsafe { (*scratch).hash };
    Some(&spot.line(bucket, start(hash)).flow)
}

/// Room for a flow that is to be remembered, in this CPU's own scratch memory.
#[inline(always)]
pub fn pending(scratch: *mut Scratch) -> &'static FlowCell {
    // SAFETY: this CPU's own value; FlowCell has Flow's layout.
    unsafe { &*(&raw mut (*scratch).pending).cast::<FlowCell>() }
}

/// A copy of a flow that was found, in this CPU's own scratch memory.
#[inline(always)]
pub fn copy(scratch: *mut Scratch, table: FlowTable, flow: &FlowCell) -> &'static FlowCell {
    let index = table as usize;
    // SAFETY: this CPU's own value; FlowCell has Flow's layout, and tables have indices
    // 0 to 2.
    let copy = unsafe {
        let copies = (&raw mut (*scratch).copies).cast::<FlowCell>();
        &*copies.add(index)
    };
    copy.copy(flow);
    copy
}

/// True when the sought flow has a line, or could have one.
#[inline(always)]
pub fn has_room(table: FlowTable, now: u32) -> bool {
    Spot(find_line(table as u32)).is_some() || Spot(choose_line(table as u32, now)).is_some()
}

/// Remembers the pending flow; false when there is no room.
#[inline(always)]
pub fn remember(table: FlowTable, now: u32) -> bool {
    remember_pending(table as u32, now) != 0
}

/// Where the sought flow lies in a table: a [`Spot`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn find_line(table: u32) -> u64 {
    let table = FlowTable::from_index(table);
    let Some(scratch) = scratch() else {
        return Spot::NONE.0;
    };
    // SAFETY: this CPU's own value.
    let (key, hash) = unsafe { (&(*scratch).key, (*scratch).hash) };
    match place(table, hash) {
        Some(place) => find(&Lines, table, key, &place).0,
        None => Spot::NONE.0,
    }
}

/// The free lines of a bucket: a [`Room`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn room_in(table: u32, index: u32, start: u32, now: u32) -> u64 {
    struct Bare;
    impl Buckets for Bare {
        #[inline(always)]
        fn bucket(&self, table: FlowTable, index: u32) -> Option<&BucketCell> {
            Lines.bucket(table, index)
        }
    }
    Bare.room(FlowTable::from_index(table), index, start, now).0
}

/// A [`Spot`] for the sought flow, which is not there yet. Counts who has to go.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn choose_line(table: u32, now: u32) -> u64 {
    let table = FlowTable::from_index(table);
    let Some(scratch) = scratch() else {
        return Spot::NONE.0;
    };
    // SAFETY: this CPU's own value.
    let Some(place) = place(table, unsafe { (*scratch).hash }) else {
        return Spot::NONE.0;
    };
    let spot = choose(&Lines, table, &place, now);
    if !spot.is_some() {
        press(table, |pressure| pressure.full += 1);
    } else if table.evicts()
        && let Some(bucket) = Lines.bucket(table, spot.bucket())
        && spot.line(bucket, place.start).is_lived_in(table, now)
    {
        press(table, |pressure| pressure.evicted += 1);
    }
    spot.0
}

/// Remembers the pending flow under the sought key; 0 when there is no room.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn remember_pending(table: u32, now: u32) -> u64 {
    let table = FlowTable::from_index(table);
    let Some(scratch) = scratch() else {
        return 0;
    };
    let pending = pending(scratch);
    // SAFETY: this CPU's own value.
    let (key, hash) = unsafe { (&(*scratch).key, (*scratch).hash) };
    let Some(place) = place(table, hash) else {
        return 0;
    };
    let index = table as u32 * REGIONS + place.region;
    let (Some(region), Some(home)) = (
        maps::REGIONS.get_ptr_mut(index),
        Lines.bucket(table, place.home),
    ) else {
        return 0;
    };
    for _ in 0..TRIES {
        // SAFETY: an aligned word of a map value; volatile, so that it is read
        // before the line is chosen.
        let before = unsafe { ptr::read_volatile(&raw const (*region).changes) };
        let mut spot = Spot(find_line(table as u32));
        if !spot.is_some() {
            spot = Spot(choose_line(table as u32, now));
        }
        if !spot.is_some() {
            return 0;
        }
        let Some(bucket) = Lines.bucket(table, spot.bucket()) else {
            return 0;
        };
        let line = spot.line(bucket, place.start);
        // SAFETY: the lock of a map value.
        unsafe { bpf_spin_lock(&raw mut (*region).lock) };
        // SAFETY: as above; who changes it holds the lock.
        let unchanged = unsafe { ptr::read_volatile(&raw const (*region).changes) } == before;
        if unchanged {
            // SAFETY: as above.
            unsafe { ptr::write_volatile(&raw mut (*region).changes, before.wrapping_add(1)) };
            reach_out(home, &place, spot);
            line.fill(key, pending);
        }
        // SAFETY: the lock that is held.
        unsafe { bpf_spin_unlock(&raw mut (*region).lock) };
        if unchanged {
            mark(table, spot.bucket());
            return 1;
        }
    }
    0
}

/// Marks that a bucket has a flow: after its line was written.
#[inline(always)]
fn mark(table: FlowTable, bucket: u32) {
    let Some(shape) = maps::SHAPES.get(table as u32) else {
        return;
    };
    let mark = shape.mark(table, bucket);
    if let Some(row) = maps::MARKS.get_ptr_mut(mark / MARK_ROW) {
        // SAFETY: a byte of a map value, of which all who write it write the same.
        unsafe { ptr::write_volatile(&raw mut (*row)[(mark % MARK_ROW) as usize], 1) }
    }
}

/// Counts what befalls a table.
#[inline(always)]
fn press(table: FlowTable, count: impl FnOnce(&mut Pressure)) {
    if maps::is_dry_run() {
        return;
    }
    if let Some(pressure) = maps::PRESSURE.get_ptr_mut(table as u32) {
        // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
        count(unsafe { &mut *pressure });
    }
}
