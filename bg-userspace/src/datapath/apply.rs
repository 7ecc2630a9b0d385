//! A plan becomes tables: laid out first, refused whole if it does not fit (law
//! 8), then written so that no packet meets a half of it.

use std::collections::{BTreeMap, BTreeSet};

use bg_common::service::{Backend, FirstFlow, ReturnPath};
use tokio::sync::OwnedMutexGuard;

use super::{
    Applied, Error, Inner,
    directory::{Built, Endpoints},
    layout::{Layout, Tables, address_of, lay_out, listener_of},
    maps::Block,
    naming::Known,
    pools::Changed,
    standing,
};
use crate::plan::{ListenerPlan, Plan};

/// New blocks of source ports.
struct Blocks(BTreeMap<u16, Block>);

impl std::fmt::Debug for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The directories that a change goes through, those that differ from the one before.
#[derive(Debug)]
struct Directories {
    /// With the new return paths: no packet goes to a new backend before its reply
    /// is known for one.
    returning: Option<Built>,
    /// With the new listeners, and without what leaves.
    wanted: Option<Built>,
}

impl Directories {
    fn of(wanted: &Endpoints, held: &Endpoints) -> Result<Self, Error> {
        let mut returning = held.clone();
        returning.returns.extend(&wanted.returns);
        returning.previews.extend(&wanted.previews);
        // Return paths of listeners that are gone go; those of backends that left stay
        // for their flows, until the sweep finds none.
        let mut last = wanted.clone();
        let stays = |(from, path): &(&ListenerPlan, &ReturnPath)| {
            wanted.listeners.contains_key(&listener_of(path, from))
        };
        for (from, path) in held.previews.iter().filter(stays) {
            last.previews.entry(*from).or_insert(*path);
        }
        // Whose a backend's packet is, the way back to the listener says first.
        let is_asked = |(from, _): &(&ListenerPlan, _)| last.previews.contains_key(from);
        for way in held
            .returns
            .iter()
            .filter(|way| stays(way) || is_asked(way))
        {
            last.returns.entry(*way.0).or_insert(*way.1);
        }
        Ok(Self {
            wanted: built(&last, &returning)?,
            returning: built(&returning, held)?,
        })
    }
}

/// The directory of `wanted`, unless it is the one before.
fn built(wanted: &Endpoints, before: &Endpoints) -> Result<Option<Built>, Error> {
    if wanted == before {
        return Ok(None);
    }
    let built = Built::of(&wanted.entries());
    let built = built.ok_or_else(|| Error::step("the directory of endpoints", "has no room"))?;
    Ok(Some(built))
}

/// A plan that fits, laid out over what the kernel holds. As long as it lives,
/// nothing else changes the tables.
#[derive(Debug)]
pub struct Change {
    held: Tables,
    layout: Layout,
    pools: Changed,
    directories: Directories,
    out: BTreeSet<u32>,
    blocks: Blocks,
    _alone: OwnedMutexGuard<()>,
}

impl Change {
    /// Ids of the backends to find the way to before the change is applied: those that
    /// are new, and those that want to know the gateway's own address.
    pub fn unresolved(&self) -> BTreeSet<u32> {
        let mut unresolved = self.new_backends();
        let wanted = &self.layout.tables.backends;
        let gains = |(_, b): &(_, &Backend)| self.blocks.0.contains_key(&b.block);
        unresolved.extend(wanted.iter().filter(gains).map(|(id, _)| *id));
        unresolved
    }

    /// Ids of the backends that are new in the kernel.
    fn new_backends(&self) -> BTreeSet<u32> {
        let new = self.layout.tables.backends.keys();
        new.filter(|id| !self.held.backends.contains_key(id))
            .copied()
            .collect()
    }
}

impl Inner {
    /// Lays the plan out and reads what the kernel holds, changing nothing. Waits
    /// for a change that is under way: not to be called in a runtime.
    pub(super) fn prepare(
        &self,
        plan: &Plan,
        known: &BTreeMap<String, Known>,
    ) -> Result<Change, Error> {
        let alone = self.changing.clone().blocking_lock_owned();
        let held = self.held();
        let layout = lay_out(plan, known, &held, &self.in_use(), self.room)?;
        let out = standing::out(
            &plan.standings,
            &layout.services,
            &layout.tables.backends,
            &self.applied().out,
        );
        let pools = self.plan_pools(&standing::without(&layout.pools, &out))?;
        let backends = layout.tables.backends.values();
        let wanted: BTreeSet<u16> = backends.map(|b| b.block).filter(|id| *id != 0).collect();
        let endpoints = &layout.tables.endpoints;
        let blocks = self.missing_blocks(wanted, endpoints.listeners.keys())?;
        Ok(Change {
            directories: Directories::of(endpoints, &held.endpoints)?,
            held,
            layout,
            pools,
            out,
            blocks: Blocks(blocks),
            _alone: alone,
        })
    }

    /// Writes the blocks of ports that are missing, the new backends, which nothing leads
    /// to yet, and the blocks of old ones, which nothing uses yet, so that their next hops can be found before their first
    /// packet comes.
    pub(super) fn introduce(&self, change: &Change) -> Result<(), Error> {
        if !change.blocks.0.is_empty() {
            self.set_blocks(&change.blocks.0)?;
        }
        for (id, backend) in &change.layout.tables.backends {
            match change.held.backends.get(id) {
                None => self.set_backend(*id, backend),
                Some(held) if held.block != backend.block => self.describe_backend(*id, backend),
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Writes so that no packet meets a listener without a pool: return paths, pools,
    /// words; then the listeners, and what is no longer wanted goes. The backends have
    /// been introduced.
    pub(super) fn apply(&self, change: Change) -> Result<(), Error> {
        let Change {
            held: _,
            layout,
            pools,
            directories,
            out,
            blocks: _,
            _alone,
        } = change;
        self.replace_directory(directories.returning);
        self.write_pools(&pools);
        for (id, word) in &layout.new_services {
            // The stamp is the generation's own: the next flip's is a new one.
            let stamp = FirstFlow::new(word.generation(), 0);
            self.first_flows.store(*id as usize, stamp.0);
            self.words.store(*id as usize, word.0);
        }
        self.clear_stats(layout.new_services.keys())?;
        // Before the listeners: a flow of a listener that nobody knows is over.
        let listeners = layout.tables.endpoints.listeners.values();
        let ids = listeners.map(|listener| listener.id);
        self.applied().listeners.extend(ids.clone());
        self.replace_directory(directories.wanted);
        self.free_pools(&layout.pools);

        *self.applied() = Applied {
            listeners: ids.collect(),
            services: layout.services,
            backends: layout.tables.backends,
            direct: layout.direct,
            pools: layout.pools,
            out,
        };
        Ok(())
    }

    fn replace_directory(&self, built: Option<Built>) {
        if let Some(built) = built {
            self.directory.replace(&built);
        }
    }

    /// Forgets backends that are neither wanted nor used, and the return paths
    /// that only they had.
    pub(super) fn forget_backends(&self, unused: &BTreeSet<u32>) -> Result<(), Error> {
        // A change under way may have taken one of them up: the next sweep, then.
        let Ok(_alone) = self.changing.try_lock() else {
            return Ok(());
        };
        let applied = self.applied().clone();
        let held = self.held();
        let unused: Vec<u32> = unused
            .iter()
            .filter(|id| !applied.backends.contains_key(id))
            .copied()
            .collect();
        let kept: BTreeSet<_> = held
            .backends
            .iter()
            .filter(|(id, _)| !unused.contains(id))
            .map(|(_, backend)| address_of(backend))
            .collect();
        let mut left = held.endpoints.clone();
        for paths in [&mut left.returns, &mut left.previews] {
            paths.retain(|from, _| kept.contains(&from.address.ip()));
        }
        self.replace_directory(built(&left, &held.endpoints)?);
        for id in unused {
            self.set_backend(id, &Backend::default());
        }
        let used: BTreeSet<u16> = self.backends().values().map(|b| b.block).collect();
        let blocks = held.backends.values().map(|b| b.block);
        self.free_blocks(blocks.filter(|block| !used.contains(block)).collect())
    }
}

#[cfg(test)]
mod tests {
    use bg_common::{directory::Directory as _, service::Listener};

    use super::*;
    use crate::datapath::{directory::name_of, layout::wide};

    fn endpoint(port: u16) -> ListenerPlan {
        format!("tcp://192.0.2.1:{port}").parse().unwrap()
    }

    /// Listeners with these ports, and a backend of each at a port a thousand higher.
    fn endpoints(ports: &[u16]) -> Endpoints {
        let listener = |port: &u16| {
            let listener = Listener {
                id: *port,
                ..Listener::default()
            };
            (endpoint(*port), listener)
        };
        let back = |port: &u16| {
            let path = ReturnPath {
                address: wide(endpoint(*port).address.ip()),
                port: port.to_be_bytes(),
                listener: *port,
                ..ReturnPath::default()
            };
            (endpoint(*port + 1000), path)
        };
        Endpoints {
            listeners: ports.iter().map(listener).collect(),
            returns: ports.iter().map(back).collect(),
            ..Endpoints::default()
        }
    }

    #[test]
    fn what_is_equal_is_not_written() {
        let held = endpoints(&[1, 2]);
        let directories = Directories::of(&held, &held).unwrap();
        assert!(directories.returning.is_none() && directories.wanted.is_none());
        let fewer = Directories::of(&endpoints(&[1]), &held).unwrap();
        assert!(fewer.returning.is_none() && fewer.wanted.is_some());
    }

    #[test]
    fn a_new_backends_reply_is_known_before_its_listener_is() {
        let directories = Directories::of(&endpoints(&[2, 3]), &endpoints(&[1, 2])).unwrap();
        let (returning, wanted) = (directories.returning.unwrap(), directories.wanted.unwrap());
        let found = |built: &Built, port: u16| built.find(&name_of(&endpoint(port))).is_some();
        let ports = [1, 2, 3, 1001, 1002, 1003];
        assert_eq!(
            ports.map(|port| found(&returning, port)),
            [true, true, false, true, true, true]
        );
        assert_eq!(
            ports.map(|port| found(&wanted, port)),
            [false, true, true, false, true, true]
        );
    }

    #[test]
    fn the_way_back_from_a_backend_that_left_stays_for_its_flows() {
        let held = endpoints(&[1]);
        let mut wanted = held.clone();
        wanted.returns.clear();
        assert!(Directories::of(&wanted, &held).unwrap().wanted.is_none());
    }
}
