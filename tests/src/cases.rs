//! The case table: what becomes of a packet, and why. One table for both packet
//! paths; a case is a line, not a test of its own.

use std::net::SocketAddr;

use bg_common::{
    reason::Reason::{self, *},
    service::{Colour, CutoverWord, Flow, NextHop, PoolWord, state},
};
use bg_ebpf::{
    pipeline::Action::{self, Drop, Pass, Redirect, Transmit},
    tables::FlowTable,
};

use crate::{
    frame::{Frame, Macs},
    world::{
        BACKENDS, CLIENTS, FROM_CLIENT, TO_CLIENT, World, addr, at, from_backend, key_v4, key_v6,
        to_backend,
    },
};

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
                listener: 0,
                udp_listener: 2,
            },
            Self {
                client: addr(at::CLIENT_V6),
                service: addr(at::SERVICE_V6),
                udp: addr(at::SERVICE_UDP_V6),
                blue: 2,
                green: 3,
                listener: 1,
                udp_listener: 3,
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
            routed: world.tick,
            generation: world.word.generation(),
            colour: (backend % 2) as u8,
            client_next: 1000,
            backend_next: 5000,
            ..Flow::default()
        }
    }

    fn add(&self, world: &mut World, table: FlowTable, flow: Flow) {
        let listener = if table == FlowTable::Udp {
            self.udp_listener
        } else {
            self.listener
        };
        if self.client.is_ipv4() {
            world
                .flows_v4
                .insert((table, key_v4(self.client, listener)), flow);
        } else {
            world
                .flows_v6
                .insert((table, key_v6(self.client, listener)), flow);
        }
    }

    fn check(&self, table: FlowTable, holds: Option<fn(&Flow) -> bool>) -> FlowCheck {
        let listener = if table == FlowTable::Udp {
            self.udp_listener
        } else {
            self.listener
        };
        FlowCheck {
            client: self.client,
            listener,
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
        forward_tcp(&world, family, &mut cases);
        proof(&world, family, &mut cases);
        back_tcp(&world, family, &mut cases);
        cut(&world, family, &mut cases);
        udp(&world, family, &mut cases);
        limits(&world, family, &mut cases);
        untouched(&world, family, &mut cases);
    }
    headers(&world, &mut cases);
    cases
}

/// The world after a flip from blue to green.
fn flipped(world: &World, cut: bool) -> World {
    World {
        word: world.word.flipped(Colour::Green, cut),
        ..world.clone()
    }
}

const TO_BACKEND: Action = Redirect(BACKENDS);
const TO_CLIENTS: Action = Redirect(CLIENTS);

fn forward_tcp(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").tcp_options(&[2, 4, 5, 180]);
    let to = |id, backend| {
        Frame::tcp(to_backend(id), f.client, backend, "S")
            .tcp_options(&[2, 4, 5, 180])
            .hops(63)
            .bytes()
    };
    cases.push(Case {
        name: "a SYN goes to the active colour, on the listener's port",
        world: world.clone(),
        frame: syn.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.blue, f.blue()),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.colour() == Colour::Blue && flow.generation == 0),
        )),
    });
    cases.push(Case {
        name: "after a flip a SYN goes to the other colour, on the backend's own port (law 1)",
        world: flipped(world, false),
        frame: syn.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green, f.green()),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.colour() == Colour::Green && flow.generation == 1),
        )),
    });
    let mut old = flipped(world, false);
    f.add(
        &mut old,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    cases.push(Case {
        name: "a SYN of an old flow's tuple takes the word's colour (law 2)",
        world: old.clone(),
        frame: syn.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green, f.green()),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.state & state::CONTESTED != 0),
        )),
    });
    cases.push(Case {
        name: "an established flow stays on its backend after a flip (law 2)",
        world: old.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "PA")
            .payload(b"GET /")
            .bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "PA")
            .payload(b"GET /")
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.colour() == Colour::Blue),
        )),
    });
    cases.push(Case {
        name: "a FIN is noted",
        world: old.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "FA").bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "FA")
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.state == state::CLIENT_FIN),
        )),
    });
    cases.push(Case {
        name: "a RST in the window closes the flow",
        world: old.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "R")
            .numbers(1200, 0)
            .bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "R")
            .numbers(1200, 0)
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.state == state::RESET),
        )),
    });
    cases.push(Case {
        name: "a RST out of the window closes nothing",
        world: old,
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "R")
            .numbers(999, 0)
            .bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "R")
            .numbers(999, 0)
            .hops(63)
            .bytes(),
        flow: Some(f.check(FlowTable::Established, Some(|flow| flow.state == 0))),
    });
    let orphan = Frame::tcp(FROM_CLIENT, f.client, f.service, "A");
    cases.push(Case {
        name: "a mid-stream packet of an unknown flow goes where the word says, without proof",
        world: world.clone(),
        frame: orphan.bytes(),
        action: TO_BACKEND,
        reason: ForwardedOrphan,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.state == state::ORPHAN),
        )),
    });
    cases.push(Case {
        name: "a RST of an unknown flow leaves no entry",
        world: world.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "R").bytes(),
        action: TO_BACKEND,
        reason: ForwardedOrphan,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "R")
            .hops(63)
            .bytes(),
        flow: Some(f.check(FlowTable::HalfOpen, None)),
    });
}

fn proof(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut half = world.clone();
    f.add(&mut half, FlowTable::HalfOpen, Family::flow(world, f.blue));
    cases.push(Case {
        name: "the backend's SYN-ACK is remembered as the proof that is asked for (law 7)",
        world: World {
            ingress: BACKENDS,
            ..half.clone()
        },
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "SA")
            .numbers(7000, 1001)
            .bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "SA")
            .numbers(7000, 1001)
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.state & state::ANSWERED != 0 && flow.proof == 7001),
        )),
    });
    let mut answered = world.clone();
    let entry = Flow {
        state: state::ANSWERED,
        proof: 7001,
        ..Family::flow(world, f.blue)
    };
    f.add(&mut answered, FlowTable::HalfOpen, entry);
    let ack = |number| Frame::tcp(FROM_CLIENT, f.client, f.service, "A").numbers(1001, number);
    let out = |number| {
        Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
            .numbers(1001, number)
            .hops(63)
            .bytes()
    };
    cases.push(Case {
        name: "the acknowledgement of that number makes the flow established (law 7)",
        world: answered.clone(),
        frame: ack(7001).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(7001),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.state & state::ANSWERED == 0),
        )),
    });
    for (flags, payload, table, name) in [
        (
            "A",
            "",
            FlowTable::HalfOpen,
            "a backend's bare acknowledgement, as a second SYN gets it, does not (law 7)",
        ),
        (
            "PA",
            "220 hello",
            FlowTable::Established,
            "a backend's data does",
        ),
    ] {
        let frame = |macs, from| {
            Frame::tcp(macs, from, f.client, flags)
                .numbers(7001, 1001)
                .payload(payload.as_bytes())
        };
        cases.push(Case {
            name,
            world: World {
                ingress: BACKENDS,
                ..answered.clone()
            },
            frame: frame(from_backend(f.blue), f.blue()).bytes(),
            action: TO_CLIENTS,
            reason: Returned,
            out: frame(TO_CLIENT, f.service).hops(63).bytes(),
            flow: Some(f.check(table, Some(|flow| flow.state & state::MOVED == 0))),
        });
    }
    let bare = Frame::tcp(FROM_CLIENT, f.client, f.service, "P").bytes();
    cases.push(Case {
        name: "a client's segment without ACK, SYN and RST passes untouched (law 7)",
        world: answered.clone(),
        frame: bare.clone(),
        action: Pass,
        reason: BadHeader,
        out: bare,
        flow: None,
    });
    cases.push(Case {
        name: "an acknowledgement of another number does not (law 7)",
        world: answered.clone(),
        frame: ack(7002).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(7002),
        flow: Some(f.check(FlowTable::Established, None)),
    });
    cases.push(Case {
        name: "a flip inside the handshake leaves it on its colour",
        world: World {
            word: world.word.flipped(Colour::Green, false),
            ..answered.clone()
        },
        frame: ack(7001).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(7001),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.colour() == Colour::Blue),
        )),
    });
    cases.push(Case {
        name: "with the table full a proven flow is sent on, counted, and not remembered",
        world: World {
            capacity: 0,
            ..answered
        },
        frame: ack(7001).bytes(),
        action: TO_BACKEND,
        reason: ForwardedTableFull,
        out: out(7001),
        flow: Some(f.check(FlowTable::Established, None)),
    });
    let mut contested = flipped(world, false);
    let old = Flow {
        state: state::CONTESTED,
        ..Family::flow(world, f.blue)
    };
    f.add(&mut contested, FlowTable::Established, old);
    let new = Flow {
        state: state::ANSWERED,
        proof: 7001,
        generation: 1,
        ..Family::flow(world, f.green)
    };
    f.add(&mut contested, FlowTable::HalfOpen, new);
    cases.push(Case {
        name: "a proven SYN takes an old flow's tuple over",
        world: contested.clone(),
        frame: ack(7001).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.green), f.client, f.green(), "A")
            .numbers(1001, 7001)
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.colour() == Colour::Green),
        )),
    });
    cases.push(Case {
        name: "an unproven SYN leaves the old flow where it is (law 7)",
        world: contested,
        frame: ack(4242).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(4242),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.colour() == Colour::Blue),
        )),
    });
    let mut orphan = world.clone();
    f.add(
        &mut orphan,
        FlowTable::HalfOpen,
        Flow {
            state: state::ORPHAN,
            ..Family::flow(world, f.blue)
        },
    );
    cases.push(Case {
        name: "a backend that answers an orphan's packet proves the flow",
        world: World {
            ingress: BACKENDS,
            ..orphan.clone()
        },
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "A").bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "A")
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.state & state::ORPHAN == 0),
        )),
    });
    cases.push(Case {
        name: "a backend's RST for an orphan reaches the client and proves nothing",
        world: World {
            ingress: BACKENDS,
            ..orphan
        },
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "R").bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "R")
            .hops(63)
            .bytes(),
        flow: Some(f.check(FlowTable::Established, None)),
    });
}

fn back_tcp(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut known = World {
        ingress: BACKENDS,
        ..world.clone()
    };
    f.add(
        &mut known,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    let data = |macs, from| Frame::tcp(macs, from, f.client, "PA").payload(b"HTTP/1.1 200 OK\r\n");
    cases.push(Case {
        name: "a reply leaves as the listener's",
        world: known.clone(),
        frame: data(from_backend(f.blue), f.blue()).bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: data(TO_CLIENT, f.service).hops(63).bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.client_next == 5000),
        )),
    });
    cases.push(Case {
        name: "a reply of a backend that lost the flow is dropped",
        world: known.clone(),
        frame: data(from_backend(f.green), f.green()).bytes(),
        action: Drop,
        reason: ReturnStale,
        out: data(from_backend(f.green), f.green()).bytes(),
        flow: None,
    });
    let mut unreachable = known;
    f.add(
        &mut unreachable,
        FlowTable::Established,
        Flow {
            client_hop: 0,
            ..Family::flow(world, f.blue)
        },
    );
    cases.push(Case {
        name: "a reply whose client's next hop is unknown is dropped, and says so (law 6)",
        world: unreachable,
        frame: data(from_backend(f.blue), f.blue()).bytes(),
        action: Drop,
        reason: ReturnUnreachable,
        out: data(from_backend(f.blue), f.blue()).bytes(),
        flow: None,
    });
    let elsewhere = World {
        ingress: BACKENDS,
        ..world.clone()
    };
    cases.push(Case {
        name: "a reply that belongs to no flow passes untouched (law 9)",
        world: elsewhere,
        frame: data(from_backend(f.blue), f.blue()).bytes(),
        action: Pass,
        reason: ReturnUnknown,
        out: data(from_backend(f.blue), f.blue()).bytes(),
        flow: None,
    });
    let mut one_arm = world.clone();
    one_arm.backends[f.blue as usize].next_hop = NextHop::new([2, 9, 9, 9, 9, 9], CLIENTS as u16).0;
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S");
    let macs = Macs {
        to: [2, 9, 9, 9, 9, 9],
        from: FROM_CLIENT.to,
    };
    cases.push(Case {
        name: "with one arm a packet leaves where it came in",
        world: one_arm,
        frame: syn.bytes(),
        action: Transmit,
        reason: ForwardedNew,
        out: Frame::tcp(macs, f.client, f.blue(), "S").hops(63).bytes(),
        flow: None,
    });
}

fn cut(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut was_cut = flipped(world, true);
    f.add(
        &mut was_cut,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    let back = Macs {
        to: FROM_CLIENT.from,
        from: FROM_CLIENT.to,
    };
    // A request with padding behind it, as a short frame has it: the length of
    // the packet is the IP header's.
    cases.push(Case {
        name: "a client of a cut flow gets a RST with the number it waits for",
        world: was_cut.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "PA")
            .payload(b"GET")
            .padding(9)
            .bytes(),
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(back, f.service, f.client, "R")
            .numbers(5000, 0)
            .window(0)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.state == state::CLIENT_CUT | state::RESET),
        )),
    });
    cases.push(Case {
        name: "a client's own RST of a cut flow closes the backend's side",
        world: was_cut.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "R").bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "R")
            .hops(63)
            .bytes(),
        flow: None,
    });
    let from_blue = World {
        ingress: BACKENDS,
        ..was_cut.clone()
    };
    let data = Frame::tcp(from_backend(f.blue), f.blue(), f.client, "PA").numbers(5000, 1000);
    cases.push(Case {
        name: "a backend's data of a cut flow becomes the RST that its client waits for",
        world: from_blue.clone(),
        frame: data.clone().payload(b"token token").bytes(),
        action: TO_CLIENTS,
        reason: ResetClient,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "RA")
            .numbers(5000, 1000)
            .window(0)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.state == state::CLIENT_CUT | state::RESET),
        )),
    });
    let mut told = from_blue.clone();
    let entry = Flow {
        state: state::CLIENT_CUT | state::RESET,
        ..Family::flow(world, f.blue)
    };
    f.add(&mut told, FlowTable::Established, entry);
    let to_blue = Macs {
        to: from_backend(f.blue).from,
        from: from_backend(f.blue).to,
    };
    cases.push(Case {
        name: "a segment without ACK gets a RST that acknowledges it (RFC 9293)",
        world: told.clone(),
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "F")
            .payload(b"1234")
            .padding(2)
            .bytes(),
        action: Transmit,
        reason: ResetBackend,
        out: Frame::tcp(to_blue, f.client, f.blue(), "RA")
            .numbers(0, 1005)
            .window(0)
            .bytes(),
        flow: None,
    });
    cases.push(Case {
        name: "the backend's next segment of a cut flow is answered with a RST",
        world: told,
        frame: data.payload(b"more").bytes(),
        action: Transmit,
        reason: ResetBackend,
        out: Frame::tcp(to_blue, f.client, f.blue(), "R")
            .numbers(1000, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
    let mut handshake = World {
        ingress: BACKENDS,
        ..flipped(world, true)
    };
    f.add(
        &mut handshake,
        FlowTable::HalfOpen,
        Family::flow(world, f.blue),
    );
    cases.push(Case {
        name: "cut inside the handshake: the backend is reset, the client's SYN will come again",
        world: handshake,
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "SA")
            .numbers(7000, 1001)
            .bytes(),
        action: Transmit,
        reason: ResetBackend,
        out: Frame::tcp(to_blue, f.client, f.blue(), "R")
            .numbers(1001, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
    let mut rolled_back = World {
        word: flipped(world, false).word.flipped(Colour::Blue, true),
        ..world.clone()
    };
    f.add(
        &mut rolled_back,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    cases.push(Case {
        name: "a rollback cuts the bad colour only (law 5)",
        world: rolled_back.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "A").bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
            .hops(63)
            .bytes(),
        flow: None,
    });
    f.add(
        &mut rolled_back,
        FlowTable::Established,
        Flow {
            generation: 1,
            ..Family::flow(world, f.green)
        },
    );
    cases.push(Case {
        name: "a rollback cuts the bad colour's flows",
        world: rolled_back,
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "A").bytes(),
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(back, f.service, f.client, "R")
            .numbers(5000, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
}

fn udp(world: &World, f: Family, cases: &mut Vec<Case>) {
    let query = Frame::udp(FROM_CLIENT, f.client, f.udp).payload(b"query");
    let to = |id: u32| {
        Frame::udp(to_backend(id), f.client, Family::backend(id, f.udp))
            .payload(b"query")
            .hops(63)
            .bytes()
    };
    cases.push(Case {
        name: "UDP: the first packet takes the word's colour",
        world: flipped(world, false),
        frame: query.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green),
        flow: Some(f.check(FlowTable::Udp, Some(|flow| flow.colour() == Colour::Green))),
    });
    let mut known = flipped(world, false);
    f.add(&mut known, FlowTable::Udp, Family::flow(world, f.blue));
    cases.push(Case {
        name: "UDP: a flow sticks to its backend after a flip (law 2)",
        world: known.clone(),
        frame: query.bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: to(f.blue),
        flow: Some(f.check(FlowTable::Udp, Some(|flow| flow.colour() == Colour::Blue))),
    });
    let mut idle = known.clone();
    let old = Flow {
        seen: world.tick.wrapping_sub(460),
        ..Family::flow(world, f.blue)
    };
    f.add(&mut idle, FlowTable::Udp, old);
    cases.push(Case {
        name: "UDP: a flow silent for longer than udp_idle is new",
        world: idle,
        frame: query.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green),
        flow: None,
    });
    let mut was_cut = flipped(world, true);
    f.add(&mut was_cut, FlowTable::Udp, Family::flow(world, f.blue));
    cases.push(Case {
        name: "UDP: a cut flow moves at once",
        world: was_cut,
        frame: query.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green),
        flow: None,
    });
    let back = World {
        ingress: BACKENDS,
        ..known
    };
    let blue = Family::backend(f.blue, f.udp);
    cases.push(Case {
        name: "UDP: a reply leaves as the listener's",
        world: back,
        frame: Frame::udp(from_backend(f.blue), blue, f.client)
            .payload(b"answer")
            .bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: Frame::udp(TO_CLIENT, f.udp, f.client)
            .payload(b"answer")
            .hops(63)
            .bytes(),
        flow: None,
    });
    if f.client.is_ipv4() {
        cases.push(Case {
            name: "UDP over IPv4: no checksum stays no checksum (RFC 768)",
            world: world.clone(),
            frame: Frame::udp(FROM_CLIENT, f.client, f.udp)
                .payload(b"query")
                .without_checksum()
                .bytes(),
            action: TO_BACKEND,
            reason: ForwardedNew,
            out: Frame::udp(to_backend(f.blue), f.client, blue)
                .payload(b"query")
                .without_checksum()
                .hops(63)
                .bytes(),
            flow: None,
        });
    }
}

fn limits(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S");
    let mut pass = |name, world: World, frame: Vec<u8>, reason| {
        cases.push(Case {
            name,
            world,
            out: frame.clone(),
            frame,
            action: Pass,
            reason,
            flow: None,
        });
    };
    pass(
        "TTL 1 goes to the stack",
        world.clone(),
        syn.clone().hops(1).bytes(),
        TtlExpired,
    );
    let mut small = world.clone();
    small.interfaces[BACKENDS as usize].mtu = 1280;
    let large = syn.clone().payload(&[0; 1300]).bytes();
    pass(
        "larger than the egress MTU goes to the stack",
        small,
        large,
        TooBig,
    );
    let mut empty = world.clone();
    empty.pools = [PoolWord::default(); 4];
    cases.push(Case {
        name: "an empty pool drops, and says so (law 6)",
        world: empty,
        frame: syn.bytes(),
        action: Drop,
        reason: NoBackend,
        out: syn.bytes(),
        flow: None,
    });
    let mut unresolved = world.clone();
    unresolved.backends[f.blue as usize].next_hop = 0;
    cases.push(Case {
        name: "without a next hop the stack forwards the rewritten packet and takes the hop",
        world: unresolved,
        frame: syn.bytes(),
        action: Pass,
        reason: ForwardedByStack,
        out: Frame::tcp(FROM_CLIENT, f.client, f.blue(), "S").bytes(),
        flow: None,
    });
    let canary = World {
        word: CutoverWord::new(Colour::Blue).with_canary(u16::MAX),
        ..world.clone()
    };
    cases.push(Case {
        name: "a canary share of all but nothing goes to the standby",
        world: canary,
        frame: syn.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: Frame::tcp(to_backend(f.green), f.client, f.green(), "S")
            .hops(63)
            .bytes(),
        flow: None,
    });
}

/// Law 9: what is not ours passes untouched, with its own reason.
fn untouched(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").bytes();
    let other_port = SocketAddr::new(f.service.ip(), 22);
    let header = if f.client.is_ipv4() { 20 } else { 40 };
    let protocol_at = if f.client.is_ipv4() { 23 } else { 20 };
    let mut pass = |name, frame: Vec<u8>, reason| {
        cases.push(Case {
            name,
            world: world.clone(),
            out: frame.clone(),
            frame,
            action: Pass,
            reason,
            flow: None,
        });
    };
    pass(
        "another port of the address",
        Frame::tcp(FROM_CLIENT, f.client, other_port, "S").bytes(),
        NotOurs,
    );
    pass(
        "UDP to the TCP listener",
        Frame::udp(FROM_CLIENT, f.client, f.service).bytes(),
        NotOurs,
    );
    pass(
        "ends inside the IP header",
        syn[..14 + header - 1].to_vec(),
        Truncated,
    );
    pass(
        "ends before the length the IP header says",
        syn[..syn.len() - 1].to_vec(),
        Truncated,
    );
    pass("broadcast", [&[0xff; 6], &syn[6..]].concat(), NotOurs);
    let with = |at: usize, byte: u8| {
        let mut frame = syn.clone();
        frame[at] = byte;
        frame
    };
    pass("another IP version", with(14, 0x15), BadHeader);
    pass("another protocol", with(protocol_at, 132), NotOurs);
    pass(
        "a TCP header shorter than it can be",
        with(14 + header + 12, 0x40),
        BadHeader,
    );
    pass(
        "a TCP header longer than the packet",
        with(14 + header + 12, 0xf0),
        BadHeader,
    );
    let mut tagged = syn.clone();
    tagged.splice(12..12, [0x81, 0, 0, 7]);
    pass("a VLAN tag", tagged, Vlan);
}

/// What only one family has, or neither.
fn headers(world: &World, cases: &mut Vec<Case>) {
    let (client, service) = (addr(at::CLIENT), addr(at::SERVICE));
    let syn = Frame::tcp(FROM_CLIENT, client, service, "S");
    cases.push(Case {
        name: "IPv4 options are kept",
        world: world.clone(),
        frame: syn.clone().ip_options(&[1, 1, 1, 0]).payload(b"x").bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: Frame::tcp(to_backend(0), client, addr("10.0.1.10:8000"), "S")
            .ip_options(&[1, 1, 1, 0])
            .payload(b"x")
            .hops(63)
            .bytes(),
        flow: None,
    });
    let syn6 = Frame::tcp(FROM_CLIENT, addr(at::CLIENT_V6), addr(at::SERVICE_V6), "S").bytes();
    let syn = syn.bytes();
    let mut pass = |name, frame: Vec<u8>, reason| {
        cases.push(Case {
            name,
            world: world.clone(),
            out: frame.clone(),
            frame,
            action: Pass,
            reason,
            flow: None,
        });
    };
    let with = |frame: &[u8], at: usize, bytes: &[u8]| {
        let mut frame = frame.to_vec();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    pass("ARP", with(&syn, 12, &[8, 6]), NotIp);
    pass(
        "IPv4: a header length below five words",
        with(&syn, 14, &[0x44]),
        BadHeader,
    );
    pass(
        "IPv4: the first fragment",
        with(&syn, 20, &[0x20, 0]),
        Fragment,
    );
    pass(
        "IPv4: a later fragment",
        with(&syn, 20, &[0, 185]),
        Fragment,
    );
    pass(
        "IPv4: an ICMP error",
        with(&with(&syn, 23, &[1]), 34, &[3, 4]),
        IcmpError,
    );
    pass(
        "IPv4: an echo request",
        with(&with(&syn, 23, &[1]), 34, &[8, 0]),
        NotOurs,
    );
    pass("IPv6: a fragment header", with(&syn6, 20, &[44]), Fragment);
    pass(
        "IPv6: a hop-by-hop header",
        with(&syn6, 20, &[0]),
        ExtensionHeader,
    );
    pass(
        "IPv6: an ICMPv6 error",
        with(&with(&syn6, 20, &[58]), 54, &[2, 0]),
        IcmpError,
    );
    pass(
        "IPv6: a neighbour solicitation",
        with(&with(&syn6, 20, &[58]), 54, &[135, 0]),
        NotOurs,
    );
}
