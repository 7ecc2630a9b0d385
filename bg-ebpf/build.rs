//! Tells the BPF linker that unaligned access is allowed: headers lie where the
//! wire puts them, and the kernel allows it on every architecture with
//! `HAVE_EFFICIENT_UNALIGNED_ACCESS` (x86-64, arm64). Without it each address
//! is read byte by byte.
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("bpf") {
        println!("cargo:rustc-link-arg-bins=--cpu-features=+allows-misaligned-mem-access");
    }
}
