//! `cargo xtask fuzz api`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: bg_fuzz::seeds::write(bg_fuzz::api::seeds),
    |data: &[u8]| bg_fuzz::api::run(data)
);
