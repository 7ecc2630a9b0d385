//! The kernel's flow tables, mapped.

use std::{num::NonZeroUsize, os::fd::AsFd, path::Path, ptr::NonNull};

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};
use bg_common::{
    abi::map,
    flow::{Bucket, FlowTable, TableShape},
};
use bg_ebpf::flows::BucketCell;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{FlowTables, Memory};

/// A mapping of an array of buckets.
#[derive(Debug)]
struct Mapped {
    start: NonNull<BucketCell>,
    buckets: usize,
}

impl Memory for Mapped {}

impl Mapped {
    fn new(fd: impl AsFd, buckets: u32) -> Result<Self> {
        let buckets = buckets as usize;
        let length = NonZeroUsize::new(buckets * size_of::<Bucket>()).context("no buckets")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh shared mapping, unmapped only in `drop`.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd, 0) }
            .context("mapping a flow table")?;
        Ok(Self {
            start: start.cast(),
            buckets,
        })
    }
}

impl AsRef<[BucketCell]> for Mapped {
    fn as_ref(&self) -> &[BucketCell] {
        // SAFETY: the mapping made in `new`, which lives as long as `self`; cells
        // allow the kernel's writes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.buckets) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no reference outlives `self`. A failure
        // leaves it to the end of the process.
        let _ = unsafe { munmap(self.start.cast(), self.buckets * size_of::<Bucket>()) };
    }
}

impl FlowTables {
    /// The kernel's tables; `open` gives the map of each name.
    pub fn mapped(mut open: impl FnMut(&str) -> Result<MapData>) -> Result<Self> {
        let array: Array<_, TableShape> = Map::Array(open(map::SHAPES)?).try_into()?;
        let mut shapes = [TableShape::default(); FlowTable::ALL.len()];
        for (index, shape) in shapes.iter_mut().enumerate() {
            *shape = array.get(&(index as u32), 0)?;
        }
        let mut table = |table| -> Result<Box<dyn Memory>> {
            let data = open(map::of(table))?;
            let mapped = Mapped::new(data.fd(), data.info()?.max_entries())?;
            Ok(Box::new(mapped))
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
}
