//! Where a frame comes in and leaves: an interface, and the VLAN tags on it.

/// Up to two VLAN tags in front of a frame's EtherType, outer tag first (IEEE
/// 802.1Q; 802.1ad, "QinQ"). As one number: the 8 bytes as they stand in the
/// frame, first byte highest; a missing tag is zero.
///
/// A tag is a protocol (EtherType, [`Tags::C`] or [`Tags::S`]), then three bits of
/// priority, the drop-eligible bit, and twelve bits of VLAN id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(transparent)]
pub struct Tags(pub u64);

impl Tags {
    /// No tag.
    pub const NONE: Self = Self(0);
    /// EtherType of an 802.1Q tag.
    pub const C: u16 = 0x8100;
    /// EtherType of an 802.1ad service tag.
    pub const S: u16 = 0x88a8;

    const VLAN: u64 = 0xffff_0fff;
    const ID: u64 = 0xfff;
    const PRIORITY: u64 = 0xf000;

    /// One tag: its protocol, and the two bytes behind it.
    #[inline(always)]
    pub const fn new(protocol: u16, control: u16) -> Self {
        Self((protocol as u64) << 48 | (control as u64) << 32)
    }

    /// With another tag inside of the one that is there; `None` when there are two
    /// already.
    pub const fn with_inner(self, protocol: u16, control: u16) -> Option<Self> {
        match self.count() {
            0 => Some(Self::new(protocol, control)),
            1 => Some(Self(self.0 | Self::new(protocol, control).0 >> 32)),
            _ => None,
        }
    }

    /// How many tags there are.
    #[inline(always)]
    pub const fn count(self) -> usize {
        (self.0 != 0) as usize + (self.0 as u32 != 0) as usize
    }

    /// True for the EtherType of a tag.
    #[inline(always)]
    pub const fn is_tag(ether_type: [u8; 2]) -> bool {
        matches!(u16::from_be_bytes(ether_type), Self::C | Self::S)
    }

    /// The VLAN: without priorities, and without tags that carry nothing else (id
    /// 0), as the kernel takes them.
    #[inline(always)]
    #[must_use]
    pub const fn vlan(self) -> Self {
        let (outer, inner) = (self.0 >> 32 & Self::VLAN, self.0 & Self::VLAN);
        let inner = if inner & Self::ID == 0 { 0 } else { inner };
        if outer & Self::ID == 0 {
            Self(inner << 32)
        } else {
            Self(outer << 32 | inner)
        }
    }

    /// The same tags with the priorities of `from`, tag by tag where both have one.
    #[inline(always)]
    #[must_use]
    pub const fn with_priority_of(self, from: Self) -> Self {
        const BOTH: u64 = Tags::PRIORITY << 32 | Tags::PRIORITY;
        let has = match self.count() {
            0 => 0,
            1 => Self::PRIORITY << 32,
            _ => BOTH,
        };
        Self(self.0 & !BOTH | from.0 & has)
    }
}

/// An interface and the VLAN on it. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Port {
    /// The VLAN, as in [`Tags::vlan`].
    pub vlan: Tags,
    /// Kernel interface index.
    pub ifindex: u32,
    zero: u32,
}

impl Port {
    /// The VLAN of the interface `ifindex`.
    #[inline(always)]
    pub const fn new(ifindex: u32, vlan: Tags) -> Self {
        Self {
            vlan,
            ifindex,
            zero: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_stand_as_in_a_frame() {
        let tags = Tags::new(Tags::S, 0x2064).with_inner(Tags::C, 0x00c8);
        let bytes = [0x88, 0xa8, 0x20, 0x64, 0x81, 0, 0, 0xc8];
        assert_eq!(tags.map(|tags| tags.0.to_be_bytes()), Some(bytes));
        assert_eq!(tags.map(Tags::count), Some(2));
        assert_eq!(tags.and_then(|tags| tags.with_inner(Tags::C, 1)), None);
    }

    #[test]
    fn a_vlan_has_no_priority() {
        let tags =
            |outer, inner| Tags(Tags::new(Tags::S, outer).0 | Tags::new(Tags::C, inner).0 >> 32);
        assert_eq!(tags(0xe064, 0x10c8).vlan(), tags(0x64, 0xc8));
        assert_eq!(Tags::new(Tags::C, 0xa000).vlan(), Tags::NONE);
        assert_eq!(tags(0xa000, 0xc8).vlan(), Tags::new(Tags::C, 0xc8));
        assert_eq!(tags(0x64, 0xa000).vlan(), Tags::new(Tags::S, 0x64));
    }

    #[test]
    fn priorities_go_over_tag_by_tag() {
        let one = |control| Tags::new(Tags::C, control);
        let two = one(0x64).with_inner(Tags::C, 0xc8).unwrap();
        assert_eq!(one(0x64).with_priority_of(one(0xa0c8)), one(0xa064));
        assert_eq!(two.with_priority_of(one(0xa0c8)).0, 0x8100_a064_8100_00c8);
        assert_eq!(Tags::NONE.with_priority_of(one(0xa0c8)), Tags::NONE);
    }
}
