//! Incremental checksum updates (RFC 1624, equation 3).
//!
//! The one's complement sum does not depend on byte order (RFC 1071, section
//! 2), so words are taken as they stand in memory; and as 2^16 is 1 modulo
//! 2^16 - 1, it may be taken over 32-bit words and folded at the end.

/// What changes in the words that a checksum covers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta(u64);

impl Delta {
    /// Nothing changed yet.
    #[inline(always)]
    pub const fn new() -> Self {
        Self(0)
    }

    /// A 16-bit word was replaced.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, old: [u8; 2], new: [u8; 2]) -> Self {
        // Carries are folded late: 2^32 words fit before the sum overflows.
        Self(self.0 + (!u16::from_ne_bytes(old)) as u64 + u16::from_ne_bytes(new) as u64)
    }

    /// An IPv4 address or another 32-bit word was replaced.
    #[inline(always)]
    #[must_use]
    pub const fn word32(self, old: [u8; 4], new: [u8; 4]) -> Self {
        Self(self.0 + (!u32::from_ne_bytes(old)) as u64 + u32::from_ne_bytes(new) as u64)
    }

    /// An IPv6 address was replaced.
    #[inline(always)]
    #[must_use]
    pub const fn word128(self, old: [u8; 16], new: [u8; 16]) -> Self {
        let (old, new) = (quarters(old), quarters(new));
        self.word32(old[0], new[0])
            .word32(old[1], new[1])
            .word32(old[2], new[2])
            .word32(old[3], new[3])
    }

    /// What changes here and there.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// `check` after the changes: `HC' = ~(~HC + ~m + m')`.
    #[inline(always)]
    pub const fn apply(self, check: [u8; 2]) -> [u8; 2] {
        (!fold(self.0 + (!u16::from_ne_bytes(check)) as u64)).to_ne_bytes()
    }

    /// Like [`Delta::apply`], with UDP's rules (RFC 768): 0 means "no checksum"
    /// and stays 0; a computed 0 is sent as 0xffff.
    #[inline(always)]
    pub const fn apply_udp(self, check: [u8; 2]) -> [u8; 2] {
        if u16::from_ne_bytes(check) == 0 {
            return check;
        }
        match self.apply(check) {
            [0, 0] => [0xff, 0xff],
            check => check,
        }
    }
}

/// A checksum computed from nothing, over the few words of a header we write.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// An empty sum.
    #[inline(always)]
    pub const fn new() -> Self {
        Self(0)
    }

    /// Adds a 16-bit word.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, word: [u8; 2]) -> Self {
        Self(self.0 + u16::from_ne_bytes(word) as u64)
    }

    /// Adds an IPv4 address or another 32-bit word.
    #[inline(always)]
    #[must_use]
    pub const fn word32(self, word: [u8; 4]) -> Self {
        Self(self.0 + u32::from_ne_bytes(word) as u64)
    }

    /// Adds an IPv6 address.
    #[inline(always)]
    #[must_use]
    pub const fn word128(self, word: [u8; 16]) -> Self {
        let words = quarters(word);
        self.word32(words[0])
            .word32(words[1])
            .word32(words[2])
            .word32(words[3])
    }

    /// The sum over both.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// The checksum: the complement of the folded sum.
    #[inline(always)]
    pub const fn finish(self) -> [u8; 2] {
        (!fold(self.0)).to_ne_bytes()
    }
}

/// An IPv6 address as 32-bit words, each in memory order. (Taken apart by chunk,
/// not by byte, or LLVM keeps every byte in a stack slot of its own.)
#[inline(always)]
const fn quarters(address: [u8; 16]) -> [[u8; 4]; 4] {
    let words = address.as_chunks().0;
    [words[0], words[1], words[2], words[3]]
}

#[inline(always)]
const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32); // 33 bits
    let sum = (sum & 0xffff) + (sum >> 16); // 18 bits
    let sum = (sum & 0xffff) + (sum >> 16); // 17 bits
    (sum + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1624_example() {
        // Section 4: HC = 0xDD2F, m = 0x5555, m' = 0x3285 gives 0x0000.
        let delta = Delta::new().word([0x55, 0x55], [0x32, 0x85]);
        assert_eq!(delta.apply([0xdd, 0x2f]), [0, 0]);
        assert_eq!(delta.apply_udp([0xdd, 0x2f]), [0xff, 0xff]);
    }

    #[test]
    fn udp_without_checksum_stays_without() {
        assert_eq!(Delta::new().word([1, 2], [3, 4]).apply_udp([0, 0]), [0, 0]);
    }

    #[test]
    fn ipv4_header_sum() {
        // A header whose checksum is known from RFC 1071-style textbooks.
        let header = [
            [0x45, 0, 0, 0x73],
            [0, 0, 0x40, 0],
            [0x40, 0x11, 0, 0],
            [0xc0, 0xa8, 0, 1],
            [0xc0, 0xa8, 0, 0xc7],
        ];
        let sum = header.into_iter().fold(Sum::new(), Sum::word32);
        assert_eq!(sum.finish(), [0xb8, 0x61]);
    }

    #[test]
    fn wide_words_sum_like_narrow_ones() {
        let (old, new) = (
            [0xff; 16],
            [
                0xfe, 0xdc, 0, 1, 0, 0, 0, 0, 9, 8, 7, 6, 0xff, 0xff, 0xff, 0xff,
            ],
        );
        let mut narrow = Delta::new();
        for at in (0..16).step_by(2) {
            narrow = narrow.word([old[at], old[at + 1]], [new[at], new[at + 1]]);
        }
        for check in [[0, 1], [0xff, 0xff], [0x12, 0x34]] {
            assert_eq!(
                Delta::new().word128(old, new).apply(check),
                narrow.apply(check)
            );
        }
    }
}
