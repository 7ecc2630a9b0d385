//! The only place that talks to the kernel's BPF: load, pin, adopt, attach,
//! apply, and the word.

mod attach;
mod batch;
mod error;
mod layout;
mod mmap;
mod pins;
mod resolver;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use aya::{
    EbpfLoader, Pod,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray},
    programs::Xdp,
};
use bg_common::{
    abi::{MAGLEV_ROW, PROGRAM, TICK_SHIFT, capacity, map, tick_ns},
    key::{Endpoint, FlowKey},
    reason::Reason,
    service::{
        Backend, Colour, ColourStats, CutoverWord, FirstFlow, Flow, Listener, NextHop, PoolWord,
        ReturnPath, state,
    },
};
use nix::time::{ClockId, clock_gettime};

pub use self::{
    attach::InterfaceStatus,
    error::{Error, StoreError},
    pins::Lock,
    resolver::Resolver,
};
use self::{
    layout::{Tables, address_of, lay_out, listener_of, protocol_of},
    mmap::Words,
    pins::Pins,
};
use crate::{
    object::OBJECT,
    plan::{ListenerPlan, Plan},
};

/// How XDP is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// In the driver.
    Native,
    /// In the stack, for drivers without XDP: slow.
    Generic,
}

impl AttachMode {
    /// `"native"` or `"generic"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// Where and how the packet path runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Interfaces to attach to: clients' side, backends' side.
    pub interfaces: Vec<String>,
    /// Native or generic; never downgraded.
    pub mode: AttachMode,
    /// Established TCP flows that fit, per address family.
    pub max_flows: u32,
}

/// A flip that was stored.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// `CLOCK_MONOTONIC`, ns, just before the store.
    pub at_ns: u64,
    /// What the store took, ns, the two clock reads included.
    pub store_ns: u64,
}

/// One remembered flow.
#[derive(Clone, Debug)]
pub struct FlowRecord {
    /// The client.
    pub client: SocketAddr,
    /// Service id.
    pub service: u32,
    /// Its colour.
    pub colour: Colour,
    /// Its backend's address.
    pub backend: Option<IpAddr>,
    /// Backend id.
    pub backend_id: u32,
    /// Generation it was born in.
    pub generation: u16,
    /// `established`, `half_open` or `udp`.
    pub table: &'static str,
    /// Time since its last packet.
    pub idle: Duration,
    /// Both sides have closed it, or it was reset.
    pub closing: bool,
}

/// A plan that fits, laid out over what the kernel holds.
#[derive(Debug)]
pub struct Change {
    held: Tables,
    layout: layout::Layout,
    pools: BTreeMap<u32, (PoolWord, Vec<u32>)>,
}

/// The packet path, adopted or new. Dropping it changes no forwarding.
#[derive(Debug)]
pub struct Datapath {
    inner: Arc<Inner>,
    interfaces: Vec<InterfaceStatus>,
    _lock: Lock,
}

#[derive(Debug)]
struct Inner {
    pins: Pins,
    words: Words,
    first_flows: Words,
    pools: Words,
    arena: Words,
    backend_words: Words,
    tables: Mutex<Applied>,
}

#[derive(Debug, Default, Clone)]
struct Applied {
    services: BTreeMap<String, u32>,
    /// Backends of the plan.
    backends: BTreeMap<u32, Backend>,
}

/// Locks the pins below `bpffs` against a second daemon, for as long as the
/// lock lives.
pub fn lock(bpffs: &Path) -> Result<Lock, Error> {
    Pins::new(bpffs).lock()
}

/// Refuses interfaces that are not there.
pub fn interfaces_exist(interfaces: &[String]) -> Result<(), Error> {
    attach::exist(interfaces)
}

impl Datapath {
    /// Checks, loads or adopts, pins, attaches and applies the plan. What fails
    /// leaves nothing behind where nothing was, and changes nothing where
    /// something was.
    pub fn start(lock: Lock, settings: &Settings, plan: &Plan) -> Result<Self, Error> {
        let pins = lock.pins().clone();
        pins.check()?;
        attach::check(settings, &pins)?;
        let fresh = pins.flow_capacity().is_none();
        let max_flows = pins.flow_capacity().unwrap_or(settings.max_flows);
        if max_flows != settings.max_flows {
            tracing::warn!(
                "gateway.max_flows is {}, but the pinned flow tables hold {max_flows}: they keep that \
                 size until `bgswitch detach`",
                settings.max_flows
            );
        }
        pins.make()?;
        let started = Self::start_locked(settings, plan, &pins, max_flows);
        if started.is_err() && fresh {
            // Nothing ran before, so nothing is kept: the next start is clean.
            let _ = pins.remove();
        }
        let (inner, interfaces) = started?;
        Ok(Self {
            inner: Arc::new(inner),
            interfaces,
            _lock: lock,
        })
    }

    fn start_locked(
        settings: &Settings,
        plan: &Plan,
        pins: &Pins,
        max_flows: u32,
    ) -> Result<(Inner, Vec<InterfaceStatus>), Error> {
        let mut loader = EbpfLoader::new();
        for name in map::ALL {
            loader.map_pin_path(name, pins.map(name));
        }
        loader
            .map_max_entries(map::FLOWS_V4, max_flows)
            .map_max_entries(map::FLOWS_V6, max_flows);
        let mut ebpf = loader
            .load(OBJECT)
            .map_err(|e| Error::bpf("loading the eBPF object", &e))?;
        let program: &mut Xdp = ebpf
            .program_mut(PROGRAM)
            .ok_or_else(|| Error::step("the eBPF object", "has no XDP program"))?
            .try_into()
            .map_err(|e| Error::step("the eBPF object", e))?;
        program
            .load()
            .map_err(|e| Error::step("the kernel's verifier", error::describe(&e)))?;

        // First what may be refused, and can be taken back.
        let inner = Inner::open(pins)?;
        let change = inner.plan_change(plan)?;
        let added = attach::add(program, settings, pins)?;
        inner.enter_backends(&change);
        inner.apply(change)?;
        let interfaces = attach::replace(program, settings, pins)?;
        added.keep();
        let _ = fs::remove_file(pins.program());
        program
            .pin(pins.program())
            .map_err(|e| Error::bpf("pinning the program", &e))?;
        Ok((inner, interfaces))
    }

    /// What a plan changes, or why it cannot be applied. Nothing is changed yet.
    ///
    /// A change holds until the next [`Datapath::apply`] or [`Datapath::sweep`].
    pub fn plan_change(&self, plan: &Plan) -> Result<Change, Error> {
        self.inner.plan_change(plan)
    }

    /// Enters the backends that are new, so that the way to them is known before
    /// [`Datapath::apply`] sends packets there.
    pub fn enter_backends(&self, change: &Change) {
        self.inner.enter_backends(change);
    }

    /// Applies a change whose backends are entered.
    pub fn apply(&self, change: Change) -> Result<(), Error> {
        self.inner.apply(change)
    }

    /// The service's word.
    pub fn word(&self, service: &str) -> Option<CutoverWord> {
        Some(CutoverWord(
            self.inner.words.load(self.inner.service(service)? as usize),
        ))
    }

    /// Stores a service's word, if it is still `expected`.
    pub fn store(
        &self,
        service: &str,
        expected: CutoverWord,
        new: CutoverWord,
    ) -> Result<Stored, StoreError> {
        let id = self
            .inner
            .service(service)
            .ok_or_else(|| StoreError::UnknownService(service.to_owned()))?;
        store(&self.inner.words, id, expected, new)
    }

    /// The stamp of the newest generation's first flow.
    pub fn first_flow(&self, service: &str) -> Option<FirstFlow> {
        Some(FirstFlow(
            self.inner
                .first_flows
                .load(self.inner.service(service)? as usize),
        ))
    }

    /// All reason counters, summed over the CPUs.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, Error> {
        let counters: PerCpuArray<_, u64> = self.inner.open_map(map::REASONS, Map::PerCpuArray)?;
        Reason::ALL
            .iter()
            .map(|reason| {
                let values = counters
                    .get(&(*reason as u32), 0)
                    .map_err(|e| Error::bpf("reading REASONS", &e))?;
                Ok((*reason, values.iter().sum()))
            })
            .collect()
    }

    /// Statistics of both colours of a service, summed over the CPUs.
    pub fn stats(&self, service: &str) -> Result<[ColourStats; 2], Error> {
        let id = self
            .inner
            .service(service)
            .ok_or_else(|| Error::UnknownService(service.to_owned()))?;
        let stats: PerCpuArray<_, ColourStats> =
            self.inner.open_map(map::STATS, Map::PerCpuArray)?;
        let mut sums = [ColourStats::default(); 2];
        for colour in Colour::ALL {
            let index = id * 2 + colour as u32;
            let values = stats
                .get(&index, 0)
                .map_err(|e| Error::bpf("reading STATS", &e))?;
            let sum = &mut sums[colour as usize];
            for cpu in values.iter() {
                sum.forward_packets += cpu.forward_packets;
                sum.forward_bytes += cpu.forward_bytes;
                sum.return_packets += cpu.return_packets;
                sum.return_bytes += cpu.return_bytes;
                sum.new_flows += cpu.new_flows;
                sum.resets += cpu.resets;
            }
        }
        Ok(sums)
    }

    /// Calls `visit` for every remembered flow.
    pub fn flows(&self, mut visit: impl FnMut(&FlowRecord)) -> Result<(), Error> {
        let backends = self.inner.backends();
        let now = tick();
        for (name, table) in FLOW_TABLES {
            let data = self.inner.pinned(name)?;
            let mut one = |client: SocketAddr, flow: &Flow| {
                if table == HALF_OPEN && flow.state & state::MOVED != 0 {
                    return;
                }
                visit(&FlowRecord {
                    client,
                    service: flow.service,
                    colour: flow.colour(),
                    backend: backends.get(&flow.backend).map(address_of),
                    backend_id: flow.backend,
                    generation: flow.generation,
                    table,
                    idle: Duration::from_nanos(tick_ns(now.saturating_sub(flow.seen))),
                    closing: is_closing(flow),
                });
            };
            let result = if name.ends_with("V4") {
                batch::for_each::<FlowKey<[u8; 4]>, Flow>(data.fd(), |key, flow| {
                    one(
                        SocketAddr::new(key.client.into(), u16::from_be_bytes(key.port)),
                        flow,
                    );
                })
            } else {
                batch::for_each::<FlowKey<[u8; 16]>, Flow>(data.fd(), |key, flow| {
                    one(
                        SocketAddr::new(key.client.into(), u16::from_be_bytes(key.port)),
                        flow,
                    );
                })
            };
            result.map_err(Error::io(format!("reading {name}")))?;
        }
        Ok(())
    }

    /// Deletes established flows that are closed for 10 s or silent for longer
    /// than `idle`, and forgets backends that left and have no flows any more.
    /// Returns how many flows went.
    pub fn sweep(&self, idle: Duration) -> Result<usize, Error> {
        let now = tick();
        let idle = bg_common::abi::ticks(idle.as_nanos() as u64);
        let dead = |flow: &Flow| {
            let silent = now.saturating_sub(flow.seen);
            silent > idle || is_closing(flow) && silent > CLOSING_TICKS
        };
        let mut swept = self.sweep_table::<[u8; 4]>(map::FLOWS_V4, dead)?;
        swept += self.sweep_table::<[u8; 16]>(map::FLOWS_V6, dead)?;
        self.forget_backends()?;
        Ok(swept)
    }

    fn sweep_table<A: Copy + 'static>(
        &self,
        name: &str,
        dead: impl Fn(&Flow) -> bool,
    ) -> Result<usize, Error>
    where
        FlowKey<A>: Pod,
    {
        let data = self.inner.pinned(name)?;
        let mut keys = Vec::new();
        batch::for_each::<FlowKey<A>, Flow>(data.fd(), |key, flow| {
            if dead(flow) {
                keys.push(*key);
            }
        })
        .map_err(Error::io(format!("reading {name}")))?;
        let mut table: HashMap<_, FlowKey<A>, Flow> = HashMap::try_from(Map::HashMap(data))
            .map_err(|e| Error::bpf(format!("opening {name}"), &e))?;
        for key in &keys {
            // Gone already is as good.
            let _ = table.remove(key);
        }
        Ok(keys.len())
    }

    fn forget_backends(&self) -> Result<(), Error> {
        let applied = self.inner.applied().clone();
        let left: BTreeMap<u32, Backend> = self
            .inner
            .backends()
            .into_iter()
            .filter(|(id, _)| !applied.backends.contains_key(id))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        let mut in_use = BTreeSet::new();
        self.flows(|flow| {
            in_use.insert(flow.backend_id);
        })?;
        for (id, backend) in left.iter().filter(|(id, _)| !in_use.contains(id)) {
            self.inner.forget_backend(*id, backend, &applied)?;
        }
        Ok(())
    }

    /// Entries of the flow tables, and what fits.
    pub fn capacity(&self) -> u32 {
        self.inner
            .pins
            .flow_capacity()
            .unwrap_or(0)
            .saturating_mul(2)
    }

    /// Where the program is attached.
    pub fn interfaces(&self) -> &[InterfaceStatus] {
        &self.interfaces
    }

    /// The id of a service.
    pub fn service_id(&self, service: &str) -> Option<u32> {
        self.inner.service(service)
    }

    /// The task that keeps next hops fresh.
    pub fn resolver(&self) -> Resolver {
        Resolver::new(Arc::clone(&self.inner))
    }

    /// Backends of the plan without a next hop: service id, colour, address.
    pub fn unresolved(&self) -> Vec<(u32, Colour, IpAddr)> {
        let applied = self.inner.applied();
        applied
            .backends
            .iter()
            .filter(|(id, _)| self.inner.next_hop(**id) == NextHop::NONE)
            .map(|(_, backend)| {
                (
                    backend.service,
                    Colour::from_bit(backend.colour),
                    address_of(backend),
                )
            })
            .collect()
    }
}

impl Inner {
    fn open(pins: &Pins) -> Result<Self, Error> {
        let words = |name: &str, words: usize| {
            let data = pinned(pins, name)?;
            Words::map(data.fd(), words).map_err(Error::io(format!("mapping {name}")))
        };
        Ok(Self {
            words: words(map::WORDS, capacity::SERVICES)?,
            first_flows: words(map::FIRST_FLOWS, capacity::SERVICES)?,
            pools: words(map::POOLS, capacity::SERVICES * 4)?,
            arena: words(map::MAGLEV, capacity::MAGLEV_ROWS * MAGLEV_ROW as usize / 2)?,
            backend_words: words(map::BACKENDS, capacity::BACKENDS * BACKEND_WORDS)?,
            tables: Mutex::default(),
            pins: pins.clone(),
        })
    }

    fn applied(&self) -> std::sync::MutexGuard<'_, Applied> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn service(&self, name: &str) -> Option<u32> {
        self.applied().services.get(name).copied()
    }

    fn pinned(&self, name: &str) -> Result<MapData, Error> {
        pinned(&self.pins, name)
    }

    fn open_map<T: TryFrom<Map, Error = MapError>>(
        &self,
        name: &str,
        of: impl FnOnce(MapData) -> Map,
    ) -> Result<T, Error> {
        T::try_from(of(self.pinned(name)?)).map_err(|e| Error::bpf(format!("opening {name}"), &e))
    }

    fn next_hop(&self, backend: u32) -> NextHop {
        NextHop(self.backend_words.load(backend as usize * BACKEND_WORDS))
    }

    fn set_next_hop(&self, backend: u32, hop: NextHop) {
        self.backend_words
            .store(backend as usize * BACKEND_WORDS, hop.0);
    }

    /// The used slots of the backend table.
    fn backends(&self) -> BTreeMap<u32, Backend> {
        let slot = |id: usize| {
            let word = |n: usize| {
                self.backend_words
                    .load(id * BACKEND_WORDS + n)
                    .to_ne_bytes()
            };
            let last = word(3);
            let mut address = [0; 16];
            address[..8].copy_from_slice(&word(1));
            address[8..].copy_from_slice(&word(2));
            Backend {
                next_hop: u64::from_ne_bytes(word(0)),
                address,
                port: [last[0], last[1]],
                family: last[2],
                colour: last[3],
                service: u32::from_ne_bytes([last[4], last[5], last[6], last[7]]),
            }
        };
        (0..capacity::BACKENDS)
            .map(|id| (id as u32, slot(id)))
            .filter(|(_, b)| b.family != 0)
            .collect()
    }

    fn set_backend(&self, id: u32, backend: &Backend) {
        let at = id as usize * BACKEND_WORDS;
        let (low, high) = backend.address.split_at(8);
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
        let [p, q] = backend.port;
        let [a, b, c, d] = backend.service.to_ne_bytes();
        self.backend_words.store(at, backend.next_hop);
        self.backend_words.store(at + 1, word(low));
        self.backend_words.store(at + 2, word(high));
        self.backend_words.store(
            at + 3,
            u64::from_ne_bytes([p, q, backend.family, backend.colour, a, b, c, d]),
        );
    }

    fn held(&self) -> Result<Tables, Error> {
        let mut held = Tables {
            backends: self.backends(),
            ..Tables::default()
        };
        self.read_endpoints::<[u8; 4], Listener>(map::LISTENERS_V4, &mut held.listeners)?;
        self.read_endpoints::<[u8; 16], Listener>(map::LISTENERS_V6, &mut held.listeners)?;
        self.read_endpoints::<[u8; 4], ReturnPath>(map::RETURNS_V4, &mut held.returns)?;
        self.read_endpoints::<[u8; 16], ReturnPath>(map::RETURNS_V6, &mut held.returns)?;
        Ok(held)
    }

    fn read_endpoints<A: Copy + Into<IpAddr> + 'static, V: Pod>(
        &self,
        name: &str,
        into: &mut BTreeMap<ListenerPlan, V>,
    ) -> Result<(), Error>
    where
        Endpoint<A>: Pod,
    {
        let data = self.pinned(name)?;
        batch::for_each::<Endpoint<A>, V>(data.fd(), |key, value| {
            let address = SocketAddr::new(key.address.into(), u16::from_be_bytes(key.port));
            into.insert(
                ListenerPlan {
                    address,
                    protocol: protocol_of(key.protocol),
                },
                *value,
            );
        })
        .map_err(Error::io(format!("reading {name}")))
    }

    /// Sets or removes entries of a pair of endpoint tables.
    fn write_endpoints<V: Pod>(
        &self,
        names: [&str; 2],
        set: &BTreeMap<ListenerPlan, V>,
        remove: &[ListenerPlan],
    ) -> Result<(), Error> {
        let mut v4: HashMap<_, Endpoint<[u8; 4]>, V> = self.open_map(names[0], Map::HashMap)?;
        let mut v6: HashMap<_, Endpoint<[u8; 16]>, V> = self.open_map(names[1], Map::HashMap)?;
        let failed = |endpoint: &ListenerPlan| {
            let what = format!("setting {endpoint} in {}", names[0]);
            |e: MapError| Error::bpf(what, &e)
        };
        for (endpoint, value) in set {
            let (port, protocol) = (
                endpoint.address.port().to_be_bytes(),
                endpoint.protocol.number(),
            );
            match endpoint.address.ip() {
                IpAddr::V4(ip) => v4.insert(Endpoint::new(ip.octets(), port, protocol), value, 0),
                IpAddr::V6(ip) => v6.insert(Endpoint::new(ip.octets(), port, protocol), value, 0),
            }
            .map_err(failed(endpoint))?;
        }
        for endpoint in remove {
            let (port, protocol) = (
                endpoint.address.port().to_be_bytes(),
                endpoint.protocol.number(),
            );
            match endpoint.address.ip() {
                IpAddr::V4(ip) => v4.remove(&Endpoint::new(ip.octets(), port, protocol)),
                IpAddr::V6(ip) => v6.remove(&Endpoint::new(ip.octets(), port, protocol)),
            }
            .map_err(failed(endpoint))?;
        }
        Ok(())
    }

    fn plan_change(&self, plan: &Plan) -> Result<Change, Error> {
        let held = self.held()?;
        let layout = lay_out(plan, &held)?;
        let pools = self.plan_pools(&layout)?;
        Ok(Change {
            held,
            layout,
            pools,
        })
    }

    fn enter_backends(&self, change: &Change) {
        for (id, backend) in &change.layout.tables.backends {
            if !change.held.backends.contains_key(id) {
                self.set_backend(*id, backend);
            }
        }
    }

    /// Writes so that no packet meets a listener without a pool: return paths,
    /// pools, listeners; then removes what is no longer wanted, listeners first.
    fn apply(&self, change: Change) -> Result<(), Error> {
        let Change {
            held,
            layout,
            pools,
        } = change;
        self.write_endpoints(
            [map::RETURNS_V4, map::RETURNS_V6],
            &layout.tables.returns,
            &[],
        )?;
        for (index, (word, table)) in &pools {
            for (pair, slots) in table.chunks(2).enumerate() {
                let high = slots.get(1).copied().unwrap_or(0);
                let at = word.base() as usize / 2 + pair;
                self.arena
                    .store(at, u64::from(slots[0]) | u64::from(high) << 32);
            }
            self.pools.store(*index as usize, word.0);
        }
        for id in &layout.new_services {
            self.words
                .store(*id as usize, CutoverWord::new(Colour::Blue).0);
            self.first_flows.store(*id as usize, 0);
        }
        let gone: Vec<ListenerPlan> = held
            .listeners
            .keys()
            .filter(|l| !layout.tables.listeners.contains_key(l))
            .copied()
            .collect();
        self.write_endpoints(
            [map::LISTENERS_V4, map::LISTENERS_V6],
            &layout.tables.listeners,
            &gone,
        )?;
        // Return paths of listeners that are gone; those of backends that left
        // stay for their flows, until the sweep finds none.
        let stale: Vec<ListenerPlan> = held
            .returns
            .iter()
            .filter(|(from, path)| {
                !layout.tables.returns.contains_key(from)
                    && !layout
                        .tables
                        .listeners
                        .contains_key(&listener_of(path, from))
            })
            .map(|(from, _)| *from)
            .collect();
        self.write_endpoints::<ReturnPath>(
            [map::RETURNS_V4, map::RETURNS_V6],
            &BTreeMap::new(),
            &stale,
        )?;

        *self.applied() = Applied {
            services: layout.services,
            backends: layout.tables.backends,
        };
        Ok(())
    }

    /// The pools that change, with their places in the arena.
    fn plan_pools(
        &self,
        layout: &layout::Layout,
    ) -> Result<BTreeMap<u32, (PoolWord, Vec<u32>)>, Error> {
        let mut used: Vec<PoolWord> = (0..capacity::SERVICES * 4)
            .map(|index| PoolWord(self.pools.load(index)))
            .collect();
        let mut changed = BTreeMap::new();
        for (index, members) in &layout.pools {
            let table = layout::pool_table(members);
            let held = used[*index as usize];
            if held.slots() as usize == table.len() && self.table_of(held) == table {
                continue;
            }
            let base = layout::allocate(&used, table.len() as u32)?;
            let word = PoolWord::new(base, table.len() as u32);
            // The old place stays taken until the new word is stored.
            used.push(word);
            changed.insert(*index, (word, table));
        }
        Ok(changed)
    }

    fn table_of(&self, pool: PoolWord) -> Vec<u32> {
        (pool.base()..pool.base() + pool.slots())
            .map(|slot| (self.arena.load(slot as usize / 2) >> (slot % 2 * 32)) as u32)
            .collect()
    }

    fn forget_backend(&self, id: u32, backend: &Backend, applied: &Applied) -> Result<(), Error> {
        let address = address_of(backend);
        let held = self.held()?;
        let wanted: BTreeSet<IpAddr> = applied.backends.values().map(address_of).collect();
        let stale: Vec<ListenerPlan> = held
            .returns
            .keys()
            .filter(|from| from.address.ip() == address && !wanted.contains(&address))
            .copied()
            .collect();
        self.write_endpoints::<ReturnPath>(
            [map::RETURNS_V4, map::RETURNS_V6],
            &BTreeMap::new(),
            &stale,
        )?;
        self.set_backend(id, &Backend::default());
        Ok(())
    }
}

/// The words, without a daemon: what an emergency rollback needs.
#[derive(Debug)]
pub struct PinnedWords {
    inner: Inner,
}

impl PinnedWords {
    /// Opens the pinned state below `bpffs`.
    pub fn open(bpffs: &Path) -> Result<Self, Error> {
        let pins = Pins::new(bpffs);
        if !pins.hold_state()? {
            return Err(Error::step(
                format!("opening the pinned state in {}", bpffs.display()),
                "there is none: nothing forwards here",
            ));
        }
        pins.check()?;
        Ok(Self {
            inner: Inner::open(&pins)?,
        })
    }

    /// The id of the service that one of these listeners belongs to.
    pub fn service_of(&self, listeners: &[ListenerPlan]) -> Result<Option<u32>, Error> {
        let held = self.inner.held()?;
        Ok(listeners
            .iter()
            .find_map(|listener| held.listeners.get(listener))
            .map(|found| found.service))
    }

    /// A service's word.
    pub fn word(&self, id: u32) -> CutoverWord {
        CutoverWord(self.inner.words.load(id as usize))
    }

    /// The stamp of the newest generation's first flow.
    pub fn first_flow(&self, id: u32) -> FirstFlow {
        FirstFlow(self.inner.first_flows.load(id as usize))
    }

    /// Stores a service's word, if it is still `expected`.
    pub fn store(
        &self,
        id: u32,
        expected: CutoverWord,
        new: CutoverWord,
    ) -> Result<Stored, StoreError> {
        store(&self.inner.words, id, expected, new)
    }
}

/// Removes everything: links, program, maps, of all layouts. Returns the pins
/// that were removed.
pub fn detach(bpffs: &Path) -> Result<Vec<PathBuf>, Error> {
    lock(bpffs)?.pins().remove()
}

fn store(
    words: &Words,
    id: u32,
    expected: CutoverWord,
    new: CutoverWord,
) -> Result<Stored, StoreError> {
    let word = words.at(id as usize);
    let at_ns = now_ns();
    let stored = word.compare_exchange(expected.0, new.0, Ordering::SeqCst, Ordering::Acquire);
    let store_ns = now_ns() - at_ns;
    stored
        .map(|_| Stored { at_ns, store_ns })
        .map_err(|actual| StoreError::Conflict(CutoverWord(actual)))
}

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of [`FirstFlow`].
pub fn now_ns() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

fn tick() -> u32 {
    (nanoseconds(ClockId::CLOCK_MONOTONIC_COARSE) >> TICK_SHIFT) as u32
}

fn nanoseconds(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |now| {
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    })
}

const fn is_closing(flow: &Flow) -> bool {
    const BOTH: u8 = state::CLIENT_FIN | state::BACKEND_FIN;
    flow.state & BOTH == BOTH || flow.state & state::RESET != 0
}

fn pinned(pins: &Pins, name: &str) -> Result<MapData, Error> {
    MapData::from_pin(pins.map(name)).map_err(|e| Error::bpf(format!("opening {name}"), &e))
}

const BACKEND_WORDS: usize = size_of::<Backend>() / 8;
/// A closed flow is kept for 10 s, for segments that are still on their way.
const CLOSING_TICKS: u32 = 150;

const HALF_OPEN: &str = "half_open";

const FLOW_TABLES: [(&str, &str); 6] = [
    (map::FLOWS_V4, "established"),
    (map::FLOWS_V6, "established"),
    (map::HALF_OPEN_V4, HALF_OPEN),
    (map::HALF_OPEN_V6, HALF_OPEN),
    (map::UDP_V4, "udp"),
    (map::UDP_V6, "udp"),
];
