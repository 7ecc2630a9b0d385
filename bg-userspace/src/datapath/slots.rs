//! The tables that go by an interface's slot.

use std::collections::BTreeMap;

use aya::maps::{Array, DevMap, HashMap, Map, MapData, MapError};
use bg_common::{
    abi::{capacity, map},
    service::Interface,
};

use super::{Error, pinned, pins::Pins};

/// Slots by interface index, and what they hold.
pub struct Slots {
    by_ifindex: HashMap<MapData, u32, u32>,
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
            by_ifindex: slots.map_err(failed)?,
            ports: ports.map_err(failed)?,
            table: table.map_err(failed)?,
        })
    }

    /// Slots by interface index.
    pub fn taken(&self) -> Result<BTreeMap<u32, u32>, Error> {
        self.by_ifindex
            .iter()
            .collect::<Result<_, _>>()
            .map_err(failed)
    }

    /// Writes an interface to its slot. True when it has a new one.
    pub fn fill(&mut self, interface: Interface) -> Result<bool, Error> {
        let taken = self.taken()?;
        let known = taken.get(&interface.ifindex).copied();
        let slot = match known {
            Some(slot) => slot,
            None => lowest_free(&taken)?,
        };
        if self.table.get(&slot, 0).map_err(failed)? != interface {
            self.table.set(slot, interface, 0).map_err(failed)?;
        }
        if known.is_none() {
            self.set_port(slot, interface.ifindex)?;
            self.by_ifindex
                .insert(interface.ifindex, slot, 0)
                .map_err(failed)?;
        }
        Ok(known.is_none())
    }

    /// Frees an interface's slot.
    pub fn free(&mut self, ifindex: u32) -> Result<(), Error> {
        let Ok(slot) = self.by_ifindex.get(&ifindex, 0) else {
            return Ok(());
        };
        self.by_ifindex.remove(&ifindex).map_err(failed)?;
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

fn lowest_free(taken: &BTreeMap<u32, u32>) -> Result<u32, Error> {
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
