//! The one bounds-checked door to packet bytes.
//!
//! Everything else in this library asks here for a header at an offset and gets
//! `None` when the frame ends before it. **If a view is `Some`, every field of
//! it lies inside the frame**, until [`Packet::truncate`], [`Packet::grow`] or
//! [`Packet::shrink`] is called, which take the packet mutably and so end all views.
#![allow(unsafe_code)]

use bg_common::port::{Port, Tags};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

/// Length of an Ethernet header, bytes.
pub const ETHERNET: usize = size_of::<Ethernet>();

/// Ethernet header. (The one of network-types is aligned to two bytes, which a
/// byte buffer on the host does not promise.)
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ethernet {
    /// Destination MAC.
    pub destination: [u8; 6],
    /// Source MAC.
    pub source: [u8; 6],
    /// EtherType, network byte order.
    pub ether_type: [u8; 2],
}

/// TCP header without options (RFC 9293, section 3.1). (The one of
/// network-types reads flags bit by bit; here they are one byte.)
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tcp {
    /// Source port, network byte order.
    pub source: [u8; 2],
    /// Destination port, network byte order.
    pub destination: [u8; 2],
    /// Sequence number, network byte order.
    pub sequence: [u8; 4],
    /// Acknowledgement number, network byte order.
    pub acknowledgement: [u8; 4],
    /// Data offset in 32-bit words in the high four bits.
    pub offset: u8,
    /// `tcp_flag::*` bits.
    pub flags: u8,
    /// Window, network byte order.
    pub window: [u8; 2],
    /// Checksum, network byte order.
    pub check: [u8; 2],
    /// Urgent pointer, network byte order.
    pub urgent: [u8; 2],
}

/// Bits of [`Tcp::flags`].
pub mod tcp_flag {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 1 << 1;
    /// Reset the connection.
    pub const RST: u8 = 1 << 2;
    /// The acknowledgement number is valid.
    pub const ACK: u8 = 1 << 4;
}

/// ICMP or ICMPv6 header of an error (RFC 792, RFC 4443).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Checksum, network byte order.
    pub check: [u8; 2],
    /// By type: the MTU of a "too big", else unused.
    pub rest: [u8; 4],
}

/// A frame that starts with an Ethernet header.
pub trait Packet {
    /// Address of the first byte.
    fn start(&self) -> usize;
    /// Address after the last byte that a view may show: of the first buffer, where
    /// the frame lies in several.
    fn end(&self) -> usize;
    /// Length of the frame in bytes, those behind [`Packet::end`] too where it lies in
    /// several buffers. Not for bounds of views: the kernel's verifier must see
    /// those checked against [`Packet::end`], so this length must be opaque to an
    /// optimiser that would drop the later check.
    fn length(&self) -> usize;
    /// True when the frame is at least `bytes` long.
    fn holds(&self, bytes: usize) -> bool {
        self.length() >= bytes
    }
    /// Index of the interface the frame came in by.
    fn ingress(&self) -> u32;
    /// The VLAN tags that were taken off the frame, with their priorities.
    fn tags(&self) -> Tags;
    /// Where the frame came in.
    fn port(&self) -> Port;
    /// Notes the VLAN tags that the frame came with.
    fn tag(&mut self, tags: Tags);
    /// Cuts the frame to `length` bytes; false if it could not be done. All
    /// views are void after it.
    fn truncate(&mut self, length: usize) -> bool;
    /// Adds `bytes` of anything in front; false if it could not be done. All
    /// views are void after it.
    fn grow(&mut self, bytes: usize) -> bool;
    /// Takes `bytes` away in front; false if it could not be done. All views are
    /// void after it.
    fn shrink(&mut self, bytes: usize) -> bool;

    /// The header at `offset`.
    #[inline(always)]
    fn header<H: Header>(&self, offset: usize) -> Option<&H> {
        let address = inside::<H, _>(self, offset)?;
        // SAFETY: `inside` has checked that [address, address + size) lies in
        // the frame, which `self` borrows; H has alignment 1 and no invalid
        // bit patterns (`Header`).
        Some(unsafe { &*(address as *const H) })
    }

    /// The header at `offset`, to be written.
    #[inline(always)]
    fn header_mut<H: Header>(&mut self, offset: usize) -> Option<&mut H> {
        let address = inside::<H, _>(self, offset)?;
        // SAFETY: as in `header`; `self` is borrowed mutably, so no other view
        // of the frame exists while this one lives.
        Some(unsafe { &mut *(address as *mut H) })
    }
}

#[inline(always)]
fn inside<H: Header, P: Packet + ?Sized>(packet: &P, offset: usize) -> Option<usize> {
    const { assert!(align_of::<H>() == 1) }
    let address = packet.start() + offset;
    if address + size_of::<H>() > packet.end() {
        return None;
    }
    Some(address)
}

/// A header that may be laid over any bytes.
///
/// # Safety
/// `repr(C)`, alignment 1, every bit pattern valid.
pub unsafe trait Header: Copy {}

macro_rules! headers {
    ($($name:ty),+) => {$(
        // SAFETY: repr(C) over u8 and arrays of u8 only.
        unsafe impl Header for $name {}
    )+};
}
headers!(
    Ethernet,
    Tcp,
    Icmp,
    Ipv4Hdr,
    Ipv6Hdr,
    UdpHdr,
    [u8; 4],
    [[u8; 4]; 3],
    [[u8; 4]; 7],
    [[u8; 4]; 12]
);
