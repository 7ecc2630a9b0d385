//! The packet path in the kernel, fed by test runs (`BPF_PROG_TEST_RUN`).

mod together;

use std::{
    collections::{HashMap as Map, hash_map::Entry},
    fs::{self, File},
    hash::Hash,
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, ArrayOfMaps, DevMap, HashMap, MapData, PerCpuArray},
    programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp},
};
use bg_common::{
    abi::{MaglevRow, TICK_SHIFT, map},
    flow::{FlowTable, TableShape, buckets_for},
    monitor::LISTENS,
    reason::Reason,
    snat::{Lease, Source, index},
};
use bg_ebpf::packet::ETHERNET;
use bg_userspace::datapath::{Built, Directory, Features, Loaded, block_of};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use crate::{
    cases::{self, Case},
    flow_table::FlowTables,
    world::{self, BACKENDS, CLIENTS, Flows, Fragments, World, key, xdp_action},
};

/// Bytes of memory that the kernel accounts a map.
pub fn memory_of(map: &MapData) -> Result<u64> {
    let fd = map.fd().as_fd().as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:"));
    let bytes = bytes.context("the kernel tells no map's memory")?;
    Ok(bytes.trim().parse()?)
}

/// Runs `work` on a thread of its own in a new network namespace, which is gone
/// when it returns.
///
/// # Panics
/// When `work` does.
pub fn in_new_namespace<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace (needs root)");
                work()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `work` on a thread of its own in the namespace of `file`.
///
/// # Panics
/// When `work` does.
pub fn in_namespace<R: Send>(file: &File, work: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .expect("entering a network namespace");
                work()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Keeps the calling thread on a CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("choosing a CPU")
}

/// The loaded program and its maps, none of it pinned or attached.
pub struct Kernel {
    loaded: Loaded,
    tables: FlowTables,
    directory: Directory,
    blocks: Map<u32, Array<MapData, Lease>>,
    /// Indices of the ports that the world has leases of.
    set: Vec<u32>,
    /// Interface indices of the two test devices.
    pub ifindexes: [u32; 2],
    /// A test run can say where the frame came in (kernel 5.14). Where it cannot, it
    /// is always the loopback device.
    says_ingress: bool,
}

/// What the program takes.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Instructions that the verifier has followed (kernel 5.16 tells).
    pub verified: Option<u32>,
    /// Bytes of the translated program, with all of its functions.
    pub translated: u32,
}

/// Index of the loopback device, in every network namespace.
const LOOPBACK: u32 = 1;

/// Layout of the kernel's `struct xdp_md`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Context {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

impl Context {
    /// A frame of `length` bytes that came in by `ingress`.
    pub(crate) fn new(length: usize, ingress: u32) -> Self {
        Self {
            data_end: length as u32,
            ingress_ifindex: ingress,
            ..Self::default()
        }
    }

    pub(crate) const fn bytes(&self) -> &[u8] {
        // SAFETY: Context is repr(C) of u32 fields only, so all its bytes are
        // initialised, and the slice borrows `self`.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

impl Kernel {
    /// Loads the object as the daemon does, in the present network namespace, and
    /// makes two devices for it.
    pub fn load() -> Result<Self> {
        Self::load_for(Features::probe()?)
    }

    /// Loads the object as for a kernel that has these features and no others.
    pub fn load_for(features: Features) -> Result<Self> {
        Self::load_as(features, 1000)
    }

    /// Loads the object as the daemon does, with room for so many established flows.
    pub fn load_sized(flows: u32) -> Result<Self> {
        Self::load_as(Features::probe()?, flows)
    }

    fn load_as(features: Features, flows: u32) -> Result<Self> {
        ip(&["link", "add", "bg0", "type", "veth", "peer", "name", "bg1"])?;
        ip(&["link", "set", "bg0", "up"])?;
        ip(&["link", "set", "bg1", "up"])?;
        let ifindexes = ["bg0", "bg1"].map(|name| nix::net::if_::if_nametoindex(name).unwrap_or(0));
        ensure!(!ifindexes.contains(&0), "the test devices did not appear");
        let mut loader = EbpfLoader::new();
        loader.map_max_entries(map::FLOWS, buckets_for(flows));
        let loaded = features.load(&mut loader)?;
        let array = |name: &str| -> Result<MapData> {
            let map = loaded
                .ebpf
                .map(name)
                .with_context(|| format!("no map {name}"))?;
            let aya::maps::Map::Array(data) = map else {
                bail!("{name} is no array");
            };
            let fd = data.fd().as_fd().try_clone_to_owned()?;
            Ok(MapData::from_fd(fd)?)
        };
        let tables = FlowTables::mapped(array)?;
        let [word, pilots, lines] = Directory::MAPS.map(array);
        let directory = Directory::map([word?, pilots?, lines?])?;
        let mut kernel = Self {
            loaded,
            tables,
            directory,
            blocks: Map::new(),
            set: Vec::new(),
            ifindexes,
            says_ingress: true,
        };
        let nothing = [0; ETHERNET];
        kernel.says_ingress = kernel.run(&nothing, LOOPBACK).is_ok();
        Ok(kernel)
    }

    /// What the program takes.
    pub fn cost(&mut self) -> Result<Cost> {
        let info = self.loaded.program()?.info()?;
        Ok(Cost {
            verified: info.verified_instruction_count(),
            translated: info.size_translated().context("no size of the program")?,
        })
    }

    /// Bytes of memory that the kernel has given the table of established flows.
    pub fn memory_of_flows(&self) -> Result<u64> {
        let name = map::of(FlowTable::Established);
        let map = self.loaded.ebpf.map(name);
        let aya::maps::Map::Array(data) = map.with_context(|| format!("no map {name}"))? else {
            bail!("{name} is no array");
        };
        memory_of(data)
    }

    /// Interface indices for a world in which frames come in by slot `ingress`.
    pub fn ifindexes_of(&self, ingress: u32) -> [u32; 2] {
        let mut ifindexes = self.ifindexes;
        if !self.says_ingress {
            ifindexes[ingress as usize] = LOOPBACK;
        }
        ifindexes
    }

    /// Makes the maps say what the world says.
    pub fn set(&mut self, world: &World) -> Result<()> {
        self.set_leases(world)?;
        self.listen()?;
        let ebpf = &mut self.loaded.ebpf;
        map_of::<Array<_, u64>>(ebpf, map::WORDS)?.set(0, world.word.0, 0)?;
        map_of::<Array<_, u64>>(ebpf, map::FIRST_FLOWS)?.set(0, 0, 0)?;
        let mut pools: Array<_, u64> = map_of(ebpf, map::POOLS)?;
        for (index, pool) in world.pools.iter().enumerate() {
            pools.set(index as u32, pool.0, 0)?;
        }
        let row: MaglevRow = std::array::from_fn(|slot| slot as u32);
        map_of::<Array<_, MaglevRow>>(ebpf, map::MAGLEV)?.set(0, row, 0)?;
        let mut backends: Array<_, bg_common::service::Backend> = map_of(ebpf, map::BACKENDS)?;
        for (id, backend) in world.backends.iter().enumerate() {
            backends.set(id as u32, *backend, 0)?;
        }
        let mut ports: DevMap<_> = map_of(ebpf, map::PORTS)?;
        for (slot, interface) in world.interfaces.iter().enumerate() {
            ports.set(slot as u32, interface.ifindex, None, 0)?;
        }
        let mut interfaces: Array<_, bg_common::service::Interface> =
            map_of(ebpf, map::INTERFACES)?;
        for (slot, interface) in world.interfaces.iter().enumerate() {
            interfaces.set(slot as u32, *interface, 0)?;
        }
        let slots = world
            .interfaces
            .iter()
            .enumerate()
            .map(|(slot, i)| (i.port(), slot as u32))
            .collect();
        fill(ebpf, map::SLOTS, &slots)?;
        let built = Built::of(&world.entries()).context("no directory")?;
        self.directory.write(&built);
        fill(ebpf, map::FRAGMENTS_V4, &world.fragments_v4)?;
        fill(ebpf, map::FRAGMENTS_V6, &world.fragments_v6)?;
        let mut shapes: Array<_, TableShape> = map_of(ebpf, map::SHAPES)?;
        for (table, shape) in FlowTable::ALL.into_iter().zip(world.shapes()) {
            shapes.set(table as u32, shape, 0)?;
            self.tables.shape(table, shape);
        }
        world.fill(&self.tables);
        Ok(())
    }

    /// Listens to the world's servers: the twin does not, and no packet's way may differ.
    fn listen(&mut self) -> Result<()> {
        let ebpf = &mut self.loaded.ebpf;
        map_of::<Array<_, u64>>(ebpf, map::LISTENED)?.set(0, 1, 0)?;
        let mut monitor: Array<_, [u64; 2]> = map_of(ebpf, map::MONITOR)?;
        Ok(monitor.set(0, [LISTENS, 0], 0)?)
    }

    fn set_leases(&mut self, world: &World) -> Result<()> {
        let mut sources: Array<_, Source> = map_of(&mut self.loaded.ebpf, map::SOURCES)?;
        for (block, source) in (0..).zip(&world.sources) {
            sources.set(block, source, 0)?;
        }
        let mut outer: ArrayOfMaps<_, Array<MapData, Lease>> =
            map_of(&mut self.loaded.ebpf, map::LEASES)?;
        for block in 0..world.sources.len() as u32 {
            if let Entry::Vacant(vacant) = self.blocks.entry(block) {
                let mut loader = EbpfLoader::new();
                loader.map_max_entries(map::FLOWS, 1);
                let inner = block_of(&mut loader)?;
                outer.set(block, &inner, 0)?;
                vacant.insert(inner);
            }
        }
        // What the run before has lent.
        let lent: Vec<u32> = self
            .flows()
            .values()
            .filter_map(|flow| index(flow.via))
            .collect();
        let used: Vec<u32> = self.set.drain(..).chain(lent).collect();
        for (number, block) in &mut self.blocks {
            for index in used.iter().copied() {
                block.set(index, Lease::default(), 0)?;
            }
            for ((of, index), lease) in &world.leases {
                if of == number {
                    block.set(*index, lease, 0)?;
                }
            }
        }
        self.set = world.leases.keys().map(|(_, index)| *index).collect();
        Ok(())
    }

    /// The lease of a port, as the map has it.
    pub fn lease(&self, block: u32, index: u32) -> Result<Lease> {
        let block = self.blocks.get(&block).context("no such block of ports")?;
        Ok(block.get(&index, 0)?)
    }

    /// Runs one frame through the program: XDP's return value, the reason that
    /// was counted, and the frame afterwards.
    pub fn run(&mut self, frame: &[u8], ingress: u32) -> Result<(u32, Reason, Vec<u8>)> {
        self.run_split(frame, frame.len(), ingress)
    }

    /// The same, with no more than `first` bytes in the frame's first buffer. Only
    /// kernel 6.18 and later can do with fewer than one page holds.
    pub fn run_split(
        &mut self,
        frame: &[u8],
        first: usize,
        ingress: u32,
    ) -> Result<(u32, Reason, Vec<u8>)> {
        let before = self.reasons()?;
        ensure!(
            self.says_ingress || ingress == LOOPBACK,
            "this kernel's test runs come in by the loopback device alone"
        );
        let context = self.says_ingress.then(|| Context::new(first, ingress));
        let (returned, out) = once(self.loaded.program()?, frame, context)?;
        let counted: Vec<Reason> = Reason::ALL
            .iter()
            .zip(self.reasons()?.iter().zip(&before))
            .flat_map(|(reason, (after, before))| vec![*reason; (after - before) as usize])
            .collect();
        let [reason] = counted[..] else {
            bail!("one packet must count one reason (law 6), it counted {counted:?}");
        };
        Ok((returned, reason, out))
    }

    /// The flows, as the maps have them.
    pub fn flows(&self) -> Flows {
        world::flows(&self.tables)
    }

    /// What became of first fragments over IPv4, as the map has it.
    pub fn fragments_v4(&mut self) -> Result<Fragments<[u8; 4]>> {
        entries(&mut self.loaded.ebpf, map::FRAGMENTS_V4)
    }

    /// What became of first fragments over IPv6, as the map has it.
    pub fn fragments_v6(&mut self) -> Result<Fragments<[u8; 16]>> {
        entries(&mut self.loaded.ebpf, map::FRAGMENTS_V6)
    }

    fn reasons(&mut self) -> Result<Vec<u64>> {
        let counters: PerCpuArray<_, u64> = map_of(&mut self.loaded.ebpf, map::REASONS)?;
        Reason::ALL
            .iter()
            .map(|reason| Ok(counters.get(&(*reason as u32), 0)?.iter().sum()))
            .collect()
    }
}

/// What XDP returned for a frame, and the frame afterwards.
pub type Ran = (u32, Vec<u8>);

/// Runs one frame through a program.
fn once(program: &Xdp, frame: &[u8], context: Option<Context>) -> Result<Ran> {
    let mut out = vec![0; frame.len() + 256];
    let result = program.test_run(TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out),
        ctx_in: context.as_ref().map(Context::bytes),
        ctx_out: None,
        repeat: 1,
        attrs: TestRunAttrs::new(),
    })?;
    out.truncate(result.data_size_out as usize);
    Ok((result.return_value, out))
}

impl Case {
    /// Runs it in the kernel; an error says what is not as it should be.
    pub fn check_in(&self, kernel: &mut Kernel) -> Result<()> {
        kernel.set(&self.world)?;
        let ingress = self.world.interfaces[self.world.ingress as usize].ifindex;
        let (returned, reason, out) = kernel.run(&self.frame, ingress)?;
        let wanted = (xdp_action(self.action), self.reason);
        ensure!(
            (returned, reason) == wanted,
            "{}: verdict {returned} {reason:?}, expected {wanted:?}",
            self.name
        );
        self.check_out(&out)?;
        self.check_flow(&kernel.flows())
    }

    /// Holds the frame that left against the one that should.
    pub fn check_out(&self, out: &[u8]) -> Result<()> {
        ensure!(
            out == self.out,
            "{}: {out:x?} leaves, expected {:x?}",
            self.name,
            self.out
        );
        Ok(())
    }

    /// Holds the flow afterwards against what must be true of it.
    pub fn check_flow(&self, flows: &Flows) -> Result<()> {
        let Some(check) = &self.flow else {
            return Ok(());
        };
        let flow = flows.get(&(check.table, key(check.client, check.listener)));
        match (flow, check.holds) {
            (None, None) => Ok(()),
            (Some(flow), Some(holds)) if holds(flow) => Ok(()),
            (found, _) => bail!("{}: in {:?} there is {found:?}", self.name, check.table),
        }
    }
}

/// Holds the whole case table against a loaded program: how many cases hold, and
/// what is wrong with the others. The cases are made anew after `fresh` of them.
pub fn hold_cases(kernel: &mut Kernel, fresh: usize) -> (usize, Vec<String>) {
    let (mut held, mut wrong) = (0, Vec::new());
    for ingress in [CLIENTS, BACKENDS] {
        let mut done = 0;
        loop {
            let mut cases = cases::all(kernel.ifindexes_of(ingress), tick());
            cases.retain(|case| case.world.ingress == ingress);
            let Some(next) = cases.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            for case in next.iter().take(fresh) {
                match case.check_in(kernel) {
                    Ok(()) => held += 1,
                    Err(error) => wrong.push(format!("{error:#}")),
                }
                done += 1;
            }
        }
    }
    (held, wrong)
}

/// Bytes that make a frame lie in several buffers.
const MORE: usize = 8000;

/// Holds the program against the packet path on the host, with every frame of the
/// case table made too long for one buffer: by what lies behind the packet, or by
/// the packet itself. How often each reason was given, and what is wrong.
pub fn hold_large(kernel: &mut Kernel) -> Result<(Map<Reason, usize>, Vec<String>)> {
    let (mut reasons, mut wrong) = (Map::new(), Vec::new());
    for case in cases::all(kernel.ifindexes, tick()) {
        let behind = [case.frame.clone(), vec![0; MORE]].concat();
        for (mtu, frame) in [
            (9216, lengthened(&behind)),
            (1500, lengthened(&behind)),
            (1500, behind),
        ] {
            let mut host = case.world.clone();
            for interface in &mut host.interfaces {
                interface.mtu = mtu;
            }
            host.tick = tick();
            kernel.set(&host)?;
            let ingress = host.interfaces[host.ingress as usize].ifindex;
            let (returned, reason, out) = kernel.run(&frame, ingress)?;
            let (verdict, host_out) = host.run(&frame);
            let wanted = (world::xdp_action(verdict.action), verdict.reason);
            if (returned, reason) != wanted || out != host_out {
                wrong.push(format!(
                    "{}, MTU {mtu}: {returned} {reason:?}, {} bytes; on the host {wanted:?}, {} bytes",
                    case.name,
                    out.len(),
                    host_out.len()
                ));
            }
            *reasons.entry(reason).or_default() += 1;
        }
    }
    Ok((reasons, wrong))
}

/// The frame with an IP packet that is [`MORE`] bytes longer, where it is one.
/// Checksums stay what they were: nobody on the way looks at them.
fn lengthened(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let at = match frame[12..14] {
        [8, 0] => 16,
        [0x86, 0xdd] => 18,
        _ => return frame,
    };
    if let Some(length) = frame.get_mut(at..at + 2) {
        let longer = u16::from_be_bytes([length[0], length[1]]).saturating_add(MORE as u16);
        length.copy_from_slice(&longer.to_be_bytes());
    }
    frame
}

/// The kernel's coarse clock, in ticks.
pub fn tick() -> u32 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("the coarse clock");
    ((now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64) >> TICK_SHIFT) as u32
}

fn fill<K: Pod + Eq + Hash, V: Pod>(
    ebpf: &mut Ebpf,
    name: &str,
    entries: &Map<K, V>,
) -> Result<()> {
    let mut table: HashMap<_, K, V> = map_of(ebpf, name)?;
    let old: Vec<K> = table.keys().collect::<Result<_, _>>()?;
    for key in old {
        table.remove(&key)?;
    }
    for (key, value) in entries {
        table.insert(key, value, 0)?;
    }
    Ok(())
}

fn entries<K: Pod + Eq + Hash, V: Pod>(ebpf: &mut Ebpf, name: &str) -> Result<Map<K, V>> {
    let table: HashMap<_, K, V> = map_of(ebpf, name)?;
    Ok(table.iter().collect::<Result<_, _>>()?)
}

fn map_of<'a, M>(ebpf: &'a mut Ebpf, name: &str) -> Result<M>
where
    M: TryFrom<&'a mut aya::maps::Map, Error = aya::maps::MapError>,
    M: 'a,
{
    let map = ebpf
        .map_mut(name)
        .with_context(|| format!("no map {name}"))?;
    M::try_from(map).with_context(|| format!("map {name}"))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip")
        .args(arguments)
        .status()
        .context("running ip")?;
    ensure!(status.success(), "ip {} failed", arguments.join(" "));
    Ok(())
}
