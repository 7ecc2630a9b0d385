//! The lines of the flow tables, read in place.

use std::{
    ops::Range,
    sync::atomic::{Ordering, fence},
};

use bg_common::flow::{Flow, FlowKey, FlowTable, LINES, Line, MARKS, TableShape};

use super::mmap::Words;

/// Words of a line.
const WORDS: usize = size_of::<Line>() / 8;
/// The word that holds a line's id and reach.
const ID: usize = 2;

/// The flow tables, mapped into this process. What packets write meanwhile is
/// seen as it is.
#[derive(Debug)]
pub struct Lines {
    tables: [Words; FlowTable::ALL.len()],
    marks: Words,
}

/// A flow that is over for the packet path may be found there for some ticks more: as
/// long as the clocks differ, and much longer.
const MARGIN: u32 = 16;

impl Lines {
    /// The tables, mapped each, in the order of [`FlowTable::ALL`]; and the marks of all.
    pub const fn new(tables: [Words; FlowTable::ALL.len()], marks: Words) -> Self {
        Self { tables, marks }
    }

    /// Words of all marks.
    pub const MARKS: usize = FlowTable::ALL.len() * MARKS as usize / 8;

    /// Words of a table of so many buckets.
    pub const fn words(buckets: u32) -> usize {
        buckets as usize * LINES * WORDS
    }

    /// Calls `visit` for every line of a table that holds a flow, over or not.
    pub fn each(&self, table: FlowTable, mut visit: impl FnMut(&FlowKey, &Flow)) {
        let words = &self.tables[table as usize];
        each_in(words, 0..words.len(), &mut visit);
    }

    /// The same for the flows that are there at tick `now`, passing over most of what
    /// has none: a flow that was remembered in this very moment may be missed.
    pub fn each_there(&self, table: FlowTable, now: u32, mut visit: impl FnMut(&FlowKey, &Flow)) {
        let words = &self.tables[table as usize];
        let buckets = words.len() / (LINES * WORDS);
        let marked = (LINES * WORDS) << TableShape::new(0, buckets as u32).mark_shift;
        let marks = words.len().div_ceil(marked);
        let first = table as usize * MARKS as usize;
        let over = |flow: &Flow| flow.is_over(table, now.wrapping_sub(MARGIN));
        for mark in (first..first + marks).step_by(8) {
            let eight = self.marks.load(mark / 8).to_ne_bytes();
            for (byte, _) in eight.iter().enumerate().filter(|(_, mark)| **mark != 0) {
                let start = (mark - first + byte) * marked;
                let range = start..(start + marked).min(words.len());
                if !has_one_there(words, range.clone(), over, &mut visit) {
                    self.take_back(mark + byte, || {
                        has_one_there(words, range, over, &mut |_, _| {})
                    });
                }
            }
        }
    }

    /// Takes a mark back, unless something `is_there` after that.
    fn take_back(&self, mark: usize, is_there: impl FnOnce() -> bool) {
        let mut bytes = [0; 8];
        bytes[mark % 8] = u8::MAX;
        let bits = u64::from_ne_bytes(bytes);
        let word = self.marks.at(mark / 8);
        // Packets may set its neighbours meanwhile; and what is read next is read after.
        word.fetch_and(!bits, Ordering::SeqCst);
        if is_there() {
            word.fetch_or(bits, Ordering::SeqCst);
        }
    }
}

/// Calls `visit` for every line between these words that holds a flow, over or not.
fn each_in(words: &Words, range: Range<usize>, visit: &mut impl FnMut(&FlowKey, &Flow)) {
    for at in range.step_by(WORDS) {
        if let Some((key, flow)) = read(words, at) {
            visit(&key, &flow);
        }
    }
}

/// The same; true if one of the flows is not `over`.
fn has_one_there(
    words: &Words,
    range: Range<usize>,
    over: impl Fn(&Flow) -> bool,
    visit: &mut impl FnMut(&FlowKey, &Flow),
) -> bool {
    let mut is_there = false;
    each_in(words, range, &mut |key, flow| {
        is_there |= !over(flow);
        visit(key, flow);
    });
    is_there
}

/// The line at word `at`, unless it is free or changes hands at this moment.
fn read(words: &Words, at: usize) -> Option<(FlowKey, Flow)> {
    let id = words.load(at + ID);
    let [a, b, c, d, ..] = id.to_ne_bytes();
    if [a, b, c, d] == [0; 4] {
        return None;
    }
    let word = |n: usize| words.at(at + n).load(Ordering::Relaxed);
    let halves = |n: usize| {
        let [a, b, c, d, e, f, g, h] = word(n).to_ne_bytes();
        (
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
        )
    };
    let client = [word(0), word(1)];
    let client_hop = word(3);
    let ((backend, seen), (client_next, backend_next)) = (halves(4), halves(6));
    let [p, q, r, s, t, u, v, w] = word(5).to_ne_bytes();
    let proof = u32::from_ne_bytes([p, q, r, s]);
    let (service, via) = (u16::from_ne_bytes([t, u]), u16::from_ne_bytes([v, w]));
    let [g, h, r, s, colour_spread, from_client, from_backend, zero] = word(7).to_ne_bytes();
    fence(Ordering::Acquire);
    if words.load(at + ID) as u32 != id as u32 {
        return None;
    }
    let [port @ .., listener_a, listener_b] = [a, b, c, d];
    let key = FlowKey::new(client, port, u16::from_ne_bytes([listener_a, listener_b]));
    let flow = Flow {
        client_hop,
        backend,
        seen,
        proof,
        service,
        via,
        client_next,
        backend_next,
        generation: u16::from_ne_bytes([g, h]),
        routed: u16::from_ne_bytes([r, s]),
        colour_spread,
        from_client,
        from_backend,
        zero,
    };
    Some((key, flow))
}

#[cfg(test)]
mod tests {
    use bg_common::flow::ESTABLISHED_IDLE;
    use nix::{
        sys::memfd::{MFdFlags, memfd_create},
        unistd::ftruncate,
    };

    use super::*;

    const BUCKETS: u32 = 64;
    const NOW: u32 = 3 * ESTABLISHED_IDLE;

    fn memory(words: usize) -> Words {
        let file = memfd_create(c"lines", MFdFlags::empty()).unwrap();
        ftruncate(&file, words as i64 * 8).unwrap();
        Words::map(&file, words).unwrap()
    }

    fn lines() -> Lines {
        let table = || memory(Lines::words(BUCKETS));
        Lines::new([table(), table(), table()], memory(Lines::MARKS))
    }

    /// Writes a flow of this client into the first line of a bucket, and marks it.
    fn put(lines: &Lines, bucket: usize, client: u64, seen: u32) {
        let table = &lines.tables[FlowTable::Established as usize];
        let at = bucket * LINES * WORDS;
        table.store(at + 1, client);
        table.store(at + 4, u64::from(seen) << 32);
        table.store(at + ID, 7);
        let word = lines.marks.at(bucket / 8);
        word.fetch_or(1 << (bucket % 8 * 8), Ordering::SeqCst);
    }

    fn clients(lines: &Lines) -> Vec<u64> {
        let mut clients = Vec::new();
        lines.each_there(FlowTable::Established, NOW, |key, _| {
            clients.push(key.client[1]);
        });
        clients
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_flow_is_seen_as_long_as_it_is_there() {
        let lines = lines();
        assert!(clients(&lines).is_empty());
        for bucket in [0, 5, 6, 63] {
            put(&lines, bucket, bucket as u64 + 1, NOW);
        }
        for _ in 0..3 {
            assert_eq!(clients(&lines), [1, 6, 7, 64]);
        }
        // One that is over is seen once more, and its bucket then left alone.
        put(&lines, 5, 6, NOW - 2 * ESTABLISHED_IDLE);
        assert_eq!(clients(&lines), [1, 6, 7, 64]);
        assert_eq!(clients(&lines), [1, 7, 64]);
        put(&lines, 5, 6, NOW);
        assert_eq!(clients(&lines), [1, 6, 7, 64]);
    }

    #[test]
    fn what_comes_while_a_mark_is_taken_back_is_marked_again() {
        let lines = lines();
        put(&lines, 9, 1, NOW);
        lines.take_back(9, || true);
        assert_eq!(clients(&lines), [1]);
        lines.take_back(9, || false);
        assert!(clients(&lines).is_empty());
    }

    #[test]
    fn large_tables_share_marks() {
        for buckets in [1, 100, 32_768, 32_769, 203_125, 2_031_250, 20_312_500] {
            let shape = TableShape::new(1, buckets);
            let table = FlowTable::HalfOpen;
            let first = shape.mark(table, 0);
            let last = shape.mark(table, shape.total() - 1);
            assert_eq!(first, MARKS);
            assert!(last < 2 * MARKS, "{buckets}");
            // No more of them than is needed.
            assert!(
                shape.mark_shift == 0 || last > MARKS + MARKS / 2,
                "{buckets}"
            );
            assert_eq!(
                TableShape::new(0, shape.total()).mark_shift,
                shape.mark_shift
            );
        }
    }
}
