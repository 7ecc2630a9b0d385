//! Pools: what their tables hold, and where they lie in the arena.

use std::collections::BTreeMap;

use bg_common::{
    abi::{MAGLEV_ROW, capacity},
    maglev::{self, Member},
    service::PoolWord,
};

use super::{Inner, directory::wait_for_packets, error::Error};

/// Pools that change: index of the word, new word, table.
pub type Changed = BTreeMap<u32, (PoolWord, Vec<u32>)>;

/// Fills a pool's table. Weights count relative to each other only: 100 and 100
/// take as little room as 1 and 1.
pub fn table(members: &[Member]) -> Vec<u32> {
    let divisor = members.iter().map(|member| member.weight).fold(0, gcd);
    let members: Vec<Member> = members
        .iter()
        .map(|member| Member {
            weight: member.weight / divisor.max(1),
            ..*member
        })
        .collect();
    let total = members.iter().map(|member| u64::from(member.weight)).sum();
    let mut table = vec![0; maglev::size(members.len(), total) as usize];
    maglev::fill(&members, &mut vec![0; members.len()], &mut table);
    table
}

const fn gcd(a: u32, b: u32) -> u32 {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Finds `slots` slots of the arena that no pool in `used` takes up.
pub fn allocate(used: &[PoolWord], slots: u32) -> Result<u32, Error> {
    let arena = capacity::MAGLEV_ROWS as u32 * MAGLEV_ROW;
    let rows = |slots: u32| slots.next_multiple_of(MAGLEV_ROW);
    let mut used: Vec<(u32, u32)> = used
        .iter()
        .filter(|pool| pool.slots() > 0)
        .map(|pool| (pool.base(), rows(pool.slots())))
        .collect();
    used.sort_unstable();
    let mut base = 0;
    for (start, length) in used {
        if start.saturating_sub(base) >= rows(slots) {
            return Ok(base);
        }
        base = base.max(start + length);
    }
    if base + rows(slots) > arena {
        let (wanted, limit) = ((base + slots) as usize, arena as usize);
        return Err(Error::Full {
            what: "slots of the pools' hash tables, old and new ones together (a pool with a hundred slots per \
                   weight; change fewer services at once, or use smaller weights)",
            wanted,
            limit,
        });
    }
    Ok(base)
}

impl Inner {
    /// The pools that change, with their places in the arena.
    pub(super) fn plan_pools(&self, pools: &BTreeMap<u32, Vec<Member>>) -> Result<Changed, Error> {
        let mut used: Vec<PoolWord> = (0..POOLS).map(|index| self.pool(index)).collect();
        let mut changed = Changed::new();
        for (index, members) in pools {
            let table = table(members);
            let held = used[*index as usize];
            if held.slots() as usize == table.len() && self.table_of(held) == table {
                continue;
            }
            let base = allocate(&used, table.len() as u32)?;
            let word = PoolWord::new(base, table.len() as u32);
            // The old place stays taken until the new word is stored.
            used.push(word);
            changed.insert(*index, (word, table));
        }
        Ok(changed)
    }

    /// Writes tables, then the words that lead to them. Their places may have been other
    /// tables' a moment ago: no packet may still read those.
    pub(super) fn write_pools(&self, pools: &Changed) {
        if !pools.is_empty() {
            wait_for_packets();
        }
        for (index, (word, table)) in pools {
            for (pair, slots) in table.chunks(2).enumerate() {
                let high = slots.get(1).copied().unwrap_or(0);
                let at = word.base() as usize / 2 + pair;
                self.arena
                    .store(at, u64::from(slots[0]) | u64::from(high) << 32);
            }
            self.pools.store(*index as usize, word.0);
        }
    }

    /// Gives back the room of all pools but these.
    pub(super) fn free_pools<V>(&self, kept: &BTreeMap<u32, V>) {
        for index in (0..POOLS).filter(|index| !kept.contains_key(index)) {
            if self.pool(index).slots() > 0 {
                self.pools.store(index as usize, PoolWord::default().0);
            }
        }
    }

    pub(super) fn pool(&self, index: u32) -> PoolWord {
        PoolWord(self.pools.load(index as usize))
    }

    pub(super) fn table_of(&self, pool: PoolWord) -> Vec<u32> {
        (pool.base()..pool.base() + pool.slots())
            .map(|slot| (self.arena.load(slot as usize / 2) >> (slot % 2 * 32)) as u32)
            .collect()
    }
}

const POOLS: u32 = capacity::SERVICES as u32 * 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arena_gives_gaps_back() {
        let used = [PoolWord::new(0, 251), PoolWord::new(1024, 251)];
        assert_eq!(allocate(&used, 251).unwrap(), 256);
        assert_eq!(allocate(&used, 1021).unwrap(), 1280);
        assert!(allocate(&used, capacity::MAGLEV_ROWS as u32 * MAGLEV_ROW).is_err());
    }

    #[test]
    fn equal_weights_take_the_room_of_ones() {
        let pool = |weight| {
            let member = |id| Member {
                id,
                name: maglev::mix(u64::from(id)),
                weight,
            };
            table(&[member(1), member(2), member(3)])
        };
        assert_eq!(pool(100), pool(1));
    }
}
