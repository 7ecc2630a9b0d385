//! Whose a packet is, and what its ends become: what the tables say of it, read
//! anew.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bg_common::{
    flow::{Flow, FlowKey, FlowTable, bits},
    key::{Endpoint, PREVIEW, TCP, UDP},
    service::{Backend, Listener, PoolWord, ReturnPath, forward},
    snat::via,
};
use bg_tests::world::{World, key, wide};

use super::{oracle::Judged, ports, view::Ip};

/// Source and destination.
pub(super) type Ends = [SocketAddr; 2];

/// Both ends of a packet that shows its ports.
pub(super) fn ends(ip: &Ip, packet: &[u8]) -> Option<Ends> {
    let [from, to] = ip.ports(packet)?;
    Some([
        SocketAddr::new(ip.source, from),
        SocketAddr::new(ip.destination, to),
    ])
}

/// An address of the tables: 16 bytes, IPv4 first.
pub(super) fn address(wide: &[u8; 16], v6: bool) -> IpAddr {
    if v6 {
        return Ipv6Addr::from(*wide).into();
    }
    let [a, b, c, d, ..] = *wide;
    Ipv4Addr::new(a, b, c, d).into()
}

/// The listener at an end.
pub(super) fn listener(world: &World, at: SocketAddr, protocol: u8) -> Option<Listener> {
    let port = at.port().to_be_bytes();
    match at.ip() {
        IpAddr::V4(ip) => {
            let at = Endpoint::new(ip.octets(), port, protocol);
            world.listeners_v4.get(&at).copied()
        }
        IpAddr::V6(ip) => {
            let at = Endpoint::new(ip.octets(), port, protocol);
            world.listeners_v6.get(&at).copied()
        }
    }
}

/// The way back from the backend at an end.
fn return_path(world: &World, at: SocketAddr, protocol: u8) -> Option<&ReturnPath> {
    let port = at.port().to_be_bytes();
    match at.ip() {
        IpAddr::V4(ip) => world
            .returns_v4
            .get(&Endpoint::new(ip.octets(), port, protocol)),
        IpAddr::V6(ip) => world
            .returns_v6
            .get(&Endpoint::new(ip.octets(), port, protocol)),
    }
}

/// A flow's entries that count, the established one first: neither over nor moved to
/// another table, and with the port that they were lent.
pub(super) fn current(world: &World, key: FlowKey, protocol: u8) -> Vec<(FlowTable, Flow)> {
    let tables: &[FlowTable] = match protocol {
        UDP => &[FlowTable::Udp],
        TCP => &[FlowTable::Established, FlowTable::HalfOpen],
        _ => &[],
    };
    let found = tables
        .iter()
        .filter_map(|table| Some((*table, *world.flows.get(&(*table, key))?)));
    let counts = |(table, flow): &(FlowTable, Flow)| {
        let moved = (flow.from_client | flow.from_backend) & bits::MOVED != 0;
        let lost = ports::is_lent(flow.via) && !ports::has(world, key, flow);
        !flow.is_over(*table, world.tick)
            && (*table == FlowTable::Established || !lost)
            && (*table != FlowTable::HalfOpen || !moved)
    };
    found.filter(counts).collect()
}

/// How a flow's packets go to its backend.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) backend: Backend,
    pub(super) via: u16,
}

impl Way {
    /// The way of a flow of the only service; `None` when its backend is another's, or
    /// nobody's.
    fn of(world: &World, backend: u32, via: u16, v6: bool) -> Option<Self> {
        let backend = *world.backends.get(backend as usize)?;
        let serves = backend.service == 0 && backend.family == if v6 { 6 } else { 4 };
        serves.then_some(Self { backend, via })
    }

    /// What the ends of a client's packet become; `None` while the gateway's own
    /// address is not known.
    pub(super) fn ends(&self, world: &World, [client, listener]: Ends) -> Option<Ends> {
        let v6 = listener.is_ipv6();
        let port = match u16::from_be_bytes(self.backend.port) {
            0 => listener.port(),
            own => own,
        };
        let backend = SocketAddr::new(address(&self.backend.address, v6), port);
        match self.via {
            via::NAT => Some([client, backend]),
            via::DSR => Some([client, listener]),
            lent => {
                let own = ports::own_address(world, self.backend.block, v6)?;
                Some([SocketAddr::new(own, lent), backend])
            }
        }
    }
}

/// A client's packet.
pub(super) struct Asked {
    pub(super) listener: Listener,
    pub(super) key: FlowKey,
    pub(super) ends: Ends,
    protocol: u8,
}

/// The client's packet with these ends, if it is one.
pub(super) fn asked(world: &World, ends: Ends, protocol: u8) -> Option<Asked> {
    let listener = listener(world, ends[1], protocol)?;
    Some(Asked {
        listener,
        key: key(ends[0], listener.id),
        ends,
        protocol,
    })
}

impl Asked {
    /// The flow's entries that a packet of it meets.
    pub(super) fn flows(&self, world: &World) -> Vec<(FlowTable, Flow)> {
        let mut flows = current(world, self.key, self.protocol);
        flows.retain(|(_, flow)| u32::from(flow.service) == self.listener.service);
        flows
    }

    /// The ways of a known flow that is not cut; of a cut one, too, for a RST. What is
    /// established goes before what is not, unless a SYN of the same tuple came since.
    pub(super) fn known_ways(&self, world: &World, rst: bool) -> Vec<Way> {
        let mut flows = self.flows(world);
        if let [(FlowTable::Established, flow), ..] = flows[..]
            && flow.from_client & bits::CONTESTED == 0
        {
            flows.truncate(1);
        }
        let stays = |flow: &Flow| rst || !world.word.resets(flow.colour_spread, flow.generation);
        flows
            .iter()
            .filter(|(_, flow)| stays(flow))
            .filter_map(|(_, flow)| Way::of(world, flow.backend, flow.via, self.is_v6()))
            .collect()
    }

    /// The ways of a new flow: to backends of the word's colours, and in `snat` from
    /// the port that it has now.
    pub(super) fn new_ways(&self, judged: &Judged<'_>) -> Vec<Way> {
        let world = judged.before;
        let chosen = self.chosen(world);
        let ways = chosen.iter().filter_map(|id| {
            let via = match self.listener.forward {
                forward::SNAT => {
                    let remembered = current(judged.after, self.key, self.protocol);
                    let (_, flow) = remembered
                        .iter()
                        .find(|(table, flow)| !is_established(*table) && flow.backend == *id)?;
                    flow.via
                }
                forward::DSR => via::DSR,
                _ => via::NAT,
            };
            Way::of(world, *id, via, self.is_v6())
        });
        ways.collect()
    }

    /// Backends that the word and the pools may choose.
    pub(super) fn chosen(&self, world: &World) -> Vec<u32> {
        let pools = self.pools(world);
        pools
            .iter()
            .flat_map(|pool| pool.base()..pool.base() + pool.slots())
            .collect()
    }

    /// The pools that the word may choose.
    pub(super) fn pools(&self, world: &World) -> Vec<PoolWord> {
        let active = world.word.active();
        let standby = (world.word.canary() > 0).then(|| active.other());
        let colours = match self.listener.preview_of() {
            None => [Some(active), standby],
            only => [only, None],
        };
        let colours = colours.into_iter().flatten();
        colours
            .map(|colour| world.pools[PoolWord::index(0, colour, self.is_v6()) as usize])
            .collect()
    }

    pub(super) const fn protocol(&self) -> u8 {
        self.protocol
    }

    fn is_v6(&self) -> bool {
        self.ends[0].is_ipv6()
    }
}

fn is_established(table: FlowTable) -> bool {
    table == FlowTable::Established
}

/// A backend's packet.
pub(super) struct Owed {
    /// Whom it is for.
    pub(super) key: FlowKey,
    /// What the flow's [`Flow::via`] must be.
    pub(super) via: u16,
    path: ReturnPath,
    ends: Ends,
    protocol: u8,
}

/// The backend's packet with these ends, if it is one: of its listener or of its preview,
/// whichever has a flow that is proven; of the listener, where both or none have.
pub(super) fn owed(world: &World, ends: Ends, protocol: u8) -> Option<Owed> {
    let by = |name| {
        Some(owed_by(
            world,
            *return_path(world, ends[0], name)?,
            ends,
            protocol,
        ))
    };
    let listener = by(protocol)?;
    let rank = |owed: &Owed| match owed.own(world).as_slice() {
        [] => 0,
        [(FlowTable::HalfOpen, _), ..] => 1,
        _ => 2,
    };
    let preview = by(protocol | PREVIEW);
    let preview = preview.filter(|preview| rank(preview) > rank(&listener));
    Some(preview.unwrap_or(listener))
}

/// The same by one way back: for who has the port that it is for, or else for the client
/// that it names.
fn owed_by(world: &World, path: ReturnPath, ends: Ends, protocol: u8) -> Owed {
    let to = ends[1];
    let own = ports::own_address(world, path.block, to.is_ipv6());
    let lessee = ports::lessee(world, path.block, to.port())
        .filter(|key| own == Some(to.ip()) && key.listener() == path.listener);
    let (key, via) = match lessee {
        Some(lessee) => (lessee, to.port()),
        None => (key(to, path.listener), via::NAT),
    };
    Owed {
        key,
        via,
        path,
        ends,
        protocol,
    }
}

impl Owed {
    /// Who hears it, and from whom.
    pub(super) fn ends(&self) -> Ends {
        let v6 = self.ends[0].is_ipv6();
        let listener = address(&self.path.address, v6);
        let client = if v6 {
            Ipv6Addr::from(self.key.address()).into()
        } else {
            let [.., a, b, c, d] = self.key.address();
            Ipv4Addr::new(a, b, c, d).into()
        };
        [
            SocketAddr::new(listener, u16::from_be_bytes(self.path.port)),
            SocketAddr::new(client, u16::from_be_bytes(self.key.port())),
        ]
    }

    /// The flow's entries that a packet of it meets, whichever backend they are of.
    pub(super) fn flows(&self, world: &World) -> Vec<(FlowTable, Flow)> {
        let mut flows = current(world, self.key, self.protocol);
        flows.retain(|(_, flow)| flow.via == self.via);
        flows
    }

    /// Those of the backend that sent the packet.
    pub(super) fn own(&self, world: &World) -> Vec<(FlowTable, Flow)> {
        let sender = wide(self.ends[0]);
        let mut flows = self.flows(world);
        flows.retain(|(_, flow)| {
            let backend = world.backends.get(flow.backend as usize);
            backend.is_some_and(|backend| backend.address == sender)
        });
        flows
    }
}

/// True when a packet with these ends is of a flow that the word has cut.
pub(super) fn is_cut(world: &World, ends: Ends, protocol: u8) -> bool {
    let flows = match asked(world, ends, protocol) {
        Some(asked) => asked.flows(world),
        None => owed(world, ends, protocol).map_or(Vec::new(), |owed| {
            // A cut flow's datagrams are nobody's, whichever backend they are of.
            if protocol == UDP {
                owed.flows(world)
            } else {
                owed.own(world)
            }
        }),
    };
    flows
        .iter()
        .any(|(_, flow)| world.word.resets(flow.colour_spread, flow.generation))
}
