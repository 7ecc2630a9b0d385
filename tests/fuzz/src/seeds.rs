//! Inputs to begin with: made from the case table and the documentation, not kept
//! as files.

use std::{env, fs, path::PathBuf};

/// Names the directory for [`write`].
pub const DIRECTORY: &str = "BG_FUZZ_SEEDS";

/// Writes seeds into the directory that the environment names, if it does.
///
/// # Panics
/// When they cannot be written.
pub fn write(seeds: fn() -> Vec<Vec<u8>>) {
    let Some(directory) = env::var_os(DIRECTORY).map(PathBuf::from) else {
        return;
    };
    fs::create_dir_all(&directory).expect("a directory for seeds");
    for (number, seed) in seeds().into_iter().enumerate() {
        fs::write(directory.join(format!("seed-{number:04}")), seed).expect("writing a seed");
    }
}

/// Runs a target on its seeds, and `rounds` times on one that was changed a little.
#[cfg(test)]
pub(crate) fn try_out(run: fn(&[u8]), seeds: &[Vec<u8>], rounds: u64) {
    /// Shows the input of a run that panics.
    struct Shown<'a>(&'a [u8]);
    impl Drop for Shown<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let bytes = self.0.iter();
                let hex = bytes.fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
                eprintln!("the input was {hex}");
            }
        }
    }
    let run = |input: &[u8]| {
        let _shown = Shown(input);
        run(input);
    };
    for seed in seeds {
        run(seed);
    }
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    // xorshift64 (Marsaglia, 2003): the same numbers each time.
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below.max(1)
    };
    for _ in 0..rounds {
        let mut input = seeds[random(seeds.len())].clone();
        for _ in 0..=random(4) {
            let at = random(input.len());
            match random(4) {
                0 => input.truncate(at),
                1 => input.insert(at, random(256) as u8),
                2 => input.extend_from_slice(&seeds[random(seeds.len())]),
                _ => {
                    if let Some(byte) = input.get_mut(at) {
                        *byte = random(256) as u8;
                    }
                }
            }
        }
        run(&input);
    }
}
