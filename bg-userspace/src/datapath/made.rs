//! Packets made to be run through the packet path: bytes of Ethernet, IP and TCP or
//! UDP, without data.

use std::net::{IpAddr, SocketAddr};

use bg_common::key;

/// What kind of packet is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// TCP: the first of a connection.
    Syn,
    /// TCP: one of a connection that exists.
    Ack,
    /// UDP.
    Datagram,
}

const ETHERNET: usize = 14;
const V4: usize = 20;
const V6: usize = 40;
/// TTL or hop limit.
const HOPS: u8 = 64;

/// A client's packet to a listener of its address family, which comes to the gateway's
/// interface with this MAC address.
pub fn frame(made: Made, client: SocketAddr, listener: SocketAddr, mac: [u8; 6]) -> Vec<u8> {
    let (protocol, mut transport) = match made {
        Made::Syn => (key::TCP, tcp(client, listener, 0, 0x02)),
        Made::Ack => (key::TCP, tcp(client, listener, 1, 0x10)),
        Made::Datagram => (key::UDP, udp(client, listener)),
    };
    let mut addresses = octets(client.ip());
    addresses.extend(octets(listener.ip()));
    let length = transport.len() as u16;
    let pseudo = [&addresses[..], &length.to_be_bytes(), &[0, protocol]].concat();
    let at = if protocol == key::TCP { 16 } else { 6 };
    let check = checksum(&[pseudo, transport.clone()].concat());
    transport[at..at + 2].copy_from_slice(&check.to_be_bytes());

    let mut frame = mac.to_vec();
    frame.extend([2, 0, 0, 0, 0, 1]); // a neighbour, administered by us
    if client.is_ipv4() {
        frame.extend([0x08, 0x00]);
        let [high, low] = (V4 as u16 + length).to_be_bytes();
        let mut ip = vec![0x45, 0, high, low, 0, 0, 0x40, 0, HOPS, protocol, 0, 0];
        ip.extend(addresses);
        let check = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&check);
        frame.extend(ip);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([protocol, HOPS]);
        frame.extend(addresses);
    }
    frame.extend(transport);
    frame
}

/// Where a frame of that kind goes now: its next hop and its destination.
pub fn destination(frame: &[u8]) -> Option<([u8; 6], SocketAddr)> {
    let mac = *frame.first_chunk()?;
    let ip = frame.get(ETHERNET..)?;
    let (address, header): (IpAddr, usize) = match frame.get(12..ETHERNET)? {
        [0x08, 0x00] => {
            let address: [u8; 4] = *ip.get(16..)?.first_chunk()?;
            (address.into(), V4)
        }
        [0x86, 0xdd] => {
            let address: [u8; 16] = *ip.get(24..)?.first_chunk()?;
            (address.into(), V6)
        }
        _ => return None,
    };
    let port = u16::from_be_bytes(*ip.get(header + 2..)?.first_chunk()?);
    Some((mac, SocketAddr::new(address, port)))
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A TCP header whose numbers are both `number` (RFC 9293, section 3.1).
fn tcp(client: SocketAddr, listener: SocketAddr, number: u32, flags: u8) -> Vec<u8> {
    let mut header = ports(client, listener);
    header.extend(number.to_be_bytes());
    header.extend(number.to_be_bytes());
    header.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    header
}

fn udp(client: SocketAddr, listener: SocketAddr) -> Vec<u8> {
    let mut header = ports(client, listener);
    header.extend([0, 8, 0, 0]);
    header
}

fn ports(client: SocketAddr, listener: SocketAddr) -> Vec<u8> {
    let mut ports = client.port().to_be_bytes().to_vec();
    ports.extend(listener.port().to_be_bytes());
    ports
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks().0.iter();
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_has_right_checksums_and_ends() {
        let mac = [2, 0, 0, 0, 0, 9];
        for (client, listener, header) in [
            ("198.51.100.7:40000", "203.0.113.10:8000", V4),
            ("[2001:db8::7]:40000", "[2001:db8::10]:8000", V6),
        ] {
            let (client, listener) = (client.parse().unwrap(), listener.parse().unwrap());
            for made in [Made::Syn, Made::Ack, Made::Datagram] {
                let frame = frame(made, client, listener, mac);
                assert_eq!(destination(&frame), Some((mac, listener)));
                let (ip, transport) = frame[ETHERNET..].split_at(header);
                let protocol = if header == V4 {
                    assert_eq!(checksum(ip), 0);
                    ip[9]
                } else {
                    ip[6]
                };
                let addresses = if header == V4 { &ip[12..] } else { &ip[8..] };
                let length = (transport.len() as u16).to_be_bytes();
                let sum = [addresses, &length, &[0, protocol], transport].concat();
                assert_eq!(checksum(&sum), 0, "{made:?}");
            }
        }
    }
}
