//! The state that a packet meets, in one form for both packet paths, and the
//! packet path's twin on the host.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::{BTreeMap, HashMap},
    hash::Hash,
    net::{IpAddr, SocketAddr},
};

use bg_common::{
    directory::{Entry, Name},
    flow::{Flow, FlowKey, FlowTable, LINES, TableShape},
    key::{Endpoint, EndpointV4, EndpointV6, FragmentKey, PREVIEW},
    port::{Port, Tags},
    reason::Reason,
    service::{
        Backend, Colour, ColourStats, CutoverWord, FirstFlow, Fragment, Interface, Listener,
        NextHop, PoolWord, ReturnPath, forward, way,
    },
    snat::{CANDIDATES, Lease, Source, port, via},
};
use bg_ebpf::{
    flows::FlowCell,
    leases::{Hold, LeaseCell, candidate, hold},
    packet::Packet,
    parse::Segment,
    pipeline::{Action, Verdict, process},
    preview::Reply,
    tables::{Address, FamilyTables, Tables, name},
};

use crate::{flow_table::FlowTables, frame::Macs};

/// Slot of the clients' interface.
pub const CLIENTS: u32 = 0;
/// Slot of the backends' interface.
pub const BACKENDS: u32 = 1;

/// A client's, or its router's, MAC.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The gateway's MAC on the clients' side.
pub const OUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The gateway's MAC on the backends' side.
pub const INNER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];

/// Frames from clients to the gateway.
pub const FROM_CLIENT: Macs = Macs {
    to: OUTER_MAC,
    from: CLIENT_MAC,
};
/// Frames from the gateway to clients.
pub const TO_CLIENT: Macs = Macs {
    to: CLIENT_MAC,
    from: OUTER_MAC,
};

/// MAC of a backend, by id.
pub const fn backend_mac(id: u32) -> [u8; 6] {
    [2, 0, 0, 0, 1, id as u8]
}

/// Frames from the gateway to a backend.
pub const fn to_backend(id: u32) -> Macs {
    Macs {
        to: backend_mac(id),
        from: INNER_MAC,
    }
}

/// Frames from a backend to the gateway.
pub const fn from_backend(id: u32) -> Macs {
    Macs {
        to: INNER_MAC,
        from: backend_mac(id),
    }
}

/// Flows, in all three tables.
pub type Flows = HashMap<(FlowTable, FlowKey), Flow>;

/// The idle time of the world's UDP listeners, in ticks.
pub const UDP_IDLE: u32 = 450;

/// Leases of ports, by block and index.
pub type Leases = HashMap<(u32, u32), Lease>;

/// What became of first fragments of one address family.
pub type Fragments<A> = HashMap<FragmentKey<A>, Fragment>;

/// One service with two colours of one backend per address family, one of them
/// on a port of its own, and two interfaces. Cases change it before they run.
#[derive(Clone, Debug)]
pub struct World {
    /// The service's word.
    pub word: CutoverWord,
    /// Arena slots of the pools, by colour and family.
    pub pools: [PoolWord; 4],
    /// Backends, by id; the Maglev arena maps slot n to backend n.
    pub backends: Vec<Backend>,
    /// Interfaces, by slot.
    pub interfaces: Vec<Interface>,
    /// IPv4 listeners.
    pub listeners_v4: HashMap<EndpointV4, Listener>,
    /// IPv6 listeners.
    pub listeners_v6: HashMap<EndpointV6, Listener>,
    /// IPv4 return paths.
    pub returns_v4: HashMap<EndpointV4, ReturnPath>,
    /// IPv6 return paths.
    pub returns_v6: HashMap<EndpointV6, ReturnPath>,
    /// Remembered flows.
    pub flows: Flows,
    /// First fragments over IPv4.
    pub fragments_v4: Fragments<[u8; 4]>,
    /// First fragments over IPv6.
    pub fragments_v6: Fragments<[u8; 16]>,
    /// The gateway's addresses in `snat`, by block.
    pub sources: Vec<Source>,
    /// Who has which port, by block and index.
    pub leases: Leases,
    /// The established table is full of strangers.
    pub full: bool,
    /// Slot of the interface the packet comes in by.
    pub ingress: u32,
    /// The clock, in ticks.
    pub tick: u32,
}

/// Endpoints of the world.
pub mod at {
    use bg_common::key::{TCP, UDP};

    /// The service over IPv4.
    pub const SERVICE: &str = "203.0.113.10:8000";
    /// The service over IPv6.
    pub const SERVICE_V6: &str = "[2001:db8::10]:8000";
    /// The service's UDP listener.
    pub const SERVICE_UDP: &str = "203.0.113.10:4433";
    /// The service's UDP listener over IPv6.
    pub const SERVICE_UDP_V6: &str = "[2001:db8::10]:4433";
    /// Backends by id: blue and green over IPv4, blue and green over IPv6. The
    /// green ones listen on a port of their own for TCP and UDP alike.
    pub const BACKENDS: [&str; 4] = [
        "10.0.1.10:0",
        "10.0.2.10:9000",
        "[fd00:1::10]:0",
        "[fd00:2::10]:9000",
    ];
    /// The service's listeners by id, less 1, and their protocols.
    pub const LISTENERS: [(&str, u8); 4] = [
        (SERVICE, TCP),
        (SERVICE_V6, TCP),
        (SERVICE_UDP, UDP),
        (SERVICE_UDP_V6, UDP),
    ];
    /// The previews of blue and of green, over IPv4 and over IPv6.
    pub const PREVIEWS: [[&str; 2]; 2] = [
        ["203.0.113.11", "2001:db8::11"],
        ["203.0.113.12", "2001:db8::12"],
    ];
    /// The gateway's own address on the backends' side, in `snat`.
    pub const OWN: &str = "10.0.0.1:0";
    /// The same over IPv6.
    pub const OWN_V6: &str = "[fd00::1]:0";
    /// A client over IPv4.
    pub const CLIENT: &str = "198.51.100.7:40000";
    /// A client over IPv6.
    pub const CLIENT_V6: &str = "[2001:db8:c::7]:40000";
}

/// The preview of a colour that stands for the listener at this address.
pub fn preview_at(colour: Colour, listener: SocketAddr) -> SocketAddr {
    let [v4, v6] = at::PREVIEWS[colour as usize];
    let address = if listener.is_ipv4() { v4 } else { v6 };
    let address = address.parse().expect("an address in a test");
    SocketAddr::new(address, listener.port())
}

/// Parses an address of a test.
///
/// # Panics
/// When it is none.
pub fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address in a test")
}

impl World {
    /// What the directory says of its endpoints.
    pub fn entries(&self) -> Vec<Entry> {
        let mut whose = BTreeMap::new();
        name_all(&self.listeners_v4, &self.returns_v4, &mut whose);
        name_all(&self.listeners_v6, &self.returns_v6, &mut whose);
        let entry = |(name, (listener, path))| Entry::new(name, listener, path);
        whose.into_iter().map(entry).collect()
    }

    /// The world before a case changes it; `ifindexes` of both interfaces.
    pub fn new(ifindexes: [u32; 2]) -> Self {
        let mut world = Self {
            word: CutoverWord::new(Colour::Blue),
            pools: [
                PoolWord::new(0, 1),
                PoolWord::new(2, 1),
                PoolWord::new(1, 1),
                PoolWord::new(3, 1),
            ],
            backends: Vec::new(),
            interfaces: vec![
                plain(ifindexes[0], OUTER_MAC),
                plain(ifindexes[1], INNER_MAC),
            ],
            listeners_v4: HashMap::new(),
            listeners_v6: HashMap::new(),
            returns_v4: HashMap::new(),
            returns_v6: HashMap::new(),
            flows: HashMap::new(),
            fragments_v4: HashMap::new(),
            fragments_v6: HashMap::new(),
            sources: Vec::new(),
            leases: HashMap::new(),
            full: false,
            ingress: CLIENTS,
            tick: 1_000_000,
        };
        for (id, text) in at::BACKENDS.iter().enumerate() {
            let address = addr(text);
            let id = id as u32;
            world.backends.push(Backend {
                next_hop: NextHop::new(backend_mac(id), BACKENDS as u16).0,
                address: wide(address),
                port: address.port().to_be_bytes(),
                family: if address.is_ipv6() { 6 } else { 4 },
                colour: (id % 2) as u8,
                service: 0,
                block: 0,
            });
        }
        // No listener has id 0.
        for (id, (text, protocol)) in (1..).zip(at::LISTENERS) {
            world.listen((id, None), addr(text), protocol);
        }
        world
    }

    /// The same world, before it has another mode, with a preview of each colour.
    #[must_use]
    pub fn with_previews(&self) -> Self {
        let mut world = self.clone();
        for path in world.returns_v4.values_mut() {
            path.previewed = 1;
        }
        for path in world.returns_v6.values_mut() {
            path.previewed = 1;
        }
        for colour in Colour::ALL {
            for (listener, (text, protocol)) in (1..).zip(at::LISTENERS) {
                let id = Self::preview_id(colour, listener);
                world.listen((id, Some(colour)), preview_at(colour, addr(text)), protocol);
            }
        }
        world
    }

    /// The id of the preview of a colour that stands for a listener.
    pub const fn preview_id(colour: Colour, listener: u16) -> u16 {
        (colour as u16 + 1) * at::LISTENERS.len() as u16 + listener
    }

    /// The same world with `snat`, every backend having a block of ports.
    #[must_use]
    pub fn with_snat(&self) -> Self {
        let mut world = self.with_mode(forward::SNAT);
        world.sources = vec![Source::default()];
        for (block, backend) in (1..).zip(&mut world.backends) {
            backend.block = block;
            let own = if backend.family == 4 {
                at::OWN
            } else {
                at::OWN_V6
            };
            world.sources.push(Source {
                address: wide(addr(own)),
            });
        }
        let blocks: HashMap<[u8; 16], u16> = world
            .backends
            .iter()
            .map(|b| (b.address, b.block))
            .collect();
        for (from, path) in &mut world.returns_v4 {
            path.block = blocks[&wide(SocketAddr::from((from.address, 0)))];
        }
        for (from, path) in &mut world.returns_v6 {
            path.block = blocks[&from.address];
        }
        world
    }

    /// The same world with `dsr`.
    #[must_use]
    pub fn with_dsr(&self) -> Self {
        let mut world = self.with_mode(forward::DSR);
        world.returns_v4.clear();
        world.returns_v6.clear();
        world
    }

    fn with_mode(&self, mode: u8) -> Self {
        let mut world = self.clone();
        world.set_mode(mode);
        world
    }

    /// From now on new flows are forwarded in this mode.
    pub fn set_mode(&mut self, mode: u8) {
        let listeners = self.listeners_v4.values_mut();
        for listener in listeners.chain(self.listeners_v6.values_mut()) {
            listener.forward = mode;
        }
    }

    /// The ports, by index, that are looked at for a flow, in their order.
    pub fn candidates(key: &FlowKey, table: FlowTable) -> impl Iterator<Item = u32> + use<> {
        let hash = key.hash(SEED);
        (0..CANDIDATES).map(move |n| candidate(hash, table, n).0)
    }

    /// Listens, also for one colour alone.
    fn listen(&mut self, (id, only): (u16, Option<Colour>), address: SocketAddr, protocol: u8) {
        let listener = Listener {
            service: 0,
            id,
            forward: forward::NAT,
            only: Listener::only(only),
            idle: UDP_IDLE,
        };
        let path = ReturnPath {
            address: wide(address),
            port: address.port().to_be_bytes(),
            listener: id,
            service: 0,
            block: 0,
            previewed: 0,
        };
        for (id, backend) in at::BACKENDS.iter().enumerate() {
            let mut from = addr(backend);
            let is_one = only.is_none_or(|colour| id % 2 == colour as usize);
            if from.is_ipv4() != address.is_ipv4() || !is_one {
                continue;
            }
            // Both green endpoints serve one listener each: TCP's and UDP's.
            if from.port() == 0 {
                from.set_port(address.port());
            }
            let name = if only.is_some() { PREVIEW } else { 0 };
            self.answers(from, protocol | name, path);
        }
        let port = address.port().to_be_bytes();
        match address {
            SocketAddr::V4(v4) => {
                self.listeners_v4
                    .insert(Endpoint::new(v4.ip().octets(), port, protocol), listener);
            }
            SocketAddr::V6(v6) => {
                self.listeners_v6
                    .insert(Endpoint::new(v6.ip().octets(), port, protocol), listener);
            }
        }
    }

    /// What a backend's endpoint sends is rewritten back to this.
    pub fn answers(&mut self, from: SocketAddr, protocol: u8, path: ReturnPath) {
        let port = from.port().to_be_bytes();
        match from.ip() {
            IpAddr::V4(ip) => {
                let from = Endpoint::new(ip.octets(), port, protocol);
                self.returns_v4.insert(from, path);
            }
            IpAddr::V6(ip) => {
                let from = Endpoint::new(ip.octets(), port, protocol);
                self.returns_v6.insert(from, path);
            }
        }
    }

    /// The same world at another time: everything in it is as old as it was.
    pub fn move_to(&mut self, tick: u32) {
        let later = tick.wrapping_sub(self.tick);
        let moved = |then: &mut u32| *then = then.wrapping_add(later);
        for flow in self.flows.values_mut() {
            moved(&mut flow.seen);
            flow.routed = flow.routed.wrapping_add(later as u16);
        }
        self.leases
            .values_mut()
            .for_each(|lease| moved(&mut lease.since));
        self.fragments_v4
            .values_mut()
            .for_each(|f| moved(&mut f.seen));
        self.fragments_v6
            .values_mut()
            .for_each(|f| moved(&mut f.seen));
        self.tick = tick;
    }

    /// Runs a frame through the packet path on the host; flows change as it says.
    pub fn run(&mut self, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let (verdict, out, _) = self.run_watched(frame);
        (verdict, out)
    }

    /// The same, and what was looked up by a hash on the way.
    pub fn run_watched(&mut self, frame: &[u8]) -> (Verdict, Vec<u8>, Vec<Lookup>) {
        let lookups = Lookups::default();
        let mut buffer = Buffer {
            bytes: frame.to_vec(),
            tags: Tags::NONE,
            ingress: self.interfaces[self.ingress as usize].ifindex,
        };
        let twin = Twin {
            v4: FamilyTwin::new(&self.listeners_v4, &self.returns_v4, &self.fragments_v4),
            v6: FamilyTwin::new(&self.listeners_v6, &self.returns_v6, &self.fragments_v6),
            lookups: &lookups,
            tables: FlowTables::new(self.shapes()),
            sought: Cell::new(FlowKey::new([0; 2], [0; 2], 0)),
            pending: left_over(),
            leases: RefCell::new(self.leases.clone()),
            world: self,
            plans: Chain::default(),
            // What the packet before left: nothing to go by.
            no_plan: Fragment {
                seen: self.tick,
                way: way::BACK,
                ..Fragment::default()
            },
            reasons: RefCell::new(Vec::new()),
        };
        self.fill(&twin.tables);
        let verdict = process(&mut buffer, &twin);
        assert_eq!(
            *twin.reasons.borrow(),
            [verdict.reason],
            "one verdict, one reason (law 6)"
        );
        let Twin {
            v4,
            v6,
            tables,
            leases,
            ..
        } = twin;
        let (v4, v6, leases) = (v4.remembered, v6.remembered, leases.into_inner());
        self.flows = flows(&tables);
        self.leases = leases;
        self.fragments_v4.extend(v4.entries());
        self.fragments_v6.extend(v6.entries());
        (verdict, buffer.bytes, lookups.into_inner())
    }

    /// The shapes of the flow tables: small, and a full table's is one bucket.
    pub fn shapes(&self) -> [TableShape; FlowTable::ALL.len()] {
        let of = |buckets| TableShape::new(SEED, buckets);
        [of(if self.full { 1 } else { 16 }), of(16), of(16)]
    }

    /// Puts the world's flows into tables of its shapes.
    pub fn fill(&self, tables: &FlowTables) {
        // Oldest first: some tables evict.
        let mut flows: Vec<_> = self.flows.iter().collect();
        flows.sort_by_key(|((table, key), flow)| (*table, flow.seen, *key));
        for ((table, key), flow) in flows {
            assert!(
                tables.insert(*table, key, flow, self.tick),
                "no room for {key:?}"
            );
        }
        for stranger in 0..if self.full { LINES as u64 } else { 0 } {
            let key = FlowKey::new([STRANGERS, stranger], [0, 1], 9);
            let flow = Flow {
                seen: self.tick,
                ..Flow::default()
            };
            tables.insert(FlowTable::Established, &key, &flow, self.tick);
        }
    }
}

/// What the packet before left where flows are written down: nothing to go by, and it
/// looks like a flow to blue.
fn left_over() -> FlowCell {
    let flow = FlowCell::default();
    flow.via.set(via::DSR);
    flow
}

/// The seed of the tables' hash.
const SEED: u64 = 0x0123_4567_89ab_cdef;
/// First half of the addresses that fill a full table.
const STRANGERS: u64 = 0xdead;

/// What is in the tables, without the strangers that fill a full one.
pub fn flows(tables: &FlowTables) -> Flows {
    let of = |table| {
        tables
            .flows(table)
            .map(move |(key, flow)| ((table, key), flow))
    };
    FlowTable::ALL
        .into_iter()
        .flat_map(of)
        .filter(|((_, key), _)| key.client[0] != STRANGERS)
        .collect()
}

/// An interface without VLANs.
pub const fn plain(ifindex: u32, mac: [u8; 6]) -> Interface {
    Interface {
        tags: Tags::NONE,
        ifindex,
        device: ifindex,
        mtu: 1500,
        mac,
        zero: [0; 6],
    }
}

/// The address part, 16 bytes wide, IPv4 first.
pub fn wide(address: SocketAddr) -> [u8; 16] {
    let mut wide = [0; 16];
    match address {
        SocketAddr::V4(v4) => wide[..4].copy_from_slice(&v4.ip().octets()),
        SocketAddr::V6(v6) => wide = v6.ip().octets(),
    }
    wide
}

/// What XDP returns for an action.
pub const fn xdp_action(action: Action) -> u32 {
    match action {
        Action::Drop => 1,
        Action::Pass => 2,
        Action::Transmit => 3,
        Action::Redirect(_) => 4,
    }
}

struct Buffer {
    bytes: Vec<u8>,
    tags: Tags,
    ingress: u32,
}

impl Packet for Buffer {
    fn start(&self) -> usize {
        self.bytes.as_ptr() as usize
    }

    fn end(&self) -> usize {
        self.start() + self.bytes.len()
    }

    fn length(&self) -> usize {
        self.bytes.len()
    }

    fn ingress(&self) -> u32 {
        self.ingress
    }

    fn tags(&self) -> Tags {
        self.tags
    }

    fn port(&self) -> Port {
        Port::new(self.ingress, self.tags.vlan())
    }

    fn tag(&mut self, tags: Tags) {
        self.tags = tags;
    }

    fn truncate(&mut self, length: usize) -> bool {
        self.bytes.truncate(length);
        true
    }

    fn grow(&mut self, bytes: usize) -> bool {
        self.bytes.splice(0..0, vec![0; bytes]);
        true
    }

    fn shrink(&mut self, bytes: usize) -> bool {
        self.bytes.drain(..bytes);
        true
    }
}

/// What endpoints of one family are, by their names in the directory.
fn name_all<A: Address>(
    listeners: &HashMap<Endpoint<A>, Listener>,
    returns: &HashMap<Endpoint<A>, ReturnPath>,
    into: &mut BTreeMap<Name, (Listener, ReturnPath)>,
) {
    for (endpoint, listener) in listeners {
        into.entry(name(endpoint)).or_default().0 = *listener;
    }
    for (endpoint, path) in returns {
        into.entry(name(endpoint)).or_default().1 = *path;
    }
}

/// What is looked up by a hash: what costs a packet most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// A listener.
    Listener,
    /// A return path.
    Return,
    /// A flow.
    Flow(FlowTable),
    /// A first fragment.
    Fragment,
    /// The slot of an interface.
    Slot,
}

type Lookups = RefCell<Vec<Lookup>>;

struct Twin<'a> {
    world: &'a World,
    lookups: &'a Lookups,
    v4: FamilyTwin<'a, [u8; 4]>,
    v6: FamilyTwin<'a, [u8; 16]>,
    tables: FlowTables,
    sought: Cell<FlowKey>,
    pending: FlowCell,
    leases: RefCell<Leases>,
    plans: Chain<Fragment>,
    no_plan: Fragment,
    reasons: RefCell<Vec<Reason>>,
}

struct FamilyTwin<'a, A> {
    listeners: &'a HashMap<Endpoint<A>, Listener>,
    returns: &'a HashMap<Endpoint<A>, ReturnPath>,
    /// What became of first fragments before this packet.
    fragments: &'a Fragments<A>,
    /// And with it.
    remembered: Chain<(FragmentKey<A>, Fragment)>,
    kept: OnceCell<Segment<A>>,
    reply: OnceCell<Reply<A>>,
}

impl<'a, A: Copy + Eq + Hash> FamilyTwin<'a, A> {
    fn new(
        listeners: &'a HashMap<Endpoint<A>, Listener>,
        returns: &'a HashMap<Endpoint<A>, ReturnPath>,
        fragments: &'a Fragments<A>,
    ) -> Self {
        Self {
            listeners,
            returns,
            fragments,
            remembered: Chain::default(),
            kept: OnceCell::new(),
            reply: OnceCell::new(),
        }
    }
}

/// Entries that are added while older ones are held: like the kernel's, they stay
/// where they are as long as a packet may look at them.
struct Chain<T>(OnceCell<(T, Box<Self>)>);

impl<T> Default for Chain<T> {
    fn default() -> Self {
        Self(OnceCell::new())
    }
}

impl<T: Copy> Chain<T> {
    fn add(&self, entry: T) {
        match self.0.get() {
            Some((_, rest)) => rest.add(entry),
            None => {
                self.0.get_or_init(|| (entry, Box::default()));
            }
        }
    }

    /// Oldest first.
    fn iter(&self) -> impl Iterator<Item = &T> {
        let links = std::iter::successors(self.0.get(), |(_, rest)| rest.0.get());
        links.map(|(entry, _)| entry)
    }

    fn entries(&self) -> impl Iterator<Item = T> {
        self.iter().copied()
    }
}

impl Tables for Twin<'_> {
    fn word(&self, service: u32) -> Option<CutoverWord> {
        (service == 0).then_some(self.world.word)
    }

    fn first_flow(&self, _service: u32) -> FirstFlow {
        FirstFlow(0)
    }

    fn set_first_flow(&self, _service: u32, _stamp: FirstFlow) {}

    fn pool(&self, index: u32) -> PoolWord {
        self.world.pools[index as usize]
    }

    fn maglev(&self, slot: u32) -> Option<u32> {
        Some(slot)
    }

    fn backend(&self, id: u32) -> Option<&Backend> {
        self.world.backends.get(id as usize)
    }

    fn interface(&self, slot: u32) -> Option<&Interface> {
        self.world.interfaces.get(slot as usize)
    }

    fn slot(&self, port: &Port) -> Option<u32> {
        self.looks_up(Lookup::Slot);
        self.world
            .interfaces
            .iter()
            .position(|i| i.port() == *port)
            .map(|slot| slot as u32)
    }

    fn tick(&self) -> u32 {
        self.world.tick
    }

    fn now_ns(&self) -> u64 {
        bg_common::abi::tick_ns(self.world.tick)
    }

    fn seek(&self, key: &FlowKey) {
        self.sought.set(*key);
    }

    fn expect_half_open(&self) {}

    fn sought(&self) -> &FlowKey {
        // SAFETY: nobody seeks another flow as long as a caller holds the key.
        unsafe { &*self.sought.as_ptr() }
    }

    fn flow(&self, table: FlowTable) -> Option<&FlowCell> {
        self.looks_up(Lookup::Flow(table));
        self.tables.find(table, &self.sought.get())
    }

    fn pending(&self) -> &FlowCell {
        &self.pending
    }

    fn remember(&self, table: FlowTable) -> bool {
        self.tables
            .remember(table, &self.sought.get(), &self.pending, self.world.tick)
    }

    fn source(&self, block: u32) -> Option<&Source> {
        self.world.sources.get(block as usize)
    }

    fn has_port(&self, block: u32, index: u32) -> bool {
        self.lease(block, index).key() == self.sought.get()
    }

    fn seek_lessee(&self, block: u32, index: u32, listener: u16) -> bool {
        let key = self.lease(block, index).key();
        let found = key.listener() == listener;
        if found {
            self.sought.set(key);
        }
        found
    }

    fn lend(&self, block: u32, table: FlowTable) -> u16 {
        let (key, now) = (self.sought.get(), self.world.tick);
        let hash = key.hash(SEED);
        let index = (0..2 * CANDIDATES)
            .map(|n| candidate(hash, table, n))
            .find(|(index, least)| self.hold(block, *index) >= *least)
            .map(|(index, _)| index);
        let Some(index) = index else {
            return 0;
        };
        let mut lease = self.lease(block, index);
        lease.client = key.client;
        lease.id = key.id;
        lease.turn += 1;
        lease.since = now;
        lease.table = table as u32;
        self.leases.borrow_mut().insert((block, index), lease);
        port(index)
    }

    fn keep_port(&self, block: u32, index: u32) -> bool {
        let mut lease = self.lease(block, index);
        lease.turn += 1;
        let ours = lease.key() == self.sought.get();
        if ours {
            self.leases.borrow_mut().insert((block, index), lease);
        }
        ours
    }

    fn plan(&self, fragment: Fragment) {
        self.plans.add(fragment);
    }

    fn planned(&self) -> &Fragment {
        self.plans.iter().last().unwrap_or(&self.no_plan)
    }

    fn count(&self, reason: Reason) {
        self.reasons.borrow_mut().push(reason);
    }

    // What is heard changes no packet's way.
    fn listens(&self) -> bool {
        false
    }

    fn hear(&self, _kind: u32, _sequence: u32, _payload: u32) {}

    fn record(&self, _service: u32, _colour: Colour, add: impl FnOnce(&mut ColourStats)) {
        add(&mut ColourStats::default());
    }
}

impl Twin<'_> {
    fn looks_up(&self, what: Lookup) {
        self.lookups.borrow_mut().push(what);
    }

    fn lease(&self, block: u32, index: u32) -> Lease {
        let leases = self.leases.borrow();
        leases.get(&(block, index)).copied().unwrap_or_default()
    }

    /// How dispensable the flow with a port is.
    fn hold(&self, block: u32, index: u32) -> Hold {
        let Lease {
            client,
            id,
            turn,
            since,
            table,
        } = self.lease(block, index);
        let lease = LeaseCell {
            client: client.map(Cell::new),
            id: Cell::new(id),
            turn: Cell::new(turn),
            since: Cell::new(since),
            table: Cell::new(table),
        };
        let find = |table| self.tables.find(table, &lease.key());
        hold(&lease, port(index), self.world.tick, find)
    }
}

macro_rules! family {
    ($address:ty, $field:ident) => {
        impl FamilyTables<$address> for Twin<'_> {
            fn keep(&self, segment: Segment<$address>) {
                let first = self.$field.kept.set(segment);
                assert!(first.is_ok(), "a packet is parsed once");
            }

            fn kept(&self) -> &Segment<$address> {
                self.$field.kept.get().expect("the packet was parsed")
            }

            fn keep_reply(&self, reply: Reply<$address>) {
                let first = self.$field.reply.set(reply);
                assert!(first.is_ok(), "a packet is one reply");
            }

            fn reply(&self) -> &Reply<$address> {
                self.$field.reply.get().expect("the reply was kept")
            }

            fn listener(&self, to: &Endpoint<$address>) -> Option<Listener> {
                self.looks_up(Lookup::Listener);
                self.$field.listeners.get(to).copied()
            }

            fn return_path(&self, from: &Endpoint<$address>) -> Option<&ReturnPath> {
                self.looks_up(Lookup::Return);
                self.$field.returns.get(from)
            }

            fn fragment(&self, key: &FragmentKey<$address>) -> Option<&Fragment> {
                self.looks_up(Lookup::Fragment);
                let remembered = self.$field.remembered.iter();
                let newest = remembered.filter(|(of, _)| of == key).last();
                newest
                    .map(|(_, fragment)| fragment)
                    .or_else(|| self.$field.fragments.get(key))
            }

            fn remember_fragment(&self, key: &FragmentKey<$address>, fragment: &Fragment) {
                self.$field.remembered.add((*key, *fragment));
            }

            fn route(&self, _from: &[u8; 16], _to: &$address, _device: u32) -> NextHop {
                NextHop::NONE // as in the kernel of a test run: nothing is routed
            }
        }
    };
}
family!([u8; 4], v4);
family!([u8; 16], v6);

/// Key of a flow.
pub fn key(client: SocketAddr, listener: u16) -> FlowKey {
    let address = match client {
        SocketAddr::V4(v4) => FlowKey::client_v4(v4.ip().octets()),
        SocketAddr::V6(v6) => FlowKey::client_v6(v6.ip().octets()),
    };
    FlowKey::new(address, client.port().to_be_bytes(), listener)
}
