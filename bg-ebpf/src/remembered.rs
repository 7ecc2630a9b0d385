//! The flow tables in the kernel.
//!
//! The functions with C's calling convention are global to the verifier: it
//! proves each of them once, for all arguments, instead of once on every path that
//! leads there.

use core::ptr;

use aya_ebpf::helpers::generated::{bpf_spin_lock, bpf_spin_unlock};
use bg_common::flow::{Bucket, FlowKey, FlowTable, LINES, Place, REGIONS, TableShape};
use bg_ebpf::flows::{BucketCell, Buckets, FlowCell, LineCell, Spot, choose, find, reach_out};

use crate::maps::{self, Search};

/// How often a flow is tried to be remembered while other CPUs change its region.
const TRIES: u32 = 4;

/// What [`find_line`] returns for nothing.
const NOTHING: u64 = u64::MAX;

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
}

#[inline(always)]
fn line(table: FlowTable, index: u64) -> Option<&'static LineCell> {
    let bucket = Lines.bucket(table, (index / LINES as u64) as u32)?;
    // SAFETY: the values of an array map are never freed while the program runs.
    let bucket = unsafe { &*ptr::from_ref(bucket) };
    Some(&bucket[index as usize & (LINES - 1)])
}

#[inline(always)]
fn search() -> Option<*mut Search> {
    maps::SEARCH.get_ptr_mut(0)
}

#[inline(always)]
fn place(table: FlowTable, hash: u64) -> Option<Place> {
    let shape: &TableShape = maps::SHAPES.get(table as u32)?;
    Some(shape.place(hash))
}

/// Notes the key that is sought.
#[inline(always)]
pub fn seek(key: &FlowKey) {
    let (Some(search), Some(shape)) = (search(), maps::SHAPES.get(0)) else {
        return;
    };
    // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
    unsafe {
        (*search).key = *key;
        (*search).hash = key.hash(shape.seed);
    }
}

/// The flow that is sought.
#[inline(always)]
pub fn flow(table: FlowTable) -> Option<&'static FlowCell> {
    match find_line(table as u32) {
        NOTHING => None,
        index => Some(&line(table, index)?.flow),
    }
}

/// Room for a flow that is to be remembered.
#[inline(always)]
pub fn pending() -> Option<&'static FlowCell> {
    let search = search()?;
    // SAFETY: this CPU's own value; FlowCell has Flow's layout.
    let pending = unsafe { &raw const (*search).pending };
    // SAFETY: as above.
    Some(unsafe { &*pending.cast::<FlowCell>() })
}

/// Remembers the pending flow; false when there is no room.
#[inline(always)]
pub fn remember(table: FlowTable, now: u32) -> bool {
    remember_pending(table as u32, now) != 0
}

/// Where the sought flow lies in a table: bucket times [`LINES`] plus line.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn find_line(table: u32) -> u64 {
    let table = FlowTable::from_index(table);
    let Some(search) = search() else {
        return NOTHING;
    };
    // SAFETY: this CPU's own value.
    let (key, hash) = unsafe { ((*search).key, (*search).hash) };
    let Some(place) = place(table, hash) else {
        return NOTHING;
    };
    let spot = find(&Lines, table, &key, &place);
    if !spot.is_some() {
        return NOTHING;
    }
    let line = (place.start + spot.distance()) & (LINES as u32 - 1);
    u64::from(spot.bucket()) * LINES as u64 + u64::from(line)
}

/// A [`Spot`] for the sought flow: its own, or the one a new flow takes.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn choose_line(table: u32, now: u32) -> u64 {
    let table = FlowTable::from_index(table);
    let Some(search) = search() else {
        return Spot::NONE.0;
    };
    // SAFETY: this CPU's own value.
    let (key, hash) = unsafe { ((*search).key, (*search).hash) };
    let Some(place) = place(table, hash) else {
        return Spot::NONE.0;
    };
    let held = find(&Lines, table, &key, &place);
    if held.is_some() {
        return held.0;
    }
    choose(&Lines, table, &place, now).0
}

/// Remembers the pending flow under the sought key; 0 when there is no room.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn remember_pending(table: u32, now: u32) -> u64 {
    let table = FlowTable::from_index(table);
    let (Some(search), Some(pending)) = (search(), pending()) else {
        return 0;
    };
    // SAFETY: this CPU's own value.
    let (key, hash) = unsafe { ((*search).key, (*search).hash) };
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
        let spot = Spot(choose_line(table as u32, now));
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
            line.fill(&key, pending);
        }
        // SAFETY: the lock that is held.
        unsafe { bpf_spin_unlock(&raw mut (*region).lock) };
        if unchanged {
            return 1;
        }
    }
    0
}
