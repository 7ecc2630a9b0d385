//! The tables that go by an interface's slot.

use std::collections::BTreeMap;

use aya::maps::{Array, DevMap, HashMap, Map, MapData, MapError};
use bg_common::{
    abi::{capacity, map},
    port::{Port, Tags},
    service::Interface,
};

use super::{Error, pinned, pins::Pins};

/// Slots by port, and what they hold.
pub struct Slots {
    by_port: HashMap<MapData, Port, u32>,
    ports: DevMap<MapData>,
    table: Array<MapData, Interface>,
}

impl Slots {
    /// Opens the pinned tables.
    pub fn open(pins: &Pins) -> Result<Self, Error> {
        let slots = HashMap::try_from(Map::HashMap(pinned(pins, map::SLOTS)?));
        let ports = DevMap::try_from(Map::DevMap(pinned(pins, map::PORTS)?));
        let table = Array::try_from(Map::Array(pinned(pins, map::INTERFACES)?));
        Ok(Self {
            by_port: slots.map_err(failed)?,
            ports: ports.map_err(failed)?,
            table: table.map_err(failed)?,
        })
    }

    /// Slots by port, and by the devices that routes name.
    fn taken(&self) -> Result<BTreeMap<Port, u32>, Error> {
        self.by_port
            .iter()
            .collect::<Result<_, _>>()
            .map_err(failed)
    }

    /// Slots by the device that routes name.
    pub fn by_device(&self) -> Result<BTreeMap<u32, u32>, Error> {
        let taken = self.taken()?.into_iter();
        Ok(taken
            .filter(|(port, _)| port.vlan == Tags::NONE)
            .map(|(port, slot)| (port.ifindex, slot))
            .collect())
    }

    /// What the slots hold, by slot.
    pub fn held(&self) -> Result<BTreeMap<u32, Interface>, Error> {
        let slots = self.by_device()?.into_values();
        slots
            .map(|slot| Ok((slot, self.table.get(&slot, 0).map_err(failed)?)))
            .collect()
    }

    /// Writes an interface, or a VLAN of one, to its slot. True when it has a new
    /// one.
    pub fn fill(&mut self, interface: Interface) -> Result<bool, Error> {
        let taken = self.taken()?;
        let keys = keys(&interface);
        let known = keys.iter().find_map(|key| taken.get(key).copied());
        let slot = match known {
            Some(slot) => slot,
            None => lowest_free(&taken)?,
        };
        let held = self.table.get(&slot, 0).map_err(failed)?;
        if held != interface {
            self.table.set(slot, interface, 0).map_err(failed)?;
        }
        if held.ifindex != interface.ifindex {
            self.set_port(slot, interface.ifindex)?;
        }
        // A VLAN device may have got another VLAN.
        let stale = |(key, of): &(&Port, &u32)| **of == slot && !keys.contains(key);
        for (key, _) in taken.iter().filter(stale) {
            self.by_port.remove(key).map_err(failed)?;
        }
        for key in keys.iter().filter(|key| taken.get(key) != Some(&slot)) {
            self.by_port.insert(key, slot, 0).map_err(failed)?;
        }
        Ok(known.is_none())
    }

    /// Frees the slot of a device.
    pub fn free(&mut self, device: u32) -> Result<(), Error> {
        let Ok(slot) = self.by_port.get(&Port::new(device, Tags::NONE), 0) else {
            return Ok(());
        };
        for (key, of) in self.taken()? {
            if of == slot {
                self.by_port.remove(&key).map_err(failed)?;
            }
        }
        self.set_port(slot, 0)?;
        self.table
            .set(slot, Interface::default(), 0)
            .map_err(failed)
    }

    fn set_port(&mut self, slot: u32, ifindex: u32) -> Result<(), Error> {
        self.ports
            .set(slot, ifindex, None, 0)
            .map_err(|e| Error::bpf("filling the device map", &e))
    }
}

/// The keys of an interface: the port that packets come in by, and the device that
/// routes name. They are one where there is no VLAN.
fn keys(interface: &Interface) -> [Port; 2] {
    [interface.port(), Port::new(interface.device, Tags::NONE)]
}

fn lowest_free(taken: &BTreeMap<Port, u32>) -> Result<u32, Error> {
    let limit = capacity::INTERFACES;
    (0..limit as u32)
        .find(|slot| taken.values().all(|other| other != slot))
        .ok_or(Error::Full {
            what: "interfaces",
            wanted: limit + 1,
            limit,
        })
}

#[expect(clippy::needless_pass_by_value, reason = "as map_err hands it over")]
fn failed(error: MapError) -> Error {
    Error::bpf("filling the interface tables", &error)
}
