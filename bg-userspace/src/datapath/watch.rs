//! Watching packets: what is asked of the packet path, and what it tells.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError},
};

use aya::{
    Ebpf,
    maps::{Map, MapData, PerCpuArray, RingBuf},
};
use bg_common::{
    abi::map,
    flow::FlowTable,
    monitor::{LISTENS, Pressure, Sighting, Watch},
    service::{Backend, Colour, Listener},
};
use nix::net::if_::if_indextoname;

use super::{Datapath, Error, layout::address_of, mmap::Words, slots::Slots};
use crate::plan::ListenerPlan;

/// The maps of one loaded program that nobody but its watcher reads.
pub struct Watcher {
    watch: Words,
    /// What the first word is put together of.
    asked: Mutex<Asked>,
    ring: Mutex<RingBuf<MapData>>,
    lost: PerCpuArray<MapData, u64>,
}

#[derive(Default)]
struct Asked {
    reasons: u64,
    listens: bool,
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher").finish_non_exhaustive()
    }
}

impl Watcher {
    /// Takes the maps out of an object whose maps are made.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, Error> {
        let missing = |name: &str| Error::step("the eBPF object", format!("has no {name}"));
        let Some(Map::Array(watch)) = ebpf.map(map::MONITOR) else {
            return Err(missing(map::MONITOR));
        };
        let words = Words::map(watch.fd(), size_of::<Watch>() / 8)
            .map_err(Error::io(format!("mapping {}", map::MONITOR)))?;
        let mut take = |name: &str| ebpf.take_map(name).ok_or_else(|| missing(name));
        let ring = RingBuf::try_from(take(map::SIGHTINGS)?);
        let lost = PerCpuArray::try_from(take(map::LOST)?);
        Ok(Self {
            watch: words,
            asked: Mutex::default(),
            ring: Mutex::new(ring.map_err(|e| Error::bpf("opening SIGHTINGS", &e))?),
            lost: lost.map_err(|e| Error::bpf("opening LOST", &e))?,
        })
    }

    /// Asks for other packets, from the next one of each CPU on.
    pub fn set(&self, watch: &Watch) {
        let [a, b, c, d] = watch.sample.to_ne_bytes();
        let [e, f, g, h] = watch.service.to_ne_bytes();
        self.watch
            .store(1, u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
        self.ask(|asked| asked.reasons = watch.reasons);
    }

    /// Listens to servers, or to none of them.
    pub(super) fn listen(&self, listens: bool) {
        self.ask(|asked| asked.listens = listens);
    }

    fn ask(&self, change: impl FnOnce(&mut Asked)) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut asked);
        let listens = if asked.listens { LISTENS } else { 0 };
        self.watch.store(0, asked.reasons | listens);
    }

    /// How many packets that were asked for could not be told.
    pub fn lost(&self) -> Result<u64, Error> {
        let lost = self.lost.get(&0, 0);
        let lost = lost.map_err(|e| Error::bpf("reading LOST", &e))?;
        Ok(lost.iter().sum())
    }

    /// Calls `visit` for what has been told, at most `limit` times.
    pub fn drain(&self, limit: usize, mut visit: impl FnMut(Sighting)) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..limit {
            let Some(item) = ring.next() else {
                return;
            };
            if item.len() >= size_of::<Sighting>() {
                // SAFETY: as many bytes as a Sighting has, for which every bit pattern
                // is valid; read without regard to alignment.
                visit(unsafe { item.as_ptr().cast::<Sighting>().read_unaligned() });
            }
        }
    }
}

/// What the numbers of a sighting stand for.
#[derive(Debug, Default)]
pub struct Names {
    listeners: BTreeMap<u16, (ListenerPlan, Listener)>,
    services: BTreeMap<u32, String>,
    backends: BTreeMap<u32, Backend>,
    /// Devices by slot.
    devices: BTreeMap<u32, u32>,
    interfaces: BTreeMap<u32, String>,
}

impl Names {
    /// The listener whose flow was sought.
    pub fn listener(&self, sighting: &Sighting) -> Option<ListenerPlan> {
        self.listener_at(sighting.key.listener())
    }

    /// A listener or preview by its id.
    pub fn listener_at(&self, id: u16) -> Option<ListenerPlan> {
        self.listeners.get(&id).map(|(at, _)| *at)
    }

    /// The colour that a preview always reaches; `None` for other listeners.
    pub fn preview(&self, id: u16) -> Option<Colour> {
        self.listeners.get(&id)?.1.preview_of()
    }

    /// The client whose flow was sought.
    pub fn client(sighting: &Sighting) -> Option<SocketAddr> {
        let address = Ipv6Addr::from(sighting.key.address()).to_canonical();
        (sighting.key.id != 0)
            .then(|| SocketAddr::new(address, u16::from_be_bytes(sighting.key.port())))
    }

    /// A service's name.
    pub fn service(&self, id: u32) -> Option<&str> {
        self.services.get(&id).map(String::as_str)
    }

    /// Where a flow's packets go, with the listener's port where the backend has none
    /// of its own.
    pub fn backend(&self, id: u32, listener: Option<ListenerPlan>) -> Option<SocketAddr> {
        let backend = self.backends.get(&id)?;
        let own = u16::from_be_bytes(backend.port);
        let port = match (own, listener) {
            (0, Some(listener)) => listener.address.port(),
            _ => own,
        };
        Some(SocketAddr::new(address_of(backend), port))
    }

    /// An interface's name, or its number where it is gone.
    pub fn interface(&mut self, ifindex: u32) -> String {
        let name = self.interfaces.entry(ifindex).or_insert_with(|| {
            let name = if_indextoname(ifindex).ok();
            name.and_then(|name| name.into_string().ok())
                .unwrap_or_else(|| ifindex.to_string())
        });
        name.clone()
    }

    /// The name of the interface in a slot.
    pub fn slot(&mut self, slot: u32) -> Option<String> {
        let device = *self.devices.get(&slot)?;
        Some(self.interface(device))
    }
}

/// Address and port, as a sighting has them.
pub fn end_of(family: u8, address: [u8; 16], port: [u8; 2]) -> SocketAddr {
    let [a, b, c, d, ..] = address;
    let ip = if family == 4 {
        IpAddr::from([a, b, c, d])
    } else {
        IpAddr::from(address)
    };
    SocketAddr::new(ip, u16::from_be_bytes(port))
}

impl Datapath {
    /// What the packet path tells of packets.
    pub const fn watcher(&self) -> &Watcher {
        &self.watcher
    }

    /// What the numbers in sightings stand for now.
    pub fn names(&self) -> Result<Names, Error> {
        let held = self.inner.held();
        let services = self.inner.applied().services.clone();
        let slots = Slots::open(&self.inner.pins)?.held()?;
        Ok(Names {
            listeners: held
                .endpoints
                .listeners
                .into_iter()
                .map(|(at, listener)| (listener.id, (at, listener)))
                .collect(),
            services: services.into_iter().map(|(name, id)| (id, name)).collect(),
            backends: held.backends,
            devices: slots
                .into_iter()
                .map(|(slot, interface)| (slot, interface.device))
                .collect(),
            interfaces: BTreeMap::new(),
        })
    }

    /// What befell the flow tables so far, summed over the CPUs.
    pub fn pressure(&self) -> Result<[Pressure; FlowTable::ALL.len()], Error> {
        let pressure: PerCpuArray<_, Pressure> =
            self.inner.open_map(map::PRESSURE, Map::PerCpuArray)?;
        let mut sums = [Pressure::default(); FlowTable::ALL.len()];
        for (table, sum) in FlowTable::ALL.into_iter().zip(&mut sums) {
            let values = pressure
                .get(&(table as u32), 0)
                .map_err(|e| Error::bpf("reading PRESSURE", &e))?;
            for cpu in values.iter() {
                sum.evicted += cpu.evicted;
                sum.full += cpu.full;
            }
        }
        Ok(sums)
    }
}
