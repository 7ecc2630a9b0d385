//! The packet path on the host: a world, what happens in it, and the packets that
//! come in.

mod answers;
mod errors;
mod oracle;
mod parts;
mod ports;
mod script;
mod sent;
mod view;
mod whose;

use std::sync::LazyLock;

use bg_tests::{
    cases::{self, Case},
    frame::fragments,
};

/// Interfaces and clock of the case table.
const IFINDEXES: [u32; 2] = [11, 12];
const TICK: u32 = 1_000_000;

/// What a fragment carries, bytes: less than an MTU of 1500 over both families.
const FRAGMENT: usize = 1400;

/// The case table, and behind it the packets that come in fragments.
static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| {
    let large = cases::large(IFINDEXES, TICK).into_iter();
    let mut cases = cases::all(IFINDEXES, TICK);
    cases.extend(large.map(|(case, _)| case));
    cases
});

/// Plays a script; every packet in it is judged.
pub fn run(data: &[u8]) {
    script::play(data, &CASES);
}

/// The case table as scripts: each case by itself, and each with a packet of another
/// one behind it. Of a packet in fragments, the first two.
pub fn seeds() -> Vec<Vec<u8>> {
    let (whole, large): (Vec<usize>, Vec<usize>) =
        (0..CASES.len()).partition(|case| CASES[*case].frame.len() <= script::LONGEST);
    let own = |case: usize| (CASES[case].world.ingress, CASES[case].frame.clone());
    let alone = whole.iter().map(|case| script::seed(*case, &[own(*case)]));
    let next = whole.iter().cycle().skip(1);
    let pairs = whole.iter().zip(next);
    let pairs = pairs.map(|(case, next)| script::seed(*case, &[own(*case), own(*next)]));
    let pieces = large.iter().map(|case| {
        let (ingress, frame) = own(*case);
        let pieces = fragments(&frame, FRAGMENT).into_iter().take(2);
        let pieces: Vec<_> = pieces.map(|piece| (ingress, piece)).collect();
        script::seed(*case, &pieces)
    });
    alone.chain(pairs).chain(pieces).collect()
}

#[cfg(test)]
mod tests {
    use crate::seeds::try_out;

    #[test]
    fn the_laws_of_a_packet_hold_on_cases_and_what_is_near_them() {
        try_out(super::run, &super::seeds(), 100_000);
    }
}
