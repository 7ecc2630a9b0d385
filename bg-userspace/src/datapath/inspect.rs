//! What `bgswitch doctor` looks at: the same facts, and the same checks, that a start
//! goes by, and nothing that a look changes.

use std::{net::IpAddr, path::Path};

use futures_util::TryStreamExt as _;
use nix::{
    errno::Errno,
    net::if_::if_indextoname,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use rtnetlink::packet_route::link::{LinkAttribute, LinkInfo};

use super::{
    AttachMode, Error, Features, Settings, attach,
    forwarding::{self, Setting},
    load,
    netdev::{XdpFeatures, xdp_features},
    netlink::{self, Failure, Neighbour, Requests, in_time},
    offloads::{Offloads, offloads},
    pins::Pins,
};
use crate::plan::{ForwardMode, Plan};

/// The MTU up to which frames fit one page, about: 4 096 bytes without headroom (256),
/// `skb_shared_info` (320) and the Ethernet header.
const ONE_PAGE: u32 = 3500;

/// An interface, as it is now.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Seen {
    /// What kind of device it is, like `veth`; `None` for a card.
    pub kind: Option<String>,
    /// The bridge or bond that it is a port of.
    pub port_of: Option<String>,
    /// It has an Ethernet address.
    pub is_ethernet: bool,
    /// Largest L3 packet, bytes.
    pub mtu: u32,
    /// It is up, and has a carrier.
    pub running: bool,
    /// It has an XDP program.
    pub has_program: bool,
    /// There are VLANs above it.
    pub has_vlans: bool,
    /// `None` where the kernel cannot say.
    pub features: Option<XdpFeatures>,
    /// `None` where the driver does not say.
    pub offloads: Option<Offloads>,
}

/// The running kernel's release: its first two numbers.
pub fn release() -> (u32, u32) {
    load::release()
}

/// What the kernel has of BPF; an error where it may not be asked.
pub fn features() -> Result<Features, Error> {
    Features::probe()
}

/// Whether frames of this MTU may lie in one page.
pub const fn fits_one_page(mtu: u32) -> bool {
    mtu <= ONE_PAGE
}

/// Whether a path is on a BPF file system, or would be; the errno where that cannot be
/// seen.
pub fn is_on_bpffs(path: &Path) -> Result<bool, Errno> {
    let there = path.ancestors().find(|ancestor| ancestor.exists());
    let found = statfs(there.unwrap_or(Path::new("/")))?;
    Ok(found.filesystem_type() == BPF_FS_MAGIC)
}

/// Refuses, as a start does, pins of another version, and interfaces with a program of
/// somebody else.
pub fn check_pins(bpffs: &Path) -> Result<(), Error> {
    Pins::new(bpffs).check()
}

/// The same, of one interface.
pub fn check_interface(bpffs: &Path, interface: &str, mode: AttachMode) -> Result<(), Error> {
    let settings = Settings {
        interfaces: vec![interface.to_owned()],
        mode,
        max_flows: 0,
        max_services: 0,
    };
    attach::check(&settings, &Pins::new(bpffs))
}

/// Looks at an interface; `None` if it is not there.
pub fn interface(name: &str) -> Result<Option<Seen>, Error> {
    let Some(link) = attach::link(name)? else {
        return Ok(None);
    };
    let ifindex = link.ifindex;
    let found = netlink::block_on(|| async { Ok(Requests::open()?.device(ifindex).await?) })?;
    let (kind, port_of) = found.unwrap_or_default();
    Ok(Some(Seen {
        kind,
        port_of: port_of.map(|index| {
            let name = if_indextoname(index);
            name.map_or_else(
                |_| index.to_string(),
                |name| name.to_string_lossy().into_owned(),
            )
        }),
        is_ethernet: attach::interface_of(name, &link).is_ok(),
        mtu: link.mtu,
        running: link.running,
        has_program: link.xdp.is_some(),
        has_vlans: !attach::vlans(&[ifindex].into())?.is_empty(),
        features: xdp_features(ifindex),
        offloads: offloads(name).ok(),
    }))
}

impl Requests {
    /// Of a link: what kind of device it is, and the index of what it is a port of.
    async fn device(&self, ifindex: u32) -> Result<Option<(Option<String>, Option<u32>)>, Failure> {
        let what = "asking for a link";
        let mut links = self.handle.link().get().match_index(ifindex).execute();
        let link = in_time(what, links.try_next()).await?;
        Ok(link.map(|link| {
            let kind = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    }),
                    _ => None,
                });
            let port_of = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Controller(index) => Some(*index),
                    _ => None,
                });
            (kind, port_of)
        }))
    }
}

/// The settings of the host's own stack that keep a plan from working.
pub fn settings(interfaces: &[String], plan: &Plan) -> Vec<Setting> {
    let sysctls = Path::new("/proc/sys");
    let uses = |v4| {
        let mut listeners = plan.services.iter().flat_map(|service| &service.listeners);
        listeners.any(|listener| listener.address.is_ipv4() == v4)
    };
    let mut found = forwarding::off(sysctls, interfaces, uses(true), uses(false));
    let mut services = plan.services.iter();
    if services.any(|service| service.forward == ForwardMode::Snat) {
        found.extend(forwarding::own_ports(sysctls));
    }
    found
}

/// Whoever else has one of these addresses, as the neighbour table knows: the address,
/// and the interface.
pub fn held_by_others(addresses: &[IpAddr]) -> Result<Vec<(IpAddr, String)>, Error> {
    let neighbours = netlink::block_on(|| async { Ok(Requests::open()?.neighbours().await?) })?;
    let held = neighbours
        .into_iter()
        .filter_map(|((ifindex, address), neighbour)| {
            let is_held =
                matches!(neighbour, Neighbour::Usable(..)) && addresses.contains(&address);
            let name = if_indextoname(ifindex).ok().filter(|_| is_held)?;
            Some((address, name.to_string_lossy().into_owned()))
        });
    Ok(held.collect())
}
