//! What the packet path looks up and records.

use bg_common::{
    directory::Name,
    flow::{Flow, FlowKey, FlowTable},
    key::{Endpoint, FragmentKey},
    maglev::mix,
    monitor::Sighting,
    port::{Port, Tags},
    reason::Reason,
    service::{
        Backend, Colour, ColourStats, CutoverWord, FirstFlow, Fragment, Interface, Listener,
        NextHop, PoolWord, ReturnPath,
    },
    snat::Source,
};

use crate::{flows::FlowCell, parse::Segment, preview::Reply};

/// Memory of one CPU for the packet it works on; the next packet overwrites it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Scratch {
    /// The VLAN tags it came with.
    pub tags: Tags,
    /// The VLAN that they name.
    pub vlan: Tags,
    /// What later fragments will do, where it is a first one.
    pub plan: Fragment,
    /// What an IPv4 packet says.
    pub v4: Segment<[u8; 4]>,
    /// What an IPv6 packet says.
    pub v6: Segment<[u8; 16]>,
    /// The ends of an IPv4 packet from a backend, while its flow is sought.
    pub reply_v4: Reply<[u8; 4]>,
    /// The ends of an IPv6 packet.
    pub reply_v6: Reply<[u8; 16]>,
    /// The flow that is sought.
    pub key: FlowKey,
    /// The hash of its key.
    pub hash: u64,
    /// The flow that is to be remembered.
    pub pending: Flow,
    /// The key of the flow that a port is sought for, while those of other flows are
    /// looked up.
    pub lessee: FlowKey,
    /// What a watcher is told of it.
    pub noted: Noted,
    /// In a dry run: the flows that were found, a table each.
    pub copies: [Flow; FlowTable::ALL.len()],
}

/// What is noted of a packet on its way for a watcher, who sets it back before.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Noted {
    /// 4 or 6: that segment is this packet's; 0: none is.
    pub family: u32,
    /// The tick of the packet that was told last.
    pub tick: u32,
    /// The service whose word it read, plus 1, and in the high half the colour it was
    /// counted for, plus 1; 0: none.
    pub owner: u64,
    /// How many have been told in that tick.
    pub told: u32,
    zero: u32,
    /// Where a sighting is put together.
    pub sighting: Sighting,
}

/// The tables and the clock.
pub trait Tables: FamilyTables<[u8; 4]> + FamilyTables<[u8; 16]> {
    /// The service's cut-over word: one load, once a packet.
    fn word(&self, service: u32) -> Option<CutoverWord>;
    /// When the newest generation's first flow was seen.
    fn first_flow(&self, service: u32) -> FirstFlow;
    /// Stamps the first flow of a generation.
    fn set_first_flow(&self, service: u32, stamp: FirstFlow);
    /// The pool word at [`PoolWord::index`].
    fn pool(&self, index: u32) -> PoolWord;
    /// The backend id in a slot of the Maglev arena.
    fn maglev(&self, slot: u32) -> Option<u32>;
    /// A backend, by id.
    fn backend(&self, id: u32) -> Option<&Backend>;
    /// An interface, by slot.
    fn interface(&self, slot: u32) -> Option<&Interface>;
    /// The slot of a port.
    fn slot(&self, port: &Port) -> Option<u32>;
    /// The clock, in ticks ([`bg_common::abi::TICK_SHIFT`]).
    fn tick(&self) -> u32;
    /// The precise clock, `CLOCK_MONOTONIC` nanoseconds.
    fn now_ns(&self) -> u64;
    /// The key that [`Tables::flow`] and [`Tables::remember`] are about from now on.
    fn seek(&self, key: &FlowKey);
    /// Says that a flow of that key will be remembered in the half-open table: its memory
    /// may be fetched beside what is done until then.
    fn expect_half_open(&self);
    /// That key.
    fn sought(&self) -> &FlowKey;
    /// The flow of the key that was sought last.
    fn flow(&self, table: FlowTable) -> Option<&FlowCell>;
    /// Room for a flow that is to be remembered.
    fn pending(&self) -> &FlowCell;
    /// Remembers the pending flow under the key that was sought last, in place of
    /// an older one; false when there is no room.
    fn remember(&self, table: FlowTable) -> bool;
    /// The gateway's address towards the backend with this block of ports.
    fn source(&self, block: u32) -> Option<&Source>;
    /// True when the flow that was sought last has the port with this index.
    fn has_port(&self, block: u32, index: u32) -> bool;
    /// Seeks the flow that has the port with this index, if it is one of a listener;
    /// false, and nothing is sought, where there is none.
    fn seek_lessee(&self, block: u32, index: u32, listener: u16) -> bool;
    /// Lends the flow that was sought last, and is to be in `table`, a port of a
    /// block: the port, host order, or 0 when none is to be had.
    fn lend(&self, block: u32, table: FlowTable) -> u16;
    /// Keeps the port with this index for the flow that was sought last, from now on
    /// proven; false when it was taken from the flow.
    fn keep_port(&self, block: u32, index: u32) -> bool;
    /// Notes what later fragments of this packet will do.
    fn plan(&self, fragment: Fragment);
    /// What was noted.
    fn planned(&self) -> &Fragment;
    /// Counts a verdict.
    fn count(&self, reason: Reason);
    /// True when what servers do is listened to, of some service at least.
    fn listens(&self) -> bool;
    /// Hears a segment of the flow that was sought last, if its service is listened to:
    /// its [`crate::exchange::kind`], its sequence number, and its payload in bytes.
    fn hear(&self, kind: u32, sequence: u32, payload: u32);
    /// Adds to the service's statistics of a colour.
    fn record(&self, service: u32, colour: Colour, add: impl FnOnce(&mut ColourStats));
}

/// The tables of one address family, and memory for one packet.
pub trait FamilyTables<A> {
    /// Keeps what a packet says, as long as it is worked on. Once a packet.
    fn keep(&self, segment: Segment<A>);
    /// What was kept of this packet.
    fn kept(&self) -> &Segment<A>;
    /// Keeps the ends of a packet from a backend, while its flow is sought.
    fn keep_reply(&self, reply: Reply<A>);
    /// What was kept.
    fn reply(&self) -> &Reply<A>;
    /// The listener at a packet's destination.
    fn listener(&self, to: &Endpoint<A>) -> Option<Listener>;
    /// The way back for a packet from a backend endpoint.
    fn return_path(&self, from: &Endpoint<A>) -> Option<&ReturnPath>;
    /// What becomes of a packet's later fragments.
    fn fragment(&self, key: &FragmentKey<A>) -> Option<&Fragment>;
    /// Remembers that.
    fn remember_fragment(&self, key: &FragmentKey<A>, fragment: &Fragment);
    /// The next hop of a packet `from` the service address (as in
    /// [`ReturnPath::address`]) `to` a client, as the host's routes and
    /// neighbours have it; `NONE` when they do not. `device` is the one that the
    /// packet came in by ([`Interface::device`]).
    fn route(&self, from: &[u8; 16], to: &A, device: u32) -> NextHop;
}

/// An endpoint's name in the directory.
#[inline(always)]
pub fn name<A: Address>(endpoint: &Endpoint<A>) -> Name {
    let Endpoint { port, protocol, .. } = *endpoint;
    Name::new(endpoint.address.client(), port, protocol, A::FAMILY)
}

/// An address: what IPv4 and IPv6 differ in.
pub trait Address: Copy + Eq {
    /// True for IPv6.
    const V6: bool;
    /// [`Backend::family`] of a backend with such an address.
    const FAMILY: u8;
    /// Out of the 16 bytes of [`Backend::address`] or [`ReturnPath::address`].
    fn from_wide(wide: &[u8; 16]) -> Self;
    /// A hash of the address alone: the same client, the same hash.
    fn hash(self) -> u64;
    /// As the 16 bytes of [`Backend::address`].
    fn wide(self) -> [u8; 16];
    /// The address as a client's in a [`FlowKey`].
    fn client(self) -> [u64; 2];
    /// The inverse of [`Address::client`].
    fn from_client(client: [u64; 2]) -> Self;
}

impl Address for [u8; 4] {
    const V6: bool = false;
    const FAMILY: u8 = 4;

    #[inline(always)]
    fn from_wide(wide: &[u8; 16]) -> Self {
        wide.as_chunks().0[0]
    }

    #[inline(always)]
    fn hash(self) -> u64 {
        mix(u64::from(u32::from_ne_bytes(self)) + 1)
    }

    #[inline(always)]
    fn wide(self) -> [u8; 16] {
        let [a, b, c, d] = self;
        [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    #[inline(always)]
    fn client(self) -> [u64; 2] {
        FlowKey::client_v4(self)
    }

    #[inline(always)]
    fn from_client(client: [u64; 2]) -> Self {
        let [_, _, _, _, a, b, c, d] = client[1].to_ne_bytes();
        [a, b, c, d]
    }
}

impl Address for [u8; 16] {
    const V6: bool = true;
    const FAMILY: u8 = 6;

    #[inline(always)]
    fn from_wide(wide: &[u8; 16]) -> Self {
        *wide
    }

    #[inline(always)]
    fn hash(self) -> u64 {
        let halves = self.as_chunks().0;
        mix(u64::from_ne_bytes(halves[0])) ^ mix(u64::from_ne_bytes(halves[1]).wrapping_add(1))
    }

    #[inline(always)]
    fn wide(self) -> [u8; 16] {
        self
    }

    #[inline(always)]
    fn client(self) -> [u64; 2] {
        let halves = self.as_chunks().0;
        [u64::from_ne_bytes(halves[0]), u64::from_ne_bytes(halves[1])]
    }

    #[inline(always)]
    fn from_client(client: [u64; 2]) -> Self {
        let [a, b, c, d, e, f, g, h] = client[0].to_ne_bytes();
        let [i, j, k, l, m, n, o, p] = client[1].to_ne_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }
}
