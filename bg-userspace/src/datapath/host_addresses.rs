//! The addresses of the host's interfaces, over netlink.

use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use rtnetlink::{
    AddressMessageBuilder,
    packet_route::address::{
        AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol,
        AddressScope, CacheInfo,
    },
};

use super::netlink::{Failure, Requests, in_time};

/// `IFA_PROTO` of the addresses that bgswitch adds (kernel 5.18 keeps it).
const MARK: AddressProtocol = AddressProtocol::Other(182);

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Index of the interface.
    pub ifindex: u32,
    /// The address.
    pub address: IpAddr,
    /// Length of its subnet's prefix, bits.
    pub prefix: u8,
    /// It has our mark.
    pub marked: bool,
}

impl Requests {
    /// The addresses of all interfaces.
    pub async fn addresses(&self) -> Result<Vec<Held>, Failure> {
        let mut messages = self.handle.address().get().execute();
        let mut found = Vec::new();
        while let Some(message) = in_time("reading addresses", messages.try_next()).await? {
            found.extend(held_of(&message));
        }
        Ok(found)
    }

    /// Puts an address on an interface, alone in its subnet, with our mark. False
    /// when somebody else has put it there already.
    pub async fn add_address(&self, ifindex: u32, address: IpAddr) -> Result<bool, Failure> {
        let mut request = self.handle.address().add(ifindex, address, bits(address));
        decorate(request.message_mut(), address);
        match in_time("adding an address", request.execute()).await {
            Ok(()) => Ok(true),
            Err(Failure::Refused(_, libc::EEXIST)) => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    /// Takes an address from an interface; one that is not there is gone already.
    pub async fn remove_address(&self, ifindex: u32, address: IpAddr) -> Result<(), Failure> {
        let message = match address {
            IpAddr::V4(ip) => AddressMessageBuilder::<std::net::Ipv4Addr>::new()
                .index(ifindex)
                .address(ip, bits(address))
                .build(),
            IpAddr::V6(ip) => AddressMessageBuilder::<std::net::Ipv6Addr>::new()
                .index(ifindex)
                .address(ip, bits(address))
                .build(),
        };
        let request = self.handle.address().del(message);
        match in_time("removing an address", request.execute()).await {
            Err(Failure::Refused(_, libc::EADDRNOTAVAIL | libc::ENODEV)) => Ok(()),
            result => result,
        }
    }
}

/// Length of the prefix that is the address alone.
const fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Marks an address as ours, and keeps the host from choosing it as the source
/// of its own packets: an IPv4 address of host scope is none for anything beyond
/// the host, an IPv6 address that is deprecated (preferred for 0 s) is the last
/// choice (RFC 6724, rule 3). Duplicates are not looked for: the address may have
/// to be taken over from a gateway that still answers.
fn decorate(message: &mut AddressMessage, address: IpAddr) {
    let attributes = &mut message.attributes;
    attributes.push(AddressAttribute::Protocol(MARK));
    if address.is_ipv4() {
        message.header.scope = AddressScope::Host;
        return;
    }
    let mut times = CacheInfo::default();
    times.ifa_valid = u32::MAX;
    attributes.push(AddressAttribute::CacheInfo(times));
    let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
    attributes.push(AddressAttribute::Flags(flags));
    message.header.flags = AddressHeaderFlags::Nodad;
}

fn held_of(message: &AddressMessage) -> Option<Held> {
    let (mut local, mut far, mut marked) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => far = Some(*address),
            AddressAttribute::Protocol(protocol) => marked = *protocol == MARK,
            _ => {}
        }
    }
    Some(Held {
        ifindex: message.header.index,
        // On a point-to-point link the other one is the far end's.
        address: local.or(far)?,
        prefix: message.header.prefix_len,
        marked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_known_as_ours() {
        for address in ["203.0.113.10", "2001:db8::10"] {
            let address: IpAddr = address.parse().unwrap();
            let mut message = AddressMessage::default();
            message.header.index = 7;
            message.header.prefix_len = bits(address);
            message.attributes = vec![AddressAttribute::Local(address)];
            let foreign = held_of(&message).unwrap();
            assert!(!foreign.marked);
            decorate(&mut message, address);
            let ours = Held {
                marked: true,
                ..foreign
            };
            assert_eq!(held_of(&message), Some(ours));
        }
    }
}
