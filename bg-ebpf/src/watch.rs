//! Telling who watches of packets: which they were, and their verdicts.
//!
//! While nobody watches, a packet pays for one look at the `MONITOR` map and for
//! three stores to memory of its CPU's own. What is told of a flow is looked up
//! after the verdict. Nobody is woken: the daemon looks at the ring by itself.

use core::ptr;

use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_ns,
};
use bg_common::{
    flow::FlowTable,
    key::UDP,
    monitor::{NONE, Sighting, TELLS, action},
    reason::Reason,
    service::Colour,
};
use bg_ebpf::{
    parse::Segment,
    pipeline::{Action, Verdict},
    tables::{Address, Noted, Scratch},
};

use crate::{maps, remembered, tick};

/// `BPF_RB_NO_WAKEUP`.
const NO_WAKEUP: u64 = 1;

/// Before a packet: the reasons that somebody watches, and whether servers are listened to. What was noted of the packet
/// before is void then.
#[inline(always)]
pub fn begin(scratch: *mut Scratch) -> u64 {
    let Some(watch) = maps::MONITOR.get_ptr(0) else {
        return 0;
    };
    // SAFETY: an aligned word of a map value; volatile, so that it is one load.
    let watched = unsafe { ptr::read_volatile(&raw const (*watch).reasons) };
    if watched != 0 {
        // SAFETY: this CPU's own value, and XDP is not preempted by XDP; volatile, as
        // the stores in `service`, `colour` and `family`.
        unsafe {
            let noted = noted(scratch);
            ptr::write_volatile(&raw mut (*noted).family, 0);
            ptr::write_volatile(&raw mut (*noted).owner, 0);
            ptr::write_volatile(&raw mut (*scratch).key.id, 0);
        }
    }
    watched
}

/// After it: tells of it if its reason is watched.
#[inline(always)]
pub fn end(watched: u64, verdict: &Verdict, ingress: u32) {
    if watched & 1 << verdict.reason as u32 == 0 {
        return;
    }
    let (action, slot) = match verdict.action {
        Action::Pass => (action::PASS, 0),
        Action::Drop => (action::DROP, 0),
        Action::Transmit => (action::TRANSMIT, 0),
        Action::Redirect(slot) => (action::REDIRECT, slot),
    };
    tell(verdict.reason as u32, u32::from(action), slot, ingress);
}

/// Notes whose word a packet reads.
#[inline(always)]
pub fn service(scratch: *mut Scratch, service: u32) {
    // SAFETY: as in `begin`.
    unsafe { ptr::write_volatile(&raw mut (*noted(scratch)).owner, u64::from(service) + 1) }
}

/// Notes what a packet is counted for.
#[inline(always)]
pub fn colour(scratch: *mut Scratch, service: u32, colour: Colour) {
    let owner = (u64::from(service) + 1) | (colour as u64 + 1) << 32;
    // SAFETY: as in `begin`.
    unsafe { ptr::write_volatile(&raw mut (*noted(scratch)).owner, owner) }
}

/// The service and the colour (0 or 1) that a packet was counted for, if it was.
#[inline(always)]
pub fn owner(scratch: *mut Scratch) -> Option<(u32, u32)> {
    // SAFETY: as in `begin`.
    let owner = unsafe { ptr::read_volatile(&raw const (*noted(scratch)).owner) };
    let colour = ((owner >> 32) as u32).checked_sub(1)?;
    Some(((owner as u32).wrapping_sub(1), colour & 1))
}

/// Notes that a packet's segment is kept.
#[inline(always)]
pub fn family<A: Address>(scratch: *mut Scratch) {
    // SAFETY: as in `begin`.
    unsafe { ptr::write_volatile(&raw mut (*noted(scratch)).family, u32::from(A::FAMILY)) }
}

#[inline(always)]
const fn noted(scratch: *mut Scratch) -> *mut Noted {
    // SAFETY: a field of a valid map value.
    unsafe { &raw mut (*scratch).noted }
}

/// Tells of this CPU's packet. Returns 0: a function that is global to the verifier
/// returns a number.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn tell(reason: u32, action: u32, slot: u32, ingress: u32) -> u64 {
    let (Some(watch), Some(scratch)) = (maps::MONITOR.get(0), maps::SCRATCH.get_ptr_mut(0)) else {
        return 0;
    };
    let noted = noted(scratch);
    // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
    let (family, owner) = unsafe { ((*noted).family, (*noted).owner) };
    let (service, colour) = (owner as u32, (owner >> 32) as u8);
    if watch.service != 0 && watch.service != service {
        return 0;
    }
    let sample = if watch.sample == 0 { 1 } else { watch.sample };
    // SAFETY: the helper takes nothing.
    if sample > 1 && unsafe { bpf_get_prandom_u32() }.checked_rem(sample) != Some(0) {
        return 0;
    }
    let now = tick();
    // SAFETY: as above.
    let told = unsafe {
        if (*noted).tick != now {
            (*noted).tick = now;
            (*noted).told = 0;
        }
        (*noted).told += 1;
        (*noted).told
    };
    if told > TELLS {
        return lose();
    }
    // SAFETY: as above; nobody else refers to it.
    let sighting = unsafe { &mut (*noted).sighting };
    // SAFETY: the helpers take nothing.
    let (at_ns, cpu) = unsafe { (bpf_ktime_get_ns(), bpf_get_smp_processor_id() as u32) };
    sighting.at_ns = at_ns;
    sighting.cpu = cpu;
    // SAFETY: as above.
    unsafe {
        sighting.tags = (*scratch).tags.0;
        sighting.key = (*scratch).key;
    }
    sighting.reason = reason as u8;
    sighting.action = action as u8;
    sighting.slot = slot;
    sighting.ingress = ingress;
    sighting.sample = sample;
    sighting.service = if service == 0 { NONE } else { service - 1 };
    sighting.colour = colour;
    // SAFETY: as above; the segments are plain integers, valid also when never written.
    let (v4, v6) = unsafe { (&(*scratch).v4, &(*scratch).v6) };
    match family {
        4 => describe(sighting, v4),
        6 => describe(sighting, v6),
        _ => {
            sighting.family = 0;
            sighting.tags = 0;
            sighting.protocol = 0;
            sighting.source = [0; 16];
            sighting.destination = [0; 16];
        }
    }
    remember(scratch, sighting, now);
    // By reference: a copy would lie on the stack.
    let sighting: &Sighting = sighting;
    if maps::SIGHTINGS.output(sighting, NO_WAKEUP).is_err() {
        return lose();
    }
    0
}

/// Counts what could not be told.
#[inline(always)]
fn lose() -> u64 {
    if let Some(lost) = maps::LOST.get_ptr_mut(0) {
        // SAFETY: this CPU's own value, and XDP is not preempted by XDP.
        unsafe { *lost += 1 }
    }
    0
}

/// Takes over what a packet says.
#[inline(always)]
fn describe<A: Address>(sighting: &mut Sighting, segment: &Segment<A>) {
    sighting.family = A::FAMILY;
    sighting.source = segment.source.wide();
    sighting.destination = segment.destination.wide();
    sighting.source_port = segment.source_port;
    sighting.destination_port = segment.destination_port;
    sighting.protocol = segment.protocol;
    sighting.hops = segment.hops;
    sighting.length = segment.length;
    sighting.sequence = segment.tcp.sequence;
    sighting.acknowledgement = segment.tcp.acknowledgement;
    sighting.flags = segment.tcp.flags;
    sighting.part = segment.part as u8;
}

/// Takes over what is remembered of the flow that was sought. A SYN's flow is the
/// half-open one, also while an old one has the same addresses and ports.
#[inline(always)]
fn remember(scratch: *mut Scratch, sighting: &mut Sighting, now: u32) {
    sighting.table = 0;
    sighting.backend = NONE;
    sighting.seen = 0;
    sighting.generation = 0;
    sighting.colour_spread = 0;
    sighting.from_client = 0;
    sighting.from_backend = 0;
    if sighting.key.id == 0 {
        return;
    }
    let new = sighting.reason == Reason::ForwardedNew as u8;
    let tables = match sighting.protocol {
        UDP => [FlowTable::Udp, FlowTable::Udp],
        _ if new => [FlowTable::HalfOpen, FlowTable::Established],
        _ => [FlowTable::Established, FlowTable::HalfOpen],
    };
    for table in tables {
        let Some(flow) = remembered::flow_by_call(scratch, table) else {
            continue;
        };
        if flow.is_over(table, now) {
            continue;
        }
        sighting.table = table as u8 + 1;
        sighting.backend = flow.backend.get();
        sighting.seen = flow.seen.get();
        sighting.generation = flow.generation.get();
        sighting.colour_spread = flow.colour_spread.get();
        sighting.from_client = flow.from_client.get();
        sighting.from_backend = flow.from_backend.get();
        return;
    }
}
