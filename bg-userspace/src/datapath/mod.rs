//! The only place that talks to the kernel's BPF: load, pin, adopt, attach,
//! apply, and the word.

mod addresses;
mod advertise;
mod announcer;
mod apply;
mod attach;
mod batch;
mod directory;
mod error;
mod explain;
mod flows;
mod forwarding;
mod hops;
mod host_addresses;
mod ids;
pub mod inspect;
mod interfaces;
mod layout;
mod lines;
mod load;
mod made;
mod maps;
mod mmap;
mod naming;
mod netdev;
mod netlink;
mod offloads;
mod packet_socket;
mod pins;
mod pools;
mod resolver;
mod signals;
mod slots;
mod standing;
mod vlans;
mod watch;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock},
    time::Duration,
};

use aya::maps::{Map, MapData, PerCpuArray};
use bg_common::{
    abi::{Room, map},
    flow::{buckets_for, flows_for},
    maglev::Member,
    reason::Reason,
    service::{Backend, Colour, ColourStats, CutoverWord, FirstFlow, NextHop},
};
use nix::time::{ClockId, clock_gettime};

pub use self::{
    addresses::Noted,
    announcer::Announced,
    attach::InterfaceStatus,
    directory::{Built, Directory, Endpoints},
    error::{Error, StoreError},
    explain::{Explanation, Fate, Target},
    flows::FlowRecord,
    forwarding::Setting,
    load::{Features, Loaded},
    made::Made,
    maps::{Block, block_of},
    naming::Known,
    pins::Lock,
    resolver::Resolver,
    watch::{Names, Watcher, end_of},
    words::{PinnedWords, Stored},
};
use self::{
    addresses::Ours,
    announcer::Announcer,
    flows::Unused,
    interfaces::Interfaces,
    layout::address_of,
    lines::Lines,
    mmap::Words,
    netlink::Requests,
    pins::{Pins, make_room},
    signals::Ear,
};
use crate::plan::Plan;

/// How long a change waits for the next hops of its new backends.
const FIRST_RESOLVE: Duration = Duration::from_secs(2);

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
    /// Established TCP flows that fit.
    pub max_flows: u32,
    /// Services that fit.
    pub max_services: u32,
}

/// The packet path, adopted or new. Dropping it changes no forwarding.
#[derive(Debug)]
pub struct Datapath {
    inner: Arc<Inner>,
    interfaces: Arc<Interfaces>,
    announcer: Arc<Announcer>,
    watcher: Watcher,
    ear: RwLock<Ear>,
    explainer: explain::Explainer,
    unused: Mutex<Unused>,
    max_flows: u32,
    _lock: Lock,
}

/// What a plan changes, laid out and not done yet.
#[derive(Debug)]
pub struct Change {
    tables: apply::Change,
    addresses: addresses::Change,
}

/// A packet path that has begun: tables, program, who watches and listens, interfaces.
type Started = (Inner, Loaded, (Watcher, Ear), Vec<InterfaceStatus>);

#[derive(Debug)]
struct Inner {
    pins: Pins,
    room: Room,
    words: Words,
    first_flows: Words,
    pools: Words,
    arena: Words,
    sources: Words,
    backend_words: Words,
    directory: Directory,
    lines: Lines,
    tables: Mutex<Applied>,
    /// One change of the tables at a time.
    changing: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default, Clone)]
struct Applied {
    services: BTreeMap<String, u32>,
    /// Backends of the plan.
    backends: BTreeMap<u32, Backend>,
    /// Backends of the plan that reply to clients themselves.
    direct: BTreeSet<u32>,
    /// Ids of the plan's listeners.
    listeners: BTreeSet<u16>,
    /// All members of the plan's pools, by index of the pool's word.
    pools: BTreeMap<u32, Vec<Member>>,
    /// Backends that shall be out of their pools.
    out: BTreeSet<u32>,
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

/// Whether pinned state is below `bpffs`; `None` where that cannot be seen.
pub fn is_there(bpffs: &Path) -> Option<bool> {
    Pins::new(bpffs).map(map::WORDS).try_exists().ok()
}

impl Datapath {
    /// Checks, loads or adopts, pins, attaches and applies the plan. What fails
    /// leaves nothing behind where nothing was, and changes nothing where
    /// something was. `noted` are the addresses that an earlier daemon put on
    /// interfaces.
    pub fn start(
        lock: Lock,
        settings: &Settings,
        plan: &Plan,
        known: &BTreeMap<String, Known>,
        noted: &Noted,
    ) -> Result<Self, Error> {
        let pins = lock.pins().clone();
        pins.check()?;
        attach::check(settings, &pins)?;
        let wanted = buckets_for(settings.max_flows);
        let pinned = pins.flow_buckets();
        let fresh = pinned.is_none();
        let max_flows = match pinned {
            Some(buckets) if buckets != wanted => {
                let max_flows = flows_for(buckets);
                keeps_its_size("max_flows", settings.max_flows, "flow table", max_flows);
                max_flows
            }
            _ => settings.max_flows,
        };
        let wanted_room = Room {
            services: settings.max_services,
        };
        let room = pins.room().unwrap_or(wanted_room);
        if room != wanted_room {
            let wanted = wanted_room.services;
            keeps_its_size("max_services", wanted, "tables of services", room.services);
            let services = plan.services.len();
            if services > room.services as usize {
                return Err(Error::step(
                    format!("gateway.max_services is {wanted}"),
                    format!(
                        "the pinned tables have room for {} services, {services} are configured. They \
                         keep their size until `bgswitch detach`, which ends forwarding until the next start",
                        room.services
                    ),
                ));
            }
        }
        pins.make()?;
        let announcer = Announcer::default();
        let ours = Ours::new(
            &settings.interfaces,
            pins.links().iter().chain(noted.values()),
        );
        let started = netlink::block_on(|| async {
            addresses::prepare(&Requests::open()?, &ours, &plan.announced(), noted).await
        })
        .and_then(|addresses| {
            Self::start_locked(
                settings,
                plan,
                known,
                &pins,
                (pinned.unwrap_or(wanted), room),
                addresses,
                &announcer,
            )
        });
        if started.is_err() && fresh {
            // Nothing ran before, so nothing is kept: the next start is clean.
            let _ = pins.remove();
        }
        let (inner, loaded, (watcher, ear), statuses) = started?;
        let datapath = Self {
            inner: Arc::new(inner),
            interfaces: Arc::new(Interfaces::new(settings.clone(), loaded, statuses)),
            announcer: Arc::new(announcer),
            watcher,
            ear: RwLock::new(ear),
            explainer: explain::Explainer::default(),
            unused: Mutex::default(),
            max_flows,
            _lock: lock,
        };
        datapath.warn_of_settings(plan);
        Ok(datapath)
    }

    fn start_locked(
        settings: &Settings,
        plan: &Plan,
        known: &BTreeMap<String, Known>,
        pins: &Pins,
        (flow_buckets, room): (u32, Room),
        addresses: addresses::Change,
        announcer: &Announcer,
    ) -> Result<Started, Error> {
        let mut loader = pins.loader();
        loader.map_max_entries(map::FLOWS, flow_buckets);
        make_room(&mut loader, room);
        let mut loaded = Features::probe()?.load(&mut loader)?;
        let watcher = Watcher::take(&mut loaded.ebpf)?;
        let ear = Ear::take(&mut loaded.ebpf, room)?;
        let program = loaded.program()?;

        // First what may be refused, and can be taken back.
        let inner = Inner::open(pins)?;
        inner.shape_tables()?;
        inner.adopt_standings();
        let change = inner.prepare(plan, known)?;
        let added = attach::add(program, settings, pins)?;
        inner.introduce(&change)?;
        let new = change.unresolved();
        let resolved = netlink::block_on(|| inner.resolve_now(&new, FIRST_RESOLVE));
        if let Err(error) = resolved {
            tracing::error!("{error}");
        }
        let mut interfaces = Vec::new();
        announcer.change(addresses, || {
            inner.apply(change)?;
            interfaces = attach::replace(program, settings, pins)?;
            Ok(())
        })?;
        added.keep();
        let _ = fs::remove_file(pins.program());
        program
            .pin(pins.program())
            .map_err(|e| Error::bpf("pinning the program", &e))?;
        loaded.features.tell();
        Ok((inner, loaded, (watcher, ear), interfaces))
    }

    /// What a plan changes; an error says why it cannot be applied, and then
    /// nothing was changed. Blocks, as long as another change is under way too.
    pub fn prepare(&self, plan: &Plan, known: &BTreeMap<String, Known>) -> Result<Change, Error> {
        let tables = self.inner.prepare(plan, known)?;
        let ours = Ours::new(self.interfaces.names(), &[]);
        let noted = self.announcer.noted();
        let addresses = netlink::block_on(|| async {
            addresses::prepare(&Requests::open()?, &ours, &plan.announced(), &noted).await
        })?;
        Ok(Change { tables, addresses })
    }

    /// Finds the way to backends that are new, before packets go there. Takes a
    /// moment, longer when one does not answer.
    pub async fn introduce(&self, change: &Change) -> Result<(), Error> {
        self.inner.introduce(&change.tables)?;
        let new = change.tables.unresolved();
        if let Err(error) = self.inner.resolve_now(&new, FIRST_RESOLVE).await {
            tracing::error!("{error}");
        }
        Ok(())
    }

    /// Applies what was prepared and introduced. Blocks.
    pub fn apply(&self, change: Change) -> Result<(), Error> {
        let Change { tables, addresses } = change;
        self.announcer
            .change(addresses, || self.inner.apply(tables))
    }

    /// Tells the network of addresses that are new here.
    pub async fn advertise(&self) {
        let told = async { self.announcer.follow(&Requests::open()?).await };
        if let Err(error) = told.await {
            tracing::error!("{error}");
        }
    }

    /// The announced addresses, and where they are. Blocks.
    pub fn announced(&self) -> BTreeMap<IpAddr, Announced> {
        self.announcer.statuses()
    }

    /// The addresses that we put on interfaces, to be noted. Blocks.
    pub fn noted(&self) -> Noted {
        self.announcer.noted()
    }

    /// Says loudly which settings of the host keep the plan from working (law 6).
    pub fn warn_of_settings(&self, plan: &Plan) {
        for Setting { what, mends } in inspect::settings(self.interfaces.names(), plan) {
            tracing::warn!("{what} (`{mends}`)");
        }
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
        words::store(&self.inner.words, id, expected, new)
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

    /// The statistics of all services.
    pub fn statistics(&self) -> Result<Statistics, Error> {
        let table = self.inner.open_map(map::STATS, Map::PerCpuArray)?;
        Ok(Statistics { table })
    }

    /// Established TCP flows that fit.
    pub const fn max_flows(&self) -> u32 {
        self.max_flows
    }

    /// Where the program is attached.
    pub fn interfaces(&self) -> Vec<InterfaceStatus> {
        self.interfaces.statuses()
    }

    /// The id of a service.
    pub fn service_id(&self, service: &str) -> Option<u32> {
        self.inner.service(service)
    }

    /// The task that keeps next hops fresh.
    pub fn resolver(&self) -> Resolver {
        Resolver::new(
            Arc::clone(&self.inner),
            Arc::clone(&self.interfaces),
            Arc::clone(&self.announcer),
        )
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
                    u32::from(backend.service),
                    Colour::from_bit(backend.colour),
                    address_of(backend),
                )
            })
            .collect()
    }
}

/// The statistics of all services.
pub struct Statistics {
    table: PerCpuArray<MapData, ColourStats>,
}

impl Statistics {
    /// Those of both colours of a service, by its id, summed over the CPUs.
    pub fn of(&self, service: u32) -> Result<[ColourStats; 2], Error> {
        let mut sums = [ColourStats::default(); 2];
        for colour in Colour::ALL {
            let index = service * 2 + colour as u32;
            let values = self
                .table
                .get(&index, 0)
                .map_err(|e| Error::bpf("reading STATS", &e))?;
            let sum = &mut sums[colour as usize];
            for cpu in values.iter() {
                sum.forward_packets += cpu.forward_packets;
                sum.forward_bytes += cpu.forward_bytes;
                sum.return_packets += cpu.return_packets;
                sum.return_bytes += cpu.return_bytes;
                sum.new_flows += cpu.new_flows;
                sum.cut_resets += cpu.cut_resets;
                sum.drain_resets += cpu.drain_resets;
            }
        }
        Ok(sums)
    }
}

/// What was removed.
#[derive(Debug)]
pub struct Detached {
    /// Announced addresses.
    pub addresses: Vec<IpAddr>,
    /// Pins.
    pub pins: Vec<PathBuf>,
}

/// Removes everything: announced addresses first, so that nobody comes any more,
/// then links, program, maps, of all layouts.
pub fn detach(bpffs: &Path, noted: &Noted) -> Result<Detached, Error> {
    let lock = lock(bpffs)?;
    let ours = Ours::new(&[], lock.pins().links().iter().chain(noted.values()));
    let addresses = netlink::block_on(|| async {
        addresses::remove_all(&Requests::open()?, &ours, noted).await
    })?;
    let pins = lock.pins().remove()?;
    Ok(Detached { addresses, pins })
}

/// Says that pinned tables are not as large as they were asked to be.
fn keeps_its_size(key: &str, wanted: u32, tables: &str, held: u32) {
    tracing::warn!(
        "gateway.{key} is {wanted}, but the pinned {tables} hold {held}: they keep that size until \
         `bgswitch detach`"
    );
}

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of [`FirstFlow`].
pub fn now_ns() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

fn nanoseconds(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |now| {
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    })
}

fn pinned(pins: &Pins, name: &str) -> Result<MapData, Error> {
    MapData::from_pin(pins.map(name)).map_err(|e| Error::bpf(format!("opening {name}"), &e))
}
