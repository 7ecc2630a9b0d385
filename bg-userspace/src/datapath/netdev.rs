//! What XDP a driver has, as the kernel says: the generic netlink family `netdev` (kernel
//! 6.3; Documentation/netlink/specs/netdev.yaml).

use std::{io, os::fd::AsRawFd as _};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
        sockopt::ReceiveTimeout,
    },
    time::{TimeVal, TimeValLike as _},
};

/// Bits of what a driver has of XDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpFeatures(u64);

impl XdpFeatures {
    /// Programs run in the driver, and may send frames back.
    pub const fn runs(self) -> bool {
        self.0 & 1 != 0
    }

    /// It sends frames that a program on another interface hands to it.
    pub const fn takes_redirected(self) -> bool {
        self.0 & 4 != 0
    }

    /// Frames in several buffers.
    pub const fn takes_large_frames(self) -> bool {
        self.0 & 32 != 0
    }
}

/// `GENL_ID_CTRL`, and its command and attributes.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// Of the family `netdev`.
const GET_DEVICE: u8 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_XDP: u16 = 3;

/// `nlmsghdr` and `genlmsghdr`.
const HEAD: usize = 20;
/// Of an attribute.
const ATTRIBUTE_HEAD: usize = 4;
const ERROR: u16 = 2;
const REQUEST: u16 = 1;

/// What the driver of an interface has; `None` where the kernel cannot say.
pub fn xdp_features(ifindex: u32) -> Option<XdpFeatures> {
    let family = ask(CONTROL, GET_FAMILY, FAMILY_NAME, b"netdev\0").ok()?;
    let family = attribute(&family, FAMILY_ID)?.try_into().ok()?;
    let family = u16::from_ne_bytes(family);
    let device = ask(family, GET_DEVICE, DEVICE_INDEX, &ifindex.to_ne_bytes()).ok()?;
    let bits = attribute(&device, DEVICE_XDP)?.try_into().ok()?;
    Some(XdpFeatures(u64::from_ne_bytes(bits)))
}

/// Sends a command with one attribute; returns the attributes of the answer.
fn ask(family: u16, command: u8, kind: u16, value: &[u8]) -> io::Result<Vec<u8>> {
    let link = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkGeneric,
    )?;
    setsockopt(&link, ReceiveTimeout, &TimeVal::seconds(2))?;
    let padded = value.len().next_multiple_of(4);
    let length = HEAD + ATTRIBUTE_HEAD + padded;
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend(((ATTRIBUTE_HEAD + value.len()) as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(length, 0);
    send(link.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = vec![0; 8192];
    let received = recv(link.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(received);
    let is_error = answer.get(4..6) == Some(&ERROR.to_ne_bytes());
    match answer.get(HEAD..) {
        Some(attributes) if !is_error => Ok(attributes.to_vec()),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The value of the first attribute of a kind.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let (length, rest) = attributes.split_first_chunk()?;
        let (kind, _) = rest.split_first_chunk()?;
        let length = usize::from(u16::from_ne_bytes(*length));
        // Without the bits that say how it is encoded.
        if u16::from_ne_bytes(*kind) & 0x3fff == wanted {
            return attributes.get(ATTRIBUTE_HEAD..length);
        }
        attributes = attributes.get(length.max(ATTRIBUTE_HEAD).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_and_torn_ones_are_none() {
        let two = [6u16, 1, 0xabcd, 0, 8, 3, 1, 2]
            .map(u16::to_ne_bytes)
            .concat();
        assert_eq!(attribute(&two, 1), Some(&0xabcd_u16.to_ne_bytes()[..]));
        assert_eq!(attribute(&two, 3).map(<[u8]>::len), Some(4));
        assert_eq!(attribute(&two, 2), None);
        assert_eq!(attribute(&two[..11], 3), None);
        assert_eq!(attribute(&two[..14], 3), None);
    }
}
