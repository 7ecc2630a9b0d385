//! What a segment that was sent on says of the server: heard, never decided by.

use bg_common::{
    key::TCP,
    reason::Reason,
    signals::{EXCHANGES, Exchange, KEPT, PATIENCE, SPANS, Signals, Times, span, state},
};

use crate::{
    packet::{Packet, Tcp, tcp_flag},
    parse::{Segment, part},
    pipeline::Exit,
    tables::Tables,
};

/// What a segment is, in a connection.
pub mod kind {
    /// A client's SYN.
    pub const OPEN: u32 = 0;
    /// A client's data.
    pub const ASK: u32 = 1;
    /// A server's SYN-ACK.
    pub const ACCEPT: u32 = 2;
    /// A server's RST.
    pub const RESET: u32 = 3;
    /// A server's data; this and higher: with the first digit of an HTTP/1 status, or 0.
    pub const ANSWER: u32 = 4;
}

/// Tells the counts what a segment is that was decided on; its TCP header still lies where
/// it was found. Returns nothing of use: see [`crate::pipeline`].
#[inline(never)]
pub(crate) fn overhear<P: Packet, T: Tables, A>(
    packet: &P,
    tables: &T,
    segment: &Segment<A>,
    exit: Exit,
) -> u64 {
    let heard = exit.is_sent() && exit.is_heard();
    if segment.protocol != TCP || segment.part != part::WHOLE || !heard {
        return 0;
    }
    let reason = exit.reason();
    let syn = segment.has(tcp_flag::SYN);
    let payload = segment
        .tcp
        .taken
        .wrapping_sub(u32::from(syn))
        .wrapping_sub(u32::from(segment.has(tcp_flag::FIN)));
    let kind = if reason == Reason::Returned as u32 {
        if segment.has(tcp_flag::RST) {
            kind::RESET
        } else if syn {
            kind::ACCEPT
        } else if payload > 0 {
            kind::ANSWER + status(packet, segment)
        } else {
            return 0;
        }
    } else if segment.opens() {
        kind::OPEN
    } else if payload > 0 {
        kind::ASK
    } else {
        return 0;
    };
    tables.hear(kind, segment.tcp.sequence, payload);
    0
}

/// The first digit of an HTTP/1 status line at the begin of the payload (RFC 9112, section
/// 4); 0 if there is none.
#[inline(always)]
fn status<P: Packet, A>(packet: &P, segment: &Segment<A>) -> u32 {
    let at = segment.offset();
    let Some(tcp) = packet.header::<Tcp>(at) else {
        return 0;
    };
    let at = at + (tcp.offset >> 4) as usize * 4;
    match packet.header::<[[u8; 4]; 3]>(at) {
        Some(
            [
                [b'H', b'T', b'T', b'P'],
                [b'/', b'1', b'.', _],
                [b' ', digit @ b'1'..=b'5', ..],
            ],
        ) => u32::from(digit - b'0'),
        _ => 0,
    }
}

/// What reads the time.
pub trait Clock {
    /// In units of 1 024 ns.
    fn now(&self) -> u32;
    /// The same number, of which the compiler knows nothing: otherwise it leaves out the
    /// bounds that the kernel's verifier needs to see.
    fn hide(&self, number: usize) -> usize;
}

/// The place of a connection whose flow has this hash.
#[inline(always)]
pub const fn place(hash: u64) -> u32 {
    hash as u32 & (EXCHANGES as u32 - 1)
}

/// Hears a segment of the connection whose flow has this hash.
#[inline(always)]
pub fn hear(
    exchange: &mut Exchange,
    hash: u64,
    (kind, sequence, payload): (u32, u32, u32),
    clock: &impl Clock,
    counts: &mut Signals,
) {
    let tag = (hash >> 32) as u32 & !state::MASK;
    let known = exchange.tag & !state::MASK == tag;
    let waits = if known {
        exchange.tag & state::MASK
    } else {
        state::IDLE
    };
    match kind {
        kind::OPEN => {
            let now = clock.now();
            let age = now.wrapping_sub(exchange.since);
            if waits == state::OPENING && exchange.asked == sequence {
                if age >= PATIENCE && exchange.next == 0 {
                    exchange.next = 1;
                    counts.opened_again += 1;
                }
                return;
            }
            counts.opened += 1;
            if !known && exchange.tag & state::MASK == state::ASKED && age < KEPT {
                return;
            }
            *exchange = Exchange {
                tag: tag | state::OPENING,
                since: now,
                asked: sequence,
                next: 0,
            };
        }
        kind::ASK => {
            if waits == state::ASKED {
                counts.asked_again += u64::from(exchange.asked == sequence);
                return;
            }
            let now = clock.now();
            let age = now.wrapping_sub(exchange.since);
            counts.asked += 1;
            if !known && exchange.tag & state::MASK == state::ASKED && age < KEPT {
                return;
            }
            // A SYN-ACK that went another way leaves nothing known of the server.
            exchange.next = if known && waits == state::IDLE {
                exchange.next
            } else {
                0
            };
            exchange.since = now;
            exchange.asked = sequence;
            exchange.tag = tag | state::ASKED;
        }
        kind::ACCEPT => {
            if waits == state::OPENING {
                counts.accepted += 1;
                count(&mut counts.handshake, exchange, clock);
                exchange.next = sequence.wrapping_add(1);
                exchange.tag = tag;
            }
        }
        kind::RESET => {
            // Each segment that comes too late is answered with another one, and one of a
            // connection that the server never knew says nothing of it.
            if waits == state::OPENING {
                counts.refused += 1;
            } else if known && exchange.next != 0 {
                counts.reset += 1;
            }
            if known {
                exchange.tag = tag;
                exchange.next = 0;
            }
        }
        answer => {
            let end = sequence.wrapping_add(payload);
            if known {
                // What was sent before what was heard last was sent again. 0: nothing was.
                if exchange.next != 0 && (end.wrapping_sub(exchange.next) as i32) <= 0 {
                    counts.repeated += 1;
                    return;
                }
                exchange.next = end;
            }
            if waits != state::ASKED {
                return;
            }
            let digit = answer.wrapping_sub(kind::ANSWER);
            if digit == 1 {
                return; // interim: the answer is still to come
            }
            count(&mut counts.answer, exchange, clock);
            if let Some(count) = counts.status.get_mut(digit as usize) {
                *count += 1;
            }
            exchange.tag = tag;
        }
    }
}

/// Counts what was waited for.
#[inline(always)]
fn count(times: &mut Times, exchange: &Exchange, clock: &impl Clock) {
    let took = clock.now().wrapping_sub(exchange.since);
    times[clock.hide(span(took)) & (SPANS - 1)] += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: u64 = 0x1234_5678_9abc_def0;
    const OTHER: u64 = 0x4321_8765_9abc_def0;

    /// A place of the table, the counts, and a clock.
    struct Place {
        exchange: Exchange,
        counts: Signals,
        now: u32,
    }

    struct Stopped(u32);

    impl Clock for Stopped {
        fn now(&self) -> u32 {
            self.0
        }

        fn hide(&self, number: usize) -> usize {
            number
        }
    }

    impl Place {
        fn new() -> Self {
            Self {
                exchange: Exchange::default(),
                counts: Signals::NONE,
                now: u32::MAX - 100, // it wraps on the way
            }
        }

        fn hear(&mut self, hash: u64, kind: u32, sequence: u32, payload: u32) {
            let clock = Stopped(self.now);
            let event = (kind, sequence, payload);
            hear(&mut self.exchange, hash, event, &clock, &mut self.counts);
            self.now = self.now.wrapping_add(100);
        }
    }

    #[test]
    fn a_request_and_its_answer() {
        let mut place = Place::new();
        place.hear(HASH, kind::OPEN, 7, 0);
        place.hear(HASH, kind::ACCEPT, 90, 0);
        place.hear(HASH, kind::ASK, 8, 500);
        place.hear(HASH, kind::ASK, 508, 500); // the rest of it
        place.hear(HASH, kind::ANSWER + 1, 91, 25); // 100 Continue
        place.hear(HASH, kind::ANSWER + 5, 116, 100);
        place.hear(HASH, kind::ANSWER, 216, 100); // the rest of it
        let Signals {
            opened,
            accepted,
            status,
            handshake,
            answer,
            repeated,
            asked_again,
            ..
        } = place.counts;
        assert_eq!((opened, accepted), (1, 1));
        assert_eq!(status, [0, 0, 0, 0, 0, 1]);
        assert_eq!(handshake[span(100)], 1);
        assert_eq!((answer[span(300)], answer.iter().sum()), (1, 1u64));
        assert_eq!((repeated, asked_again), (0, 0));
    }

    #[test]
    fn what_is_sent_again_is_counted_and_not_timed() {
        let mut place = Place::new();
        place.hear(HASH, kind::OPEN, 7, 0);
        place.hear(HASH, kind::OPEN, 7, 0); // a copy
        place.now = place.now.wrapping_add(PATIENCE);
        place.hear(HASH, kind::OPEN, 7, 0);
        place.now = place.now.wrapping_add(PATIENCE);
        place.hear(HASH, kind::OPEN, 7, 0); // the same connection
        place.hear(HASH, kind::ACCEPT, 90, 0);
        place.hear(HASH, kind::ASK, 8, 500);
        place.hear(HASH, kind::ASK, 8, 500);
        place.hear(HASH, kind::ANSWER + 2, 91, 100);
        place.hear(HASH, kind::ANSWER + 2, 91, 100);
        let counts = place.counts;
        assert_eq!((counts.opened, counts.opened_again), (1, 1));
        assert_eq!((counts.asked_again, counts.repeated), (1, 1));
        assert_eq!(counts.status[2], 1);
        assert_eq!(counts.handshake[span(2 * PATIENCE + 400)], 1);
    }

    #[test]
    fn a_connection_is_reset_once_and_only_if_its_server_was_heard() {
        let mut place = Place::new();
        place.hear(HASH, kind::OPEN, 7, 0);
        place.hear(HASH, kind::ACCEPT, 90, 0);
        for _ in 0..5 {
            place.hear(HASH, kind::RESET, 91, 0); // to each segment of an upload
        }
        assert_eq!(place.counts.reset, 1);
        place.hear(OTHER, kind::RESET, 91, 0); // to a segment of an unknown flow
        place.hear(OTHER, kind::ASK, 8, 500);
        place.hear(OTHER, kind::RESET, 91, 0);
        assert_eq!((place.counts.reset, place.counts.refused), (1, 0));
    }

    #[test]
    fn an_answer_that_is_waited_for_keeps_its_place() {
        let mut place = Place::new();
        place.hear(HASH, kind::ASK, 8, 500);
        place.hear(OTHER, kind::OPEN, 1, 0);
        place.hear(OTHER, kind::ASK, 2, 10);
        place.hear(HASH, kind::ANSWER + 2, 91, 100);
        assert_eq!((place.counts.asked, place.counts.status[2]), (2, 1));
        assert_eq!(place.counts.opened, 1);
        place.hear(HASH, kind::ASK, 508, 500);
        place.now = place.now.wrapping_add(KEPT);
        place.hear(OTHER, kind::ASK, 12, 10);
        place.hear(HASH, kind::ANSWER + 2, 191, 100);
        assert_eq!((place.counts.asked, place.counts.status[2]), (4, 1));
    }

    #[test]
    fn a_refusal_is_no_reset() {
        let mut place = Place::new();
        place.hear(HASH, kind::OPEN, 7, 0);
        place.hear(HASH, kind::RESET, 0, 0);
        place.hear(HASH, kind::OPEN, 9, 0);
        place.hear(HASH, kind::ACCEPT, 90, 0);
        place.hear(HASH, kind::RESET, 91, 0);
        let counts = place.counts;
        assert_eq!((counts.opened, counts.accepted), (2, 1));
        assert_eq!((counts.refused, counts.reset), (1, 1));
    }

    #[test]
    fn another_connection_at_the_same_place_is_never_taken_for_this_one() {
        let mut place = Place::new();
        place.hear(HASH, kind::OPEN, 8, 0);
        place.hear(OTHER, kind::ANSWER + 5, 91, 100);
        place.hear(OTHER, kind::ACCEPT, 91, 0);
        assert_eq!((place.counts.accepted, place.counts.status[5]), (0, 0));
        place.hear(OTHER, kind::ASK, 1, 10);
        place.hear(HASH, kind::ACCEPT, 91, 0);
        assert_eq!((place.counts.accepted, place.counts.opened), (0, 1));
    }

    #[test]
    fn an_answer_that_nobody_asked_for_is_none() {
        let mut place = Place::new();
        place.hear(HASH, kind::ANSWER + 5, 91, 100);
        assert_eq!(place.counts, Signals::NONE);
    }
}
