//! The case table: what becomes of a packet, and why. One table for both packet
//! paths; a case is a line, not a test of its own.

use std::net::SocketAddr;

use bg_common::{
    flow::{Flow, FlowTable, bits},
    reason::Reason::{self, *},
    service::{Backend, Colour, CutoverWord, NextHop, PoolWord, colour_spread},
};
use bg_ebpf::pipeline::Action::{self, Drop, Pass, Redirect, Transmit};

use crate::{
    frame::{Frame, Macs},
    world::{
        BACKENDS, CLIENTS, FROM_CLIENT, Flows, TO_CLIENT, UDP_IDLE, World, addr, at, from_backend,
        key, to_backend,
    },
};

mod cut;
mod dsr;
mod errors;
mod flow;
mod fragments;
mod limits;
mod preview;
mod proof;
mod snat;
mod vlan;

/// One case.
pub struct Case {
    /// What it shows.
    pub name: &'static str,
    /// The state it meets.
    pub world: World,
    /// The frame that comes in.
    pub frame: Vec<u8>,
    /// What the driver does with it.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// The frame that leaves; the one that came in, when nothing may change.
    pub out: Vec<u8>,
    /// The flow afterwards, if the case is about it.
    pub flow: Option<FlowCheck>,
}

/// What must be true of a flow afterwards.
pub struct FlowCheck {
    /// The client.
    pub client: SocketAddr,
    /// Listener id.
    pub listener: u16,
    /// The table it must be in.
    pub table: FlowTable,
    /// The condition; `None` when it must not be there.
    pub holds: Option<fn(&Flow) -> bool>,
}

/// Two sets of addresses, so that most cases run over both families.
#[derive(Clone, Copy)]
struct Family {
    client: SocketAddr,
    service: SocketAddr,
    udp: SocketAddr,
    blue: u32,
    green: u32,
    listener: u16,
    udp_listener: u16,
}

impl Family {
    fn both() -> [Self; 2] {
        [
            Self {
                client: addr(at::CLIENT),
                service: addr(at::SERVICE),
                udp: addr(at::SERVICE_UDP),
                blue: 0,
                green: 1,
                listener: 1,
                udp_listener: 3,
            },
            Self {
                client: addr(at::CLIENT_V6),
                service: addr(at::SERVICE_V6),
                udp: addr(at::SERVICE_UDP_V6),
                blue: 2,
                green: 3,
                listener: 2,
                udp_listener: 4,
            },
        ]
    }

    fn backend(id: u32, service: SocketAddr) -> SocketAddr {
        let mut backend = addr(at::BACKENDS[id as usize]);
        if backend.port() == 0 {
            backend.set_port(service.port());
        }
        backend
    }

    fn blue(&self) -> SocketAddr {
        Self::backend(self.blue, self.service)
    }

    fn green(&self) -> SocketAddr {
        Self::backend(self.green, self.service)
    }

    fn flow(world: &World, backend: u32) -> Flow {
        Flow {
            client_hop: NextHop::new(TO_CLIENT.to, CLIENTS as u16).0,
            backend,
            seen: world.tick,
            routed: world.tick as u16,
            generation: world.word.generation(),
            colour_spread: (backend % 2) as u8,
            client_next: 1000,
            backend_next: 5000,
            ..Flow::default()
        }
    }

    fn listener(&self, table: FlowTable) -> u16 {
        match table {
            FlowTable::Udp => self.udp_listener,
            FlowTable::Established | FlowTable::HalfOpen => self.listener,
        }
    }

    fn add(&self, world: &mut World, table: FlowTable, mut flow: Flow) {
        if table == FlowTable::Udp {
            flow.proof = UDP_IDLE;
        }
        let key = key(self.client, self.listener(table));
        world.flows.insert((table, key), flow);
    }

    /// A world with a flow to a backend in `table`.
    fn with(
        &self,
        world: &World,
        table: FlowTable,
        backend: u32,
        change: impl FnOnce(&mut Flow),
    ) -> World {
        let mut world = world.clone();
        let mut flow = Self::flow(&world, backend);
        change(&mut flow);
        self.add(&mut world, table, flow);
        world
    }

    /// A client's datagram as it comes in, and as a backend gets it.
    fn datagram(&self, backend: u32) -> [Vec<u8>; 2] {
        let frame = |macs, to| Frame::udp(macs, self.client, to).payload(b"who");
        // Of a preview's port and of its listener's, a backend knows one.
        let end = Self::backend(backend, self.udp);
        let [came, left] = [
            frame(FROM_CLIENT, self.udp),
            frame(to_backend(backend), end),
        ];
        [came.bytes(), left.hops(63).bytes()]
    }

    fn check(&self, table: FlowTable, holds: Option<fn(&Flow) -> bool>) -> FlowCheck {
        FlowCheck {
            client: self.client,
            listener: self.listener(table),
            table,
            holds,
        }
    }
}

/// The table. `ifindexes` are those of the clients' and backends' interfaces,
/// `tick` is the clock of the packet path that will run it.
pub fn all(ifindexes: [u32; 2], tick: u32) -> Vec<Case> {
    let mut world = World::new(ifindexes);
    world.tick = tick;
    let mut cases = Vec::new();
    for family in Family::both() {
        flow::forward_tcp(&world, family, &mut cases);
        proof::proof(&world, family, &mut cases);
        flow::back_tcp(&world, family, &mut cases);
        flow::left_over(&world, family, &mut cases);
        cut::cut(&world, family, &mut cases);
        cut::drain(&world, family, &mut cases);
        flow::udp(&world, family, &mut cases);
        errors::errors(&world, family, &mut cases);
        limits::limits(&world, family, &mut cases);
        limits::untouched(&world, family, &mut cases);
        vlan::vlan(&world, family, &mut cases);
        fragments::fragments(&world, family, &mut cases);
        snat::snat(&world, family, &mut cases);
        dsr::dsr(&world, family, &mut cases);
        preview::preview(&world, family, &mut cases);
    }
    limits::headers(&world, &mut cases);
    limits::extensions(&world, &mut cases);
    cases
}

/// What each side's packets have set.
const fn sides(flow: &Flow) -> (u8, u8) {
    (flow.from_client, flow.from_backend)
}

/// Cases of large packets, and the large packets that leave: to be sent in fragments.
pub fn large(ifindexes: [u32; 2], tick: u32) -> Vec<(Case, Vec<u8>)> {
    let mut world = World::new(ifindexes);
    world.tick = tick;
    Family::both()
        .into_iter()
        .flat_map(|family| {
            let mut large = fragments::large(&world, family);
            large.extend(snat::large(&world, family));
            large.extend(dsr::large(&world, family));
            large
        })
        .collect()
}

/// The world after a flip from blue to green.
fn flipped(world: &World, cut: bool) -> World {
    World {
        word: world.word.flipped(Colour::Green, cut),
        ..world.clone()
    }
}

/// Frames that go back where a client's came from.
const BACK_TO_CLIENT: Macs = Macs {
    to: FROM_CLIENT.from,
    from: FROM_CLIENT.to,
};
const TO_BACKEND: Action = Redirect(BACKENDS);
const TO_CLIENTS: Action = Redirect(CLIENTS);
