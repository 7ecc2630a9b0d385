//! Builds the eBPF object that the binary embeds, and the benchmark's.
//!
//! The objects need a compiler with the source of `core` and bpf-linker. The
//! compiler is the first of these that has it: `$BG_EBPF_RUSTC`, rustup's
//! nightly, rustup's stable, Debian's. Stable compilers are told to allow the
//! one unstable flag in use, `-Zbuild-std`. `cargo xtask setup` installs both.
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, anyhow};

fn main() -> Result<()> {
    println!("cargo:rerun-if-env-changed=BG_EBPF_RUSTC");
    println!("cargo:rerun-if-changed=../bg-common/src");

    let rustc = compiler()?;
    let version =
        capture(&rustc, &["--version"]).context("asking the eBPF compiler for its version")?;
    println!("cargo:rustc-env=BG_EBPF_COMPILER={version}");
    let linker = in_path("bpf-linker").ok_or_else(|| {
        anyhow!("bpf-linker is not in PATH nor in cargo's bin directory; run `cargo xtask setup`")
    })?;

    let bin = rustc
        .parent()
        .context("the eBPF compiler has no directory")?;
    let linker_dir = linker.parent().context("bpf-linker has no directory")?;
    // aya-build prefers rustup's proxies where it sees them; with this PATH it
    // takes cargo and rustc of the compiler chosen above.
    let path = env::join_paths([bin, Path::new("/usr/bin"), Path::new("/bin")])?;
    // SAFETY: a build script's main thread, before any other thread exists.
    unsafe {
        env::set_var("PATH", path);
        env::set_var("RUSTC_BOOTSTRAP", "1");
        env::set_var(
            "CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER",
            linker_dir.join("bpf-linker"),
        );
        env::remove_var("RUSTUP_TOOLCHAIN");
        // An object built incrementally, or in several codegen units, is another one,
        // and one that the kernel may refuse.
        env::set_var("CARGO_INCREMENTAL", "0");
        env::set_var("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
        env::set_var("CARGO_PROFILE_RELEASE_PANIC", "abort");
    }

    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let object = manifest.join("../bg-ebpf").canonicalize()?;
    let root = object
        .to_str()
        .context("the path of the source tree is not UTF-8")?;
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "bg-ebpf",
            root_dir: root,
            no_default_features: false,
            features: &["kernel"],
        }],
        aya_build::Toolchain::default(),
    )
}

fn compiler() -> Result<PathBuf> {
    if let Some(given) = env::var_os("BG_EBPF_RUSTC") {
        return usable(Path::new(&given)).with_context(|| {
            format!(
                "BG_EBPF_RUSTC={} has no source of core beside it",
                given.display()
            )
        });
    }
    let rustup = |toolchain| {
        capture(
            Path::new("rustup"),
            &["which", "--toolchain", toolchain, "rustc"],
        )
    };
    [
        rustup("nightly"),
        rustup("stable"),
        Some("/usr/bin/rustc".to_owned()),
    ]
    .into_iter()
    .flatten()
    .find_map(|candidate| usable(Path::new(&candidate)))
    .context("no Rust compiler with the source of core was found; run `cargo xtask setup`")
}

/// The compiler, if its sysroot has the source of `core` and a cargo.
fn usable(rustc: &Path) -> Option<PathBuf> {
    let sysroot = PathBuf::from(capture(rustc, &["--print", "sysroot"])?);
    let core = sysroot.join("lib/rustlib/src/rust/library/core");
    let cargo = rustc.with_file_name("cargo");
    (fs::exists(core).ok()? && fs::exists(cargo).ok()?).then(|| rustc.to_owned())
}

fn capture(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn in_path(program: &str) -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .chain([cargo_home.join("bin")])
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}
