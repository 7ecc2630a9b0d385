//! The flow tables outside of the packet path: on the host, and the kernel's own,
//! mapped.

#[cfg(feature = "lab")]
mod mapped;

use std::{cell::Cell, fmt};

use bg_common::flow::{Flow, FlowKey, FlowTable, MARKS, Place, TableShape};
use bg_ebpf::flows::{BucketCell, Buckets, FlowCell, LineCell, Spot, choose, find, reach_out};

/// All three tables, and what makes the packet path's algorithms run over them.
#[derive(Debug)]
pub struct FlowTables {
    shapes: [TableShape; FlowTable::ALL.len()],
    tables: [Box<dyn Memory<BucketCell>>; FlowTable::ALL.len()],
    marks: Box<dyn Memory<Cell<u8>>>,
}

/// The buckets of one table, or the marks of all: the host's own, or the kernel's.
trait Memory<T>: AsRef<[T]> + fmt::Debug {}

impl<T: fmt::Debug> Memory<T> for Box<[T]> {}

impl Buckets for FlowTables {
    fn bucket(&self, table: FlowTable, index: u32) -> Option<&BucketCell> {
        self.buckets(table).get(index as usize)
    }
}

impl FlowTables {
    /// Empty tables on the host, of these shapes.
    pub fn new(shapes: [TableShape; FlowTable::ALL.len()]) -> Self {
        let buckets = |shape: TableShape| -> Box<dyn Memory<BucketCell>> {
            let empty = (0..shape.total()).map(|_| BucketCell::default());
            Box::new(empty.collect::<Box<[_]>>())
        };
        let marks = vec![Cell::new(0); FlowTable::ALL.len() * MARKS as usize];
        Self {
            shapes,
            tables: shapes.map(buckets),
            marks: Box::new(marks.into_boxed_slice()),
        }
    }

    fn buckets(&self, table: FlowTable) -> &[BucketCell] {
        (*self.tables[table as usize]).as_ref()
    }

    /// Gives a table another shape, and empties it.
    pub fn shape(&mut self, table: FlowTable, shape: TableShape) {
        self.shapes[table as usize] = shape;
        self.empty(table);
    }

    /// Forgets every flow of a table. The packet path must not be at work on it.
    pub fn empty(&self, table: FlowTable) {
        for line in self.lines(table) {
            line.id.set(0);
            line.reach.set(0);
        }
    }

    fn lines(&self, table: FlowTable) -> impl Iterator<Item = &LineCell> {
        let used = self.shapes[table as usize].total() as usize;
        self.buckets(table)[..used].iter().flatten()
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
        let mark = self.shapes[table as usize].mark(table, spot.bucket());
        (*self.marks).as_ref()[mark as usize].set(1);
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
