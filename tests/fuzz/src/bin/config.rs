//! `cargo xtask fuzz config`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: bg_fuzz::seeds::write(bg_fuzz::config::seeds),
    |data: &[u8]| bg_fuzz::config::run(data)
);
