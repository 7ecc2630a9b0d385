//! Attaching: links that outlive the daemon, replaced atomically, never beside
//! a program of somebody else.

use std::{
    fs,
    path::{Path, PathBuf},
};

use aya::{
    maps::{Array, DevMap, HashMap, Map, MapData},
    programs::{
        Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        loaded_programs,
        xdp::XdpLink,
    },
};
use bg_common::{
    abi::{capacity, map},
    service::Interface,
};
use futures_util::TryStreamExt as _;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::link::{LinkAttribute, LinkXdp, XdpAttached};

use super::{AttachMode, Error, Settings, error::describe, pinned, pins::Pins};

/// Where the program is attached, as the kernel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceStatus {
    /// Name.
    pub name: String,
    /// `native` or `generic`.
    pub mode: &'static str,
    /// Kernel id of the program.
    pub program_id: u32,
}

/// Refuses, before any change, interfaces that are not there or not free.
pub fn check(settings: &Settings, pins: &Pins) -> Result<(), Error> {
    exist(&settings.interfaces)?;
    for interface in &settings.interfaces {
        let Some((mode, id)) = attached(interface)? else {
            continue;
        };
        let ours =
            FdLinkOf::pinned(&pins.link(interface)).is_some_and(|link| link.program_id == id);
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

/// Gives every interface a slot, and fills the tables that go by slot. Returns
/// the interface indices that are new there.
fn fill_slots(settings: &Settings, pins: &Pins) -> Result<Vec<u32>, Error> {
    let failed = |e: aya::maps::MapError| Error::bpf("filling the interface tables", &e);
    let mut slots: HashMap<_, u32, u32> =
        HashMap::try_from(Map::HashMap(pinned(pins, map::SLOTS)?)).map_err(failed)?;
    let mut ports: DevMap<MapData> =
        DevMap::try_from(Map::DevMap(pinned(pins, map::PORTS)?)).map_err(failed)?;
    let mut table: Array<_, Interface> =
        Array::try_from(Map::Array(pinned(pins, map::INTERFACES)?)).map_err(failed)?;
    let mut taken: Vec<(u32, u32)> = slots.iter().collect::<Result<_, _>>().map_err(failed)?;
    let mut new = Vec::new();
    let mut interfaces = Vec::new();
    for name in &settings.interfaces {
        let ifindex =
            if_nametoindex(name.as_str()).map_err(|_| Error::NoInterface(name.clone()))?;
        interfaces.push(interface_of(name, ifindex)?);
    }
    for interface in interfaces {
        let ifindex = interface.ifindex;
        let slot = if let Some((_, slot)) = taken.iter().find(|(index, _)| *index == ifindex) {
            *slot
        } else {
            new.push(ifindex);
            let limit = capacity::INTERFACES;
            (0..limit as u32)
                .find(|slot| taken.iter().all(|(_, other)| other != slot))
                .ok_or(Error::Full {
                    what: "interfaces",
                    wanted: limit + 1,
                    limit,
                })?
        };
        taken.push((ifindex, slot));
        table.set(slot, interface, 0).map_err(failed)?;
        ports
            .set(slot, ifindex, None, 0)
            .map_err(|e| Error::bpf("filling the device map", &e))?;
        slots.insert(ifindex, slot, 0).map_err(failed)?;
    }
    Ok(new)
}

fn interface_of(name: &str, ifindex: u32) -> Result<Interface, Error> {
    let (mac, mtu) = with_netlink(|handle| async move {
        let mut links = handle.link().get().match_index(ifindex).execute();
        let mut found = ([0; 6], 0);
        while let Some(link) = links.try_next().await? {
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::Address(bytes) => found.0 = bytes.try_into().unwrap_or_default(),
                    LinkAttribute::Mtu(mtu) => found.1 = mtu,
                    _ => {}
                }
            }
        }
        Ok(found)
    })?;
    if mac == [0; 6] {
        return Err(Error::NotEthernet(name.to_owned()));
    }
    Ok(Interface {
        ifindex,
        mtu,
        mac,
        zero: [0; 2],
    })
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
        let slots = pinned(self.pins, map::SLOTS).and_then(|data| {
            HashMap::<_, u32, u32>::try_from(Map::HashMap(data))
                .map_err(|e| Error::step("SLOTS", e))
        });
        if let Ok(mut slots) = slots {
            for ifindex in &self.slots {
                let _ = slots.remove(ifindex);
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
        .map(|interface| match attached(interface)? {
            Some((mode, program_id)) if mode == settings.mode.as_str() => Ok(InterfaceStatus {
                name: interface.clone(),
                mode,
                program_id,
            }),
            other => Err(Error::Attach {
                interface: interface.clone(),
                mode: settings.mode.as_str(),
                cause: format!("the kernel reports {other:?}"),
            }),
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
    fn pinned(pin: &Path) -> Option<Self> {
        let link = FdLink::from(PinnedLink::from_pin(pin).ok()?);
        Some(Self {
            program_id: link.info().ok()?.program_id(),
        })
    }
}

/// Mode and id of the XDP program on an interface.
fn attached(interface: &str) -> Result<Option<(&'static str, u32)>, Error> {
    let name = interface.to_owned();
    with_netlink(|handle| async move {
        let mut links = handle.link().get().match_name(name).execute();
        let (mut mode, mut id) = (None, None);
        while let Some(link) = links.try_next().await? {
            for attribute in link.attributes {
                let LinkAttribute::Xdp(parts) = attribute else {
                    continue;
                };
                for part in parts {
                    match part {
                        LinkXdp::Attached(XdpAttached::Driver) => mode = Some("native"),
                        LinkXdp::Attached(XdpAttached::SocketBuffer) => mode = Some("generic"),
                        LinkXdp::Attached(XdpAttached::None) => {}
                        LinkXdp::Attached(_) => mode = Some("another"),
                        LinkXdp::ProgId(program) => id = Some(program),
                        _ => {}
                    }
                }
            }
        }
        Ok(mode.zip(id))
    })
}

fn name_of(id: u32) -> String {
    let name = loaded_programs()
        .flatten()
        .find(|program| program.id() == id)
        .and_then(|program| program.name_as_str().map(str::to_owned));
    format!("id {id}, `{}`", name.unwrap_or_default())
}

/// Runs a few netlink requests to their end, on a thread of their own, so that
/// it works inside and outside of a runtime.
fn with_netlink<R, F>(work: impl FnOnce(rtnetlink::Handle) -> F + Send) -> Result<R, Error>
where
    R: Send,
    F: Future<Output = Result<R, rtnetlink::Error>>,
{
    let run = || -> Result<R, Error> {
        let failed = Error::io("talking to the kernel over netlink");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()
                .map_err(Error::io("talking to the kernel over netlink"))?;
            tokio::spawn(connection);
            work(handle)
                .await
                .map_err(|e| Error::step("asking the kernel about its interfaces", e))
        })
    };
    std::thread::scope(|scope| {
        scope
            .spawn(run)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
