//! Scripts: bytes that say in which world packets meet, what they are, and what
//! happens between them.
//!
//! Any bytes are a script. The first two choose a world of the case table; then each
//! step is a byte that chooses its kind, and what that kind needs.

use std::net::SocketAddr;

use bg_common::{
    flow::{Flow, FlowKey, FlowTable},
    service::{Colour, CutoverWord, NextHop, PoolWord, colour_spread, forward},
    snat::{Lease, PORTS, RESERVED, Source, port, via},
};
use bg_ebpf::pipeline::Action;
use bg_tests::{
    cases::Case,
    frame::{Frame, fragments, tagged},
    world::{BACKENDS, CLIENT_MAC, CLIENTS, UDP_IDLE, World, key, wide},
};

use super::{
    oracle,
    parts::{FLAGS, Parts, client, number, own},
    view::{Ip, View},
};
use crate::bytes::Bytes;

/// Packets of one script, at most.
const PACKETS: u32 = 6;
/// Steps, at most.
const STEPS: usize = 16;
/// Bytes of a frame, at most.
pub(super) const LONGEST: usize = 2048;
/// Flows that scripts put into a world, at most.
const FLOWS: usize = 6;

/// No link's MTU is smaller (RFC 791).
const SMALLEST_MTU: u32 = 68;

/// Kinds of steps.
mod step {
    pub const FRAME: u8 = 0;
    pub const BUILT: u8 = 1;
    pub const AGAIN: u8 = 2;
    pub const ANSWER: u8 = 3;
    pub const CLOCK: u8 = 4;
    pub const WORD: u8 = 5;
    pub const TABLES: u8 = 6;
    pub const PORTS: u8 = 7;
    pub const FLOW: u8 = 8;
    pub const ALL: u8 = FLOW + 1;
}

/// The script of the world of a case, and of frames that come in by slots.
pub(super) fn seed(case: usize, frames: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut script = (case as u16).to_be_bytes().to_vec();
    for (ingress, frame) in frames {
        script.push(step::FRAME);
        script.push(*ingress as u8);
        script.extend((frame.len() as u16).to_be_bytes());
        script.extend(frame);
    }
    script
}

/// Plays a script.
pub(super) fn play(data: &[u8], cases: &[Case]) {
    let mut bytes = Bytes(data);
    let world = usize::from(bytes.u16()) % cases.len();
    let mut stage = Stage {
        world: cases[world].world.clone(),
        came: Vec::new(),
        left: None,
        packets: 0,
    };
    for _ in 0..STEPS {
        if bytes.is_empty() || stage.packets == PACKETS {
            break;
        }
        match bytes.u8() % step::ALL {
            step::FRAME => stage.frame(&mut bytes),
            step::BUILT => stage.built(&mut bytes),
            step::AGAIN => stage.again(&mut bytes),
            step::ANSWER => stage.answer(&mut bytes),
            step::CLOCK => {
                let ticks = u32::from(bytes.u16()) << (bytes.u8() % 8);
                stage.world.tick = stage.world.tick.wrapping_add(ticks);
            }
            step::WORD => stage.word(&mut bytes),
            step::TABLES => stage.tables(&mut bytes),
            step::PORTS => stage.ports(&mut bytes),
            _ => stage.flow(&mut bytes),
        }
    }
}

struct Stage {
    world: World,
    /// The last frame that came in.
    came: Vec<u8>,
    /// The last one that left, and the slot.
    left: Option<(u32, Vec<u8>)>,
    packets: u32,
}

impl Stage {
    /// Lets a frame in by the interface in slot `ingress`.
    fn come(&mut self, ingress: u32, frame: Vec<u8>) {
        self.packets += 1;
        self.world.ingress = ingress % self.world.interfaces.len() as u32;
        let before = self.world.clone();
        let (verdict, out) = self.world.run(&frame);
        oracle::judge(&before, &frame, &self.world, verdict, &out);
        self.left = match verdict.action {
            Action::Redirect(slot) => Some((slot, out)),
            Action::Transmit => Some((self.world.ingress, out)),
            Action::Pass | Action::Drop => None,
        };
        self.came = frame;
    }

    /// Bytes of its own.
    fn frame(&mut self, bytes: &mut Bytes<'_>) {
        let ingress = bytes.u8();
        let length = usize::from(bytes.u16()).min(LONGEST);
        let frame = bytes.take(length).to_vec();
        self.come(ingress.into(), frame);
    }

    /// The last one again, changed here and there.
    fn again(&mut self, bytes: &mut Bytes<'_>) {
        let ingress = bytes.u8();
        let mut frame = std::mem::take(&mut self.came);
        for _ in 0..bytes.u8() % 8 {
            let (at, byte) = (usize::from(bytes.u16()), bytes.u8());
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        self.come(ingress.into(), frame);
    }

    /// A packet of parts that fit together.
    fn built(&mut self, bytes: &mut Bytes<'_>) {
        let parts = Parts::choose(bytes);
        let mut frame = parts.frame(&self.world, bytes);
        if bytes.u8().is_multiple_of(4) && frame[14] != 0x47 {
            let size = usize::from(bytes.u8() % 32 + 1) * 8;
            let pieces = fragments(&frame, size);
            frame.clone_from(&pieces[usize::from(bytes.u8()) % pieces.len()]);
        }
        let tags = bytes.choose(&[0, 0, 0, 0, 1, 1, 2, 3]);
        let tags: Vec<_> = (0..tags).map(|_| self.tag(bytes)).collect();
        let ingress = if parts.from_backend {
            BACKENDS
        } else {
            CLIENTS
        };
        let elsewhere = if bytes.u8().is_multiple_of(8) {
            bytes.u8()
        } else {
            0
        };
        self.come(ingress + u32::from(elsewhere), tagged(&frame, &tags));
    }

    /// A tag that there is a device for, or any.
    fn tag(&self, bytes: &mut Bytes<'_>) -> [u8; 4] {
        let interfaces = &self.world.interfaces;
        let own = interfaces[usize::from(bytes.u8()) % interfaces.len()].tags;
        let [p, q, a, b, ..] = own.0.to_be_bytes();
        if [p, q] == [0, 0] {
            let [p, q] = bytes.choose(&[[0x81, 0x00], [0x88, 0xa8]]);
            let [a, b] = bytes.u16().to_be_bytes();
            return [p, q, a, b];
        }
        [p, q, bytes.u8() & 0xf0 | a, b]
    }

    /// What the receiver of the last packet that left says to it.
    fn answer(&mut self, bytes: &mut Bytes<'_>) {
        let Some((slot, frame)) = self.left.take() else {
            return;
        };
        let Some(view) = View::new(&frame) else {
            return;
        };
        let Some((ip, [source, destination])) = view
            .ip
            .as_ref()
            .and_then(|ip| Some((ip, ip.ports(&view.packet)?)))
        else {
            return;
        };
        let macs = bg_tests::frame::Macs {
            to: view.macs[1],
            from: view.macs[0],
        };
        let (from, to) = (
            SocketAddr::new(ip.destination, destination),
            SocketAddr::new(ip.source, source),
        );
        let answer = if ip.protocol == bg_common::key::UDP {
            Frame::udp(macs, from, to)
        } else {
            let (sequence, acknowledgement) = next_numbers(&view.packet, ip);
            let flags = bytes.choose(&FLAGS);
            Frame::tcp(macs, from, to, flags).numbers(acknowledgement, sequence.wrapping_add(1))
        };
        let frame = answer.payload(&[0x5a; 3][..usize::from(bytes.u8() % 4)]);
        self.come(slot, tagged(&frame.bytes(), &view.tags));
    }

    fn word(&mut self, bytes: &mut Bytes<'_>) {
        let word = self.world.word;
        self.world.word = match bytes.u8() % 6 {
            0 => word.flipped(word.active().other(), false),
            1 => word.flipped(word.active().other(), true),
            2 => word.flipped(word.active(), true),
            3 => word.with_canary(bytes.u16()),
            4 => word.drained(bytes.u8()),
            _ => CutoverWord(bytes.u64()),
        };
    }

    fn tables(&mut self, bytes: &mut Bytes<'_>) {
        let choice = bytes.u8();
        let backend = usize::from(bytes.u8()) % self.world.backends.len();
        let slot = usize::from(bytes.u8()) % self.world.interfaces.len();
        match choice % 9 {
            0 => self.world.backends[backend].next_hop = 0,
            1 => {
                let mac = bg_tests::world::backend_mac(backend as u32);
                self.world.backends[backend].next_hop = NextHop::new(mac, slot as u16).0;
            }
            2 => self.world.interfaces[slot].mtu = u32::from(bytes.u16()).max(SMALLEST_MTU),
            3 => self.world.pools[backend % 4] = PoolWord::default(),
            4 => self.world.backends[backend].port = bytes.u16().to_be_bytes(),
            5 => {
                let modes = [forward::NAT, forward::SNAT, forward::DSR];
                self.world.set_mode(modes[backend % modes.len()]);
            }
            6 => {
                if let Some(source) = self.world.sources.get_mut(backend + 1) {
                    *source = Source::default();
                }
            }
            7 => {
                let of = usize::from(self.world.backends[backend].block);
                if let Some(source) = self.world.sources.get_mut(of) {
                    source.address = wide(own(self.world.backends[backend].family == 6));
                }
            }
            _ => self.world.full = !self.world.full && self.world.flows.len() <= FLOWS,
        }
    }

    /// A flow that is remembered.
    fn flow(&mut self, bytes: &mut Bytes<'_>) {
        let v6 = bytes.u8() % 2 == 1;
        let table = FlowTable::from_index(bytes.u8().into());
        let listener = 1 + u16::from(v6) + if table == FlowTable::Udp { 2 } else { 0 };
        let choice = bytes.u8();
        let colour = Colour::from_bit(choice);
        // By the listener, or by the preview of its colour.
        let listener = if choice >> 1 & 3 == 3 {
            World::preview_id(colour, listener)
        } else {
            listener
        };
        let mut flow = Flow {
            client_hop: bytes
                .choose(&[NextHop::new(CLIENT_MAC, CLIENTS as u16), NextHop::NONE])
                .0,
            backend: u32::from(v6) * 2 + colour as u32,
            seen: self.world.tick.wrapping_sub(bytes.u16().into()),
            proof: if table == FlowTable::Udp {
                UDP_IDLE
            } else {
                number(bytes)
            },
            service: 0,
            via: via::NAT,
            client_next: number(bytes),
            backend_next: number(bytes),
            generation: self.world.word.generation().wrapping_sub(bytes.u8().into()),
            routed: self.world.tick as u16,
            colour_spread: colour_spread(colour, bytes.u8().into()),
            from_client: bytes.u8(),
            from_backend: bytes.u8(),
            zero: 0,
        };
        let key = key(client(v6, bytes), listener);
        if self.world.flows.len() < FLOWS {
            flow.via = self.via(key, table, flow.backend, bytes);
            self.world.flows.insert((table, key), flow);
        }
    }

    /// How the backend of a flow sees its client. A flow without proof may have lost its
    /// port.
    fn via(&mut self, key: FlowKey, table: FlowTable, backend: u32, bytes: &mut Bytes<'_>) -> u16 {
        let block = u32::from(self.world.backends[backend as usize].block);
        let choice = bytes.u8() % 8;
        if choice == 0 {
            return via::DSR;
        }
        if choice < 3 || block == 0 {
            return via::NAT;
        }
        let index = if choice == 3 {
            u32::from(bytes.u16()) % PORTS
        } else {
            let nth = usize::from(bytes.u8() / 64);
            World::candidates(&key, table).nth(nth).unwrap_or(0)
        };
        let lost = choice == 4 && table != FlowTable::Established;
        let since = self.world.tick.wrapping_sub(bytes.u8().into());
        if lost || self.lend((block, index), key, table as u32, since) {
            port(index)
        } else {
            via::NAT
        }
    }

    /// Lends a port that nobody had yet.
    fn lend(&mut self, place: (u32, u32), key: FlowKey, table: u32, since: u32) -> bool {
        let vacant = !self.world.leases.contains_key(&place);
        if vacant {
            let lease = Lease {
                client: key.client,
                id: key.id,
                turn: 0,
                since,
                table,
            };
            self.world.leases.insert(place, lease);
        }
        vacant
    }

    /// Strangers have the ports that a client's next flow would look at.
    fn ports(&mut self, bytes: &mut Bytes<'_>) {
        let choice = bytes.u8();
        let (v6, udp) = (choice & 1 != 0, choice & 2 != 0);
        let (table, listener) = if udp {
            (FlowTable::Udp, 3 + u16::from(v6))
        } else {
            (FlowTable::HalfOpen, 1 + u16::from(v6))
        };
        let backend = usize::from(v6) * 2 + usize::from(choice >> 2 & 1);
        let block = u32::from(self.world.backends[backend].block);
        if block == 0 {
            return;
        }
        let next = World::candidates(&key(client(v6, bytes), listener), table);
        let since = self.world.tick.wrapping_sub(bytes.u16().into());
        let lent = bytes.choose(&[table as u32, table as u32, RESERVED]);
        for index in next.take(bytes.u8().into()) {
            let stranger = FlowKey::of([0, u64::from(index)], 1);
            self.lend((block, index), stranger, lent, since);
        }
    }
}

/// The next sequence number of whoever sent `packet`, and what it acknowledged.
fn next_numbers(packet: &[u8], ip: &Ip) -> (u32, u32) {
    let word = |at: usize| {
        let bytes = packet.get(ip.header + at..).and_then(|b| b.first_chunk());
        bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
    };
    (word(4), word(8))
}
