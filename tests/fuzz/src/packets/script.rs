//! Scripts: bytes that say in which world packets meet, what they are, and what
//! happens between them.
//!
//! Any bytes are a script. The first two choose a world of the case table; then each
//! step is a byte that chooses its kind, and what that kind needs.

use std::net::SocketAddr;

use bg_common::{
    flow::{Flow, FlowTable},
    service::{Colour, CutoverWord, NextHop, PoolWord, colour_spread},
    snat::via,
};
use bg_ebpf::pipeline::Action;
use bg_tests::{
    cases::Case,
    frame::{Frame, fragments, tagged},
    world::{
        BACKENDS, CLIENT_MAC, CLIENTS, FROM_CLIENT, UDP_IDLE, World, addr, at, from_backend, key,
    },
};

use super::{
    oracle,
    view::{Ip, View},
};
use crate::bytes::Bytes;

/// Packets of one script, at most.
const PACKETS: u32 = 6;
/// Bytes of a frame, at most.
const LONGEST: usize = 2048;
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
    pub const FLOW: u8 = 7;
    pub const ALL: u8 = FLOW + 1;
}

/// The script of a case, with the packet of another one behind its own.
pub(super) fn seed(cases: &[Case], case: usize, next: Option<usize>) -> Vec<u8> {
    let mut script = (case as u16).to_be_bytes().to_vec();
    for case in [Some(case), next].into_iter().flatten() {
        let Case { world, frame, .. } = &cases[case];
        script.push(step::FRAME);
        script.push(world.ingress as u8);
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
    while !bytes.is_empty() && stage.packets < PACKETS {
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
        let mut frame = parts.frame(bytes);
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
        match choice % 6 {
            0 => self.world.backends[backend].next_hop = 0,
            1 => {
                let mac = bg_tests::world::backend_mac(backend as u32);
                self.world.backends[backend].next_hop = NextHop::new(mac, slot as u16).0;
            }
            2 => self.world.interfaces[slot].mtu = u32::from(bytes.u16()).max(SMALLEST_MTU),
            3 => self.world.pools[backend % 4] = PoolWord::default(),
            4 => self.world.backends[backend].port = bytes.u16().to_be_bytes(),
            _ => self.world.full = !self.world.full && self.world.flows.len() <= FLOWS,
        }
    }

    /// A flow that is remembered.
    fn flow(&mut self, bytes: &mut Bytes<'_>) {
        let v6 = bytes.u8() % 2 == 1;
        let table = FlowTable::from_index(bytes.u8().into());
        let listener = 1 + u16::from(v6) + if table == FlowTable::Udp { 2 } else { 0 };
        let colour = Colour::from_bit(bytes.u8());
        let flow = Flow {
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
        if self.world.flows.len() < FLOWS {
            let key = key(client(v6, bytes), listener);
            self.world.flows.insert((table, key), flow);
        }
    }
}

const FLAGS: [&str; 9] = ["S", "SA", "A", "PA", "FA", "R", "RA", "F", "SR"];

/// Numbers that cases know, their neighbours, or any.
fn number(bytes: &mut Bytes<'_>) -> u32 {
    match bytes.u8() {
        any if any % 8 == 7 => bytes.u32(),
        near => [1000, 1001, 5000, 5001, 999, 4999, 0][usize::from(near % 8)],
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

fn client(v6: bool, bytes: &mut Bytes<'_>) -> SocketAddr {
    let mut client = addr(if v6 { at::CLIENT_V6 } else { at::CLIENT });
    client.set_port(client.port() + u16::from(bytes.u8() / 64));
    client
}

/// What a built packet is made of.
#[expect(clippy::struct_excessive_bools, reason = "choices, each of its own")]
struct Parts {
    v6: bool,
    udp: bool,
    from_backend: bool,
    /// An error about a packet that came the other way.
    error: bool,
    backend: u32,
    client: SocketAddr,
    service: SocketAddr,
}

impl Parts {
    fn choose(bytes: &mut Bytes<'_>) -> Self {
        let choice = bytes.u8();
        let (v6, udp) = (choice & 1 != 0, choice & 2 != 0);
        let service = match (v6, udp) {
            (false, false) => at::SERVICE,
            (true, false) => at::SERVICE_V6,
            (false, true) => at::SERVICE_UDP,
            (true, true) => at::SERVICE_UDP_V6,
        };
        Self {
            v6,
            udp,
            from_backend: choice & 4 != 0,
            error: choice & 0x18 == 0x18,
            backend: u32::from(v6) * 2 + u32::from(choice >> 5 & 1),
            client: client(v6, bytes),
            service: addr(service),
        }
    }

    fn frame(&self, bytes: &mut Bytes<'_>) -> Vec<u8> {
        let macs = if self.from_backend {
            from_backend(self.backend)
        } else {
            FROM_CLIENT
        };
        let mut backend = addr(at::BACKENDS[self.backend as usize]);
        if backend.port() == 0 {
            backend.set_port(self.service.port());
        }
        let (from, to) = if self.from_backend {
            (backend, self.client)
        } else {
            (self.client, self.service)
        };
        if self.error {
            // About what was sent to whoever sends the error.
            let about = self.segment(macs, to, from, bytes).quote(bytes.u8().into());
            let (kind, code) = if self.v6 {
                bytes.choose(&[(1, 0), (2, 0), (3, 0), (4, 1)])
            } else {
                bytes.choose(&[(3, 4), (3, 1), (11, 0), (12, 0)])
            };
            let rest = bytes.u16().into();
            let (from, to) = (from.ip(), to.ip());
            return Frame::icmp(macs, from, to, (kind, code, rest), &about).bytes();
        }
        self.segment(macs, from, to, bytes).bytes()
    }

    fn segment(
        &self,
        macs: bg_tests::frame::Macs,
        from: SocketAddr,
        to: SocketAddr,
        bytes: &mut Bytes<'_>,
    ) -> Frame {
        let mut frame = if self.udp {
            Frame::udp(macs, from, to)
        } else {
            let flags = bytes.choose(&FLAGS);
            let options: &[u8] = bytes.choose(&[&[], &[], &[2, 4, 5, 180], &[1; 12]]);
            Frame::tcp(macs, from, to, flags)
                .numbers(number(bytes), number(bytes))
                .tcp_options(options)
        };
        let choice = bytes.u8();
        if choice & 1 != 0 {
            frame = frame.hops(bytes.u8() % 4);
        }
        if choice & 2 != 0 {
            frame = frame.may_fragment();
        }
        if choice & 0xc == 0xc && !self.v6 {
            frame = frame.ip_options(&[1; 8]);
        }
        if choice & 0x30 == 0x30 && self.udp {
            frame = frame.without_checksum();
        }
        let payload = match choice >> 6 {
            0 => 0,
            1 => usize::from(bytes.u8()),
            2 => 1400 + usize::from(bytes.u8()),
            _ => return frame.padding(usize::from(bytes.u8() % 32)),
        };
        let filling: Vec<u8> = (0..payload).map(|n| n as u8).collect();
        frame.payload(&filling)
    }
}
