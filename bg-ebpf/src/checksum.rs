//! Incremental checksum updates (RFC 1624, equation 3).
//!
//! The one's complement sum does not depend on byte order (RFC 1071, section
//! 2), so 16-bit words are taken as they stand in memory.

/// What changes in the words that a checksum covers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta(u32);

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
        // Carries are folded late: 0x1_0000 words fit before the sum overflows.
        Self(self.0 + (!u16::from_ne_bytes(old)) as u32 + u16::from_ne_bytes(new) as u32)
    }

    /// An IPv4 address or another pair of words was replaced.
    #[inline(always)]
    #[must_use]
    pub const fn words2(self, old: [u8; 4], new: [u8; 4]) -> Self {
        self.word([old[0], old[1]], [new[0], new[1]])
            .word([old[2], old[3]], [new[2], new[3]])
    }

    /// An IPv6 address was replaced.
    #[inline(always)]
    #[must_use]
    pub const fn words8(self, old: [u8; 16], new: [u8; 16]) -> Self {
        let mut delta = self;
        let mut at = 0;
        while at < 16 {
            delta = delta.word([old[at], old[at + 1]], [new[at], new[at + 1]]);
            at += 2;
        }
        delta
    }

    /// `check` after the changes: `HC' = ~(~HC + ~m + m')`.
    #[inline(always)]
    pub const fn apply(self, check: [u8; 2]) -> [u8; 2] {
        (!fold(self.0 + (!u16::from_ne_bytes(check)) as u32)).to_ne_bytes()
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
pub struct Sum(u32);

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
        Self(self.0 + u16::from_ne_bytes(word) as u32)
    }

    /// Adds `N` bytes, `N` even.
    #[inline(always)]
    #[must_use]
    pub fn bytes<const N: usize>(self, bytes: [u8; N]) -> Self {
        const { assert!(N.is_multiple_of(2)) }
        let mut sum = self;
        let mut at = 0;
        while at < N {
            sum = sum.word([bytes[at], bytes[at + 1]]);
            at += 2;
        }
        sum
    }

    /// The checksum: the complement of the folded sum.
    #[inline(always)]
    pub const fn finish(self) -> [u8; 2] {
        (!fold(self.0)).to_ne_bytes()
    }
}

#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
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
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0,
            0xc7,
        ];
        assert_eq!(Sum::new().bytes(header).finish(), [0xb8, 0x61]);
    }
}
