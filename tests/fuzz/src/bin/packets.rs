//! `cargo xtask fuzz packets`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: bg_fuzz::seeds::write(bg_fuzz::packets::seeds),
    |data: &[u8]| bg_fuzz::packets::run(data)
);
