//! Remembered flows, and where in a flow table one lies.
//!
//! A flow table is an array of buckets of eight lines, a line being one cache
//! line. A flow's key, hashed with a seed that only this host knows, names two
//! buckets and the line at which the search starts in both: the *home* bucket
//! first, then the *other* one. What decides about a flow is one line away, and
//! with it the next packet of a known flow costs one cache miss.
//!
//! Nothing is ever deleted. A flow that is over ([`patience`]) is a line that the
//! next new flow may take.

use core::time::Duration;

use crate::{
    abi::ticks,
    maglev::mix,
    service::{Colour, NextHop},
};

/// Where a flow is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum FlowTable {
    /// TCP, proven: no flood reaches it.
    Established = 0,
    /// TCP without proof: small, the longest silent goes first.
    HalfOpen = 1,
    /// UDP, which has no proof.
    Udp = 2,
}

impl FlowTable {
    /// Every table, in index order.
    pub const ALL: [Self; 3] = [Self::Established, Self::HalfOpen, Self::Udp];

    /// `established`, `half_open` or `udp`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::HalfOpen => "half_open",
            Self::Udp => "udp",
        }
    }

    /// The table with this index.
    #[inline(always)]
    pub const fn from_index(index: u32) -> Self {
        match index {
            0 => Self::Established,
            1 => Self::HalfOpen,
            _ => Self::Udp,
        }
    }

    /// True when a new flow may take the line of one that is not over yet.
    #[inline(always)]
    pub const fn evicts(self) -> bool {
        !matches!(self, Self::Established)
    }
}

/// Key of a flow: the client, and the listener it talks to.
///
/// The listener's id stands for the service address, port and protocol, so both
/// directions build the same key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct FlowKey {
    /// The client's address, 16 bytes in network byte order as two words; an
    /// IPv4 address is mapped into IPv6 (`::ffff:a.b.c.d`, RFC 4291, section
    /// 2.5.5.2).
    pub client: [u64; 2],
    /// The client's port (network byte order) and the listener's id: see
    /// [`FlowKey::id`]. Never 0: no listener has id 0.
    pub id: u32,
    zero: u32,
}

impl FlowKey {
    /// The key of `client:port` talking to the listener with this id.
    #[inline(always)]
    pub const fn new(client: [u64; 2], port: [u8; 2], listener: u16) -> Self {
        let [a, b] = listener.to_ne_bytes();
        Self {
            client,
            id: u32::from_ne_bytes([port[0], port[1], a, b]),
            zero: 0,
        }
    }

    /// The key of a line.
    #[inline(always)]
    pub const fn of(client: [u64; 2], id: u32) -> Self {
        Self {
            client,
            id,
            zero: 0,
        }
    }

    /// A client's IPv4 address as the words of a key.
    #[inline(always)]
    pub const fn client_v4(address: [u8; 4]) -> [u64; 2] {
        let [a, b, c, d] = address;
        [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d])]
    }

    /// A client's IPv6 address as the words of a key.
    #[inline(always)]
    pub const fn client_v6(address: [u8; 16]) -> [u64; 2] {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
        [
            u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
        ]
    }

    /// The client's address, 16 bytes in network byte order.
    pub fn address(&self) -> [u8; 16] {
        let mut address = [0; 16];
        for (part, word) in address.chunks_exact_mut(8).zip(self.client) {
            part.copy_from_slice(&word.to_ne_bytes());
        }
        address
    }

    /// The client's port, network byte order.
    #[inline(always)]
    pub const fn port(&self) -> [u8; 2] {
        let [a, b, ..] = self.id.to_ne_bytes();
        [a, b]
    }

    /// The listener's id.
    #[inline(always)]
    pub const fn listener(&self) -> u16 {
        let [_, _, a, b] = self.id.to_ne_bytes();
        u16::from_ne_bytes([a, b])
    }

    /// The key's hash under a seed: every step keeps different keys different,
    /// and without the seed nobody can tell which ones end up in one bucket.
    #[inline(always)]
    pub const fn hash(&self, seed: u64) -> u64 {
        let hash = (self.client[0] ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = (hash ^ (hash >> 32) ^ self.client[1]).wrapping_mul(0xd6e8_feb8_6659_fd93);
        mix(hash ^ (hash >> 32) ^ self.id as u64)
    }
}

/// One remembered flow. 40 bytes.
///
/// `from_client` is written by packets of the client's direction only, and
/// `from_backend` by those of the backend's: two CPUs never lose each other's bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Flow {
    /// [`NextHop`] word towards the client.
    pub client_hop: u64,
    /// Backend id: index of the backend table.
    pub backend: u32,
    /// Last packet, in [ticks](crate::abi::TICK_SHIFT) of the clock.
    pub seen: u32,
    /// Half-open TCP: the acknowledgement number that proves the client (host
    /// order). UDP: the listener's [idle time](crate::service::Listener::idle).
    pub proof: u32,
    /// Service id.
    pub service: u16,
    /// How the backend sees the client: see [`crate::snat::via`].
    pub via: u16,
    /// TCP: the backend's last acknowledgement, the next byte it expects (host order).
    pub client_next: u32,
    /// TCP: the client's last acknowledgement, the next byte it expects (host order).
    pub backend_next: u32,
    /// Generation the flow was born in.
    pub generation: u16,
    /// Last time the route to the client was looked up, in ticks modulo 65 536.
    pub routed: u16,
    /// [`crate::service::colour_spread`] of its birth.
    pub colour_spread: u8,
    /// Bits of [`bits`] that the client's packets set.
    pub from_client: u8,
    /// Bits of [`bits`] that the backend's packets set.
    pub from_backend: u8,
    /// Zero.
    pub zero: u8,
}

impl Flow {
    /// The flow's colour.
    #[inline(always)]
    pub const fn colour(&self) -> Colour {
        Colour::from_bit(self.colour_spread)
    }

    /// The next hop towards the client.
    pub const fn hop(&self) -> NextHop {
        NextHop(self.client_hop)
    }

    /// True when both sides have closed it, or one has reset it.
    pub const fn is_closing(&self) -> bool {
        is_closing(self.from_client, self.from_backend)
    }

    /// Ticks of silence after which the flow is over.
    pub const fn patience(&self, table: FlowTable) -> u32 {
        patience(table, self.from_client, self.from_backend, self.proof)
    }

    /// True when the flow is over at tick `now`.
    pub const fn is_over(&self, table: FlowTable, now: u32) -> bool {
        is_silent(self.seen, now, self.patience(table))
    }
}

/// Bits of [`Flow::from_client`] and [`Flow::from_backend`].
pub mod bits {
    /// This side sent FIN.
    pub const FIN: u8 = 1;
    /// This side sent RST inside its window, or a packet of its was answered with
    /// one by us. Its own traffic a second later undoes it.
    pub const RST: u8 = 1 << 1;
    /// Half-open: a packet of this side moved the flow to the established table.
    pub const MOVED: u8 = 1 << 2;
    /// Half-open: a packet of this side proved the flow, but the established table
    /// was full.
    pub const PROVEN: u8 = 1 << 3;
    /// Client, half-open: born from a mid-stream packet of a flow we do not know.
    pub const ORPHAN: u8 = 1 << 4;
    /// Client, established: a SYN of the same tuple is in the half-open table.
    pub const CONTESTED: u8 = 1 << 5;
    /// Backend, half-open: SYN-ACK seen, [`super::Flow::proof`] is valid.
    pub const ANSWERED: u8 = 1 << 4;
    /// Backend: no route to the client is known, its next hop was learned from
    /// its packets.
    pub const LEARNED: u8 = 1 << 5;
    /// Backend: the flow was cut, and its client was sent a RST at the very
    /// sequence number that it waits for.
    pub const CLIENT_CUT: u8 = 1 << 6;
}

/// An established flow that was silent for longer is forgotten: more than the two
/// hours and four minutes of RFC 5382 (REQ-5), so that a keep-alive of two hours
/// keeps it.
pub const ESTABLISHED_IDLE: u32 = ticks(Duration::from_mins(130).as_nanos() as u64);
/// A handshake that got no further in this time is none.
pub const HALF_OPEN_IDLE: u32 = ticks(Duration::from_mins(1).as_nanos() as u64);
/// A closed flow is kept for segments that are still on their way.
pub const CLOSING: u32 = ticks(Duration::from_secs(10).as_nanos() as u64);

/// True when both sides have closed a flow with these bits, or one has reset it.
#[inline(always)]
pub const fn is_closing(from_client: u8, from_backend: u8) -> bool {
    from_client & from_backend & bits::FIN != 0 || (from_client | from_backend) & bits::RST != 0
}

/// Ticks of silence after which a flow is over. `idle` is UDP's: see
/// [`Flow::proof`].
#[inline(always)]
pub const fn patience(table: FlowTable, from_client: u8, from_backend: u8, idle: u32) -> u32 {
    let both = from_client | from_backend;
    match table {
        FlowTable::Udp => idle,
        // What the handshake left behind: nobody asks for it.
        FlowTable::HalfOpen if both & bits::MOVED != 0 => 0,
        FlowTable::HalfOpen if both & bits::PROVEN == 0 => HALF_OPEN_IDLE,
        _ if is_closing(from_client, from_backend) => CLOSING,
        _ => ESTABLISHED_IDLE,
    }
}

/// True when what was last seen at tick `seen` has been silent for longer than
/// `patience` at tick `now`. Ticks of another CPU's clock may lie a little ahead.
#[inline(always)]
pub const fn is_silent(seen: u32, now: u32, patience: u32) -> bool {
    let silent = now.wrapping_sub(seen);
    silent > patience && silent < u32::MAX / 2
}

/// Lines of a bucket.
pub const LINES: usize = 8;

/// A line of a flow table: one cache line, 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Line {
    /// [`FlowKey::client`].
    pub client: [u64; 2],
    /// [`FlowKey::id`]; 0 = the line is free.
    pub id: u32,
    /// How many lines a search that starts here has to look at, at most: 1 to
    /// [`LINES`] in this bucket, more in the key's other one. Never shrinks.
    pub reach: u32,
    /// What is remembered.
    pub flow: Flow,
}

/// The lines that are searched together.
pub type Bucket = [Line; LINES];

/// The size of a flow table, and the seed of its hash.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TableShape {
    /// Random, of this host: see [`FlowKey::hash`].
    pub seed: u64,
    /// Buckets of one region.
    pub buckets: u32,
    /// Regions: a power of two, at most [`REGIONS`].
    pub regions: u32,
    /// Buckets that share a [mark](TableShape::mark): 1 shifted left by this.
    pub mark_shift: u32,
    zero: u32,
}

/// Marks of a flow table: bytes.
pub const MARKS: u32 = 32_768;

/// Marks in one row of their array: 64 bytes.
pub const MARK_ROW: u32 = 64;

/// A row of marks.
pub type MarkRow = [u8; MARK_ROW as usize];

/// Regions of a flow table, at most: new flows of different regions do not wait
/// for each other.
pub const REGIONS: u32 = 256;

/// Both buckets of a key lie in one region, and start at the same line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Place {
    /// The bucket that is searched first.
    pub home: u32,
    /// The bucket for what found no room at home.
    pub other: u32,
    /// The region of both.
    pub region: u32,
    /// The line of a bucket at which the search starts.
    pub start: u32,
}

impl TableShape {
    /// The shape of a table with at least `buckets` buckets.
    pub const fn new(seed: u64, buckets: u32) -> Self {
        let mut regions = REGIONS;
        while regions > 1 && buckets < regions * 4 {
            regions /= 2;
        }
        Self {
            seed,
            buckets: if buckets == 0 {
                1
            } else {
                buckets.div_ceil(regions)
            },
            regions,
            mark_shift: 0,
            zero: 0,
        }
        .marked()
    }

    /// With as many buckets to a mark as the number of marks wants.
    const fn marked(mut self) -> Self {
        while self.total() > MARKS << self.mark_shift {
            self.mark_shift += 1;
        }
        self
    }

    /// Index of a bucket's mark, among those of all tables. A mark that is 0 says that no
    /// bucket has a flow that is not over: who counts flows need not look. The packet path
    /// sets it after it has written a line; who finds no flow there may take it back, and
    /// must then look again.
    #[inline(always)]
    pub const fn mark(&self, table: FlowTable, bucket: u32) -> u32 {
        table as u32 * MARKS + (bucket >> (self.mark_shift & 31))
    }

    /// Buckets of the whole table.
    pub const fn total(&self) -> u32 {
        self.buckets * self.regions
    }

    /// The home bucket of the key with this hash.
    #[inline(always)]
    pub const fn home(&self, hash: u64) -> u32 {
        let first = self.region(hash).wrapping_mul(self.buckets);
        first.wrapping_add(self.home_in_region(hash))
    }

    #[inline(always)]
    const fn region(&self, hash: u64) -> u32 {
        (hash >> 56) as u32 & self.regions.wrapping_sub(1)
    }

    #[inline(always)]
    const fn home_in_region(&self, hash: u64) -> u32 {
        ((hash as u32 as u64 * self.buckets as u64) >> 32) as u32
    }

    /// Where the key with this hash lies.
    #[inline(always)]
    pub const fn place(&self, hash: u64) -> Place {
        let region = self.region(hash);
        let home = self.home_in_region(hash);
        let mut other = (((hash >> 24) as u32 as u64 * self.buckets as u64) >> 32) as u32;
        if other == home {
            other = if home == 0 {
                self.buckets.wrapping_sub(1)
            } else {
                home - 1
            };
        }
        let first = region.wrapping_mul(self.buckets);
        Place {
            home: first.wrapping_add(home),
            other: first.wrapping_add(other),
            region,
            start: start(hash),
        }
    }
}

/// The line of a bucket at which the search for the key with this hash starts.
#[inline(always)]
pub const fn start(hash: u64) -> u32 {
    hash as u32 & (LINES as u32 - 1)
}

/// Lines for so many flows: 104 bytes a flow.
const LINES_OF_FLOWS: (u64, u64) = (13, 8);

/// Buckets for `flows` flows: so many lines more that of ten million flows none
/// finds both of its buckets full. With half as many lines again, of two million three
/// did.
pub const fn buckets_for(flows: u32) -> u32 {
    let lines = flows as u64 * LINES_OF_FLOWS.0 / LINES_OF_FLOWS.1;
    let buckets = lines.div_ceil(LINES as u64);
    TableShape::new(0, buckets as u32).total()
}

/// The flows that a table of `buckets` buckets was made for.
pub const fn flows_for(buckets: u32) -> u32 {
    (buckets as u64 * LINES as u64 * LINES_OF_FLOWS.1 / LINES_OF_FLOWS.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(seen: u32, from_client: u8, from_backend: u8) -> Flow {
        Flow {
            seen,
            from_client,
            from_backend,
            ..Flow::default()
        }
    }

    /// The last tick at which a flow seen at tick 0 is there.
    fn lasts(table: FlowTable, flow: Flow) -> u32 {
        let patience = flow.patience(table);
        assert!(!flow.is_over(table, patience));
        assert!(flow.is_over(table, patience + 1));
        patience
    }

    #[test]
    fn a_silent_datagram_flow_is_over_when_its_listener_says_so() {
        let flow = Flow {
            proof: 450,
            ..seen(0, 0, 0)
        };
        assert_eq!(lasts(FlowTable::Udp, flow), 450);
    }

    #[test]
    fn a_handshake_gets_a_minute_and_what_it_left_behind_nothing() {
        let half = FlowTable::HalfOpen;
        for (client, backend) in [(0, 0), (0, bits::ANSWERED), (bits::ORPHAN, 0)] {
            assert_eq!(lasts(half, seen(0, client, backend)), HALF_OPEN_IDLE);
        }
        for (client, backend) in [(bits::MOVED, bits::ANSWERED), (0, bits::MOVED)] {
            assert_eq!(lasts(half, seen(0, client, backend)), 0);
        }
        let full = seen(0, bits::PROVEN, bits::ANSWERED);
        assert_eq!(lasts(half, full), ESTABLISHED_IDLE);
    }

    #[test]
    fn a_closed_flow_goes_soon_and_a_silent_one_late() {
        let table = FlowTable::Established;
        assert_eq!(lasts(table, seen(0, bits::FIN, bits::FIN)), CLOSING);
        assert_eq!(lasts(table, seen(0, bits::RST, 0)), CLOSING);
        assert_eq!(lasts(table, seen(0, 0, bits::RST)), CLOSING);
        assert_eq!(lasts(table, seen(0, bits::FIN, 0)), ESTABLISHED_IDLE);
        assert!(ESTABLISHED_IDLE > ticks(Duration::from_mins(124).as_nanos() as u64));
    }

    #[test]
    fn a_clock_that_lags_behind_ends_no_flow() {
        assert!(!seen(1000, bits::RST, 0).is_over(FlowTable::Established, 999));
        assert!(!seen(2, bits::RST, 0).is_over(FlowTable::Established, u32::MAX));
    }

    #[test]
    fn a_key_gives_back_what_it_was_made_of() {
        let key = FlowKey::new(FlowKey::client_v4([192, 0, 2, 7]), [0x1f, 0x40], 0x0302);
        assert_eq!(
            key.address(),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 7]
        );
        assert_eq!((key.port(), key.listener()), ([0x1f, 0x40], 0x0302));
        let wide = core::array::from_fn(|n| n as u8);
        let key = FlowKey::new(FlowKey::client_v6(wide), [0, 0], 1);
        assert_eq!(key.address(), wide);
        assert_ne!(key.id, 0);
    }

    #[test]
    fn every_place_lies_in_the_table_and_in_one_region() {
        for buckets in [0, 1, 2, 7, 64, 1023, 1024, 1025, 187_500] {
            let shape = TableShape::new(1, buckets);
            assert!(shape.total() >= buckets.max(1), "{shape:?}");
            assert!(shape.total() < buckets + buckets / 4 + 2, "{shape:?}");
            for n in 0..10_000u32 {
                let key = FlowKey::new([0, u64::from(n)], [1, 2], 1);
                let place = shape.place(key.hash(shape.seed));
                for bucket in [place.home, place.other] {
                    assert!(bucket < shape.total());
                    assert_eq!(bucket / shape.buckets, place.region);
                }
                assert!(shape.buckets == 1 || place.home != place.other);
                assert!((place.start as usize) < LINES);
            }
        }
    }

    #[test]
    fn keys_spread_evenly_over_the_buckets() {
        let shape = TableShape::new(0x1234_5678_9abc_def0, 1024);
        let mut homes = [0u32; 1024];
        for n in 0..102_400u32 {
            // Neighbours in address and port, as clients are.
            let client = FlowKey::client_v4((0x0a00_0000 + n / 64).to_be_bytes());
            let key = FlowKey::new(
                client,
                (1024 + n % 64).to_be_bytes()[2..].try_into().unwrap(),
                1,
            );
            homes[shape.place(key.hash(shape.seed)).home as usize] += 1;
        }
        // 100 expected, standard deviation 10: seven of them are a bad hash.
        assert!(homes.iter().all(|count| (30..170).contains(count)));
    }

    #[test]
    fn a_table_has_room_for_what_it_was_made_for() {
        for flows in [1, 1000, 100_000, 1_000_000] {
            assert!(flows_for(buckets_for(flows)) >= flows);
        }
        assert!(buckets_for(1_000_000) as usize * size_of::<Bucket>() <= 105_000_000);
    }
}
