//! What flips: colours, the cut-over word, backends, listeners and flow entries.

use crate::port::{Port, Tags};

/// One complete environment of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Colour {
    /// The first environment.
    Blue = 0,
    /// The second environment.
    Green = 1,
}

impl Colour {
    /// Both colours, in index order.
    pub const ALL: [Self; 2] = [Self::Blue, Self::Green];

    /// The colour of the lowest bit of `bits`.
    #[inline(always)]
    pub const fn from_bit(bits: u8) -> Self {
        if bits & 1 == 0 {
            Self::Blue
        } else {
            Self::Green
        }
    }

    /// The other colour.
    #[inline(always)]
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Blue => Self::Green,
            Self::Green => Self::Blue,
        }
    }

    /// `"blue"` or `"green"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blue => "blue",
            Self::Green => "green",
        }
    }
}

/// The 8 bytes per service that the packet path reads once per packet.
///
/// Stored and loaded as one aligned `u64`, so no packet sees a mix:
///
/// | bits | field |
/// | --- | --- |
/// | 0 | active colour |
/// | 1 | the floor is a drain's end |
/// | 8 | floor is armed |
/// | 9..16 | spared: a flow below the floor whose spread lies below this is not reset yet |
/// | 16..32 | canary share: parts of 65 536 of new flows that go to the standby |
/// | 32..48 | generation |
/// | 48..64 | floor: with the floor armed, a flow of the standby colour born in a generation before it is reset |
///
/// A spread is a flow's own number below [`SPREADS`], see [`colour_spread`]. When a
/// drain ends, the floor rises with almost all of them spared, and the daemon
/// lowers that number step by step to 0; a cut spares none from the start.
///
/// Generations are compared by serial-number arithmetic (RFC 1982, 16 bits): a
/// floor reaches back 32 767 flips.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct CutoverWord(pub u64);

/// How many spreads there are: 7 bits.
pub const SPREADS: u8 = 128;

/// What a flow keeps of its birth in one byte: its colour in bit 0, its spread, of
/// the lowest bits of `hash`, above.
#[inline(always)]
pub const fn colour_spread(colour: Colour, hash: u64) -> u8 {
    (hash as u8) << 1 | colour as u8
}

impl CutoverWord {
    const DRAINED: u64 = 1 << 1;
    const FLOOR_ARMED: u64 = 1 << 8;
    const SPARED: u64 = (SPREADS as u64 - 1) << 9;

    /// Generation 0, no canary, no floor.
    pub const fn new(active: Colour) -> Self {
        Self(active as u64)
    }

    /// The colour that new flows go to.
    #[inline(always)]
    pub const fn active(self) -> Colour {
        Colour::from_bit(self.0 as u8)
    }

    /// Parts of 65 536 of new flows that go to the standby.
    #[inline(always)]
    pub const fn canary(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// How often the service has flipped, or a canary was rolled back, modulo
    /// 65 536.
    #[inline(always)]
    pub const fn generation(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// The armed floor, if any.
    #[inline(always)]
    pub const fn floor(self) -> Option<u16> {
        if self.0 & Self::FLOOR_ARMED == 0 {
            None
        } else {
            Some((self.0 >> 48) as u16)
        }
    }

    /// Flows below the floor whose spread lies below this are not reset yet.
    #[inline(always)]
    pub const fn spared(self) -> u8 {
        (self.0 >> 9) as u8 & (SPREADS - 1)
    }

    /// True when a flow with this [`Flow::colour_spread`], born in `generation`, is
    /// to be reset.
    #[inline(always)]
    pub const fn resets(self, colour_spread: u8, generation: u16) -> bool {
        if self.active() as u8 == colour_spread & 1 {
            return false;
        }
        match self.floor() {
            Some(floor) => {
                (generation.wrapping_sub(floor) as i16) < 0 && colour_spread >> 1 >= self.spared()
            }
            None => false,
        }
    }

    /// True when the flows of its standby colour born in `generation` are the old
    /// ones: those that a drain of this word is about.
    #[inline(always)]
    pub const fn is_old(self, colour: Colour, generation: u16) -> bool {
        self.active() as u8 != colour as u8
            && (generation.wrapping_sub(self.generation()) as i16) < 0
    }

    /// The colour of a new flow whose hash is `hash`.
    #[inline(always)]
    pub const fn colour_for(self, hash: u32) -> Colour {
        if ((hash >> 16) as u16) < self.canary() {
            self.active().other()
        } else {
            self.active()
        }
    }

    /// The word after a flip to `to`: the next generation, no canary, and, with
    /// `cut`, a floor that resets every flow of the other colour. An older floor
    /// was meant for the colour that is active now, and goes. With the colour that
    /// is active already, a canary is taken back.
    #[must_use]
    pub const fn flipped(self, to: Colour, cut: bool) -> Self {
        let generation = self.generation().wrapping_add(1);
        let word = Self(to as u64 | (generation as u64) << 32);
        if cut {
            word.with_floor(generation)
        } else {
            word
        }
    }

    /// The same word with the floor raised to its own generation: every flow of
    /// the standby colour born before the last flip is reset, but for those whose
    /// spread is below `spared` (at most 127).
    #[must_use]
    pub const fn drained(self, spared: u8) -> Self {
        let spared = (spared & (SPREADS - 1)) as u64;
        let word = self.with_floor(self.generation());
        Self(word.0 & !Self::SPARED | Self::DRAINED | spared << 9)
    }

    /// True when what this word resets, it resets because a drain's time is over, not
    /// because somebody cut.
    #[inline(always)]
    pub const fn is_drained(self) -> bool {
        self.0 & Self::DRAINED != 0
    }

    /// How many spreads the end of a drain spares in this word: all of them before
    /// it has begun, 0 when it is done.
    pub const fn drain_spares(self) -> u8 {
        match self.floor() {
            Some(floor) if floor == self.generation() => self.spared(),
            _ => SPREADS,
        }
    }

    /// The same word, with its drain as near to its end as that of `other`.
    #[must_use]
    pub const fn ended_as(self, other: Self) -> Self {
        if other.is_drained() {
            self.drained(other.spared())
        } else {
            self
        }
    }

    /// The same word with another canary share.
    #[must_use]
    pub const fn with_canary(self, share: u16) -> Self {
        Self(self.0 & !(0xffff << 16) | (share as u64) << 16)
    }

    const fn with_floor(self, floor: u16) -> Self {
        Self(self.0 & !(0xffff << 48) | Self::FLOOR_ARMED | (floor as u64) << 48)
    }
}

/// When the first new flow of a generation was seen: generation in the high 16
/// bits, `CLOCK_MONOTONIC` nanoseconds modulo 2^48 (78 hours) in the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct FirstFlow(pub u64);

impl FirstFlow {
    /// A stamp of `generation` at `ns` since boot.
    #[inline(always)]
    pub const fn new(generation: u16, ns: u64) -> Self {
        Self((generation as u64) << 48 | ns & 0xffff_ffff_ffff)
    }

    /// The generation that the stamp belongs to.
    #[inline(always)]
    pub const fn generation(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// Nanoseconds from `since` (same clock) to the stamp; 0 if it lies before.
    pub const fn ns_since(self, since: u64) -> u64 {
        let delta = self.0.wrapping_sub(since) & 0xffff_ffff_ffff;
        if delta >> 47 == 0 { delta } else { 0 }
    }
}

/// Where a rewritten packet leaves: the next hop's MAC address and the slot of
/// the interface, in one word, so that a change of neighbour is one store.
///
/// Bits 0..48 hold the MAC (first byte lowest), bits 48..64 slot + 1;
/// 0 means "not resolved".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct NextHop(pub u64);

impl NextHop {
    /// Not resolved.
    pub const NONE: Self = Self(0);

    /// The neighbour `mac` behind the interface in `slot`.
    #[inline(always)]
    pub const fn new(mac: [u8; 6], slot: u16) -> Self {
        let [a, b, c, d, e, f] = mac;
        Self(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]) | (slot as u64 + 1) << 48)
    }

    /// The neighbour's MAC address.
    #[inline(always)]
    pub const fn mac(self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.0.to_le_bytes();
        [a, b, c, d, e, f]
    }

    /// The interface's slot, `None` while not resolved.
    #[inline(always)]
    pub const fn slot(self) -> Option<u16> {
        let slot = (self.0 >> 48) as u16;
        if slot == 0 { None } else { Some(slot - 1) }
    }
}

/// A slot of the interface table: an interface that XDP is attached to or a VLAN of
/// it, and what to put into frames that leave there. The same slot of the device map
/// holds the ifindex.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Interface {
    /// VLAN tags of frames that leave, without priorities.
    pub tags: Tags,
    /// Kernel index of the interface with XDP; 0 = unused slot.
    pub ifindex: u32,
    /// Kernel index of the device that the routes name: a VLAN device, or the
    /// interface itself.
    pub device: u32,
    /// Largest L3 packet, bytes.
    pub mtu: u32,
    /// The device's own MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub zero: [u8; 6],
}

impl Interface {
    /// Where its frames come in and leave.
    #[inline(always)]
    pub const fn port(&self) -> Port {
        Port::new(self.ifindex, self.tags)
    }
}

/// A server of one colour.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Backend {
    /// [`NextHop`] word, first so that it is aligned: replaced by one store.
    pub next_hop: u64,
    /// Address, network byte order; IPv4 in the first four bytes, rest zero.
    pub address: [u8; 16],
    /// Port, network byte order; 0 = the listener's port.
    pub port: [u8; 2],
    /// 4 or 6; 0 = unused slot.
    pub family: u8,
    /// [`Colour`] as a bit.
    pub colour: u8,
    /// Service id.
    pub service: u16,
    /// Block of source ports towards its address: see [`crate::snat`]; 0 = none.
    pub block: u16,
}

/// What a listener endpoint belongs to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Listener {
    /// Service id: index of the word, the pools and the statistics.
    pub service: u32,
    /// Listener id: part of every [`crate::flow::FlowKey`]; unique per host, never 0.
    pub id: u16,
    /// How packets are forwarded: `forward::*`.
    pub forward: u8,
    /// A preview: all of its flows are of this colour, plus 1. 0 = new flows are of the
    /// word's colours.
    pub only: u8,
    /// UDP: a flow silent for longer is new again. In [ticks](crate::abi::TICK_SHIFT).
    pub idle: u32,
}

impl Listener {
    /// The colour of a new flow whose hash is `hash`.
    #[inline(always)]
    pub const fn colour_for(&self, word: CutoverWord, hash: u32) -> Colour {
        match self.preview_of() {
            None => word.colour_for(hash),
            Some(colour) => colour,
        }
    }

    /// The one colour that a preview reaches.
    #[inline(always)]
    pub const fn preview_of(&self) -> Option<Colour> {
        match self.only {
            0 => None,
            only => Some(Colour::from_bit(only - 1)),
        }
    }

    /// [`Listener::only`] of a preview of this colour, or of no preview.
    pub const fn only(colour: Option<Colour>) -> u8 {
        match colour {
            None => 0,
            Some(colour) => colour as u8 + 1,
        }
    }

    /// True for what always reaches one colour.
    #[inline(always)]
    pub const fn is_preview(&self) -> bool {
        self.only != 0
    }
}

/// What a packet from a backend endpoint is rewritten back to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ReturnPath {
    /// The listener's address, network byte order; IPv4 in the first four bytes.
    pub address: [u8; 16],
    /// The listener's port, network byte order.
    pub port: [u8; 2],
    /// The listener's id.
    pub listener: u16,
    /// Service id.
    pub service: u16,
    /// The backend's block of source ports: see [`crate::snat`]; 0 = none.
    pub block: u16,
    /// Not 0: there is another way back, see [`crate::key::Endpoint::preview`].
    pub previewed: u16,
}

/// Values of [`Listener::forward`]: what a backend sees of its clients.
pub mod forward {
    /// The destination is rewritten, and replies come back through here.
    pub const NAT: u8 = 0;
    /// The source too: replies come back to the gateway's own address.
    pub const SNAT: u8 = 1;
    /// Nothing is rewritten: the backend has the listener's address, and replies
    /// to the client itself (direct server return).
    pub const DSR: u8 = 2;
}

/// A pool's slice of the Maglev arena, in one word: rows base in the low half,
/// number of slots in the high half. 0 slots = the pool is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct PoolWord(pub u64);

impl PoolWord {
    /// `slots` slots starting at slot `base` of the arena.
    pub const fn new(base: u32, slots: u32) -> Self {
        Self(base as u64 | (slots as u64) << 32)
    }

    /// First slot in the arena.
    #[inline(always)]
    pub const fn base(self) -> u32 {
        self.0 as u32
    }

    /// Number of slots.
    #[inline(always)]
    pub const fn slots(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The arena slot for `hash`, `None` for an empty pool.
    #[inline(always)]
    pub const fn slot(self, hash: u32) -> Option<u32> {
        if self.slots() == 0 {
            return None;
        }
        Some(
            self.base()
                .wrapping_add(((hash as u64 * self.slots() as u64) >> 32) as u32),
        )
    }

    /// Index of a pool's word in the pool table.
    #[inline(always)]
    pub const fn index(service: u32, colour: Colour, v6: bool) -> u32 {
        service * 4 + colour as u32 * 2 + v6 as u32
    }
}

/// What became of a packet's first fragment, and becomes of the later ones. 56 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Fragment {
    /// [`NextHop`] word; where it is not resolved the stack takes the fragments.
    pub next_hop: u64,
    /// What the rewritten end becomes; IPv4 in the first four bytes, rest zero.
    pub address: [u8; 16],
    /// What the other end becomes in `snat`; zero in other modes.
    pub other: [u8; 16],
    /// When the first fragment came, in [ticks](crate::abi::TICK_SHIFT).
    pub seen: u32,
    /// Service id.
    pub service: u32,
    /// [`Colour`] as a bit.
    pub colour: u32,
    /// `way::*`.
    pub way: u16,
    /// How the backend sees the client: see [`crate::snat::via`].
    pub via: u16,
}

/// Values of [`Fragment::way`].
pub mod way {
    /// Nowhere.
    pub const NOWHERE: u16 = 0;
    /// Nowhere: the flow was cut.
    pub const CUT: u16 = 1;
    /// To a backend: the destination is rewritten.
    pub const FORWARD: u16 = 2;
    /// To a client: the source is rewritten.
    pub const BACK: u16 = 3;
}

/// Per service and colour, per CPU. Index: `service * 2 + colour`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ColourStats {
    /// Packets sent to backends.
    pub forward_packets: u64,
    /// Bytes of those, from the IP header.
    pub forward_bytes: u64,
    /// Packets sent back to clients.
    pub return_packets: u64,
    /// Bytes of those, from the IP header.
    pub return_bytes: u64,
    /// Flows that chose this colour.
    pub new_flows: u64,
    /// TCP resets sent, to either side, because somebody cut.
    pub cut_resets: u64,
    /// The same, because a drain's time was over.
    pub drain_resets: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Flow;

    /// The first flows to be spared, and the last ones.
    const BLUE: u8 = Colour::Blue as u8;
    const GREEN: u8 = Colour::Green as u8;

    /// Words that differ in each field, some of it at its limits.
    fn words() -> impl Iterator<Item = CutoverWord> {
        (0..2000u64).map(|n| CutoverWord(crate::maglev::mix(n)))
    }

    #[test]
    fn flip_changes_colour_and_generation_and_drops_the_canary() {
        let word = CutoverWord::new(Colour::Blue).with_canary(655);
        let next = word.flipped(Colour::Green, false);
        assert_eq!(
            (
                next.active(),
                next.generation(),
                next.canary(),
                next.floor()
            ),
            (Colour::Green, 1, 0, None)
        );
    }

    #[test]
    fn cut_resets_only_the_colour_that_is_left() {
        let word = CutoverWord::new(Colour::Blue).flipped(Colour::Green, true);
        assert!(word.resets(BLUE, 0));
        assert!(!word.resets(GREEN, 0));
    }

    #[test]
    fn rollback_with_cut_spares_old_flows_of_the_good_colour() {
        let flipped = CutoverWord::new(Colour::Blue).flipped(Colour::Green, false);
        let back = flipped.flipped(Colour::Blue, true);
        assert!(!back.resets(BLUE, 0));
        assert!(back.resets(GREEN, 1));
    }

    #[test]
    fn drained_flows_fall_when_the_floor_rises() {
        let word = CutoverWord::new(Colour::Blue).flipped(Colour::Green, false);
        assert!(!word.resets(BLUE, 0));
        assert!(word.drained(0).resets(BLUE, 0));
    }

    #[test]
    fn drain_flips_never_reset_however_often_the_generation_wraps() {
        let mut word = CutoverWord::new(Colour::Blue);
        for _ in 0..100_001 {
            word = word.flipped(word.active().other(), false);
            assert!(!word.resets(word.active().other() as u8, 0));
        }
        assert_eq!(word.generation(), (100_001u32 % 65_536) as u16);
    }

    #[test]
    fn a_drain_flip_after_a_rollback_spares_the_flows_it_drains() {
        let back = CutoverWord::new(Colour::Blue)
            .flipped(Colour::Green, false)
            .flipped(Colour::Blue, true);
        let again = back.flipped(Colour::Green, false);
        assert!(!again.resets(BLUE, 0));
        assert!(!again.resets(BLUE, 2));
    }

    #[test]
    fn a_drain_that_ends_resets_one_spread_after_the_other_and_then_all() {
        for before in words() {
            let before = before.flipped(before.active().other(), false);
            let old = before.generation().wrapping_sub(1);
            let standby = before.active().other();
            let mut word = before;
            for spared in (0..SPREADS).rev() {
                word = word.drained(spared);
                assert_eq!((word.spared(), word.drain_spares()), (spared, spared));
                assert!(word.is_drained());
                assert_eq!(word.canary(), before.canary());
                for spread in 0..SPREADS {
                    let flow = colour_spread(standby, u64::from(spread));
                    assert_eq!(word.resets(flow, old), spread >= spared);
                    // Neither what was born since, nor the other colour.
                    assert!(!word.resets(flow, word.generation()));
                    assert!(!word.resets(flow ^ 1, old));
                }
            }
            let cut = before.flipped(standby, true);
            assert_eq!((cut.spared(), cut.drain_spares()), (0, 0));
        }
    }

    #[test]
    fn a_flip_or_a_rollback_forgets_what_was_spared() {
        for word in words() {
            let word = word.drained(77).with_canary(9);
            for to in Colour::ALL {
                for cut in [false, true] {
                    let next = word.flipped(to, cut);
                    assert_eq!((next.spared(), next.canary()), (0, 0));
                    assert!(word.is_drained() && !next.is_drained());
                    assert_eq!(next.ended_as(next), next);
                    assert_eq!(next.floor().is_some(), cut);
                    assert_eq!(next.drain_spares(), if cut { 0 } else { SPREADS });
                }
            }
        }
    }

    #[test]
    fn fields_do_not_touch_each_other() {
        for word in words() {
            for share in [0, 1, 0x7fff, u16::MAX] {
                let changed = word.with_canary(share);
                assert_eq!(changed.canary(), share);
                assert_eq!(changed.with_canary(word.canary()), word);
            }
            let drained = word.drained(5);
            assert_eq!(drained.floor(), Some(word.generation()));
            assert_eq!(
                (drained.active(), drained.generation(), drained.canary()),
                (word.active(), word.generation(), word.canary())
            );
        }
    }

    #[test]
    fn a_canary_that_is_taken_back_loses_its_flows_and_the_active_colour_none() {
        let canary = CutoverWord::new(Colour::Blue).with_canary(655);
        let back = canary.flipped(Colour::Blue, true);
        assert_eq!(
            (back.active(), back.canary(), back.generation()),
            (Colour::Blue, 0, 1)
        );
        assert!(back.resets(GREEN, 0) && !back.resets(BLUE, 0));
    }

    #[test]
    fn a_flow_keeps_its_colour_beside_its_spread() {
        for hash in 0..=255u64 {
            for colour in Colour::ALL {
                let flow = Flow {
                    colour_spread: colour_spread(colour, hash),
                    ..Flow::default()
                };
                assert_eq!(flow.colour(), colour);
                assert_eq!(u64::from(flow.colour_spread >> 1), hash % 128);
            }
        }
    }

    #[test]
    fn canary_share_is_a_share() {
        let word = CutoverWord::new(Colour::Blue).with_canary(0x8000);
        assert_eq!(word.colour_for(0x7fff_0000), Colour::Green);
        assert_eq!(word.colour_for(0x8000_0000), Colour::Blue);
    }

    #[test]
    fn next_hop_round_trip() {
        let hop = NextHop::new([2, 0, 0, 0, 1, 9], 0);
        assert_eq!((hop.mac(), hop.slot()), ([2, 0, 0, 0, 1, 9], Some(0)));
        assert_eq!(NextHop::NONE.slot(), None);
    }

    #[test]
    fn first_flow_survives_the_wrap_of_48_bits() {
        let stamp = FirstFlow::new(7, (1 << 48) + 5);
        assert_eq!(stamp.generation(), 7);
        assert_eq!(stamp.ns_since((1 << 48) - 10), 15);
        assert_eq!(stamp.ns_since((1 << 48) + 10), 0);
    }
}
