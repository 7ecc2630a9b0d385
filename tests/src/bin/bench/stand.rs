//! The stand: a lab with two arms whose far ends drop everything, generators at
//! both, and a place on the gateway's interfaces for the program to be measured.

use std::{
    collections::BTreeMap,
    fs::File,
    net::{IpAddr, SocketAddr},
    ops::Range,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, DevMap, Map, MapData, PerCpuArray},
    programs::{
        ProgramInfo, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        xdp::XdpLink,
    },
};
use aya_obj::programs::xdp::XdpAttachType;
use bg_common::{
    abi::{LAYOUT, Room, map},
    flow::{Flow, FlowKey, FlowTable, buckets_for},
    monitor::LISTENS,
    reason::Reason,
    service::{Backend, Colour, CutoverWord, Listener},
};
use bg_ebpf::stream::{self, Stream};
use bg_tests::{
    flow_table::FlowTables,
    frame::Macs,
    generator::{Generator, halves},
    kernel::{in_namespace, memory_of, tick},
    lab::{Lab, Place, SERVERS, SERVICE, SERVICE_V6, default_service},
    world::wide,
};
use bg_userspace::{
    datapath::{Directory, PinnedWords},
    plan::{ListenerPlan, Protocol},
};
use nix::{net::if_::if_nametoindex, sys::signal::Signal};
use serde_json::Value;

use crate::cases::{
    CLIENTS, CLIENTS_V6, DSR, Kind, PARTS, Ports, Program, SNAT, STRANGERS_KINDS, Side,
};

/// Interfaces of the gateway, by side.
const INTERFACES: [&str; 2] = ["clients", "blue"];
/// The places at their other ends, whose interface is `eth0`.
const FAR: [Place; 2] = [Place::Client, Place::Blue];
const FAR_INTERFACE: &str = "eth0";
/// Queues of each link: what comes from one CPU stays on it.
const QUEUES: u32 = 2;

/// What the packet path is set up for.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    /// Established flows that fit.
    pub max_flows: u32,
    /// Services that fit.
    pub max_services: u32,
    /// The configuration's part behind `[gateway]`.
    pub services: &'a str,
    /// Hosts of both server networks that are servers beside the usual ones: a range of
    /// the address's last byte.
    pub hosts: (u8, u8),
}

/// The service of most scenarios, and one a mode of forwarding with the same servers.
pub fn usual_services() -> String {
    let other = |name: &str, listen: String, forward: &str| {
        let [[blue, ..], [green, ..]] = SERVERS;
        format!(
            "[service.{name}]\nlisten = [\"{listen}\"]\nforward = \"{forward}\"\n\
             [service.{name}.blue]\nbackends = [\"{blue}\"]\n\
             [service.{name}.green]\nbackends = [\"{green}\"]\n"
        )
    };
    default_service()
        + &other("dsr", format!("tcp://{SERVICE}:{DSR}"), "dsr")
        + &other("snat", format!("udp://{SERVICE}:{SNAT}"), "snat")
}

/// Run time and runs of a program.
#[derive(Clone, Copy, Debug)]
pub struct Runs {
    /// Nanoseconds.
    pub ns: u64,
    /// How often.
    pub count: u64,
}

/// The lab, its programs, and what is in them.
pub struct Stand {
    generators: [Generator; 2],
    /// Of the clients' side, for another CPU.
    second: Generator,
    macs: [Macs; 2],
    ours: Xdp,
    bare: Ebpf,
    /// Keeps the programs at the far ends.
    far_ends: Option<Ebpf>,
    reasons: PerCpuArray<MapData, u64>,
    /// What it is asked to watch.
    monitor: Array<MapData, [u64; 2]>,
    /// Which program is where.
    attached: [Program; 2],
    /// Which clients that nobody knows are sent in, if any, ...
    feeds_strangers: Option<usize>,
    /// ... and frames of each kind of them so far.
    strangers: [AtomicU32; STRANGERS_KINDS],
    /// How many flows fit in the table of established ones, ...
    max_flows: u32,
    /// ... and how many of the service each table holds.
    remembered: u32,
    /// The service's word as it was, and the service.
    word: (CutoverWord, u32),
    cpu: usize,
    /// Last, so that it goes last.
    lab: Lab,
}

impl Stand {
    /// With the usual services, and room for so many flows.
    pub fn usual(max_flows: u32) -> Result<Self> {
        let setup = Setup {
            max_flows,
            max_services: Room::LEAST.services,
            services: &usual_services(),
            hosts: (0, 0),
        };
        Self::new(&setup, Lab::start)
    }

    /// Makes the lab, has the daemon set the packet path up, by `start`, and ends the
    /// daemon: the packet path is measured alone.
    pub fn new(setup: &Setup<'_>, start: impl FnOnce(&mut Lab) -> Result<()>) -> Result<Self> {
        let mut lab = Lab::new()?;
        lab.queues(QUEUES)?;
        let Setup {
            max_flows,
            max_services,
            services,
            hosts,
        } = *setup;
        let keys = format!("max_flows = {max_flows}\nmax_services = {max_services}");
        lab.configure_with(&keys, services)?;
        let macs = |side: Side| -> Result<Macs> {
            Ok(Macs {
                to: lab.mac(Place::Gateway, INTERFACES[side as usize])?,
                from: lab.mac(FAR[side as usize], FAR_INTERFACE)?,
            })
        };
        let macs = [macs(Side::Clients)?, macs(Side::Servers)?];
        know_neighbours(&lab)?;
        know_hosts(&lab, hosts)?;
        lab.forward(Place::Gateway)?;
        start(&mut lab)?;
        lab.end_daemon(Signal::SIGTERM)?;

        lab.free_far_ends();
        let mut far_ends = Ebpf::load(bg_userspace::object::BENCH)?;
        let program_there = program(&mut far_ends, "discard")?;
        program_there.load()?;
        for place in FAR {
            in_namespace(&lab.enter(place)?, || {
                program_there
                    .attach(FAR_INTERFACE, XdpMode::Driver)
                    .map(drop)
            })
            .with_context(|| format!("attaching to {FAR_INTERFACE} in {place:?}"))?;
        }
        let tcp = listener(&lab, SERVICE, 8000, Protocol::Tcp)?;
        let mut loader = EbpfLoader::new();
        let shared = [map::BACKENDS, map::FLOWS, map::SHAPES];
        for name in shared.into_iter().chain(Directory::MAPS) {
            loader.map_pin_path(name, lab.pinned_map(name));
        }
        let room = Room {
            services: max_services,
        };
        let mut bare = loader
            .map_max_entries(map::FLOWS, buckets_for(max_flows))
            .map_max_entries(map::BACKENDS, room.backends())
            .override_global("LISTENER", &u32::from(tcp.id), true)
            .load(bg_userspace::object::BENCH)?;
        for name in ["discard", "redirect", "transmit"]
            .into_iter()
            .chain(PARTS.map(|(name, _)| name))
        {
            program(&mut bare, name)?
                .load()
                .with_context(|| format!("loading {name}"))?;
        }
        let out = bare.map_mut("OUT").context("no device map")?;
        let mut out: DevMap<_> = out.try_into()?;
        in_namespace(&lab.enter(Place::Gateway)?, || -> Result<()> {
            let ifindex = if_nametoindex(INTERFACES[Side::Servers as usize])?;
            Ok(out.set(0, ifindex, None, 0)?)
        })?;
        let layout = lab.bpffs().join(format!("v{LAYOUT}"));
        let ours = Xdp::from_pin(layout.join("program"), XdpAttachType::Interface)?;
        let info: ProgramInfo = ours.info()?;
        let mut listened: Array<_, u64> = own_map(&info, map::LISTENED)?;
        listened.set(tcp.service, 1, 0)?;
        let monitor = own_map(&info, map::MONITOR)?;
        let reasons = pinned(&lab, map::REASONS, Map::PerCpuArray)?;
        let cpus = std::thread::available_parallelism()?.get();
        let (words, service) = lab.words()?;
        Ok(Self {
            generators: [Generator::load()?, Generator::load()?],
            second: Generator::load()?,
            word: (words.word(service), service),
            macs,
            ours,
            bare,
            far_ends: Some(far_ends),
            reasons,
            monitor,
            attached: [Program::Ours; 2],
            feeds_strangers: None,
            strangers: Default::default(),
            max_flows,
            remembered: 0,
            cpu: cpus - 1,
            lab,
        })
    }

    /// Fills the flow tables up to `flows` flows, in an order that is not the one
    /// in which packets come: neighbours in time are not neighbours in memory.
    pub fn remember(&mut self, flows: u32) -> Result<()> {
        let held = self.remembered;
        ensure!(flows >= held, "flows are never removed");
        let [v4, _, v6] = SERVERS[Colour::Blue as usize];
        let (v4, v6): (IpAddr, IpAddr) = (v4.parse()?, v6.parse()?);
        let backends = self.backends()?;
        let of = |port, address| self.served(&backends, port, Protocol::Tcp, address);
        let (tcp, backend) = of(8000, v4)?;
        let (tcp_v6, backend_v6) = of(8000, v6)?;
        let (dsr, backend_dsr) = of(DSR, v4)?;
        self.fill(held..flows, |number, tables| {
            let (client, port) = client(number);
            let offset = u128::from(stream::client(number).0);
            let wide = (CLIENTS_V6.to_bits() + offset).to_be_bytes();
            let client_v6 = FlowKey::client_v6(wide);
            tables.established(FlowKey::new(client, port, tcp.id), flow(tcp, backend))?;
            let key_v6 = FlowKey::new(client_v6, port, tcp_v6.id);
            tables.established(key_v6, flow(tcp_v6, backend_v6))?;
            if held == 0 {
                tables.established(FlowKey::new(client, port, dsr.id), flow(dsr, backend_dsr))?;
            }
            Ok(())
        })?;
        self.remembered = flows;
        Ok(())
    }

    /// Puts so many flows of datagrams in their table, which strangers' flows may have
    /// pushed out.
    pub fn remember_datagrams(&self, flows: u32) -> Result<()> {
        let [v4, ..] = SERVERS[Colour::Blue as usize];
        let backends = self.backends()?;
        let (udp, backend) = self.served(&backends, 4433, Protocol::Udp, v4.parse()?)?;
        self.fill(0..flows, |number, tables| {
            let (client, port) = client(number);
            let datagrams = Flow {
                proof: udp.idle,
                ..flow(udp, backend)
            };
            let key = FlowKey::new(client, port, udp.id);
            tables.insert(FlowTable::Udp, key, datagrams)
        })
    }

    /// The listener at a port of the service's address, and its server with this address.
    fn served(
        &self,
        backends: &[(u32, Backend)],
        port: u16,
        protocol: Protocol,
        address: IpAddr,
    ) -> Result<(Listener, u32)> {
        let to = if address.is_ipv4() {
            SERVICE
        } else {
            SERVICE_V6
        };
        let listener = listener(&self.lab, to, port, protocol)?;
        let is = |backend: &Backend| {
            u32::from(backend.service) == listener.service
                && backend.address == wide(SocketAddr::new(address, port))
        };
        let mut backends = backends.iter().filter(|(_, backend)| is(backend));
        let (id, backend) = backends.next().context("no such backend")?;
        ensure!(backend.next_hop != 0, "{address} has no next hop");
        Ok((listener, *id))
    }

    /// Forgets all established flows.
    pub fn forget(&self) -> Result<()> {
        self.flow_tables()?.empty(FlowTable::Established);
        Ok(())
    }

    /// Adds to the established flows some of each of these services, side by side, so that
    /// the table is as full for one as for the other: flow `n` is of the service at port
    /// `first + n % count`, and goes to the server of the blue ones with that place in their
    /// order.
    pub fn remember_over(&self, flows: u32, services: &[Ports]) -> Result<()> {
        let backends = self.backends()?;
        let endpoints = self.lab.endpoints()?.read().listeners;
        let served = |ports: &Ports| served_over(&backends, &endpoints, *ports);
        let services: Vec<_> = services.iter().map(served).collect::<Result<_>>()?;
        self.fill(0..flows, |number, tables| {
            let (client, port) = client(number);
            for services in &services {
                let (listener, servers) = &services[number as usize % services.len()];
                let server = servers[number as usize / services.len() % servers.len()];
                let key = FlowKey::new(client, port, listener.id);
                tables.established(key, flow(*listener, server))?;
            }
            Ok(())
        })
    }

    /// Calls `add` with each number, in an order that is not the one in which packets
    /// come.
    fn fill(&self, numbers: Range<u32>, add: impl Fn(u32, &Filling) -> Result<()>) -> Result<()> {
        let tables = Filling {
            tables: self.flow_tables()?,
            now: tick(),
        };
        let count = numbers.len() as u32;
        let step = stride(count);
        for n in 0..count {
            let leap = u64::from(n) * step % u64::from(count);
            add(numbers.start + leap as u32, &tables)?;
        }
        Ok(())
    }

    fn flow_tables(&self) -> Result<FlowTables> {
        let maps = self.lab.pinned_map(map::FLOWS);
        FlowTables::pinned(maps.parent().context("no directory")?)
    }

    /// The lab.
    pub const fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Takes the programs at the far ends away, to make room for others.
    pub fn free_far_ends(&mut self) {
        self.far_ends = None;
    }

    /// Puts a program on the gateway's interface of a side.
    pub fn put(&mut self, side: Side, wanted: Program) -> Result<()> {
        if self.attached[side as usize] == wanted {
            return Ok(());
        }
        let listens = if wanted == Program::Listening {
            LISTENS
        } else {
            0
        };
        self.monitor.set(0, [listens, 0], 0)?;
        let (word, service) = self.word;
        self.store(
            service,
            match wanted {
                Program::Draining => word.flipped(Colour::Green, false),
                Program::Cut => word.flipped(Colour::Green, true),
                _ => word,
            },
        )?;
        let link = format!("v{LAYOUT}/links/{}", INTERFACES[side as usize]);
        let link = PinnedLink::from_pin(self.lab.bpffs().join(link))?;
        let program = self.program(wanted)?;
        let id = program.attach_to_link(XdpLink::try_from(FdLink::from(link))?)?;
        // The pin keeps the link.
        drop(program.take_link(id)?);
        self.attached[side as usize] = wanted;
        Ok(())
    }

    fn store(&self, service: u32, word: CutoverWord) -> Result<()> {
        let words = PinnedWords::open(&self.lab.bpffs())?;
        let held = words.word(service);
        if held != word {
            words.store(service, held, word)?;
        }
        Ok(())
    }

    /// Sets what comes in on the frames' side.
    pub fn feed(&mut self, kind: Kind, flows: u32) -> Result<()> {
        let mut stream = self.stream(kind, flows)?;
        if kind.side() == Side::Clients {
            self.feeds_strangers = kind.strangers();
        }
        if let Some(strangers) = kind.strangers() {
            // Behind those that came last, who may not be forgotten yet.
            stream.next = self.strangers[strangers].load(Ordering::Relaxed) % flows;
        }
        self.generators[kind.side() as usize].set(&stream)
    }

    /// Sets whether frames that come in on a side are cut short there.
    pub const fn mend(&mut self, side: Side, mend: bool) {
        self.generators[side as usize].mend(mend);
    }

    /// Sets what comes in on the clients' side, one half of the flows on each of two
    /// CPUs.
    pub fn feed_halves(&mut self, kind: Kind, flows: u32) -> Result<()> {
        let [one, other] = halves(self.stream(kind, flows)?);
        self.generators[Side::Clients as usize].set(&one)?;
        self.second.set(&other)
    }

    fn stream(&self, kind: Kind, flows: u32) -> Result<Stream> {
        let [v4, _, v6] = SERVERS[Colour::Blue as usize];
        let macs = self.macs[kind.side() as usize];
        kind.stream(macs, [v4.parse()?, v6.parse()?], flows)
    }

    /// Sets how many frames are made on a side before the first of them leaves.
    pub const fn set_batch(&mut self, side: Side, frames: u32) {
        self.generators[side as usize].set_batch(frames);
    }

    /// Sends frames in on a side; returns what it took.
    pub fn run(&self, side: Side, frames: u32) -> Result<Duration> {
        let side = side as usize;
        let namespace: File = self.lab.enter(FAR[side])?;
        if let Some(strangers) = self
            .feeds_strangers
            .filter(|_| side == Side::Clients as usize)
        {
            self.strangers[strangers].fetch_add(frames, Ordering::Relaxed);
        }
        self.generators[side].run(&namespace, FAR_INTERFACE, frames, self.cpu)
    }

    /// Sends so many frames in on the clients' side on each of two CPUs at the same time;
    /// returns what it took.
    pub fn run_both(&self, frames: u32) -> Result<Duration> {
        let other = self.cpu.checked_sub(1).context("there is one CPU only")?;
        let namespace = self.lab.enter(FAR[Side::Clients as usize])?;
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let run = || self.second.run(&namespace, FAR_INTERFACE, frames, other);
            let second = scope.spawn(run);
            self.run(Side::Clients, frames)?;
            let joined = second.join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        Ok(begun.elapsed())
    }

    /// What a program has taken so far, while the kernel keeps statistics.
    pub fn runs(&mut self, program: Program) -> Result<Runs> {
        let info: ProgramInfo = self.program(program)?.info()?;
        Ok(Runs {
            ns: info.run_time().as_nanos() as u64,
            count: info.run_count(),
        })
    }

    /// Bytes of memory for each flow that fits in the table of established ones.
    pub fn memory_of_a_flow(&self) -> Result<f64> {
        let flows = MapData::from_pin(self.lab.pinned_map(map::FLOWS))?;
        Ok(memory_of(&flows)? as f64 / f64::from(self.max_flows))
    }

    /// The packet path's reasons so far, in counter order.
    pub fn reasons(&self) -> Result<Vec<u64>> {
        Reason::ALL
            .iter()
            .map(|reason| Ok(self.reasons.get(&(*reason as u32), 0)?.iter().sum()))
            .collect()
    }

    /// Frames that have come in on the gateway's interface of a side, or at its
    /// other end.
    pub fn received(&self, side: Side, far: bool) -> Result<u64> {
        let (place, interface) = if far {
            (FAR[side as usize], FAR_INTERFACE)
        } else {
            (Place::Gateway, INTERFACES[side as usize])
        };
        let text = self
            .lab
            .run(place, &format!("ip -s -j link show dev {interface}"))?;
        let links: Value = serde_json::from_str(&text)?;
        links[0]["stats64"]["rx"]["packets"]
            .as_u64()
            .with_context(|| format!("no statistics of {interface}"))
    }

    fn program(&mut self, program: Program) -> Result<&mut Xdp> {
        match program {
            Program::Ours | Program::Listening | Program::Draining | Program::Cut => {
                Ok(&mut self.ours)
            }
            Program::Drop => self::program(&mut self.bare, "discard"),
            Program::Redirect => self::program(&mut self.bare, "redirect"),
            Program::Transmit => self::program(&mut self.bare, "transmit"),
            Program::Part(name) => self::program(&mut self.bare, name),
        }
    }

    /// All backends, by id.
    fn backends(&self) -> Result<Vec<(u32, Backend)>> {
        let backends: Array<_, Backend> = pinned(&self.lab, map::BACKENDS, Map::Array)?;
        let mut held = Vec::new();
        for id in 0..backends.len() {
            let backend = backends.get(&id, 0)?;
            if backend.family != 0 {
                held.push((id, backend));
            }
        }
        Ok(held)
    }
}

/// Flow tables that are filled.
struct Filling {
    tables: FlowTables,
    now: u32,
}

impl Filling {
    fn established(&self, key: FlowKey, flow: Flow) -> Result<()> {
        self.insert(FlowTable::Established, key, flow)
    }

    fn insert(&self, table: FlowTable, key: FlowKey, flow: Flow) -> Result<()> {
        let inserted = self.tables.insert(table, &key, &flow, self.now);
        ensure!(inserted, "no room for a flow");
        Ok(())
    }
}

/// The services at these ports: the listener of each, and its blue servers' ids.
fn served_over(
    backends: &[(u32, Backend)],
    endpoints: &BTreeMap<ListenerPlan, Listener>,
    ports: Ports,
) -> Result<Vec<(Listener, Vec<u32>)>> {
    let mut services = Vec::new();
    for port in (ports.first..).take(ports.count.into()) {
        let at = ListenerPlan {
            address: SocketAddr::new(SERVICE.parse()?, port),
            protocol: Protocol::Tcp,
        };
        let listener = *endpoints.get(&at).with_context(|| format!("no {at}"))?;
        services.push((listener, Vec::new()));
    }
    let places: BTreeMap<u32, usize> = (0..)
        .zip(&services)
        .map(|(place, (listener, _))| (listener.service, place))
        .collect();
    for (id, backend) in backends {
        if let Some(place) = places.get(&u32::from(backend.service))
            && backend.colour == Colour::Blue as u8
        {
            ensure!(backend.next_hop != 0, "backend {id} has no next hop");
            services[*place].1.push(*id);
        }
    }
    Ok(services)
}

/// The client of a flow, as its key has it, and its port.
fn client(number: u32) -> ([u64; 2], [u8; 2]) {
    let (offset, port) = stream::client(number);
    let address = (CLIENTS.to_bits() + offset).to_be_bytes();
    (FlowKey::client_v4(address), port.to_be_bytes())
}

/// Tells every stack where its neighbours are: with the far ends dropping
/// everything, nobody could ask. Clients of the benchmark's networks live behind
/// the client.
pub fn know_neighbours(lab: &Lab) -> Result<()> {
    for (servers, place, interface) in [
        (SERVERS[0], Place::Blue, "blue"),
        (SERVERS[1], Place::Green, "green"),
    ] {
        for address in servers {
            know(lab, address, place, interface)?;
        }
    }
    for (via, network) in [
        ("198.51.100.10", format!("{CLIENTS}/15")),
        ("2001:db8:c::10", format!("{CLIENTS_V6}/48")),
    ] {
        know(lab, via, Place::Client, "clients")?;
        let route = format!("route add {network} via {via} dev clients");
        lab.ip(Place::Gateway, &route)?;
    }
    Ok(())
}

/// The same of more servers, whose addresses end in these bytes.
fn know_hosts(lab: &Lab, (first, last): (u8, u8)) -> Result<()> {
    for host in first..last {
        know(lab, &format!("10.0.1.{host}"), Place::Blue, "blue")?;
        know(lab, &format!("10.0.2.{host}"), Place::Green, "green")?;
    }
    Ok(())
}

/// Tells the gateway that an address is at a place.
fn know(lab: &Lab, address: &str, place: Place, interface: &str) -> Result<()> {
    let [a, b, c, d, e, f] = lab.mac(place, FAR_INTERFACE)?;
    let line = format!(
        "neigh replace {address} lladdr {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} \
         dev {interface} nud permanent"
    );
    lab.ip(Place::Gateway, &line)
}

fn flow(listener: Listener, backend: u32) -> Flow {
    let now = tick();
    Flow {
        backend,
        seen: now,
        // The first packet back looks the route up.
        routed: (now as u16).wrapping_sub(u16::MAX / 2),
        colour_spread: Colour::Blue as u8,
        service: listener.service as u16,
        ..Flow::default()
    }
}

/// A step that reaches every number below `count`, with long leaps: about the
/// golden section, and coprime.
fn stride(count: u32) -> u64 {
    const fn gcd(a: u64, b: u64) -> u64 {
        if b == 0 { a } else { gcd(b, a % b) }
    }
    let count = u64::from(count.max(1));
    let mut step = (count * 618 / 1000).max(1);
    while gcd(step, count) != 1 {
        step += 1;
    }
    step
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf.program_mut(name);
    Ok(program
        .with_context(|| format!("no program {name}"))?
        .try_into()?)
}

fn listener(lab: &Lab, address: &str, port: u16, protocol: Protocol) -> Result<Listener> {
    lab.listener(ListenerPlan {
        address: SocketAddr::new(address.parse()?, port),
        protocol,
    })
}

/// An array of a program's own, which is not pinned.
fn own_map<V: Pod>(info: &ProgramInfo, name: &str) -> Result<Array<MapData, V>> {
    for id in info.map_ids()?.unwrap_or_default() {
        let map = MapData::from_id(id)?;
        if map.info()?.name_as_str() == Some(name) {
            return Ok(Map::Array(map).try_into()?);
        }
    }
    anyhow::bail!("the program has no {name}")
}

fn pinned<M>(lab: &Lab, name: &str, of: fn(MapData) -> Map) -> Result<M>
where
    M: TryFrom<Map, Error = aya::maps::MapError>,
{
    let path = lab.pinned_map(name);
    let open = |path: &Path| Ok::<_, aya::maps::MapError>(of(MapData::from_pin(path)?));
    open(&path)
        .and_then(M::try_from)
        .with_context(|| format!("opening {}", path.display()))
}
