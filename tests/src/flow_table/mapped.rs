//! The kernel's flow tables, mapped.

use std::{cell::Cell, num::NonZeroUsize, os::fd::AsFd, path::Path, ptr::NonNull};

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};
use bg_common::{
    abi::map,
    flow::{FlowTable, MARKS, TableShape},
};
use bg_ebpf::flows::BucketCell;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{FlowTables, Memory};

/// A mapping of an array, of cells that allow the kernel's writes.
#[derive(Debug)]
struct Mapped<T> {
    start: NonNull<T>,
    count: usize,
}

impl Memory<BucketCell> for Mapped<BucketCell> {}
impl Memory<Cell<u8>> for Mapped<Cell<u8>> {}

impl<T> Mapped<T> {
    fn new(fd: impl AsFd, count: u32) -> Result<Self> {
        let count = count as usize;
        let length = NonZeroUsize::new(count * size_of::<T>()).context("an empty array")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh shared mapping, unmapped only in `drop`.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd, 0) }
            .context("mapping a flow table")?;
        Ok(Self {
            start: start.cast(),
            count,
        })
    }
}

impl<T> AsRef<[T]> for Mapped<T> {
    fn as_ref(&self) -> &[T] {
        // SAFETY: the mapping made in `new`, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no reference outlives `self`. A failure
        // leaves it to the end of the process.
        let _ = unsafe { munmap(self.start.cast(), self.count * size_of::<T>()) };
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
        let mut table = |table| -> Result<Box<dyn Memory<BucketCell>>> {
            let data = open(map::of(table))?;
            let mapped = Mapped::new(data.fd(), data.info()?.max_entries())?;
            Ok(Box::new(mapped))
        };
        let tables = [
            table(FlowTable::Established)?,
            table(FlowTable::HalfOpen)?,
            table(FlowTable::Udp)?,
        ];
        let marks = Mapped::new(open(map::MARKS)?.fd(), FlowTable::ALL.len() as u32 * MARKS)?;
        Ok(Self {
            shapes,
            tables,
            marks: Box::new(marks),
        })
    }

    /// The tables whose pins are in this directory.
    pub fn pinned(maps: &Path) -> Result<Self> {
        Self::mapped(|name| {
            MapData::from_pin(maps.join(name)).with_context(|| format!("opening {name}"))
        })
    }
}
