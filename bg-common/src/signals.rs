//! What the packet path hears of the servers of a colour in TCP connections as they pass
//! by: whether they take connections, how long they take to answer, and what they answer
//! where that is plain HTTP/1.
//!
//! Per connection one [`Exchange`] is remembered, in a table without chains: two
//! connections that fall on one place cost each other what was being timed, and nothing
//! else. Both directions write to it, on any CPU, without a lock: what is counted is a
//! sample, and no packet's way depends on it.

/// Services that can be listened to at one time.
pub const SERVICES: usize = 64;
/// Rows of counts: a service has two, blue's first.
pub const ROWS: usize = 2 * SERVICES;
/// Connections that are remembered.
pub const EXCHANGES: usize = 65_536;
/// Spans of time that are told apart: see [`span`].
pub const SPANS: usize = 128;

/// A SYN that comes again sooner is a copy, in units of 1 024 ns: clients wait a second (RFC
/// 6298, section 2.1).
pub const PATIENCE: u32 = 850_000;
/// An answer that is waited for keeps its place from other connections for so long, in the
/// same units: those that take long must not be the ones that are not heard.
pub const KEPT: u32 = 30_000_000;

/// How many times something took so long; index: [`span`].
pub type Times = [u64; SPANS];

/// What was heard of one colour of a service. 2 160 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signals {
    /// Connections that clients began.
    pub opened: u64,
    /// Those whose SYN the client sent again: nobody had answered for [`PATIENCE`].
    pub opened_again: u64,
    /// Connections that servers took.
    pub accepted: u64,
    /// Connections that servers refused with a RST.
    pub refused: u64,
    /// Connections, of those that servers were heard in, which they reset.
    pub reset: u64,
    /// Requests: what clients sent after servers had answered.
    pub asked: u64,
    /// Requests whose first segment clients sent again.
    pub asked_again: u64,
    /// Segments with data that servers sent again.
    pub repeated: u64,
    /// Answers by the first digit of their HTTP/1 status; 0: no HTTP/1 status.
    pub status: [u64; 6],
    /// From a client's first SYN to the server's SYN-ACK, as they pass by.
    pub handshake: Times,
    /// From the first segment of what a client sends, to the first one of what the server
    /// sends then: of a request and its answer.
    pub answer: Times,
}

impl Signals {
    /// Nothing was heard.
    pub const NONE: Self = Self {
        opened: 0,
        opened_again: 0,
        accepted: 0,
        refused: 0,
        reset: 0,
        asked: 0,
        asked_again: 0,
        repeated: 0,
        status: [0; 6],
        handshake: [0; SPANS],
        answer: [0; SPANS],
    };

    /// Adds what was heard elsewhere, or by another CPU.
    pub fn add(&mut self, other: &Self) {
        self.each(other, u64::wrapping_add);
    }

    /// What was heard since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut since = *self;
        since.each(earlier, u64::saturating_sub);
        since
    }

    /// Answers, of whatever status.
    pub fn answers(&self) -> u64 {
        self.answer.iter().sum()
    }

    fn each(&mut self, other: &Self, change: fn(u64, u64) -> u64) {
        let Self {
            opened,
            opened_again,
            accepted,
            refused,
            reset,
            asked,
            asked_again,
            repeated,
            status,
            handshake,
            answer,
        } = self;
        for (own, other) in [
            (opened, other.opened),
            (opened_again, other.opened_again),
            (accepted, other.accepted),
            (refused, other.refused),
            (reset, other.reset),
            (asked, other.asked),
            (asked_again, other.asked_again),
            (repeated, other.repeated),
        ] {
            *own = change(*own, other);
        }
        for (own, other) in [
            (&mut status[..], &other.status[..]),
            (&mut handshake[..], &other.handshake[..]),
            (&mut answer[..], &other.answer[..]),
        ] {
            for (own, other) in own.iter_mut().zip(other) {
                *own = change(*own, *other);
            }
        }
    }
}

/// A connection on its way. 16 bytes; all zero: none.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Exchange {
    /// Bits of the flow's hash, and in the two lowest ones `state::*`.
    pub tag: u32,
    /// When what is waited for began, in units of 1 024 ns of `CLOCK_MONOTONIC`, modulo 2^32.
    pub since: u32,
    /// Sequence number of the client's segment that began it.
    pub asked: u32,
    /// The server's next byte, as far as it was heard; 0 if nothing was. While a SYN-ACK is
    /// waited for: not 0 if the SYN came again.
    pub next: u32,
}

/// States of an [`Exchange`].
pub mod state {
    /// Nothing is waited for.
    pub const IDLE: u32 = 0;
    /// A SYN-ACK.
    pub const OPENING: u32 = 1;
    /// An answer.
    pub const ASKED: u32 = 2;
    /// The bits.
    pub const MASK: u32 = 3;
}

/// The span that a time of so many units of 1 024 ns falls into: four to an octave, from
/// four units on.
#[inline(always)]
pub const fn span(units: u32) -> usize {
    if units < 4 {
        return units as usize;
    }
    let octave = units.ilog2();
    let quarter = units >> (octave - 2) & 3;
    ((octave - 1) * 4 + quarter) as usize
}

/// Where a span ends, in units of 1 024 ns: the first time that is longer.
pub const fn end_of(span: usize) -> u64 {
    if span < 4 {
        return span as u64 + 1;
    }
    let (octave, quarter) = (span as u32 / 4 + 1, span as u64 % 4);
    (5 + quarter) << (octave - 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_follow_each_other_without_a_gap() {
        let last = span(u32::MAX);
        assert!(last < SPANS);
        for at in 0..last {
            let end = end_of(at) as u32;
            assert_eq!((span(end - 1), span(end)), (at, at + 1), "{at}");
        }
    }

    #[test]
    fn a_span_is_at_most_a_quarter_long() {
        for units in [5, 100, 976, 123_456, 1 << 30] {
            let end = end_of(span(units)) as f64;
            assert!((1.0..=1.25).contains(&(end / f64::from(units))), "{units}");
        }
    }
}
