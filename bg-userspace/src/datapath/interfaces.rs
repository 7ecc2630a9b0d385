//! Interfaces while the daemon runs: their addresses and sizes change, and they
//! go and come again.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use bg_common::port::Tags;

use super::{Error, Inner, InterfaceStatus, Loaded, Settings, attach, netlink::Link, slots::Slots};

/// The configured interfaces, as they are.
#[derive(Debug)]
pub struct Interfaces {
    settings: Settings,
    loaded: Mutex<Loaded>,
    statuses: Mutex<Vec<InterfaceStatus>>,
}

impl Interfaces {
    pub(super) const fn new(
        settings: Settings,
        loaded: Loaded,
        statuses: Vec<InterfaceStatus>,
    ) -> Self {
        Self {
            settings,
            loaded: Mutex::new(loaded),
            statuses: Mutex::new(statuses),
        }
    }

    /// Their names.
    pub fn names(&self) -> &[String] {
        &self.settings.interfaces
    }

    /// What was found last.
    pub fn statuses(&self) -> Vec<InterfaceStatus> {
        let statuses = self.statuses.lock();
        statuses.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Brings the tables in line with the interfaces and the VLANs above them: frees
    /// the slots of those that are gone, attaches to those that came again, and follows changes of
    /// address and size. Blocks.
    pub(super) fn follow(&self, inner: &Inner) -> Result<(), Error> {
        let mut slots = Slots::open(&inner.pins)?;
        let names = &self.settings.interfaces;
        let links = names
            .iter()
            .map(|name| attach::link(name))
            .collect::<Result<Vec<_>, _>>()?;
        let below: BTreeSet<u32> = links.iter().flatten().map(|link| link.ifindex).collect();
        let vlans = attach::vlans(&below)?;
        let ports: BTreeSet<_> = vlans
            .iter()
            .map(|vlan| (vlan.device, vlan.port()))
            .collect();
        for (slot, held) in slots.held()? {
            let is = match held.tags {
                Tags::NONE => below.contains(&held.device),
                _ => ports.contains(&(held.device, held.port())),
            };
            if !is {
                inner.clear_hops(slot);
                slots.free(held.device)?;
            }
        }
        let mut statuses = Vec::new();
        for (name, link) in names.iter().zip(links) {
            let status = match link {
                None => Ok(InterfaceStatus::absent(name)),
                Some(link) => self.follow_one(name, &link, inner, &mut slots),
            };
            statuses.push(status.unwrap_or_else(|error| {
                tracing::error!("{error}");
                InterfaceStatus::absent(name)
            }));
        }
        attach::fill_vlans(&mut slots, &vlans)?;
        for (before, now) in self.statuses().iter().zip(&statuses) {
            tell_of_change(before, now);
        }
        *self.statuses.lock().unwrap_or_else(PoisonError::into_inner) = statuses;
        Ok(())
    }

    fn follow_one(
        &self,
        name: &str,
        link: &Link,
        inner: &Inner,
        slots: &mut Slots,
    ) -> Result<InterfaceStatus, Error> {
        slots.fill(attach::interface_of(name, link)?)?;
        if link.xdp.is_some() {
            return Ok(InterfaceStatus::of(name, link));
        }
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        attach::again(loaded.program()?, name, self.settings.mode, &inner.pins)?;
        let link = attach::link(name)?.ok_or_else(|| Error::NoInterface(name.to_owned()))?;
        let status = InterfaceStatus::of(name, &link);
        tracing::warn!(
            "interface {name} came again: it runs XDP in {} mode, program {}",
            status.mode,
            status.program_id
        );
        Ok(status)
    }
}

/// Logs what became of an interface.
fn tell_of_change(before: &InterfaceStatus, now: &InterfaceStatus) {
    let name = &now.name;
    match (before.program_id, now.program_id) {
        (0, 0) => {}
        (_, 0) => tracing::error!("interface {name} is gone: nothing is forwarded there"),
        _ if before.running == now.running => {}
        _ if now.running => tracing::info!("interface {name} is up"),
        _ => tracing::warn!("interface {name} is down: nothing passes there"),
    }
}
