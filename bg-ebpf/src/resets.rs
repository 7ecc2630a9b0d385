//! What a cut flow's ends hear: TCP resets made of the packet at hand.

use bg_common::{
    flow::FlowKey,
    reason::Reason,
    service::{Colour, ColourStats, CutoverWord, NextHop, ReturnPath},
};

use crate::{
    flows::FlowCell,
    packet::{Ethernet, Packet, tcp_flag},
    parse::{Segment, part},
    pipeline::{Exit, drop, leave, transmit},
    rewrite::{self, Network, Reset},
    tables::Tables,
};

/// Answers a segment of a cut flow with a RST, out of where it came in.
#[inline(always)]
pub(crate) fn sender<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    (service, colour, word): (u32, Colour, CutoverWord),
    reason: Reason,
) -> Exit {
    if !turn_round(packet, segment) {
        return drop(Reason::CutDropped);
    }
    tables.record(service, colour, |stats| count(stats, word));
    transmit(reason)
}

/// Counts a reset that a word has caused.
#[inline(always)]
fn count(stats: &mut ColourStats, word: CutoverWord) {
    if word.is_drained() {
        stats.drain_resets += 1;
    } else {
        stats.cut_resets += 1;
    }
}

/// Makes a segment the RST that its sender accepts: the sequence number is what
/// it acknowledged (RFC 9293, section 3.10.7.1).
#[inline(never)]
fn turn_round<P: Packet, A: Network>(packet: &mut P, segment: &Segment<A>) -> bool {
    let Some(ethernet) = packet.header::<Ethernet>(0) else {
        return false;
    };
    let (us, them) = (ethernet.destination, ethernet.source);
    let (sequence, acknowledgement) = if segment.has(tcp_flag::ACK) {
        (segment.tcp.acknowledgement.to_be_bytes(), None)
    } else if segment.part != part::WHOLE {
        return false; // how long the segment is, its first fragment does not say
    } else {
        let next = segment.tcp.sequence.wrapping_add(segment.tcp.taken);
        ([0; 4], Some(next.to_be_bytes()))
    };
    let reset = Reset {
        from: (segment.destination, segment.destination_port),
        to: (segment.source, segment.source_port),
        sequence,
        acknowledgement,
    };
    rewrite::reset(packet, &reset).is_some()
        && rewrite::ethernet(packet, NextHop::new(them, 0), us).is_some()
}

/// Turns a backend's segment of a cut flow into a RST for the client, at the
/// sequence number that the client waits for: the segment's, or, where that is
/// old (a retransmission, a keep-alive probe), the one it acknowledged last.
#[inline(always)]
pub(crate) fn receiver<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    (path, word): (&ReturnPath, CutoverWord),
    flow: &FlowCell,
) -> Exit {
    let hop = NextHop(flow.client_hop.get());
    let Some(slot) = hop.slot() else {
        return drop(Reason::ReturnUnreachable);
    };
    let Some(interface) = tables.interface(u32::from(slot)) else {
        return drop(Reason::Inconsistent);
    };
    let sequence = later(segment.tcp.sequence, flow.backend_next.get());
    if !tell_client(packet, segment, path, tables.sought(), sequence) {
        return drop(Reason::CutDropped);
    }
    tables.record(u32::from(path.service), flow.colour(), |stats| {
        count(stats, word);
    });
    leave(packet, hop, u32::from(slot), interface, Reason::ResetClient)
}

/// Makes a backend's segment a RST from the listener to the client.
#[inline(never)]
fn tell_client<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    path: &ReturnPath,
    client: &FlowKey,
    sequence: u32,
) -> bool {
    let reset = Reset {
        from: (A::from_wide(&path.address), path.port),
        to: (A::from_client(client.client), client.port()),
        sequence: sequence.to_be_bytes(),
        acknowledgement: segment
            .has(tcp_flag::ACK)
            .then(|| segment.tcp.acknowledgement.to_be_bytes()),
    };
    rewrite::reset(packet, &reset).is_some()
}

/// The later of two sequence numbers (RFC 1982).
#[inline(always)]
const fn later(a: u32, b: u32) -> u32 {
    if (a.wrapping_sub(b) as i32) < 0 { b } else { a }
}
