//! `cargo xtask setup`: from a Debian with nothing but rustup's cargo to a
//! machine that builds, shows and tests everything.
//!
//! Looks first and installs only what is missing, so a second run is quick and
//! changes nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{self, capture, cargo, is_root},
    toolchain,
};

const BPFFS: &str = "/sys/fs/bpf";
const LLVM: &str = "/usr/lib/llvm-22";
/// Links with LLVM 22, the one of both compilers that the object is built with.
const BPF_LINKER: &str = "0.13.0";

/// Packages by the file that shows that they are there.
const PROGRAMS: [(&str, &str); 7] = [
    ("ip", "iproute2"),
    ("ethtool", "ethtool"),
    ("sysctl", "procps"),
    ("mount", "mount"),
    ("curl", "curl"),
    ("iperf3", "iperf3"),
    ("dig", "bind9-dnsutils"),
];
/// The picture's typeface.
const FONT: (&str, &str) = (
    "/usr/share/fonts/opentype/inter/Inter-Regular.otf",
    "fonts-inter",
);
/// A compiler and the source of `core` of one version, and clippy to match.
const COMPILER: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-clippy"];
/// What bpf-linker is built from.
const LINKER: [&str; 6] = [
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "zlib1g-dev",
    "gcc",
    "g++",
];

/// Finds or installs everything; says what it found and what it does.
pub fn run() -> Result<()> {
    let missing = Missing::look();
    if missing.any_for_root() && !is_root() {
        bail!(
            "setup has to install or mount as root what is missing here; run:\n{}",
            missing.as_commands().join("\n")
        );
    }
    missing.install()?;
    let (Some(compiler), Some((linker, version))) = (toolchain::compiler(), toolchain::linker())
    else {
        bail!("everything was installed, yet the eBPF compiler or bpf-linker is not to be found");
    };
    eprintln!(
        "setup: eBPF objects are built by {} ({}) and bpf-linker {version} ({})",
        capture(&compiler, &["--version"]).unwrap_or_default(),
        compiler.display(),
        linker.display(),
    );
    Ok(())
}

/// Installs the packages of programs that are not here.
pub fn programs(programs: &[(&str, &'static str)]) -> Result<()> {
    packages(lacking(programs))
}

/// Installs packages.
pub fn packages(packages: Vec<&'static str>) -> Result<()> {
    let missing = Missing {
        packages,
        linker: false,
        bpffs: false,
    };
    missing.install()
}

/// The packages of programs that are not here.
fn lacking(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    let lacks = |program: &&(&str, _)| !toolchain::has_program(program.0);
    programs
        .iter()
        .filter(lacks)
        .map(|(_, package)| *package)
        .collect()
}

/// Finds or installs the C++ compiler that libFuzzer is built with.
pub fn cxx() -> Result<()> {
    if ["c++", "g++", "clang++"]
        .into_iter()
        .any(toolchain::has_program)
    {
        return Ok(());
    }
    let missing = Missing {
        packages: vec!["g++"],
        linker: false,
        bpffs: false,
    };
    if !is_root() {
        let commands = missing.as_commands();
        bail!(
            "fuzzing needs a C++ compiler; run:\n{}",
            commands.join("\n")
        );
    }
    missing.install()
}

/// What this machine lacks.
struct Missing {
    packages: Vec<&'static str>,
    linker: bool,
    bpffs: bool,
}

impl Missing {
    fn look() -> Self {
        let mut packages = lacking(&PROGRAMS);
        if !Path::new(FONT.0).exists() {
            packages.push(FONT.1);
        }
        if toolchain::compiler().is_none() && !add_core_to_nightly() {
            eprintln!("setup: no Rust compiler here has the source of core; taking Debian's");
            packages.extend(COMPILER);
        }
        let linker = linker_is_missing();
        if linker {
            packages.extend(LINKER);
        }
        Self {
            packages,
            linker,
            bpffs: !is_bpffs(),
        }
    }

    fn any_for_root(&self) -> bool {
        !self.packages.is_empty() || self.bpffs
    }

    /// What a person would type, one command a line.
    fn as_commands(&self) -> Vec<String> {
        let sudo = |command: &Command| format!("  sudo {}", command::line(command));
        let mut lines = Vec::new();
        if !self.packages.is_empty() {
            lines.push(sudo(&apt_update()));
            lines.push(sudo(&apt_install(&self.packages)));
        }
        if self.bpffs {
            lines.push(sudo(&mount_bpffs()));
        }
        lines.push("  cargo xtask setup".to_owned());
        lines
    }

    fn install(&self) -> Result<()> {
        if !self.packages.is_empty() {
            if !toolchain::has_program("apt-get") {
                bail!(
                    "this is no Debian; install what these of its packages hold, then run `cargo xtask setup` again: {}",
                    self.packages.join(" ")
                );
            }
            eprintln!("setup: installing {}", self.packages.join(", "));
            command::run(&mut apt_update())?;
            command::run(&mut apt_install(&self.packages))?;
        }
        if self.linker {
            eprintln!("setup: building bpf-linker {BPF_LINKER} (about a minute)");
            command::run(&mut install_linker())?;
        }
        if self.bpffs {
            eprintln!("setup: mounting the BPF file system");
            fs::create_dir_all(BPFFS).with_context(|| format!("making {BPFFS}"))?;
            command::run(&mut mount_bpffs())?;
        }
        Ok(())
    }
}

/// Asks rustup for the source of `core` beside a nightly, if there is one. No
/// answer from rustup's server is no error: Debian's compiler does as well.
fn add_core_to_nightly() -> bool {
    if toolchain::rustup("nightly").is_none() {
        return false;
    }
    let mut add = Command::new("timeout");
    add.args([
        "120",
        "rustup",
        "component",
        "add",
        "rust-src",
        "--toolchain",
        "nightly",
    ]);
    if let Err(error) = command::run(&mut add) {
        eprintln!("setup: {error:#}");
    }
    toolchain::compiler().is_some()
}

fn linker_is_missing() -> bool {
    let Some((linker, version)) = toolchain::linker() else {
        return true;
    };
    let numbers =
        |text: &str| -> Vec<u32> { text.split('.').map_while(|n| n.parse().ok()).collect() };
    let old = numbers(&version) < numbers(BPF_LINKER);
    if old {
        eprintln!(
            "setup: {} is bpf-linker {version}, {BPF_LINKER} is needed",
            linker.display()
        );
    }
    old
}

/// Whether the last mount on the BPF file system's place is one.
fn is_bpffs() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .rfind(|(place, _)| *place == BPFFS)
        .is_some_and(|(_, kind)| kind == "bpf")
}

fn apt_update() -> Command {
    let mut apt = Command::new("apt-get");
    apt.args(["update", "-q"]);
    apt
}

fn apt_install(packages: &[&str]) -> Command {
    let mut apt = Command::new("env");
    apt.args([
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "install",
        "-q",
        "-y",
        "--no-install-recommends",
    ])
    .args(packages);
    apt
}

fn install_linker() -> Command {
    let mut install = cargo();
    install
        .env("LLVM_PREFIX", PathBuf::from(LLVM))
        .args(["install", "bpf-linker", "--force", "--version", BPF_LINKER])
        .args(["--no-default-features", "--features", "llvm-22"]);
    install
}

fn mount_bpffs() -> Command {
    let mut mount = Command::new("mount");
    mount.args(["-t", "bpf", "bpf", BPFFS]);
    mount
}
