//! The flow tables outside of the packet path: on the host, and the kernel's own,
//! mapped.

use std::{num::NonZeroUsize, os::fd::AsFd, path::Path, ptr::NonNull};

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};
use bg_common::{
    abi::map,
    flow::{Bucket, Flow, FlowKey, FlowTable, Place, TableShape},
};
use bg_ebpf::flows::{BucketCell, Buckets, FlowCell, LineCell, Spot, choose, find, reach_out};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// All three tables, and what makes the packet path's algorithms run over them.
#[derive(Debug)]
pub struct FlowTables {
    shapes: [TableShape; FlowTable::ALL.len()],
    tables: [Memory; FlowTable::ALL.len()],
}

#[derive(Debug)]
enum Memory {
    Owned(Box<[BucketCell]>),
    Mapped {
        start: NonNull<BucketCell>,
        buckets: usize,
    },
}

impl Memory {
    fn owned(buckets: u32) -> Self {
        Self::Owned((0..buckets).map(|_| BucketCell::default()).collect())
    }

    fn map(fd: impl AsFd, buckets: u32) -> Result<Self> {
        let buckets = buckets as usize;
        let length = NonZeroUsize::new(buckets * size_of::<Bucket>()).context("no buckets")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh shared mapping, unmapped only in `drop`.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd, 0) }
            .context("mapping a flow table")?;
        Ok(Self::Mapped {
            start: start.cast(),
            buckets,
        })
    }

    fn buckets(&self) -> &[BucketCell] {
        match self {
            Self::Owned(buckets) => buckets,
            // SAFETY: the mapping made in `map`, which lives as long as `self`;
            // cells allow the kernel's writes.
            Self::Mapped { start, buckets } => unsafe {
                std::slice::from_raw_parts(start.as_ptr(), *buckets)
            },
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Self::Mapped { start, buckets } = *self {
            // SAFETY: the mapping made in `map`; no reference outlives `self`.
            // A failure leaves it to the end of the process.
            let _ = unsafe { munmap(start.cast(), buckets * size_of::<Bucket>()) };
        }
    }
}

impl Buckets for FlowTables {
    fn bucket(&self, table: FlowTable, index: u32) -> Option<&BucketCell> {
        self.tables[table as usize].buckets().get(index as usize)
    }
}

impl FlowTables {
    /// Empty tables on the host, of these shapes.
    pub fn new(shapes: [TableShape; FlowTable::ALL.len()]) -> Self {
        Self {
            shapes,
            tables: shapes.map(|shape| Memory::owned(shape.total())),
        }
    }

    /// The kernel's tables; `open` gives the map of each name.
    pub fn mapped(mut open: impl FnMut(&str) -> Result<MapData>) -> Result<Self> {
        let array: Array<_, TableShape> = Map::Array(open(map::SHAPES)?).try_into()?;
        let mut shapes = [TableShape::default(); FlowTable::ALL.len()];
        for (index, shape) in shapes.iter_mut().enumerate() {
            *shape = array.get(&(index as u32), 0)?;
        }
        let mut table = |table| {
            let data = open(map::of(table))?;
            Memory::map(data.fd(), data.info()?.max_entries())
        };
        Ok(Self {
            shapes,
            tables: [
                table(FlowTable::Established)?,
                table(FlowTable::HalfOpen)?,
                table(FlowTable::Udp)?,
            ],
        })
    }

    /// The tables whose pins are in this directory.
    pub fn pinned(maps: &Path) -> Result<Self> {
        Self::mapped(|name| {
            MapData::from_pin(maps.join(name)).with_context(|| format!("opening {name}"))
        })
    }

    /// Gives a table another shape, and empties it.
    pub fn shape(&mut self, table: FlowTable, shape: TableShape) {
        self.shapes[table as usize] = shape;
        for line in self.lines(table) {
            line.id.set(0);
            line.reach.set(0);
        }
    }

    fn lines(&self, table: FlowTable) -> impl Iterator<Item = &LineCell> {
        let used = self.shapes[table as usize].total() as usize;
        self.tables[table as usize].buckets()[..used]
            .iter()
            .flatten()
    }

    fn place(&self, table: FlowTable, key: &FlowKey) -> Place {
        let shape = self.shapes[table as usize];
        shape.place(key.hash(self.shapes[0].seed))
    }

    fn spot(&self, table: FlowTable, key: &FlowKey) -> Option<&FlowCell> {
        let place = self.place(table, key);
        self.at(table, &place, find(self, table, key, &place))
            .map(|line| &line.flow)
    }

    fn at(&self, table: FlowTable, place: &Place, spot: Spot) -> Option<&LineCell> {
        let bucket = self
            .bucket(table, spot.bucket())
            .filter(|_| spot.is_some())?;
        Some(spot.line(bucket, place.start))
    }

    /// The cell of a flow, over or not.
    pub fn find(&self, table: FlowTable, key: &FlowKey) -> Option<&FlowCell> {
        self.spot(table, key)
    }

    /// A flow, over or not.
    pub fn get(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        self.spot(table, key).map(FlowCell::get)
    }

    /// Remembers a flow as the packet path does at tick `now`; false when there is
    /// no room.
    pub fn remember(&self, table: FlowTable, key: &FlowKey, flow: &FlowCell, now: u32) -> bool {
        let place = self.place(table, key);
        let held = find(self, table, key, &place);
        let spot = if held.is_some() {
            held
        } else {
            choose(self, table, &place, now)
        };
        let (Some(home), Some(line)) =
            (self.bucket(table, place.home), self.at(table, &place, spot))
        else {
            return false;
        };
        reach_out(home, &place, spot);
        line.fill(key, flow);
        true
    }

    /// Remembers a flow as [`FlowTables::remember`] does.
    pub fn insert(&self, table: FlowTable, key: &FlowKey, flow: &Flow, now: u32) -> bool {
        let cell = FlowCell::default();
        cell.set(flow);
        self.remember(table, key, &cell, now)
    }

    /// Every flow of a table, over or not.
    pub fn flows(&self, table: FlowTable) -> impl Iterator<Item = (FlowKey, Flow)> {
        self.lines(table)
            .filter(|line| line.id.get() != 0)
            .map(|line| {
                let [p, q, a, b] = line.id.get().to_ne_bytes();
                let client = [line.client[0].get(), line.client[1].get()];
                let key = FlowKey::new(client, [p, q], u16::from_ne_bytes([a, b]));
                (key, line.flow.get())
            })
    }
}
