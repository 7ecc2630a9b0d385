//! Attaching: links that outlive the daemon, replaced atomically, never beside
//! a program of somebody else.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use aya::programs::{
    Xdp, XdpMode,
    links::{FdLink, PinnedLink},
    loaded_programs,
    xdp::XdpLink,
};
use bg_common::{port::Tags, service::Interface};
use nix::net::if_::if_nametoindex;

use super::{
    AttachMode, Error, Settings,
    error::describe,
    netlink::{self, Link, Requests},
    pins::Pins,
    slots::Slots,
    vlans,
};

/// Where the program is attached, as the kernel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceStatus {
    /// Name.
    pub name: String,
    /// `native` or `generic`; `absent` when the interface or the program is not
    /// there.
    pub mode: &'static str,
    /// Kernel id of the program; 0 when it is absent.
    pub program_id: u32,
    /// It is up, and has a carrier.
    pub running: bool,
}

impl InterfaceStatus {
    pub(super) fn of(name: &str, link: &Link) -> Self {
        let (mode, program_id) = link.xdp.unwrap_or(("absent", 0));
        Self {
            name: name.to_owned(),
            mode,
            program_id,
            running: link.running,
        }
    }

    pub(super) fn absent(name: &str) -> Self {
        Self::of(name, &Link::default())
    }
}

/// Refuses, before any change, interfaces that are not there or not free; with
/// [`Error::NotPermitted`] where whose a program is may not be asked.
pub fn check(settings: &Settings, pins: &Pins) -> Result<(), Error> {
    exist(&settings.interfaces)?;
    for interface in &settings.interfaces {
        let Some((mode, id)) = attached(interface)? else {
            continue;
        };
        let pinned = FdLinkOf::pinned(&pins.link(interface))?;
        let ours = pinned.is_some_and(|link| link.program_id == id);
        if !ours {
            return Err(Error::ForeignProgram {
                interface: interface.clone(),
                program: name_of(id),
            });
        }
        if mode != settings.mode.as_str() {
            return Err(Error::Attach {
                interface: interface.clone(),
                mode: settings.mode.as_str(),
                cause: format!(
                    "it is attached in {mode} mode; `bgswitch detach` first, or set gateway.xdp"
                ),
            });
        }
    }
    Ok(())
}

/// Refuses interfaces that are not there.
pub fn exist(interfaces: &[String]) -> Result<(), Error> {
    let gone = |name: &&String| if_nametoindex(name.as_str()).is_err();
    match interfaces.iter().find(gone) {
        Some(name) => Err(Error::NoInterface(name.clone())),
        None => Ok(()),
    }
}

/// The link of an interface, if it is there.
pub fn link(name: &str) -> Result<Option<Link>, Error> {
    match if_nametoindex(name) {
        Err(_) => Ok(None),
        Ok(ifindex) => netlink::block_on(|| async { Ok(Requests::open()?.link(ifindex).await?) }),
    }
}

/// What the packet path needs to know of an interface.
pub fn interface_of(name: &str, link: &Link) -> Result<Interface, Error> {
    if link.mac == [0; 6] {
        return Err(Error::NotEthernet(name.to_owned()));
    }
    Ok(Interface {
        tags: Tags::NONE,
        ifindex: link.ifindex,
        device: link.ifindex,
        mtu: link.mtu,
        mac: link.mac,
        zero: [0; 6],
    })
}

/// The VLANs above these interfaces.
pub fn vlans(below: &BTreeSet<u32>) -> Result<Vec<Interface>, Error> {
    let links = netlink::block_on(|| async { Ok(Requests::open()?.links().await?) })?;
    Ok(vlans::above(below, &links))
}

/// Gives VLANs a slot each. Returns the devices that are new there.
pub fn fill_vlans(slots: &mut Slots, vlans: &[Interface]) -> Result<Vec<u32>, Error> {
    let mut new = Vec::new();
    for vlan in vlans {
        match slots.fill(*vlan) {
            Ok(true) => new.push(vlan.device),
            Ok(false) => {}
            Err(error @ Error::Full { .. }) => {
                tracing::error!("{error}: frames of some VLANs are left to the host's stack");
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(new)
}

fn attached(name: &str) -> Result<Option<(&'static str, u32)>, Error> {
    Ok(link(name)?.and_then(|link| link.xdp))
}

/// Gives every interface a slot, and every VLAN above one. Returns the devices that
/// are new there.
fn fill_slots(settings: &Settings, pins: &Pins) -> Result<Vec<u32>, Error> {
    let mut interfaces = Vec::new();
    for name in &settings.interfaces {
        let link = link(name)?.ok_or_else(|| Error::NoInterface(name.clone()))?;
        interfaces.push(interface_of(name, &link)?);
    }
    let below = interfaces.iter().map(|interface| interface.ifindex);
    let vlans = vlans(&below.collect())?;
    let mut slots = Slots::open(pins)?;
    let mut new = Vec::new();
    for interface in interfaces {
        if slots.fill(interface)? {
            new.push(interface.device);
        }
    }
    new.extend(fill_vlans(&mut slots, &vlans)?);
    Ok(new)
}

/// What a start has added so far; taken back unless it is kept.
pub struct Added<'a> {
    pins: &'a Pins,
    links: Vec<PathBuf>,
    slots: Vec<u32>,
}

impl Added<'_> {
    /// The start succeeded.
    pub fn keep(mut self) {
        self.links.clear();
        self.slots.clear();
    }
}

impl Drop for Added<'_> {
    fn drop(&mut self) {
        for pin in &self.links {
            let _ = fs::remove_file(pin);
        }
        if self.slots.is_empty() {
            return;
        }
        if let Ok(mut slots) = Slots::open(self.pins) {
            for device in &self.slots {
                let _ = slots.free(*device);
            }
        }
    }
}

/// Attaches the loaded program to the interfaces that do not have it yet.
pub fn add<'a>(program: &mut Xdp, settings: &Settings, pins: &'a Pins) -> Result<Added<'a>, Error> {
    let mut added = Added {
        pins,
        links: Vec::new(),
        slots: fill_slots(settings, pins)?,
    };
    for interface in &settings.interfaces {
        if attached(interface)?.is_some() {
            continue;
        }
        let pin = pins.link(interface);
        // The interface that a link belonged to is gone, and has come back as
        // another one.
        let _ = fs::remove_file(&pin);
        attach_one(program, interface, settings.mode, &pin)?;
        added.links.push(pin);
    }
    Ok(added)
}

/// Puts the loaded program behind every pinned link, lets go of interfaces that
/// are no longer configured, and says what the kernel has then.
pub fn replace(
    program: &mut Xdp,
    settings: &Settings,
    pins: &Pins,
) -> Result<Vec<InterfaceStatus>, Error> {
    for interface in &settings.interfaces {
        replace_one(program, &pins.link(interface))?;
    }
    for interface in pins
        .links()
        .into_iter()
        .filter(|name| !settings.interfaces.contains(name))
    {
        tracing::warn!("{interface} is no longer configured: letting go of it");
        let _ = fs::remove_file(pins.link(&interface));
    }
    settings
        .interfaces
        .iter()
        .map(|interface| {
            let link = link(interface)?.unwrap_or_default();
            match link.xdp {
                Some((mode, _)) if mode == settings.mode.as_str() => {
                    Ok(InterfaceStatus::of(interface, &link))
                }
                other => Err(Error::Attach {
                    interface: interface.clone(),
                    mode: settings.mode.as_str(),
                    cause: format!("the kernel reports {other:?}"),
                }),
            }
        })
        .collect()
}

fn replace_one(program: &mut Xdp, pin: &Path) -> Result<(), Error> {
    let what = || format!("replacing the program behind {}", pin.display());
    let link = PinnedLink::from_pin(pin).map_err(|e| Error::bpf(what(), &e))?;
    let link = XdpLink::try_from(FdLink::from(link)).map_err(|e| Error::bpf(what(), &e))?;
    let id = program
        .attach_to_link(link)
        .map_err(|e| Error::bpf(what(), &e))?;
    // The pin keeps the link; what the library holds may go.
    drop(program.take_link(id));
    Ok(())
}

/// Attaches the program to an interface that was made again.
pub fn again(
    program: &mut Xdp,
    interface: &str,
    mode: AttachMode,
    pins: &Pins,
) -> Result<(), Error> {
    let pin = pins.link(interface);
    // The link of the interface that is gone.
    let _ = fs::remove_file(&pin);
    attach_one(program, interface, mode, &pin)
}

fn attach_one(
    program: &mut Xdp,
    interface: &str,
    mode: AttachMode,
    pin: &Path,
) -> Result<(), Error> {
    let failed = |cause: String| Error::Attach {
        interface: interface.to_owned(),
        mode: mode.as_str(),
        cause,
    };
    let wanted = match mode {
        AttachMode::Native => XdpMode::Driver,
        AttachMode::Generic => XdpMode::Skb,
    };
    let id = program.attach(interface, wanted).map_err(|e| {
        let advice = match mode {
            AttachMode::Native => {
                "; the driver must support XDP, with this MTU. xdp = \"generic\" runs on any driver, slower"
            }
            AttachMode::Generic => "",
        };
        failed(describe(&e) + advice)
    })?;
    let link = program.take_link(id).map_err(|e| failed(describe(&e)))?;
    // A link without a descriptor is netlink's and dies with us: dropping it
    // detaches it.
    let link = FdLink::try_from(link).map_err(|_| Error::NotPinnable(interface.to_owned()))?;
    link.pin(pin).map_err(|e| failed(describe(&e)))?;
    Ok(())
}

struct FdLinkOf {
    program_id: u32,
}

impl FdLinkOf {
    /// The link behind a pin; `None` if there is none, an error if it may not be seen.
    fn pinned(pin: &Path) -> Result<Option<Self>, Error> {
        let info = PinnedLink::from_pin(pin).and_then(|link| FdLink::from(link).info());
        match info {
            Ok(info) => Ok(Some(Self {
                program_id: info.program_id(),
            })),
            Err(error) => match Error::bpf(format!("reading {}", pin.display()), &error) {
                error @ Error::NotPermitted { .. } => Err(error),
                _ => Ok(None),
            },
        }
    }
}

fn name_of(id: u32) -> String {
    let name = loaded_programs()
        .flatten()
        .find(|program| program.id() == id)
        .and_then(|program| program.name_as_str().map(str::to_owned));
    format!("id {id}, `{}`", name.unwrap_or_default())
}
