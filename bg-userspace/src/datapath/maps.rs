//! The pinned tables, as the daemon reads and writes them.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    EbpfLoader, Pod,
    maps::{Array, ArrayOfMaps, Map, MapData, MapError, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use bg_common::{
    abi::{MAGLEV_ROW, Room, capacity, map},
    flow::{FlowTable, TableShape},
    service::{Backend, Colour, ColourStats, CutoverWord, NextHop},
    snat::{self, Lease, RESERVED, Source},
};

use super::{
    Applied, Error, Inner, batch, directory::Directory, flows::tick, layout::Tables, lines::Lines,
    mmap::Words, naming::InUse, pinned, pins::Pins,
};
use crate::{object::OBJECT, plan::ListenerPlan};

const BACKEND_WORDS: usize = size_of::<Backend>() / 8;
const SOURCE_WORDS: usize = size_of::<Source>() / 8;

/// A block of source ports.
pub type Block = Array<MapData, Lease>;

/// A new block of ports, made as the object describes it: an inner map must be like
/// the one that the array of maps was made with, to its type information.
pub fn block_of(loader: &mut EbpfLoader<'_>) -> Result<Block, Error> {
    let failed = |e: &(dyn std::error::Error + 'static)| Error::bpf("making a block of ports", e);
    let mut ebpf = loader.load(OBJECT).map_err(|e| failed(&e))?;
    let block = ebpf
        .take_map(map::BLOCK)
        .ok_or_else(|| Error::step("the eBPF object", "has no BLOCK"))?;
    Block::try_from(block).map_err(|e| failed(&e))
}

/// 16 bytes as two words.
pub(super) fn halves(bytes: &[u8; 16]) -> [u64; 2] {
    let halves = bytes.as_chunks().0;
    [u64::from_ne_bytes(halves[0]), u64::from_ne_bytes(halves[1])]
}

impl Inner {
    pub(super) fn open(pins: &Pins) -> Result<Self, Error> {
        let words = |name: &str, words: usize| {
            let data = pinned(pins, name)?;
            Words::map(data.fd(), words).map_err(Error::io(format!("mapping {name}")))
        };
        let lines = |table| words(map::of(table), Lines::words(buckets(pins, table)?));
        let room = pins.room().unwrap_or(Room::LEAST);
        let rows = room.maglev_rows() as usize;
        Ok(Self {
            room,
            words: words(map::WORDS, room.services as usize)?,
            first_flows: words(map::FIRST_FLOWS, room.services as usize)?,
            pools: words(map::POOLS, room.pools() as usize)?,
            arena: words(map::MAGLEV, rows * MAGLEV_ROW as usize / 2)?,
            sources: words(map::SOURCES, capacity::BLOCKS * SOURCE_WORDS)?,
            backend_words: words(map::BACKENDS, room.backends() as usize * BACKEND_WORDS)?,
            directory: directory(pins)?,
            lines: Lines::new(
                [
                    lines(FlowTable::Established)?,
                    lines(FlowTable::HalfOpen)?,
                    lines(FlowTable::Udp)?,
                ],
                words(map::MARKS, Lines::MARKS)?,
            ),
            tables: Mutex::default(),
            changing: Arc::default(),
            pins: pins.clone(),
        })
    }

    pub(super) fn applied(&self) -> MutexGuard<'_, Applied> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn service(&self, name: &str) -> Option<u32> {
        self.applied().services.get(name).copied()
    }

    pub(super) fn pinned(&self, name: &str) -> Result<MapData, Error> {
        pinned(&self.pins, name)
    }

    pub(super) fn open_map<T: TryFrom<Map, Error = MapError>>(
        &self,
        name: &str,
        of: impl FnOnce(MapData) -> Map,
    ) -> Result<T, Error> {
        T::try_from(of(self.pinned(name)?)).map_err(|e| Error::bpf(format!("opening {name}"), &e))
    }

    pub(super) fn next_hop(&self, backend: u32) -> NextHop {
        NextHop(self.backend_words.load(backend as usize * BACKEND_WORDS))
    }

    pub(super) fn set_next_hop(&self, backend: u32, hop: NextHop) {
        self.backend_words
            .store(backend as usize * BACKEND_WORDS, hop.0);
    }

    /// The used slots of the backend table.
    pub(super) fn backends(&self) -> BTreeMap<u32, Backend> {
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
                service: u16::from_ne_bytes([last[4], last[5]]),
                block: u16::from_ne_bytes([last[6], last[7]]),
            }
        };
        (0..self.room.backends())
            .map(|id| (id, slot(id as usize)))
            .filter(|(_, b)| b.family != 0)
            .collect()
    }

    pub(super) fn set_backend(&self, id: u32, backend: &Backend) {
        let at = id as usize * BACKEND_WORDS;
        let [low, high] = halves(&backend.address);
        self.backend_words.store(at, backend.next_hop);
        self.backend_words.store(at + 1, low);
        self.backend_words.store(at + 2, high);
        self.describe_backend(id, backend);
    }

    /// Writes all of a backend but its next hop and its address, in one store.
    pub(super) fn describe_backend(&self, id: u32, backend: &Backend) {
        let ([p, q], [a, b]) = (backend.port, backend.service.to_ne_bytes());
        let [c, d] = backend.block.to_ne_bytes();
        self.backend_words.store(
            id as usize * BACKEND_WORDS + 3,
            u64::from_ne_bytes([p, q, backend.family, backend.colour, a, b, c, d]),
        );
    }

    /// The gateway's address towards the backends of a block, 16 bytes wide; all zero
    /// while it is not known.
    pub(super) fn source(&self, block: u16) -> [u8; 16] {
        let at = usize::from(block) * SOURCE_WORDS;
        let mut address = [0; 16];
        for (part, word) in address.chunks_exact_mut(8).zip(at..) {
            part.copy_from_slice(&self.sources.load(word).to_ne_bytes());
        }
        address
    }

    /// Sets that address: the half that tells IPv4 addresses apart first.
    pub(super) fn set_source(&self, block: u16, address: &[u8; 16]) {
        let at = usize::from(block) * SOURCE_WORDS;
        for (word, half) in (at..).zip(halves(address)) {
            self.sources.store(word, half);
        }
    }

    /// Makes those of the wanted blocks of ports that the kernel does not have, whatever
    /// backends say. The ports of listeners are never lent: the gateway's own address
    /// may be one of theirs.
    pub(super) fn missing_blocks<'a>(
        &self,
        wanted: BTreeSet<u16>,
        listeners: impl Iterator<Item = &'a ListenerPlan>,
    ) -> Result<BTreeMap<u16, Block>, Error> {
        let leases: ArrayOfMaps<_, Block> = self.open_map(map::LEASES, Map::ArrayOfMaps)?;
        let mut missing = wanted;
        missing.retain(|id| leases.get(&u32::from(*id), 0).is_err());
        let reserved: BTreeSet<u32> = listeners
            .filter_map(|listener| snat::index(listener.address.port()))
            .collect();
        let blocks = missing
            .into_iter()
            .map(|id| Ok((id, self.new_block(&reserved)?)));
        blocks.collect()
    }

    /// A new block, all of its ports free but the reserved ones.
    fn new_block(&self, reserved: &BTreeSet<u32>) -> Result<Block, Error> {
        let mut block = block_of(&mut self.pins.loader())?;
        for index in reserved {
            let lease = Lease {
                table: RESERVED,
                ..Lease::default()
            };
            block
                .set(*index, lease, 0)
                .map_err(|e| Error::bpf("reserving the ports of listeners", &e))?;
        }
        Ok(block)
    }

    /// Sets blocks of ports, towards whom nothing is known yet.
    pub(super) fn set_blocks(&self, blocks: &BTreeMap<u16, Block>) -> Result<(), Error> {
        let mut leases: ArrayOfMaps<_, Block> = self.open_map(map::LEASES, Map::ArrayOfMaps)?;
        for (id, block) in blocks {
            self.set_source(*id, &[0; 16]);
            leases
                .set(u32::from(*id), block, 0)
                .map_err(|e| Error::bpf("setting a block of ports in LEASES", &e))?;
        }
        Ok(())
    }

    /// Gives the memory of blocks back that no backend has any more.
    pub(super) fn free_blocks(&self, blocks: BTreeSet<u16>) -> Result<(), Error> {
        let leases = self.pinned(map::LEASES)?;
        for block in blocks {
            self.set_source(block, &[0; 16]);
            batch::remove_map(leases.fd(), u32::from(block))
                .map_err(Error::io("freeing a block of ports in LEASES"))?;
        }
        Ok(())
    }

    /// What the kernel holds.
    pub(super) fn held(&self) -> Tables {
        let endpoints = self.directory.read();
        let services = endpoints
            .listeners
            .values()
            .map(|listener| listener.service);
        Tables {
            words: services
                .map(|id| (id, CutoverWord(self.words.load(id as usize))))
                .collect(),
            backends: self.backends(),
            endpoints,
        }
    }

    /// What flows of any table hold on to: those that are over no packet finds.
    pub(super) fn in_use(&self) -> InUse {
        let mut in_use = InUse::default();
        let now = tick();
        for table in FlowTable::ALL {
            self.lines.each(table, |key, flow| {
                if !flow.is_over(table, now) {
                    in_use.listeners.insert(key.listener());
                    in_use.services.insert(u32::from(flow.service));
                }
            });
        }
        in_use
    }

    /// Gives the flow tables their shapes, where they have none yet.
    pub(super) fn shape_tables(&self) -> Result<(), Error> {
        let mut shapes: Array<_, TableShape> = self.open_map(map::SHAPES, Map::Array)?;
        let failed = |e: MapError| Error::bpf("shaping the flow tables", &e);
        // Keyed anew by the operating system's randomness for every process.
        let seed = RandomState::new().hash_one(std::process::id());
        for table in FlowTable::ALL {
            let index = table as u32;
            if shapes.get(&index, 0).map_err(failed)?.regions == 0 {
                let shape = TableShape::new(seed, buckets(&self.pins, table)?);
                shapes.set(index, shape, 0).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Clears the counters of services that are new under their ids.
    pub(super) fn clear_stats<'a>(
        &self,
        services: impl Iterator<Item = &'a u32>,
    ) -> Result<(), Error> {
        let mut stats: PerCpuArray<_, ColourStats> = self.open_map(map::STATS, Map::PerCpuArray)?;
        for service in services {
            clear(&mut stats, map::STATS, *service, ColourStats::default())?;
        }
        Ok(())
    }
}

/// Clears both colours' counts of the pair with this number, on every CPU.
pub(super) fn clear<T: Pod>(
    counts: &mut PerCpuArray<MapData, T>,
    name: &str,
    pair: u32,
    zero: T,
) -> Result<(), Error> {
    let what = format!("clearing {name}");
    let cpus = nr_cpus().map_err(|(what, error)| Error::step(what, error))?;
    for colour in Colour::ALL {
        let zeros = PerCpuValues::try_from(vec![zero; cpus]).map_err(Error::io(what.clone()))?;
        counts
            .set(pair * 2 + colour as u32, zeros, 0)
            .map_err(|e| Error::bpf(&what, &e))?;
    }
    Ok(())
}

fn directory(pins: &Pins) -> Result<Directory, Error> {
    let [word, pilots, lines] = Directory::MAPS.map(|name| pinned(pins, name));
    Directory::map([word?, pilots?, lines?]).map_err(Error::io("mapping the directory"))
}

/// Buckets of a pinned flow table.
fn buckets(pins: &Pins, table: FlowTable) -> Result<u32, Error> {
    let name = map::of(table);
    let info = pinned(pins, name)?
        .info()
        .map_err(|e| Error::bpf(format!("reading {name}"), &e))?;
    Ok(info.max_entries())
}
