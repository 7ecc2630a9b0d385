//! The stand: a lab with two arms whose far ends drop everything, generators at
//! both, and a place on the gateway's interfaces for the program to be measured.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
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
    abi::{LAYOUT, map},
    flow::{Flow, FlowKey, FlowTable, buckets_for},
    monitor::LISTENS,
    reason::Reason,
    service::{Backend, Colour, Listener},
};
use bg_ebpf::stream;
use bg_tests::{
    flow_table::FlowTables,
    frame::Macs,
    generator::Generator,
    kernel::{in_namespace, tick},
    lab::{Lab, Place, SERVERS, SERVICE, SERVICE_V6, default_service},
};
use bg_userspace::{
    datapath::Directory,
    plan::{ListenerPlan, Protocol},
};
use nix::{net::if_::if_nametoindex, sys::signal::Signal};
use serde_json::Value;

use crate::cases::{CLIENTS, CLIENTS_V6, Kind, PARTS, Program, Side};

/// Interfaces of the gateway, by side.
const INTERFACES: [&str; 2] = ["clients", "blue"];
/// The places at their other ends, whose interface is `eth0`.
const FAR: [Place; 2] = [Place::Client, Place::Blue];
const FAR_INTERFACE: &str = "eth0";

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
    /// How many flows each table holds.
    remembered: u32,
    cpu: usize,
    /// Last, so that it goes last.
    lab: Lab,
}

impl Stand {
    /// Makes the lab, has the daemon set the packet path up for `max_flows`
    /// flows, and ends the daemon: the packet path is measured alone.
    pub fn new(max_flows: u32) -> Result<Self> {
        let mut lab = Lab::new()?;
        lab.configure_for(max_flows, &default_service())?;
        let macs = |side: Side| -> Result<Macs> {
            Ok(Macs {
                to: lab.mac(Place::Gateway, INTERFACES[side as usize])?,
                from: lab.mac(FAR[side as usize], FAR_INTERFACE)?,
            })
        };
        let macs = [macs(Side::Clients)?, macs(Side::Servers)?];
        know_neighbours(&lab)?;
        lab.forward(Place::Gateway)?;
        lab.start()?;
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
        let mut bare = loader
            .map_max_entries(map::FLOWS, buckets_for(max_flows))
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
        Ok(Self {
            generators: [Generator::load()?, Generator::load()?],
            macs,
            ours,
            bare,
            far_ends: Some(far_ends),
            reasons,
            monitor,
            attached: [Program::Ours; 2],
            remembered: 0,
            cpu: cpus - 1,
            lab,
        })
    }

    /// Fills the flow tables up to `flows` flows, in an order that is not the one
    /// in which packets come: neighbours in time are not neighbours in memory.
    pub fn remember(&mut self, flows: u32) -> Result<()> {
        let held = self.remembered;
        let new = flows.checked_sub(held).context("flows are never removed")?;
        let step = stride(new);
        let order = (0..new).map(|n| held + (u64::from(n) * step % u64::from(new.max(1))) as u32);
        let [v4, _, v6] = SERVERS[Colour::Blue as usize];
        let (v4, v6): (IpAddr, IpAddr) = (v4.parse()?, v6.parse()?);
        let (backend_v4, backend_v6) = (self.backend(v4)?, self.backend(v6)?);

        let tcp = listener(&self.lab, SERVICE, 8000, Protocol::Tcp)?;
        let udp = listener(&self.lab, SERVICE, 4433, Protocol::Udp)?;
        let tcp_v6 = listener(&self.lab, SERVICE_V6, 8000, Protocol::Tcp)?;
        let maps = self.lab.pinned_map(map::FLOWS);
        let tables = FlowTables::pinned(maps.parent().context("no directory")?)?;
        let now = tick();
        let insert = |table, key: FlowKey, flow: Flow| {
            ensure!(tables.insert(table, &key, &flow, now), "no room for a flow");
            Ok(())
        };
        for number in order {
            let (offset, port) = stream::client(number);
            let port = port.to_be_bytes();
            let client = FlowKey::client_v4((CLIENTS.to_bits() + offset).to_be_bytes());
            let wide = (CLIENTS_V6.to_bits() + u128::from(offset)).to_be_bytes();
            let client_v6 = FlowKey::client_v6(wide);
            let (flow, flow_v6) = (flow(tcp, backend_v4), flow(tcp_v6, backend_v6));
            let established = FlowTable::Established;
            insert(established, FlowKey::new(client, port, tcp.id), flow)?;
            insert(
                established,
                FlowKey::new(client_v6, port, tcp_v6.id),
                flow_v6,
            )?;
            if held == 0 {
                let flow = Flow {
                    proof: udp.idle,
                    ..flow
                };
                insert(FlowTable::Udp, FlowKey::new(client, port, udp.id), flow)?;
            }
        }
        self.remembered = flows;
        Ok(())
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
        let link = format!("v{LAYOUT}/links/{}", INTERFACES[side as usize]);
        let link = PinnedLink::from_pin(self.lab.bpffs().join(link))?;
        let program = self.program(wanted)?;
        let id = program.attach_to_link(XdpLink::try_from(FdLink::from(link))?)?;
        // The pin keeps the link.
        drop(program.take_link(id)?);
        self.attached[side as usize] = wanted;
        Ok(())
    }

    /// Sets what comes in on the frames' side.
    pub fn feed(&mut self, kind: Kind, flows: u32) -> Result<()> {
        let side = kind.side() as usize;
        let [v4, _, v6] = SERVERS[Colour::Blue as usize];
        let stream = kind.stream(self.macs[side], [v4.parse()?, v6.parse()?], flows)?;
        self.generators[side].set(&stream)
    }

    /// Sets how many frames are made on a side before the first of them leaves.
    pub const fn set_batch(&mut self, side: Side, frames: u32) {
        self.generators[side as usize].set_batch(frames);
    }

    /// Sends frames in on a side; returns what it took.
    pub fn run(&self, side: Side, frames: u32) -> Result<Duration> {
        let side = side as usize;
        let namespace: File = self.lab.enter(FAR[side])?;
        self.generators[side].run(&namespace, FAR_INTERFACE, frames, self.cpu)
    }

    /// What a program has taken so far, while the kernel keeps statistics.
    pub fn runs(&mut self, program: Program) -> Result<Runs> {
        let info: ProgramInfo = self.program(program)?.info()?;
        Ok(Runs {
            ns: info.run_time().as_nanos() as u64,
            count: info.run_count(),
        })
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
            Program::Ours | Program::Listening => Ok(&mut self.ours),
            Program::Drop => self::program(&mut self.bare, "discard"),
            Program::Redirect => self::program(&mut self.bare, "redirect"),
            Program::Transmit => self::program(&mut self.bare, "transmit"),
            Program::Part(name) => self::program(&mut self.bare, name),
        }
    }

    /// The id of a server, which must have a next hop.
    fn backend(&self, address: IpAddr) -> Result<u32> {
        let backends: Array<_, Backend> = pinned(&self.lab, map::BACKENDS, Map::Array)?;
        let mut wide = [0; 16];
        match address {
            IpAddr::V4(v4) => wide[..4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => wide = v6.octets(),
        }
        for id in 0..64 {
            let backend = backends.get(&id, 0)?;
            if backend.family != 0 && backend.address == wide {
                ensure!(backend.next_hop != 0, "{address} has no next hop");
                return Ok(id);
            }
        }
        anyhow::bail!("{address} is no backend")
    }
}

/// Tells every stack where its neighbours are: with the far ends dropping
/// everything, nobody could ask. Clients of the benchmark's networks live behind
/// the client.
pub fn know_neighbours(lab: &Lab) -> Result<()> {
    let mac = |place| lab.mac(place, FAR_INTERFACE);
    let [client, blue, green] = [mac(Place::Client)?, mac(Place::Blue)?, mac(Place::Green)?];
    let gateway = |line: &str| lab.ip(Place::Gateway, line);
    let know = |address: &str, mac: [u8; 6], interface: &str| {
        let [a, b, c, d, e, f] = mac;
        gateway(&format!(
            "neigh replace {address} lladdr {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} \
             dev {interface} nud permanent"
        ))
    };
    for (servers, mac, interface) in [(SERVERS[0], blue, "blue"), (SERVERS[1], green, "green")] {
        for address in servers {
            know(address, mac, interface)?;
        }
    }
    for (via, network) in [
        ("198.51.100.10", format!("{CLIENTS}/15")),
        ("2001:db8:c::10", format!("{CLIENTS_V6}/48")),
    ] {
        know(via, client, "clients")?;
        gateway(&format!("route add {network} via {via} dev clients"))?;
    }
    Ok(())
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
