//! What the packet path looks up and records.

use core::{cell::Cell, mem::offset_of};

use bg_common::{
    key::{Endpoint, FlowKey, FragmentKey},
    maglev::mix,
    port::{Port, Tags},
    reason::Reason,
    service::{
        Backend, Colour, ColourStats, CutoverWord, FirstFlow, Flow, Fragment, Interface, Listener,
        NextHop, PoolWord, ReturnPath,
    },
};

use crate::parse::Segment;

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
    /// The coarse clock, in ticks ([`bg_common::abi::TICK_SHIFT`]).
    fn tick(&self) -> u32;
    /// The precise clock, `CLOCK_MONOTONIC` nanoseconds.
    fn now_ns(&self) -> u64;
    /// Notes what later fragments of this packet will do.
    fn plan(&self, fragment: Fragment);
    /// What was noted.
    fn planned(&self) -> &Fragment;
    /// Counts a verdict.
    fn count(&self, reason: Reason);
    /// Adds to the service's statistics of a colour.
    fn record(&self, service: u32, colour: Colour, add: impl FnOnce(&mut ColourStats));
}

/// The tables of one address family, and memory for one packet.
pub trait FamilyTables<A> {
    /// Keeps what a packet says, as long as it is worked on. Once a packet.
    fn keep(&self, segment: Segment<A>);
    /// What was kept of this packet.
    fn kept(&self) -> &Segment<A>;
    /// The listener at a packet's destination.
    fn listener(&self, to: &Endpoint<A>) -> Option<Listener>;
    /// The way back for a packet from a backend endpoint.
    fn return_path(&self, from: &Endpoint<A>) -> Option<&ReturnPath>;
    /// A remembered flow.
    fn flow(&self, table: FlowTable, key: &FlowKey<A>) -> Option<&FlowCell>;
    /// Remembers a flow, in place of an older one of the same key; false when
    /// the table is full.
    fn remember(&self, table: FlowTable, key: &FlowKey<A>, flow: &FlowCell) -> bool;
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

/// Where a flow is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowTable {
    /// TCP, proven: no flood reaches it.
    Established,
    /// TCP without proof: small, least recently used goes first.
    HalfOpen,
    /// UDP, which has no proof.
    Udp,
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
}

/// A [`Flow`] in a table, shared with the other CPUs: fields are read and
/// written one by one, so two CPUs never lose each other's whole entry.
#[repr(C)]
#[derive(Debug)]
pub struct FlowCell {
    /// See [`Flow::client_hop`].
    pub client_hop: Cell<u64>,
    /// See [`Flow::backend`].
    pub backend: Cell<u32>,
    /// See [`Flow::seen`].
    pub seen: Cell<u32>,
    /// See [`Flow::routed`].
    pub routed: Cell<u32>,
    /// See [`Flow::proof`].
    pub proof: Cell<u32>,
    /// See [`Flow::generation`].
    pub generation: Cell<u16>,
    /// See [`Flow::colour`].
    pub colour: Cell<u8>,
    /// See [`Flow::state`].
    pub state: Cell<u8>,
    /// See [`Flow::service`].
    pub service: Cell<u32>,
    /// See [`Flow::client_next`].
    pub client_next: Cell<u32>,
    /// See [`Flow::backend_next`].
    pub backend_next: Cell<u32>,
}

const _: () = {
    assert!(size_of::<FlowCell>() == size_of::<Flow>());
    assert!(offset_of!(FlowCell, proof) == offset_of!(Flow, proof));
    assert!(offset_of!(FlowCell, state) == offset_of!(Flow, state));
    assert!(offset_of!(FlowCell, backend_next) == offset_of!(Flow, backend_next));
};

impl FlowCell {
    /// The flow's colour.
    #[inline(always)]
    pub fn colour(&self) -> Colour {
        Colour::from_bit(self.colour.get())
    }

    /// True when all of `bits` are set.
    #[inline(always)]
    pub fn is(&self, bits: u8) -> bool {
        self.state.get() & bits == bits
    }

    /// Sets state bits; writes only a change.
    #[inline(always)]
    pub fn set(&self, bits: u8) {
        let state = self.state.get();
        if state & bits != bits {
            self.state.set(state | bits);
        }
    }

    /// Clears state bits; writes only a change.
    #[inline(always)]
    pub fn clear(&self, bits: u8) {
        let state = self.state.get();
        if state & bits != 0 {
            self.state.set(state & !bits);
        }
    }
}

impl From<Flow> for FlowCell {
    fn from(flow: Flow) -> Self {
        Self {
            client_hop: Cell::new(flow.client_hop),
            backend: Cell::new(flow.backend),
            seen: Cell::new(flow.seen),
            routed: Cell::new(flow.routed),
            proof: Cell::new(flow.proof),
            generation: Cell::new(flow.generation),
            colour: Cell::new(flow.colour),
            state: Cell::new(flow.state),
            service: Cell::new(flow.service),
            client_next: Cell::new(flow.client_next),
            backend_next: Cell::new(flow.backend_next),
        }
    }
}
