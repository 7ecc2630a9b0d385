//! The lines of the flow tables, read in place.

use std::sync::atomic::{Ordering, fence};

use bg_common::flow::{Flow, FlowKey, FlowTable, LINES, Line};

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
}

impl Lines {
    /// The tables, mapped each: in the order of [`FlowTable::ALL`].
    pub const fn new(tables: [Words; FlowTable::ALL.len()]) -> Self {
        Self { tables }
    }

    /// Words of a table of so many buckets.
    pub const fn words(buckets: u32) -> usize {
        buckets as usize * LINES * WORDS
    }

    /// Calls `visit` for every line of a table that holds a flow, over or not.
    pub fn each(&self, table: FlowTable, mut visit: impl FnMut(&FlowKey, &Flow)) {
        let words = &self.tables[table as usize];
        for line in 0..words.len() / WORDS {
            if let Some((key, flow)) = read(words, line * WORDS) {
                visit(&key, &flow);
            }
        }
    }
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
