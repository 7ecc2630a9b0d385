//! VLAN devices above the interfaces with XDP. The kernel's routes name the device;
//! a frame leaves by the interface below, with the device's tags.

use std::collections::{BTreeMap, BTreeSet};

use bg_common::{port::Tags, service::Interface};

use super::netlink::Link;

/// Length of a VLAN tag, bytes.
const TAG: u32 = 4;

/// What the packet path needs to know of the VLANs above the interfaces `below`:
/// every chain of one or two VLAN devices. `links` are all links of the host.
pub fn above(below: &BTreeSet<u32>, links: &[Link]) -> Vec<Interface> {
    let links: BTreeMap<u32, &Link> = links.iter().map(|link| (link.ifindex, link)).collect();
    links
        .values()
        .filter(|link| !below.contains(&link.ifindex) && link.mac != [0; 6])
        .filter_map(|link| {
            let (parent, tags) = chain(below, &links, link)?;
            Some(Interface {
                tags,
                ifindex: parent.ifindex,
                device: link.ifindex,
                mtu: link.mtu.min(room(parent, tags)),
                mac: link.mac,
                zero: [0; 6],
            })
        })
        .collect()
}

/// The interface with XDP below a VLAN device, and the tags of its frames.
fn chain<'a>(
    below: &BTreeSet<u32>,
    links: &BTreeMap<u32, &'a Link>,
    link: &Link,
) -> Option<(&'a Link, Tags)> {
    let vlan = link.vlan?;
    let parent = *links.get(&vlan.parent)?;
    if below.contains(&parent.ifindex) {
        return Some((parent, Tags::new(vlan.protocol, vlan.id)));
    }
    // The parent's tag is the outer one.
    let outer = parent.vlan?;
    let bottom = *links.get(&outer.parent)?;
    let tags = Tags::new(outer.protocol, outer.id).with_inner(vlan.protocol, vlan.id)?;
    below.contains(&bottom.ifindex).then_some((bottom, tags))
}

/// The largest packet that a redirect takes: the kernel allows one tag beyond the
/// MTU (`xdp_ok_fwd_dev`).
const fn room(parent: &Link, tags: Tags) -> u32 {
    let more = (tags.count() as u32).saturating_sub(1);
    parent.mtu.saturating_sub(more * TAG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::netlink::Vlan;

    fn link(ifindex: u32, vlan: Option<(u32, u16, u16)>) -> Link {
        Link {
            ifindex,
            mac: [2, 0, 0, 0, 0, ifindex as u8],
            mtu: 1500,
            vlan: vlan.map(|(parent, protocol, id)| Vlan {
                parent,
                protocol,
                id,
            }),
            ..Link::default()
        }
    }

    fn found(links: &[Link]) -> Vec<(u32, u32, u64, u32)> {
        above(&[7].into(), links)
            .iter()
            .map(|i| (i.device, i.ifindex, i.tags.0, i.mtu))
            .collect()
    }

    #[test]
    fn a_vlan_device_is_a_port_of_the_interface_below_it() {
        let links = [link(7, None), link(9, Some((7, Tags::C, 100)))];
        assert_eq!(found(&links), [(9, 7, 0x8100_0064 << 32, 1500)]);
    }

    #[test]
    fn a_vlan_in_a_vlan_has_both_tags_and_less_room() {
        let links = [
            link(7, None),
            link(8, Some((7, Tags::S, 100))),
            link(9, Some((8, Tags::C, 200))),
            link(10, Some((9, Tags::C, 300))),
        ];
        assert_eq!(
            found(&links),
            [
                (8, 7, 0x88a8_0064 << 32, 1500),
                (9, 7, 0x88a8_0064_8100_00c8, 1496),
            ]
        );
    }

    #[test]
    fn what_is_above_another_interface_is_none_of_ours() {
        let links = [
            link(6, None),
            link(7, None),
            link(9, Some((6, Tags::C, 100))),
            link(11, Some((12, Tags::C, 100))),
        ];
        assert_eq!(found(&links), []);
    }

    #[test]
    fn a_vlan_device_with_a_program_of_its_own_is_an_interface() {
        let links = [link(6, None), link(7, Some((6, Tags::C, 100)))];
        assert_eq!(found(&links), []);
    }
}
