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

use bg_tests::cases::{self, Case};

/// Interfaces and clock of the case table.
const IFINDEXES: [u32; 2] = [11, 12];
const TICK: u32 = 1_000_000;

/// The case table.
static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| cases::all(IFINDEXES, TICK));

/// Plays a script; every packet in it is judged.
pub fn run(data: &[u8]) {
    script::play(data, &CASES);
}

/// The case table as scripts: each case by itself, and each with a packet of another
/// one behind it.
pub fn seeds() -> Vec<Vec<u8>> {
    let alone = (0..CASES.len()).map(|case| script::seed(&CASES, case, None));
    let pairs = (0..CASES.len()).map(|case| {
        let next = (case + 1) % CASES.len();
        script::seed(&CASES, case, Some(next))
    });
    alone.chain(pairs).collect()
}

#[cfg(test)]
mod tests {
    use crate::seeds::try_out;

    #[test]
    fn the_laws_of_a_packet_hold_on_cases_and_what_is_near_them() {
        try_out(super::run, &super::seeds(), 100_000);
    }
}
