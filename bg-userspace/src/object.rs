//! The eBPF objects, built by this package's build script.

/// The ELF object with the XDP program and the map definitions.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bgswitch-ebpf"));

/// The ELF object with the programs of `cargo xtask bench`. Nothing of the daemon
/// uses it, so it is not in its binary.
pub static BENCH: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bgswitch-bench-ebpf"));
