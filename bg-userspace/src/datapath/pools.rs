//! Pools: what their tables hold, and where they lie in the arena.

use std::collections::BTreeMap;

use bg_common::{
    abi::MAGLEV_ROW,
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

/// Stretches of the arena that no pool takes up: first row, and how many.
struct Free(BTreeMap<u32, u32>);

impl Free {
    /// What pools of these words leave of an arena of so many rows.
    fn beside(used: impl Iterator<Item = PoolWord>, rows: u32) -> Self {
        let mut used: Vec<_> = used.filter(|pool| pool.slots() > 0).collect();
        used.sort_unstable_by_key(|pool| pool.base());
        let mut free = BTreeMap::new();
        let mut next = 0;
        for pool in used {
            let first = pool.base() / MAGLEV_ROW;
            if first > next {
                free.insert(next, first - next);
            }
            next = next.max(first + pool.slots().div_ceil(MAGLEV_ROW));
        }
        if rows > next {
            free.insert(next, rows - next);
        }
        Self(free)
    }

    /// Takes the first stretch with room for `slots` slots: its first slot.
    fn take(&mut self, slots: u32) -> Result<u32, Error> {
        let wanted = slots.div_ceil(MAGLEV_ROW);
        let found = self.0.iter().find(|(_, rows)| **rows >= wanted);
        let Some((first, rows)) = found.map(|(first, rows)| (*first, *rows)) else {
            let rows = self.0.values().copied().max().unwrap_or(0);
            return Err(Error::Full {
                what: "slots in a row of the pools' hash tables, beside old ones (a pool with a hundred slots \
                       per weight; change fewer services at once, use smaller weights, or raise \
                       gateway.max_services)",
                wanted: slots as usize,
                limit: (rows * MAGLEV_ROW) as usize,
            });
        };
        self.0.remove(&first);
        if rows > wanted {
            self.0.insert(first + wanted, rows - wanted);
        }
        Ok(first * MAGLEV_ROW)
    }
}

impl Inner {
    /// The pools that change, with their places in the arena.
    pub(super) fn plan_pools(&self, pools: &BTreeMap<u32, Vec<Member>>) -> Result<Changed, Error> {
        let words = (0..self.room.pools()).map(|index| self.pool(index));
        // Old places stay taken until the new words are stored.
        let mut free = Free::beside(words, self.room.maglev_rows());
        let mut changed = Changed::new();
        for (index, members) in pools {
            let table = table(members);
            let held = self.pool(*index);
            if held.slots() as usize == table.len() && self.table_of(held) == table {
                continue;
            }
            let slots = table.len() as u32;
            let word = PoolWord::new(free.take(slots)?, slots);
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
        for index in (0..self.room.pools()).filter(|index| !kept.contains_key(index)) {
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

#[cfg(test)]
mod tests {
    use bg_common::abi::Room;

    use super::*;

    #[test]
    fn the_arena_gives_gaps_back() {
        let rows = Room::LEAST.maglev_rows();
        let used = [PoolWord::new(1024, 251), PoolWord::new(0, 251)];
        let mut free = Free::beside(used.into_iter(), rows);
        let places = [251, 1021, 300, 251].map(|slots| free.take(slots).unwrap());
        assert_eq!(places, [256, 1280, 512, 2304]);
        assert!(free.take(rows * MAGLEV_ROW).is_err());
        let rest = rows * MAGLEV_ROW - 2560;
        assert_eq!(free.take(rest).unwrap(), 2560);
        assert!(free.take(251).is_err());
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
