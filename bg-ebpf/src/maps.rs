//! The maps: what the daemon and the packet path share, and what is remembered.
//!
//! Their names, types and meaning are [`bg_common::abi::map`]'s.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, bpf_spin_lock},
    btf_maps::{Array, ArrayOfMaps, DevMap, HashMap, LruHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use bg_common::{
    abi::{Clock, MaglevRow, Room, capacity},
    flow::{
        Bucket, FlowTable, MARK_ROW, MARKS as MARK_COUNT, MarkRow, REGIONS as REGION_COUNT,
        TableShape, buckets_for,
    },
    key::{FragmentKeyV4, FragmentKeyV6},
    monitor::{Pressure, RING, Sighting, Watch},
    port::Port,
    reason::REASONS as REASON_COUNT,
    service::{Backend, ColourStats, Fragment, Interface},
    signals::{self, Exchange, Signals},
    snat::{Lease, PORTS as LEASE_COUNT, Source},
};
use bg_ebpf::tables::Scratch;

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const ROOM: Room = Room::LEAST;
const TABLES: usize = FlowTable::ALL.len();

const fn buckets(flows: usize) -> usize {
    buckets_for(flows as u32) as usize
}

/// [`bg_common::abi::global::DRY_RUN`].
#[unsafe(no_mangle)]
static DRY_RUN: Global<u32> = Global::new(0);

/// True in a program that must change nothing.
#[inline(always)]
pub fn is_dry_run() -> bool {
    DRY_RUN.load() != 0
}

/// A region of a flow table, or of the ports: who changes it holds the lock, and counts the change.
#[repr(C)]
pub struct Region {
    pub lock: bpf_spin_lock,
    pub changes: u32,
}

#[btf_map]
pub static WORDS: Array<u64, { ROOM.services as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static FIRST_FLOWS: Array<u64, { ROOM.services as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static POOLS: Array<u64, { ROOM.pools() as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static MAGLEV: Array<MaglevRow, { ROOM.maglev_rows() as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static BACKENDS: Array<Backend, { ROOM.backends() as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static INTERFACES: Array<Interface, { capacity::INTERFACES }> = Array::new();
#[btf_map]
pub static SLOTS: HashMap<Port, u32, { 2 * capacity::INTERFACES }> = HashMap::new();
#[btf_map]
pub static PORTS: DevMap<{ capacity::INTERFACES }> = DevMap::new();

#[btf_map]
pub static FLOWS: Array<Bucket, { buckets(capacity::FLOWS) }, MMAPABLE> = Array::new();
#[btf_map]
pub static HALF_OPEN: Array<Bucket, { buckets(capacity::HALF_OPEN) }, MMAPABLE> = Array::new();
#[btf_map]
pub static UDP: Array<Bucket, { buckets(capacity::UDP) }, MMAPABLE> = Array::new();
#[btf_map]
pub static SHAPES: Array<TableShape, TABLES> = Array::new();
#[btf_map]
pub static MARKS: Array<MarkRow, { TABLES * (MARK_COUNT / MARK_ROW) as usize }, MMAPABLE> =
    Array::new();
#[btf_map]
pub static REGIONS: Array<Region, { (TABLES + 1) * REGION_COUNT as usize }> = Array::new();

#[btf_map]
pub static LEASES: ArrayOfMaps<Array<Lease, { LEASE_COUNT as usize }>, { capacity::BLOCKS }> =
    ArrayOfMaps::new();
/// What the daemon makes blocks of: an inner map must be like the one that the array
/// of maps was made with, to its type information (kernels 5.15 to 6.1 compare that).
#[btf_map]
pub static BLOCK: Array<Lease, { LEASE_COUNT as usize }> = Array::new();
#[btf_map]
pub static SOURCES: Array<Source, { capacity::BLOCKS }, MMAPABLE> = Array::new();

#[btf_map]
pub static FRAGMENTS_V4: LruHashMap<FragmentKeyV4, Fragment, { capacity::FRAGMENTS }> =
    LruHashMap::new();
#[btf_map]
pub static FRAGMENTS_V6: LruHashMap<FragmentKeyV6, Fragment, { capacity::FRAGMENTS }> =
    LruHashMap::new();

#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();
#[btf_map]
pub static REASONS: PerCpuArray<u64, { REASON_COUNT as usize }> = PerCpuArray::new();
#[btf_map]
pub static STATS: PerCpuArray<ColourStats, { ROOM.stats() as usize }> = PerCpuArray::new();
#[btf_map]
pub static PRESSURE: PerCpuArray<Pressure, TABLES> = PerCpuArray::new();

#[btf_map]
pub static CLOCK: Array<Clock, 1> = Array::new();
#[btf_map]
pub static MONITOR: Array<Watch, 1, MMAPABLE> = Array::new();
#[btf_map]
pub static SIGHTINGS: RingBuf<Sighting, RING> = RingBuf::new();
#[btf_map]
pub static LISTENED: Array<u64, { ROOM.services as usize }, MMAPABLE> = Array::new();
#[btf_map]
pub static SIGNALS: PerCpuArray<Signals, { signals::ROWS }> = PerCpuArray::new();
#[btf_map]
pub static EXCHANGES: Array<Exchange, { signals::EXCHANGES }> = Array::new();
#[btf_map]
pub static LOST: PerCpuArray<u64, 1> = PerCpuArray::new();
