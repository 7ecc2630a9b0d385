//! Consistent hashing of a pool (Maglev, NSDI 2016, section 3.4), with weights.
//!
//! A change of one backend moves few slots of the others, so flows that are not
//! remembered mostly keep their backend. Weighted backends take several turns:
//! in each round a backend fills as many slots as its weight says.

/// A member of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// What the table holds: the backend's id.
    pub id: u32,
    /// Where the member stands in the table: a hash of what names it (address
    /// and port), so that the table depends neither on ids nor on order.
    pub name: u64,
    /// Share of the slots relative to the other members; at least 1.
    pub weight: u32,
}

/// Table sizes: primes, so that every permutation visits every slot.
const SIZES: [u32; 8] = [1, 251, 1021, 4093, 8191, 16_381, 32_749, 65_521];

/// The table size for `members` with `total` weight: one slot for one member,
/// otherwise at least 100 slots per weight where the largest table has them.
pub fn size(members: usize, total: u64) -> u32 {
    if members <= 1 {
        return members as u32;
    }
    let wanted = total.saturating_mul(100);
    SIZES[1..]
        .iter()
        .copied()
        .find(|size| u64::from(*size) >= wanted)
        .unwrap_or(SIZES[SIZES.len() - 1])
}

const EMPTY: u32 = u32::MAX;

/// Fills `table` (of a length from [`size`]) with the ids of `members`.
/// `next` is scratch space of the members' length.
///
/// An empty pool leaves the table as it is.
pub fn fill(members: &[Member], next: &mut [u64], table: &mut [u32]) {
    let slots = table.len() as u64;
    if members.is_empty() || slots == 0 {
        return;
    }
    next.fill(0);
    table.fill(EMPTY);
    let mut left = slots;
    loop {
        for (member, next) in members.iter().zip(next.iter_mut()) {
            let offset = mix(member.name) % slots;
            let skip = if slots > 1 {
                mix(member.name ^ 0x9e37_79b9_7f4a_7c15) % (slots - 1) + 1
            } else {
                0
            };
            for _ in 0..member.weight.max(1) {
                loop {
                    let slot = (offset + *next * skip) % slots;
                    *next += 1;
                    if table[slot as usize] == EMPTY {
                        table[slot as usize] = member.id;
                        break;
                    }
                }
                left -= 1;
                if left == 0 {
                    return;
                }
            }
        }
    }
}

/// A 64-bit finaliser (splitmix64): every input bit changes half of the output.
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The name of a backend endpoint (FNV-1a over address and port, then mixed).
pub fn name(address: &[u8], port: [u8; 2]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in address.iter().chain(&port) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    mix(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(names: &[u8], weight: u32) -> Vec<Member> {
        names
            .iter()
            .map(|n| Member {
                id: u32::from(*n),
                name: name(&[10, 0, 0, *n], [0, 80]),
                weight,
            })
            .collect()
    }

    fn table(members: &[Member]) -> Vec<u32> {
        let total = members.iter().map(|m| u64::from(m.weight)).sum();
        let mut table = vec![0; size(members.len(), total) as usize];
        fill(members, &mut vec![0; members.len()], &mut table);
        table
    }

    fn share(table: &[u32], id: u32) -> f64 {
        table.iter().filter(|slot| **slot == id).count() as f64 / table.len() as f64
    }

    #[test]
    fn slots_are_shared_evenly() {
        let table = table(&pool(&[1, 2, 3, 4], 1));
        for id in 1..=4 {
            assert!((share(&table, id) - 0.25).abs() < 0.01);
        }
    }

    #[test]
    fn weights_are_respected() {
        let mut members = pool(&[1, 2], 1);
        members[1].weight = 3;
        let table = table(&members);
        assert!((share(&table, 2) - 0.75).abs() < 0.01);
    }

    #[test]
    fn a_lost_backend_moves_few_of_the_others() {
        let before = table(&pool(&[1, 2, 3, 4, 5], 1));
        let after = table(&pool(&[1, 2, 3, 4], 1));
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(b, a)| **b != 5 && b != a)
            .count();
        assert!(
            (moved as f64) < before.len() as f64 * 0.1,
            "{moved} of {}",
            before.len()
        );
    }

    #[test]
    fn order_and_ids_do_not_matter() {
        let mut members = pool(&[1, 2, 3], 1);
        let before = table(&members);
        members.rotate_left(1);
        let after = table(&members);
        let moved = before.iter().zip(&after).filter(|(b, a)| b != a).count();
        assert!((moved as f64) < before.len() as f64 * 0.1);
    }

    #[test]
    fn one_member_takes_one_slot_and_none_takes_none() {
        assert_eq!(table(&pool(&[9], 1)), [9]);
        assert!(table(&[]).is_empty());
    }
}
