//! The frames that tell a network where an address is now.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

type Mac = [u8; 6];

/// An announcement of `address` at `mac`, as a whole Ethernet frame: for IPv4 an
/// ARP announcement (RFC 5227, section 2.3), for IPv6 an unsolicited neighbour
/// advertisement with the override flag (RFC 4861, section 7.2.6).
/// Who has an entry for the address takes the new MAC; who has none needs none.
pub fn frame(address: IpAddr, mac: Mac) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => arp(address, mac),
        IpAddr::V6(address) => neighbour_advertisement(address, mac),
    }
}

/// A request whose sender and target are the address itself.
fn arp(address: Ipv4Addr, mac: Mac) -> Vec<u8> {
    const BROADCAST: Mac = [0xff; 6];
    let address = address.octets();
    let mut frame = ethernet(BROADCAST, mac, [0x08, 0x06]);
    // Ethernet, IPv4, their lengths, request.
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(address);
    frame.extend([0; 6]);
    frame.extend(address);
    frame
}

/// From the address itself, to all nodes. A gateway is a router, as long as its
/// stack forwards or not: it answers for the address by forwarding.
fn neighbour_advertisement(address: Ipv6Addr, mac: Mac) -> Vec<u8> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
    const ICMP_V6: u8 = 58;
    const ROUTER_AND_OVERRIDE: u8 = 0xa0;
    /// Receivers discard what a router may have forwarded (section 7.1.2).
    const HOP_LIMIT: u8 = 255;

    // Type 136, code 0, checksum, flags; the target; its link-layer address.
    let mut message = vec![136, 0, 0, 0, ROUTER_AND_OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let length = message.len() as u16;

    let mut pseudo = [address.octets(), ALL_NODES.octets()].concat();
    pseudo.extend(u32::from(length).to_be_bytes());
    pseudo.extend([0, 0, 0, ICMP_V6]);
    pseudo.extend(&message);
    message[2..4].copy_from_slice(&checksum(&pseudo).to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, mac, [0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([ICMP_V6, HOP_LIMIT]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

fn ethernet(to: Mac, from: Mac, ether_type: [u8; 2]) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend(from);
    frame.extend(ether_type);
    frame
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks::<2>().0.iter();
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    #[test]
    fn an_arp_announcement_asks_for_its_own_address() {
        let frame = frame("203.0.113.10".parse().unwrap(), MAC);
        let expected = [
            &[0xff; 6][..],
            &MAC,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &MAC,
            &[203, 0, 113, 10, 0, 0, 0, 0, 0, 0, 203, 0, 113, 10],
        ];
        assert_eq!(frame, expected.concat());
    }

    #[test]
    fn an_advertisement_overrides_and_adds_up() {
        let address: Ipv6Addr = "2001:db8::10".parse().unwrap();
        let frame = frame(address.into(), MAC);
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(
            frame[..14],
            [0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 7, 0x86, 0xdd]
        );
        assert_eq!((frame[21], frame[54], frame[58]), (255, 136, 0xa0));
        assert_eq!(frame[62..78], address.octets());
        assert_eq!(frame[78..], [2, 1, 2, 0, 0, 0, 0, 7]);
        // Over everything, the checksum included, the sum is all ones.
        let mut all = frame[22..54].to_vec();
        all.extend([0, 0, 0, 32, 0, 0, 0, 58]);
        all.extend(&frame[54..]);
        assert_eq!(checksum(&all), 0);
    }
}
