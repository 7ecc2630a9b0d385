//! A plan becomes tables: laid out first, refused whole if it does not fit (law
//! 8), then written so that no packet meets a half of it.

use std::collections::{BTreeMap, BTreeSet};

use bg_common::{
    abi::map,
    service::{Backend, FirstFlow, ReturnPath},
};
use tokio::sync::OwnedMutexGuard;

use super::{
    Applied, Error, Inner,
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

/// A plan that fits, laid out over what the kernel holds. As long as it lives,
/// nothing else changes the tables.
#[derive(Debug)]
pub struct Change {
    held: Tables,
    layout: Layout,
    pools: Changed,
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
        let held = self.held()?;
        let layout = lay_out(plan, known, &held, &self.in_use())?;
        let out = standing::out(
            &plan.standings,
            &layout.services,
            &layout.tables.backends,
            &self.applied().out,
        );
        let pools = self.plan_pools(&standing::without(&layout.pools, &out))?;
        let backends = layout.tables.backends.values();
        let wanted: BTreeSet<u16> = backends.map(|b| b.block).filter(|id| *id != 0).collect();
        let blocks = self.missing_blocks(wanted, layout.tables.listeners.keys())?;
        Ok(Change {
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

    /// Writes so that no packet meets a listener without a pool: return paths,
    /// pools, words, listeners; then removes what is no longer wanted, listeners
    /// first. The backends have been introduced.
    pub(super) fn apply(&self, change: Change) -> Result<(), Error> {
        let Change {
            held,
            layout,
            pools,
            out,
            blocks: _,
            _alone,
        } = change;
        let wanted = &layout.tables;
        let returns = [map::RETURNS_V4, map::RETURNS_V6];
        let listeners = [map::LISTENERS_V4, map::LISTENERS_V6];

        self.write_endpoints(returns, &differing(&wanted.returns, &held.returns), &[])?;
        self.write_pools(&pools);
        for (id, word) in &layout.new_services {
            // The stamp is the generation's own: the next flip's is a new one.
            let stamp = FirstFlow::new(word.generation(), 0);
            self.first_flows.store(*id as usize, stamp.0);
            self.words.store(*id as usize, word.0);
        }
        self.clear_stats(layout.new_services.keys())?;
        // Before the listeners: a flow of a listener that nobody knows is over.
        let ids = wanted.listeners.values().map(|listener| listener.id);
        self.applied().listeners.extend(ids.clone());
        let gone = missing(&held.listeners, &wanted.listeners);
        let new = differing(&wanted.listeners, &held.listeners);
        self.write_endpoints(listeners, &new, &gone)?;
        // Return paths of listeners that are gone; those of backends that left
        // stay for their flows, until the sweep finds none.
        let mut stale = missing(&held.returns, &wanted.returns);
        stale.retain(|from| {
            let listener = listener_of(&held.returns[from], from);
            !wanted.listeners.contains_key(&listener)
        });
        self.write_endpoints::<ReturnPath>(returns, &BTreeMap::new(), &stale)?;
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

    /// Forgets backends that are neither wanted nor used, and the return paths
    /// that only they had.
    pub(super) fn forget_backends(&self, unused: &BTreeSet<u32>) -> Result<(), Error> {
        // A change under way may have taken one of them up: the next sweep, then.
        let Ok(_alone) = self.changing.try_lock() else {
            return Ok(());
        };
        let applied = self.applied().clone();
        let held = self.held()?;
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
        let stale: Vec<ListenerPlan> = held
            .returns
            .keys()
            .filter(|from| !kept.contains(&from.address.ip()))
            .copied()
            .collect();
        let returns = [map::RETURNS_V4, map::RETURNS_V6];
        self.write_endpoints::<ReturnPath>(returns, &BTreeMap::new(), &stale)?;
        for id in unused {
            self.set_backend(id, &Backend::default());
        }
        let used: BTreeSet<u16> = self.backends().values().map(|b| b.block).collect();
        let blocks = held.backends.values().map(|b| b.block);
        self.free_blocks(blocks.filter(|block| !used.contains(block)).collect())
    }
}

/// The entries that are not held yet, or held with another value.
fn differing<V: Copy + PartialEq>(
    wanted: &BTreeMap<ListenerPlan, V>,
    held: &BTreeMap<ListenerPlan, V>,
) -> BTreeMap<ListenerPlan, V> {
    wanted
        .iter()
        .filter(|(key, value)| held.get(key) != Some(value))
        .map(|(key, value)| (*key, *value))
        .collect()
}

/// The keys that are held and no longer wanted.
fn missing<V>(
    held: &BTreeMap<ListenerPlan, V>,
    wanted: &BTreeMap<ListenerPlan, V>,
) -> Vec<ListenerPlan> {
    held.keys()
        .filter(|key| !wanted.contains_key(key))
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_equal_is_not_written() {
        let key =
            |port: u16| -> ListenerPlan { format!("tcp://192.0.2.1:{port}").parse().unwrap() };
        let held = BTreeMap::from([(key(1), 1), (key(2), 2), (key(3), 3)]);
        let wanted = BTreeMap::from([(key(1), 1), (key(2), 0), (key(4), 4)]);
        assert_eq!(
            differing(&wanted, &held),
            BTreeMap::from([(key(2), 0), (key(4), 4)])
        );
        assert_eq!(missing(&held, &wanted), [key(3)]);
    }
}
