//! Where the eBPF object's compiler and linker are.
//!
//! The same search as in `bg-userspace/build.rs`: the first compiler whose
//! sysroot has the source of `core`, out of `$BG_EBPF_RUSTC`, rustup's nightly,
//! rustup's stable, and Debian's.

use std::{
    env,
    path::{Path, PathBuf},
};

use crate::command::capture;

/// The compiler of the eBPF object.
pub fn compiler() -> Option<PathBuf> {
    if let Some(given) = env::var_os("BG_EBPF_RUSTC") {
        return Some(PathBuf::from(given)).filter(|rustc| has_core(rustc));
    }
    [
        rustup("nightly"),
        rustup("stable"),
        Some("/usr/bin/rustc".into()),
    ]
    .into_iter()
    .flatten()
    .find(|rustc| has_core(rustc))
}

/// rustup's compiler of that toolchain, if it is installed.
pub fn rustup(toolchain: &str) -> Option<PathBuf> {
    capture("rustup", &["which", "--toolchain", toolchain, "rustc"]).map(PathBuf::from)
}

/// `bpf-linker`, in PATH or in cargo's directory, and its version.
pub fn linker() -> Option<(PathBuf, String)> {
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    let linker = find_in(
        "bpf-linker",
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).chain([cargo_home.join("bin")]),
    )?;
    let version = capture(&linker, &["--version"])?;
    Some((linker, version.trim_start_matches("bpf-linker ").to_owned()))
}

/// A program, where root would find it.
pub fn program(name: &str) -> Option<PathBuf> {
    let system = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    find_in(
        name,
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).chain(system),
    )
}

/// Whether root would find a program.
pub fn has_program(name: &str) -> bool {
    program(name).is_some()
}

fn has_core(rustc: &Path) -> bool {
    let Some(sysroot) = capture(rustc, &["--print", "sysroot"]) else {
        return false;
    };
    Path::new(&sysroot)
        .join("lib/rustlib/src/rust/library/core")
        .exists()
        && rustc.with_file_name("cargo").exists()
}

fn find_in(program: &str, mut directories: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    directories.find_map(|directory| Some(directory.join(program)).filter(|file| file.is_file()))
}
