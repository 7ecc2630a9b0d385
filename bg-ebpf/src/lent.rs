//! The blocks of source ports in the kernel. As in [`crate::remembered`], functions
//! with C's calling convention are proven once.

use core::ptr;

use aya_ebpf::helpers::generated::{bpf_spin_lock, bpf_spin_unlock};
use bg_common::{
    flow::{FlowTable, REGIONS},
    snat::{CANDIDATES, port},
};
use bg_ebpf::leases::{KEPT, LeaseCell, candidate, hold};

use crate::{
    maps::{self, Region},
    remembered,
};

const TABLES: u32 = FlowTable::ALL.len() as u32;

/// Who has a port.
#[inline(always)]
fn lease(block: u32, index: u32) -> Option<&'static LeaseCell> {
    let lease = maps::LEASES.get_value_ptr_mut(block, &index)?;
    // SAFETY: an array's values live as long as the program; LeaseCell has Lease's
    // layout, and cells allow the writes of other CPUs.
    Some(unsafe { &*lease.cast::<LeaseCell>() })
}

/// How dispensable the flow with a port is: a [`bg_ebpf::leases::Hold`]. Seeks that flow.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn hold_of(block: u32, index: u32, now: u32) -> u64 {
    let (Some(scratch), Some(lease)) = (remembered::scratch(), lease(block, index)) else {
        return u64::from(KEPT);
    };
    remembered::seek(scratch, &lease.key());
    let find = |table| remembered::flow_by_call(scratch, table);
    u64::from(hold(lease, port(index), now, find))
}

/// Lends the sought flow, which is to be in `table`, a port of a block: the port, host
/// order, or 0.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn lend_port(block: u32, table: u32, now: u32) -> u64 {
    let Some(scratch) = remembered::scratch() else {
        return 0;
    };
    // SAFETY: this CPU's own value.
    unsafe { (*scratch).lessee = (*scratch).key }
    // SAFETY: this CPU's own value.
    let hash = unsafe { (*scratch).hash };
    let mut lent = 0;
    for n in 0..2 * CANDIDATES {
        let (index, least) = candidate(hash, FlowTable::from_index(table), n);
        let Some(lease) = lease(block, index) else {
            break;
        };
        // SAFETY: an aligned word of a map value; volatile, so that it is read before
        // the flow is looked at.
        let turn = unsafe { ptr::read_volatile(lease.turn.as_ptr()) };
        if hold_of(block, index, now) < u64::from(least) {
            continue;
        }
        if maps::is_dry_run() || take_port(block, index, table, turn, now) != 0 {
            lent = u64::from(port(index));
            break;
        }
    }
    // SAFETY: this CPU's own value; no reference into it lives.
    let key = unsafe { (*scratch).lessee };
    remembered::seek(scratch, &key);
    lent
}

/// Takes a port for the lessee, whose flow is to be in `table`, unless the lease has
/// changed since its `turn`: 0 then.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn take_port(block: u32, index: u32, table: u32, turn: u32, now: u32) -> u64 {
    let (Some(scratch), Some(lease), Some(region)) =
        (remembered::scratch(), lease(block, index), region(index))
    else {
        return 0;
    };
    // SAFETY: this CPU's own value.
    let key = unsafe { &(*scratch).lessee };
    // SAFETY: the lock of a map value.
    unsafe { bpf_spin_lock(&raw mut (*region).lock) };
    // SAFETY: as above; who changes it holds the lock.
    let unchanged = unsafe { ptr::read_volatile(lease.turn.as_ptr()) } == turn;
    if unchanged {
        lease.lend(key, FlowTable::from_index(table), now);
    }
    // SAFETY: the lock that is held.
    unsafe { bpf_spin_unlock(&raw mut (*region).lock) };
    u64::from(unchanged)
}

/// Whether the sought flow has a port.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn has_port(block: u32, index: u32) -> u64 {
    let (Some(scratch), Some(lease)) = (remembered::scratch(), lease(block, index)) else {
        return 0;
    };
    // SAFETY: this CPU's own value.
    u64::from(lease.is_of(unsafe { &(*scratch).key }))
}

/// Seeks the flow that has a port, if it is one of a listener; 0 where there is none.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn seek_lessee(block: u32, index: u32, listener: u32) -> u64 {
    let (Some(scratch), Some(lease)) = (remembered::scratch(), lease(block, index)) else {
        return 0;
    };
    let key = lease.key();
    if u32::from(key.listener()) != listener {
        return 0;
    }
    remembered::seek(scratch, &key);
    1
}

/// Keeps a port for the sought flow; 0 when the port is another's.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn keep_port(block: u32, index: u32) -> u64 {
    let (Some(scratch), Some(lease), Some(region)) =
        (remembered::scratch(), lease(block, index), region(index))
    else {
        return 0;
    };
    // SAFETY: this CPU's own value.
    let key = unsafe { &(*scratch).key };
    // SAFETY: the lock of a map value.
    unsafe { bpf_spin_lock(&raw mut (*region).lock) };
    let ours = lease.is_of(key);
    if ours {
        lease.keep();
    }
    // SAFETY: the lock that is held.
    unsafe { bpf_spin_unlock(&raw mut (*region).lock) };
    u64::from(ours)
}

/// The lock of a port.
#[inline(always)]
fn region(index: u32) -> Option<*mut Region> {
    maps::REGIONS.get_ptr_mut(TABLES * REGIONS + index % REGIONS)
}
