//! The eBPF object, built by this package's build script.

/// The ELF object with the XDP program and the map definitions.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bgswitch-ebpf"));
