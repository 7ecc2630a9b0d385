//! What the packet path hears of servers: which services it listens to, and the counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::PoisonError,
};

use aya::{
    Ebpf, Pod,
    maps::{Map, MapData, PerCpuArray},
};
use bg_common::{
    abi::{Room, map},
    service::Colour,
    signals::{SERVICES, Signals},
};

use super::{Datapath, Error, maps::clear, mmap::Words};

/// The maps of one loaded program in which it keeps what it hears.
pub struct Ear {
    listened: Words,
    counts: PerCpuArray<MapData, Counts>,
    pairs: BTreeMap<String, Pair>,
}

/// A service that is listened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    service: u32,
    number: u32,
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Counts(Signals);

// SAFETY: repr(C), Copy, 'static, of u64 only, so no padding.
unsafe impl Pod for Counts {}

impl fmt::Debug for Ear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ear").finish_non_exhaustive()
    }
}

impl Ear {
    /// Takes the maps out of an object whose maps are made, with room for so many
    /// services.
    pub(super) fn take(ebpf: &mut Ebpf, room: Room) -> Result<Self, Error> {
        let missing = |name: &str| Error::step("the eBPF object", format!("has no {name}"));
        let Some(Map::Array(listened)) = ebpf.map(map::LISTENED) else {
            return Err(missing(map::LISTENED));
        };
        let words = Words::map(listened.fd(), room.services as usize)
            .map_err(Error::io(format!("mapping {}", map::LISTENED)))?;
        let counts = ebpf
            .take_map(map::SIGNALS)
            .ok_or_else(|| missing(map::SIGNALS))?;
        Ok(Self {
            listened: words,
            counts: PerCpuArray::try_from(counts).map_err(|e| Error::bpf("opening SIGNALS", &e))?,
            pairs: BTreeMap::new(),
        })
    }

    /// Listens to these services, by name and id, and to no others. Who was listened to
    /// under the same id before keeps its counts.
    fn listen(&mut self, services: &BTreeMap<String, u32>) -> Result<(), Error> {
        let Self {
            listened,
            counts,
            pairs,
        } = self;
        pairs.retain(|name, pair| {
            let stays = services.get(name) == Some(&pair.service);
            if !stays {
                listened.store(pair.service as usize, 0);
            }
            stays
        });
        for (name, service) in services {
            if pairs.contains_key(name) {
                continue;
            }
            let is_free = |number: &u32| pairs.values().all(|pair| pair.number != *number);
            let Some(number) = (0..SERVICES as u32).find(is_free) else {
                return Err(Error::Full {
                    what: "services that are listened to",
                    wanted: services.len(),
                    limit: SERVICES,
                });
            };
            clear(counts, map::SIGNALS, number, Counts(Signals::NONE))?;
            listened.store(*service as usize, u64::from(number) + 1);
            let pair = Pair {
                service: *service,
                number,
            };
            pairs.insert(name.clone(), pair);
        }
        Ok(())
    }

    fn heard(&self, service: &str) -> Option<[Signals; 2]> {
        let pair = *self.pairs.get(service)?;
        let of = |colour: Colour| -> Option<Signals> {
            let counts = self
                .counts
                .get(&(pair.number * 2 + colour as u32), 0)
                .ok()?;
            let mut sum = Signals::NONE;
            counts.iter().for_each(|counts| sum.add(&counts.0));
            Some(sum)
        };
        Some([of(Colour::Blue)?, of(Colour::Green)?])
    }
}

impl Datapath {
    /// Listens to the servers of these services, and of no others.
    pub fn listen(&self, names: &BTreeSet<String>) -> Result<(), Error> {
        let ids = names.iter().filter_map(|name| {
            let id = self.service_id(name)?;
            Some((name.clone(), id))
        });
        let services: BTreeMap<String, u32> = ids.collect();
        let is_any = !services.is_empty();
        let mut ear = self.ear.write().unwrap_or_else(PoisonError::into_inner);
        ear.listen(&services)?;
        self.watcher.listen(is_any);
        Ok(())
    }

    /// What was heard of both colours of a service since it is listened to, blue first;
    /// `None` if it is not. Counts of other CPUs may be a packet behind.
    pub fn heard(&self, service: &str) -> Option<[Signals; 2]> {
        let ear = self.ear.read().unwrap_or_else(PoisonError::into_inner);
        ear.heard(service)
    }
}
