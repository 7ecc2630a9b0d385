//! What `bgswitch doctor` looks at: the same facts, and the same checks, that a start
//! goes by, and nothing that a look changes.

use std::{collections::BTreeSet, fs, io, net::IpAddr, path::Path};

use futures_util::TryStreamExt as _;
use nix::{
    errno::Errno,
    net::if_::if_indextoname,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use rtnetlink::packet_route::{
    link::{LinkAttribute, LinkInfo},
    neighbour::NeighbourState,
};

use super::{
    AttachMode, Error, Features, Settings, attach,
    forwarding::{self, Setting},
    load,
    netdev::{XdpFeatures, xdp_features},
    netlink::{self, Failure, Neighbour, Requests, in_time, neighbour_of},
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

/// Refuses, as a start does, pins of another version, or of another shape; with
/// [`Error::NotPermitted`] where they may not be seen.
pub fn check_pins(bpffs: &Path) -> Result<(), Error> {
    for layout in entries(bpffs)? {
        entries(&layout.path().join("maps"))?;
    }
    Pins::new(bpffs).check()
}

/// What is in a directory; nothing where there is none.
fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>, Error> {
    let found = fs::read_dir(directory).and_then(Iterator::collect);
    match found {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let what = format!("reading {}", directory.display());
            Err(Error::io(what)(error))
        }
        found => Ok(found.unwrap_or_default()),
    }
}

/// Services that fit into the pinned tables; `None` without any, or where they may not
/// be seen.
pub fn pinned_services(bpffs: &Path) -> Option<u32> {
    Pins::new(bpffs).room().map(|room| room.services)
}

/// Refuses, as a start does, an interface with a program of somebody else, or in
/// another mode.
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

/// Another host that has an address, as the neighbour table knows.
#[derive(Debug)]
pub struct HeldByOther {
    /// The address.
    pub address: IpAddr,
    /// The interface behind which the host is.
    pub interface: String,
    /// It answered of late (`NUD_REACHABLE`); else it has once.
    pub reachable: bool,
}

/// Whoever else has one of these addresses.
pub fn held_by_others(addresses: &[IpAddr]) -> Result<Vec<HeldByOther>, Error> {
    netlink::block_on(|| async { Ok(Requests::open()?.held_by_others(addresses).await?) })
}

impl Requests {
    async fn held_by_others(&self, addresses: &[IpAddr]) -> Result<Vec<HeldByOther>, Failure> {
        let own = self.addresses().await?;
        let own: BTreeSet<IpAddr> = own.into_iter().map(|held| held.address).collect();
        let mut held = Vec::new();
        let mut messages = self.handle.neighbours().get().execute();
        while let Some(message) = in_time("reading neighbours", messages.try_next()).await? {
            let state = message.header.state;
            let Some(((ifindex, address), Neighbour::Usable(mac, _))) = neighbour_of(&message)
            else {
                continue;
            };
            // The kernel has such entries for what is behind no Ethernet: on the loopback
            // device also for the host's own addresses.
            let is_host = state != NeighbourState::Noarp && mac != [0; 6];
            if !is_host || own.contains(&address) || !addresses.contains(&address) {
                continue;
            }
            let Ok(name) = if_indextoname(ifindex) else {
                continue;
            };
            held.push(HeldByOther {
                address,
                interface: name.to_string_lossy().into_owned(),
                reachable: state == NeighbourState::Reachable,
            });
        }
        Ok(held)
    }
}
