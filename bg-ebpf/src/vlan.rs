//! VLAN tags: taken off where a frame comes in and put on where it leaves, so that
//! everything in between sees IP right behind Ethernet, at constant offsets.

use bg_common::{
    port::{Port, Tags},
    reason::Reason,
};

use crate::{
    packet::Packet,
    pipeline::{Exit, drop, pass},
    tables::Tables,
};

/// Both MACs: what stands in front of the tags.
type Macs = [[u8; 4]; 3];

const MACS: usize = size_of::<Macs>();
/// Length of a tag, bytes.
const TAG: usize = 4;

/// Takes the tags off a tagged frame, and notes them. A frame that stays as it is
/// gets its verdict here: more tags than two, or a VLAN that the host has no device
/// for.
#[inline(never)]
pub(crate) fn enter<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Exit {
    let tags = match read(packet) {
        Ok(tags) => tags,
        Err(reason) => return pass(reason),
    };
    let port = Port::new(packet.ingress(), tags.vlan());
    if port.vlan != Tags::NONE && tables.slot(&port).is_none() {
        return pass(Reason::Vlan);
    }
    let Some(macs) = packet.header::<Macs>(0).copied() else {
        return pass(Reason::Truncated);
    };
    let shrunk = if tags.count() == 1 {
        packet.shrink(TAG)
    } else {
        packet.shrink(2 * TAG)
    };
    match packet.header_mut::<Macs>(0).filter(|_| shrunk) {
        Some(front) => *front = macs,
        None => return drop(Reason::Inconsistent),
    }
    packet.tag(tags);
    Exit::GO_ON
}

#[inline(always)]
fn read<P: Packet>(packet: &P) -> Result<Tags, Reason> {
    let word = |at| packet.header::<[u8; 4]>(at).ok_or(Reason::Truncated);
    let (outer, next) = (word(MACS)?, word(MACS + TAG)?);
    let tags = u64::from(u32::from_be_bytes(*outer)) << 32;
    if !Tags::is_tag([next[0], next[1]]) {
        return Ok(Tags(tags));
    }
    let last = word(MACS + 2 * TAG)?;
    if Tags::is_tag([last[0], last[1]]) {
        return Err(Reason::Vlan);
    }
    Ok(Tags(tags | u64::from(u32::from_be_bytes(*next))))
}

/// Puts tags on a frame on its way out: those it came with where it goes back or
/// to the stack, else those of the slot it leaves by, with the priorities it came
/// with.
#[inline(never)]
pub(crate) fn exit<P: Packet, T: Tables>(packet: &mut P, tables: &T, exit: Exit) -> Exit {
    let came = packet.tags();
    let tags = match exit.slot() {
        Some(slot) => match tables.interface(slot) {
            Some(interface) => interface.tags.with_priority_of(came),
            None => return drop(Reason::Inconsistent),
        },
        None if exit.is_drop() => return exit,
        None => came,
    };
    match put(packet, tags) {
        Some(()) => exit,
        None => drop(Reason::Inconsistent),
    }
}

#[inline(always)]
fn put<P: Packet>(packet: &mut P, tags: Tags) -> Option<()> {
    let macs = *packet.header::<Macs>(0)?;
    let grown = match tags.count() {
        0 => return Some(()),
        1 => packet.grow(TAG),
        _ => packet.grow(2 * TAG),
    };
    if !grown {
        return None;
    }
    *packet.header_mut::<Macs>(0)? = macs;
    *packet.header_mut::<[u8; 4]>(MACS)? = ((tags.0 >> 32) as u32).to_be_bytes();
    if tags.count() == 2 {
        *packet.header_mut::<[u8; 4]>(MACS + TAG)? = (tags.0 as u32).to_be_bytes();
    }
    Some(())
}
