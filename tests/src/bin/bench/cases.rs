//! What is measured: frames, the reason each must count, and the goal.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use bg_common::reason::Reason;
use bg_ebpf::stream::Stream;
use bg_tests::{
    frame::{Frame, Macs},
    generator::{self, Client},
    lab::{listener, listener_v6},
};

/// Where clients' addresses begin: the benchmark networks of RFC 2544, ...
pub const CLIENTS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
/// ... and RFC 5180.
pub const CLIENTS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0);
/// Where those begin whose flows nobody knows.
const STRANGERS: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 0);
/// The same over IPv6: behind this part of the clients' network.
const STRANGERS_V6: Ipv4Addr = Ipv4Addr::new(128, 0, 0, 0);
/// Kinds of strangers: over TCP, TCP over IPv6, and UDP.
pub const STRANGERS_KINDS: usize = 3;
/// So many strangers of a kind come round that each is forgotten in between.
pub const STRANGER_FLOWS: u32 = 4_000_000;
/// A MAC address that nobody has: the stack drops what is passed to it at once.
const NOBODY: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

/// Which interface of the gateway is measured, fed from its other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Where clients' packets come in.
    Clients,
    /// Where servers' packets come in.
    Servers,
}

impl Side {
    /// Both, in index order.
    pub const ALL: [Self; 2] = [Self::Clients, Self::Servers];
}

/// Which program takes the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Bare `XDP_DROP`.
    Drop,
    /// Bare `XDP_REDIRECT` to the servers.
    Redirect,
    /// Bare `XDP_TX`, back where they came from.
    Transmit,
    /// The packet path.
    Ours,
    /// The packet path while it listens to the service's servers.
    Listening,
    /// The packet path after a flip: the flows drain.
    Draining,
    /// The packet path after a flip that cut the flows.
    Cut,
    /// One part of what the packet path does, by the program's name; then drops, but for
    /// [`LEAST`].
    Part(&'static str),
}

impl Program {
    /// Whether it is the packet path.
    pub const fn is_ours(self) -> bool {
        matches!(
            self,
            Self::Ours | Self::Listening | Self::Draining | Self::Cut
        )
    }
}

/// Parts of what the packet path does: program, and name in the report.
pub const PARTS: [(&str, &str); 7] = [
    (LEAST, "floor: least of a translation"),
    (FLOW_PART, "part: look-up of a flow"),
    ("find_listener", "part: look-up of a listener"),
    ("find_backend", "part: look-up in an array"),
    ("count", "part: count in a per-CPU array"),
    ("clock", "part: clock"),
    ("call", "part: BPF function call"),
];
/// What no translation can leave out, all in one: it sends packets on.
pub const LEAST: &str = "least";
/// The part that takes most of the time when there are many flows.
const FLOW_PART: &str = "find_flow";

/// Frames of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Client's segment of an established flow, IPv4.
    Forward,
    /// The same, IPv6.
    ForwardV6,
    /// Client's datagram of a known flow, IPv4.
    ForwardUdp,
    /// Server's segment of an established flow, IPv4.
    Return,
    /// The same, IPv6.
    ReturnV6,
    /// Server's datagram of a known flow, IPv4.
    ReturnUdp,
    /// SYN of a client that is not known, IPv4.
    First,
    /// The same, IPv6.
    FirstV6,
    /// Datagram of a client that is not known, IPv4.
    FirstUdp,
    /// Client's segment of an established flow with `dsr`, IPv4.
    ForwardDsr,
    /// Client's datagram of a known flow with `snat`, IPv4.
    ForwardSnat,
    /// Client's segment of an established flow of several services in turn, IPv4.
    ForwardOver(Ports),
    /// Server's segment of such a flow.
    ReturnOver(Ports),
    /// SYN of a client that is not known, to several services in turn, IPv4.
    FirstOver(Ports),
    /// To an address that is no listener's, from one that is no server's.
    NotOurs,
}

/// Ports of listeners, one behind the other, and of their servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The first one.
    pub first: u16,
    /// How many.
    pub count: u16,
}

/// Where the service with `dsr` listens, ...
pub const DSR: u16 = 8100;
/// ... and the one with `snat`, for datagrams.
pub const SNAT: u16 = 4500;

/// One line of the report.
#[derive(Clone, Debug)]
pub struct Case {
    /// Name.
    pub name: &'static str,
    /// Whose cost it is.
    pub program: Program,
    /// What it is fed with.
    pub kind: Kind,
    /// Over how many flows.
    pub flows: u32,
    /// At most so many nanoseconds a packet, net of `XDP_DROP`.
    pub goal: Option<u32>,
}

/// What is measured with so many flows in the tables, and the goal of each.
pub type Stage = (u32, &'static [(Kind, Option<u32>)]);

/// All stages, fewest flows first.
pub const STAGES: [Stage; 3] = [
    (
        1_000,
        &[
            (Kind::Forward, Some(55)),
            (Kind::ForwardV6, Some(72)),
            (Kind::ForwardUdp, None),
            (Kind::Return, Some(72)),
            (Kind::ReturnV6, Some(94)),
            (Kind::ReturnUdp, None),
            (Kind::NotOurs, Some(20)),
            (Kind::First, Some(250)),
            (Kind::FirstV6, Some(250)),
            (Kind::FirstUdp, Some(250)),
            (Kind::ForwardDsr, None),
            (Kind::ForwardSnat, None),
        ],
    ),
    (
        100_000,
        &[
            (Kind::Forward, Some(120)),
            (Kind::ForwardV6, Some(156)),
            (Kind::Return, Some(156)),
        ],
    ),
    (
        1_000_000,
        &[
            (Kind::Forward, Some(160)),
            (Kind::ForwardV6, Some(208)),
            (Kind::Return, Some(208)),
        ],
    ),
];

/// The cases of a stage.
pub fn of_stage((flows, kinds): Stage) -> Vec<Case> {
    let over = |kind: Kind| {
        if kind.is_first() {
            STRANGER_FLOWS
        } else {
            flows
        }
    };
    let mut cases: Vec<Case> = kinds
        .iter()
        .map(|(kind, goal)| Case {
            name: kind.name(),
            program: Program::Ours,
            kind: *kind,
            flows: over(*kind),
            goal: *goal,
        })
        .collect();
    let mut compare = |name, kind, program| {
        cases.push(Case {
            name,
            program,
            kind,
            flows: over(kind),
            goal: None,
        });
    };
    let few = flows == STAGES[0].0;
    if few {
        for (name, kind, program) in [
            ("forward, draining", Kind::Forward, Program::Draining),
            ("return, draining", Kind::Return, Program::Draining),
            ("reset of a cut flow", Kind::Forward, Program::Cut),
            ("forward, listening", Kind::Forward, Program::Listening),
            ("return, listening", Kind::Return, Program::Listening),
            ("first packet, listening", Kind::First, Program::Listening),
        ] {
            compare(name, kind, program);
        }
        compare("bare XDP_REDIRECT", Kind::Forward, Program::Redirect);
    }
    for (program, name) in PARTS {
        if few || [LEAST, FLOW_PART].contains(&program) {
            compare(name, Kind::Forward, Program::Part(program));
        }
    }
    cases
}

impl Case {
    /// What the packet path must count.
    pub const fn reason(&self) -> Reason {
        match self.program {
            Program::Cut => Reason::ResetClient,
            _ => self.kind.reason(),
        }
    }
}

impl Kind {
    /// Whether its flows are not known.
    pub const fn is_first(self) -> bool {
        self.strangers().is_some()
    }

    /// Whose flows are not known: an index less than [`STRANGERS_KINDS`].
    pub const fn strangers(self) -> Option<usize> {
        match self {
            Self::First | Self::FirstOver(_) => Some(0),
            Self::FirstV6 => Some(1),
            Self::FirstUdp => Some(2),
            _ => None,
        }
    }

    /// Name in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward, IPv4 TCP",
            Self::ForwardV6 => "forward, IPv6 TCP",
            Self::ForwardUdp => "forward, IPv4 UDP",
            Self::Return => "return, IPv4 TCP",
            Self::ReturnV6 => "return, IPv6 TCP",
            Self::ReturnUdp => "return, IPv4 UDP",
            Self::First => "first packet of a flow, IPv4 TCP",
            Self::FirstV6 => "first packet of a flow, IPv6 TCP",
            Self::FirstUdp => "first packet of a flow, IPv4 UDP",
            Self::ForwardDsr => "forward, IPv4 TCP, dsr",
            Self::ForwardSnat => "forward, IPv4 UDP, snat",
            Self::ForwardOver(_) => "forward",
            Self::ReturnOver(_) => "return",
            Self::FirstOver(_) => "first packet",
            Self::NotOurs => "not ours, IPv4 TCP",
        }
    }

    /// Where these frames come in.
    pub const fn side(self) -> Side {
        match self {
            Self::Return | Self::ReturnV6 | Self::ReturnUdp | Self::ReturnOver(_) => Side::Servers,
            _ => Side::Clients,
        }
    }

    /// What the packet path must count, unless the flows are cut.
    const fn reason(self) -> Reason {
        match self {
            Self::Forward
            | Self::ForwardV6
            | Self::ForwardUdp
            | Self::ForwardDsr
            | Self::ForwardSnat
            | Self::ForwardOver(_) => Reason::Forwarded,
            Self::Return | Self::ReturnV6 | Self::ReturnUdp | Self::ReturnOver(_) => {
                Reason::Returned
            }
            Self::First | Self::FirstV6 | Self::FirstUdp | Self::FirstOver(_) => {
                Reason::ForwardedNew
            }
            Self::NotOurs => Reason::NotOurs,
        }
    }

    /// The stream over `flows` flows, between `macs`; `servers` is the backend that all
    /// flows are pinned to, over IPv4 and over IPv6.
    pub fn stream(self, macs: Macs, servers: [IpAddr; 2], flows: u32) -> Result<Stream> {
        let [server, server_v6] = servers;
        let anyone = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let anyone_v6 = SocketAddr::from((CLIENTS_V6, 0));
        let syn = |port| {
            let frame = Frame::tcp(macs, anyone, listener(port), "S").padding(10);
            (frame, Client::Source, STRANGERS)
        };
        let segment = |port| {
            let frame = Frame::tcp(macs, anyone, listener(port), "A").payload(&[0; 10]);
            (frame, Client::Source, CLIENTS)
        };
        let reply = |port| {
            let from = SocketAddr::new(server, port);
            let frame = Frame::tcp(macs, from, anyone, "A").payload(&[0; 10]);
            (frame, Client::Destination, CLIENTS)
        };
        let (frame, client, first) = match self {
            Self::Forward => segment(8000),
            Self::ForwardDsr => segment(DSR),
            Self::ForwardOver(_) => segment(0),
            Self::ForwardV6 => (
                Frame::tcp(macs, anyone_v6, listener_v6(8000), "A").padding(6),
                Client::Source,
                Ipv4Addr::UNSPECIFIED,
            ),
            Self::ForwardUdp => (
                Frame::udp(macs, anyone, listener(4433)).payload(&[0; 22]),
                Client::Source,
                CLIENTS,
            ),
            Self::Return => reply(8000),
            Self::ReturnOver(_) => reply(0),
            Self::ReturnV6 => (
                Frame::tcp(macs, SocketAddr::new(server_v6, 8000), anyone_v6, "A").padding(6),
                Client::Destination,
                Ipv4Addr::UNSPECIFIED,
            ),
            Self::ReturnUdp => {
                let server = SocketAddr::new(server, 4433);
                (
                    Frame::udp(macs, server, anyone).payload(&[0; 22]),
                    Client::Destination,
                    CLIENTS,
                )
            }
            Self::First => syn(8000),
            Self::FirstOver(_) => syn(0),
            Self::FirstV6 => (
                Frame::tcp(macs, anyone_v6, listener_v6(8000), "S").padding(6),
                Client::Source,
                STRANGERS_V6,
            ),
            Self::FirstUdp => (
                Frame::udp(macs, anyone, listener(4433)).payload(&[0; 22]),
                Client::Source,
                STRANGERS,
            ),
            Self::ForwardSnat => (
                Frame::udp(macs, anyone, listener(SNAT)).payload(&[0; 22]),
                Client::Source,
                CLIENTS,
            ),
            Self::NotOurs => {
                let macs = Macs { to: NOBODY, ..macs };
                let elsewhere = SocketAddr::from(([192, 0, 2, 99], 8000));
                (
                    Frame::tcp(macs, anyone, elsewhere, "A").padding(10),
                    Client::Source,
                    CLIENTS,
                )
            }
        };
        let frame = frame.numbers(1000, 0).bytes();
        let stream = generator::stream(&frame, client, flows, first.to_bits())?;
        Ok(match self {
            Self::ForwardOver(ports) | Self::ReturnOver(ports) | Self::FirstOver(ports) => {
                generator::over_ports(stream, ports.first, ports.count)
            }
            _ => stream,
        })
    }
}
