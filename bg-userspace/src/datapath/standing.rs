//! Who is in a pool and who is out: a backend that fell is out of its pool, unless
//! nobody would be left there.

use std::collections::{BTreeMap, BTreeSet};

use bg_common::{
    maglev::Member,
    service::{Backend, Colour, PoolWord},
};

use super::{Datapath, Error, Inner, layout::address_of};
use crate::plan::{BackendName, Standing};

/// Ids of the backends that shall be out of their pools; `before`: those that were.
pub fn out(
    standings: &BTreeMap<BackendName, Standing>,
    services: &BTreeMap<String, u32>,
    backends: &BTreeMap<u32, Backend>,
    before: &BTreeSet<u32>,
) -> BTreeSet<u32> {
    let names = names(services, backends);
    let is_out = |(id, name): &(u32, BackendName)| match standings.get(name) {
        None | Some(Standing::In) => false,
        Some(Standing::Out) => true,
        Some(Standing::AsItWas) => before.contains(id),
    };
    names.filter(is_out).map(|(id, _)| id).collect()
}

/// Pools without the members that are out. A pool that nobody would be left in is
/// whole: what probes say of it then is worth less than a try.
pub fn without(
    pools: &BTreeMap<u32, Vec<Member>>,
    out: &BTreeSet<u32>,
) -> BTreeMap<u32, Vec<Member>> {
    let left = |members: &Vec<Member>| {
        let mut left = members.clone();
        left.retain(|member| !out.contains(&member.id));
        if left.is_empty() {
            left.clone_from(members);
        }
        left
    };
    pools.iter().map(|(at, pool)| (*at, left(pool))).collect()
}

/// The names of backends, by id.
fn names(
    services: &BTreeMap<String, u32>,
    backends: &BTreeMap<u32, Backend>,
) -> impl Iterator<Item = (u32, BackendName)> {
    let services: BTreeMap<u32, &String> = services.iter().map(|(name, id)| (*id, name)).collect();
    backends.iter().filter_map(move |(id, backend)| {
        let port = u16::from_be_bytes(backend.port);
        let name = BackendName {
            service: (*services.get(&u32::from(backend.service))?).clone(),
            colour: Colour::from_bit(backend.colour),
            address: address_of(backend),
            port: (port != 0).then_some(port),
        };
        Some((*id, name))
    })
}

impl Inner {
    /// Takes over from the kernel who is out: it has the backend, and its pool does
    /// not (law 4).
    pub(super) fn adopt_standings(&self) {
        let mut tables: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        let mut out = BTreeSet::new();
        for (id, backend) in self.backends() {
            let colour = Colour::from_bit(backend.colour);
            let index = PoolWord::index(u32::from(backend.service), colour, backend.family == 6);
            let table = tables
                .entry(index)
                .or_insert_with(|| self.table_of(self.pool(index)).into_iter().collect());
            if !table.is_empty() && !table.contains(&id) {
                out.insert(id);
            }
        }
        self.applied().out = out;
    }
}

impl Datapath {
    /// Takes backends out of their pools, and puts others in again, as `standings`
    /// says when no other change is under way. Blocks.
    pub fn settle(
        &self,
        standings: impl FnOnce() -> BTreeMap<BackendName, Standing>,
    ) -> Result<(), Error> {
        let _alone = self.inner.changing.blocking_lock();
        let applied = self.inner.applied().clone();
        let out = out(
            &standings(),
            &applied.services,
            &applied.backends,
            &applied.out,
        );
        let pools = self.inner.plan_pools(&without(&applied.pools, &out))?;
        self.inner.write_pools(&pools);
        self.inner.applied().out = out;
        Ok(())
    }

    /// The backends that are not in their pools.
    pub fn out_of_pools(&self) -> BTreeSet<BackendName> {
        let applied = self.inner.applied().clone();
        let pools = without(&applied.pools, &applied.out);
        let left: BTreeSet<u32> = pools.values().flatten().map(|member| member.id).collect();
        names(&applied.services, &applied.backends)
            .filter(|(id, _)| !left.contains(id))
            .map(|(_, name)| name)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::layout::wide;

    /// Service 3 has a backend of each of these ids and last octets.
    fn backends(of: &[(u32, u8)]) -> BTreeMap<u32, Backend> {
        let backend = |octet: u8| Backend {
            address: wide([10, 0, 0, octet].into()),
            family: 4,
            colour: 1,
            service: 3,
            ..Backend::default()
        };
        of.iter()
            .map(|(id, octet)| (*id, backend(*octet)))
            .collect()
    }

    fn name(octet: u8) -> BackendName {
        BackendName {
            service: "llm".to_owned(),
            colour: Colour::Green,
            address: [10, 0, 0, octet].into(),
            port: None,
        }
    }

    #[test]
    fn who_is_out_is_what_probes_say_or_what_was() {
        let services = BTreeMap::from([("llm".to_owned(), 3)]);
        let backends = backends(&[(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]);
        let standings = BTreeMap::from([
            (name(1), Standing::In),
            (name(2), Standing::Out),
            (name(3), Standing::AsItWas),
            (name(4), Standing::AsItWas),
        ]);
        // The last one is not probed any more.
        let before = [1, 3, 5].into();
        assert_eq!(
            out(&standings, &services, &backends, &before),
            [2, 3].into()
        );
    }

    /// Laws 3 and 6: whatever probes say, a pool that has members has some left.
    #[test]
    fn no_pool_is_ever_emptied() {
        let member = |id| Member {
            id,
            name: u64::from(id),
            weight: 1,
        };
        let pools = BTreeMap::from([(0, vec![member(1), member(2)]), (1, vec![member(3)])]);
        assert_eq!(without(&pools, &[].into()), pools);
        let left = without(&pools, &[1, 3].into());
        assert_eq!(left[&0], [member(2)]);
        assert_eq!(left[&1], pools[&1]);
        assert_eq!(without(&pools, &[1, 2, 3].into()), pools);
    }
}
