//! Keys of the lookup tables: endpoints, of one address family each.

use crate::port::Tags;

/// IANA protocol number of TCP.
pub const TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const UDP: u8 = 17;
/// Bit of [`Endpoint::protocol`] in the name of a second way back: see
/// [`Endpoint::preview`].
pub const PREVIEW: u8 = 1 << 7;

/// One end of a conversation: an address, a port and a protocol.
///
/// Key of the listener table (a packet's destination) and of the return table
/// (a packet's source, when that is a backend). 8 bytes for IPv4, 20 for IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint<A> {
    /// Address, network byte order.
    pub address: A,
    /// Port, network byte order.
    pub port: [u8; 2],
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    zero: u8,
}

impl<A> Endpoint<A> {
    /// An endpoint; `port` in network byte order.
    #[inline(always)]
    pub const fn new(address: A, port: [u8; 2], protocol: u8) -> Self {
        Self {
            address,
            port,
            protocol,
            zero: 0,
        }
    }

    /// Under this name is the way back from a backend's endpoint to the preview of its
    /// colour, beside the one to its listener.
    #[inline(always)]
    #[must_use]
    pub const fn preview(self) -> Self
    where
        A: Copy,
    {
        Self::new(self.address, self.port, self.protocol | PREVIEW)
    }
}

/// Key of a packet in fragments: what all of them have in common.
///
/// 24 bytes for IPv4, 48 for IPv6. The interface is no part of it: fragments of one
/// packet may come by different ways.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FragmentKey<A> {
    /// The VLAN that they came by.
    pub vlan: Tags,
    /// The packet's identification.
    pub identification: u32,
    /// IPv4: the protocol. IPv6: 0 (RFC 8200, section 4.5).
    pub protocol: u32,
    /// Where the packet comes from, network byte order.
    pub source: A,
    /// Where it goes, network byte order.
    pub destination: A,
}

/// [`FragmentKey`] over IPv4.
pub type FragmentKeyV4 = FragmentKey<[u8; 4]>;
/// [`FragmentKey`] over IPv6.
pub type FragmentKeyV6 = FragmentKey<[u8; 16]>;
/// [`Endpoint`] over IPv4.
pub type EndpointV4 = Endpoint<[u8; 4]>;
/// [`Endpoint`] over IPv6.
pub type EndpointV6 = Endpoint<[u8; 16]>;
