//! A packet and its verdict, as people and scripts read them.

use std::net::SocketAddr;

use bg_common::{
    flow::FlowTable,
    key,
    monitor::{Direction, Sighting, action},
    port::Tags,
    reason::Reason,
    service::Colour,
};

use crate::{
    api::{PacketSeen, SCHEMA},
    datapath::{Names, end_of},
    time::Wall,
};

/// Bits of TCP's flags, lowest first.
const FLAGS: [&str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];

/// Puts names to what a sighting says.
pub fn seen(sighting: &Sighting, names: &mut Names, wall: Wall) -> PacketSeen {
    let reason = Reason::from_index(u32::from(sighting.reason)).unwrap_or(Reason::Inconsistent);
    let known = sighting.family != 0;
    let tcp = known && sighting.protocol == key::TCP && sighting.part != 2;
    let end = |address, port| known.then(|| end_of(sighting.family, address, port));
    let listener = names.listener(sighting);
    let backend = names.backend(sighting.backend, listener);
    let egress = match sighting.action {
        action::REDIRECT => names.slot(sighting.slot),
        action::TRANSMIT => Some(names.interface(sighting.ingress)),
        _ => None,
    };
    PacketSeen {
        schema: SCHEMA,
        time: wall.at(sighting.at_ns),
        at_ns: sighting.at_ns,
        reason: reason.as_str().to_owned(),
        action: action_of(sighting.action).to_owned(),
        direction: sighting.direction().map(|direction| {
            let text = match direction {
                Direction::Forward => "forward",
                Direction::Return => "return",
            };
            text.to_owned()
        }),
        protocol: known.then(|| protocol(sighting.protocol)),
        source: end(sighting.source, sighting.source_port).map(|end| shown(end, sighting)),
        destination: end(sighting.destination, sighting.destination_port)
            .map(|end| shown(end, sighting)),
        client: Names::client(sighting).map(|client| client.to_string()),
        listener: listener.map(|listener| listener.to_string()),
        backend: backend.map(|backend| backend.to_string()),
        service: names.service(sighting.service).map(str::to_owned),
        colour: colour(sighting.colour).map(|colour| colour.as_str().to_owned()),
        flow: table(sighting.table).map(|table| table.as_str().to_owned()),
        generation: (sighting.table != 0).then_some(sighting.generation),
        interface: names.interface(sighting.ingress),
        egress,
        vlans: if known {
            vlans(Tags(sighting.tags))
        } else {
            Vec::new()
        },
        length: known.then_some(sighting.length),
        hops: known.then_some(sighting.hops),
        fragment: known && sighting.part != 0,
        flags: tcp.then(|| flags(sighting.flags)),
        sequence: tcp.then_some(sighting.sequence),
        acknowledgement: tcp.then_some(sighting.acknowledgement),
        cpu: sighting.cpu,
    }
}

/// What a value of [`action`] is called.
pub const fn action_of(value: u8) -> &'static str {
    match value {
        action::PASS => "pass",
        action::DROP => "drop",
        action::TRANSMIT => "transmit",
        _ => "redirect",
    }
}

/// The colour of [`Sighting::colour`].
pub const fn colour(value: u8) -> Option<Colour> {
    match value {
        0 => None,
        value => Some(Colour::from_bit(value - 1)),
    }
}

/// The table of [`Sighting::table`].
pub const fn table(value: u8) -> Option<FlowTable> {
    match value {
        0 => None,
        value => Some(FlowTable::from_index(value as u32 - 1)),
    }
}

/// An end with its port, where the packet has ports.
fn shown(end: SocketAddr, sighting: &Sighting) -> String {
    let ports = matches!(sighting.protocol, key::TCP | key::UDP) && sighting.part != 2;
    if ports {
        end.to_string()
    } else {
        end.ip().to_string()
    }
}

fn protocol(number: u8) -> String {
    match number {
        key::TCP => "tcp".to_owned(),
        key::UDP => "udp".to_owned(),
        1 => "icmp".to_owned(),
        58 => "icmp6".to_owned(),
        other => other.to_string(),
    }
}

fn flags(bits: u32) -> Vec<String> {
    let set = FLAGS.iter().enumerate();
    set.filter(|(bit, _)| bits & 1 << bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect()
}

/// VLAN ids, the outer one first.
fn vlans(tags: Tags) -> Vec<u16> {
    let ids = [(tags.0 >> 32) as u16 & 0xfff, tags.0 as u16 & 0xfff];
    ids[..tags.count()].to_vec()
}
