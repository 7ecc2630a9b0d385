//! The directory: whose an endpoint is.
//!
//! Each packet asks once or twice whose an address and a port are: a listener's, a
//! backend's, or nobody's. The daemon alone writes the directory, and seldom, so it
//! is hashed without collisions (hash and displace; Belazzougui, Botelho and
//! Dietzfelbinger, 2009): an endpoint's hash names a *pilot*, hash and pilot name the
//! one line where it lies if it is there at all. A packet looks at one pilot, and at
//! one line at most; where no endpoint has the pilot, at none.
//!
//! There are two halves. Packets read the one that the [`DirectoryWord`] names; the
//! daemon writes the other one, and then the word, in one store.

use crate::{
    abi::capacity,
    key::PREVIEW,
    service::{Listener, ReturnPath},
};

/// Pilots in one row of their array: 64 bytes.
pub const PILOT_ROW: u32 = 32;

/// A row of pilots.
pub type PilotRow = [u16; PILOT_ROW as usize];

/// Pilots of one half, at most.
pub const PILOTS: u32 = capacity::ENDPOINTS as u32;
/// Lines of one half, at most: not more than half of them are ever taken.
pub const LINES: u32 = 2 * capacity::ENDPOINTS as u32;

/// An endpoint of either family, as a line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The address as two words, as [`crate::flow::FlowKey::client`] has it.
    pub address: [u64; 2],
    /// Port (network byte order), protocol and family (4 or 6), a byte each: never 0.
    pub tag: u32,
}

impl Name {
    /// The name of an endpoint; `port` in network byte order.
    #[inline(always)]
    pub const fn new(address: [u64; 2], port: [u8; 2], protocol: u8, family: u8) -> Self {
        Self {
            address,
            tag: u32::from_ne_bytes([port[0], port[1], protocol, family]),
        }
    }

    /// The name of the way back to a preview: [`crate::key::Endpoint::preview`].
    #[must_use]
    pub const fn preview(self) -> Self {
        let [a, b, protocol, family] = self.tag.to_ne_bytes();
        Self::new(self.address, [a, b], protocol | PREVIEW, family)
    }

    /// True for such a name.
    pub const fn is_preview(&self) -> bool {
        self.parts().1 & PREVIEW != 0
    }

    /// Port (network byte order), protocol and family.
    pub const fn parts(&self) -> ([u8; 2], u8, u8) {
        let [a, b, protocol, family] = self.tag.to_ne_bytes();
        ([a, b], protocol, family)
    }

    /// The hash under a seed: its highest bits are the ones to use. An IPv4 address and
    /// its tag share no bit, so that no two of them have the same hash.
    #[inline(always)]
    pub const fn hash(&self, seed: u32) -> u64 {
        let seed = (seed as u64) << 32;
        let hash = (self.address[1] ^ self.tag as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if self.address[0] == 0 {
            return hash;
        }
        let hash = hash ^ (hash >> 32) ^ self.address[0];
        hash.wrapping_mul(0xd6e8_feb8_6659_fd93)
    }
}

/// A line of the directory: one cache line, 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// [`Name::address`].
    pub address: [u64; 2],
    /// [`Name::tag`]; 0 = the line is free.
    pub tag: u32,
    /// The listener with this endpoint; one with id 0 is none.
    pub listener: Listener,
    /// The way back from the backend with this endpoint; to listener 0 there is none.
    pub path: ReturnPath,
    zero: [u8; 6],
}

impl Entry {
    /// Whose the endpoint with this name is.
    pub const fn new(name: Name, listener: Listener, path: ReturnPath) -> Self {
        Self {
            address: name.address,
            tag: name.tag,
            listener,
            path,
            zero: [0; 6],
        }
    }

    /// Its name.
    pub const fn name(&self) -> Name {
        Name {
            address: self.address,
            tag: self.tag,
        }
    }

    /// The listener, if there is one.
    #[inline(always)]
    pub const fn listener(&self) -> Option<Listener> {
        if self.listener.id == 0 {
            return None;
        }
        Some(self.listener)
    }

    /// The way back, if there is one.
    #[inline(always)]
    pub const fn path(&self) -> Option<&ReturnPath> {
        if self.path.listener == 0 {
            return None;
        }
        Some(&self.path)
    }
}

/// Which half of the directory is read, how large it is, and the seed of its hash.
///
/// | bits | field |
/// | --- | --- |
/// | 0..32 | seed |
/// | 32..40 | a pilot's index is this many bits shorter than a hash |
/// | 40..48 | a line's index is |
/// | 48 | which half |
///
/// 0 is an empty directory: in arrays that were never written every pilot is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct DirectoryWord(pub u64);

impl DirectoryWord {
    /// The first half, of so many pilots and lines: powers of two, at least 2.
    pub const fn new(seed: u32, pilots: u32, lines: u32) -> Self {
        let [pilots, lines] = [64 - pilots.ilog2() as u64, 64 - lines.ilog2() as u64];
        Self(seed as u64 | pilots << 32 | lines << 40)
    }

    /// The same in the other half than `held` is in.
    #[must_use]
    pub const fn beside(self, held: Self) -> Self {
        Self(self.0 & !(1 << 48) | (held.0 ^ 1 << 48) & 1 << 48)
    }

    /// 0 or 1.
    #[inline(always)]
    pub const fn half(self) -> u32 {
        (self.0 >> 48) as u32 & 1
    }

    /// The seed of its hash.
    #[inline(always)]
    pub const fn seed(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    const fn pilot_shift(self) -> u64 {
        self.0 >> 32 & 63
    }

    #[inline(always)]
    const fn line_shift(self) -> u64 {
        self.0 >> 40 & 63
    }

    /// Number of pilots.
    pub const fn pilots(self) -> u32 {
        match self.pilot_shift() {
            0 => 0,
            shift => 1 << (64 - shift),
        }
    }

    /// Number of lines.
    pub const fn lines(self) -> u32 {
        match self.line_shift() {
            0 => 0,
            shift => 1 << (64 - shift),
        }
    }

    /// Index of the pilot of the endpoint with this hash, among those of both halves.
    #[inline(always)]
    pub const fn pilot(self, hash: u64) -> u32 {
        self.half() * PILOTS + (hash >> self.pilot_shift()) as u32
    }

    /// Index of its line, among those of both halves.
    #[inline(always)]
    pub const fn line(self, hash: u64, pilot: u16) -> u32 {
        let moved = hash ^ (pilot as u64).wrapping_mul(0xa24b_aed4_963e_e407);
        let moved = moved.wrapping_mul(0x9fb2_1c65_1e98_df25);
        self.half() * LINES + (moved >> self.line_shift()) as u32
    }
}

/// The arrays of the directory, as somebody who looks up sees them.
pub trait Directory {
    /// The word: read once a look-up.
    fn word(&self) -> DirectoryWord;
    /// The pilot at an index, those of both halves counted.
    fn pilot(&self, index: u32) -> Option<u16>;
    /// The line at an index, those of both halves counted.
    fn line(&self, index: u32) -> Option<&Entry>;

    /// Whose the endpoint with this name is.
    #[inline(always)]
    fn find(&self, name: &Name) -> Option<&Entry> {
        let word = self.word();
        let hash = name.hash(word.seed());
        let pilot = self.pilot(word.pilot(hash))?;
        if pilot == 0 {
            return None; // nobody's
        }
        let entry = self.line(word.line(hash, pilot))?;
        let is_its = entry.tag == name.tag
            && entry.address[1] == name.address[1]
            && entry.address[0] == name.address[0];
        is_its.then_some(entry)
    }
}
