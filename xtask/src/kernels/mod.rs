//! `cargo xtask kernels`: what the packet path can do on other kernels than this
//! machine's, each in a virtual machine.

mod initramfs;
mod machine;
mod modules;
mod packages;
mod table;

use std::{fs, path::PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::{command, setup};

/// A kernel of a Debian release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kernel {
    /// The oldest that the packet path runs on.
    #[value(name = "5.10")]
    V5_10,
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
    /// The newest that Debian has.
    #[value(name = "newest")]
    Newest,
}

impl Kernel {
    const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::Newest];

    const fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    /// The Debian release that has it.
    const fn suite(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::Newest => "sid",
        }
    }

    /// Where what belongs to it is kept: its files, its console.
    fn directory(self) -> PathBuf {
        command::target().join("kernels").join(self.suite())
    }
}

/// What machines and their file systems are made with, and of which package.
const PROGRAMS: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
];

/// Boots these kernels, or all, and ends with a table. Everything that was not seen
/// to work is a failure, a kernel that could not be had too.
pub fn run(kernels: &[Kernel]) -> Result<()> {
    let kernels = if kernels.is_empty() {
        &Kernel::ALL[..]
    } else {
        kernels
    };
    if !command::is_root() {
        bail!(
            "the machines get a network of their own; run: \
             sudo env \"PATH=$PATH\" cargo xtask kernels"
        );
    }
    setup::run()?;
    setup::programs(&PROGRAMS)?;
    command::build_all()?;
    let results: Vec<_> = kernels
        .iter()
        .map(|kernel| (kernel.name(), boot(*kernel)))
        .collect();
    print!("{}", table::markdown(&results));
    let failures = table::failures(&results);
    for failure in &failures {
        println!("failed: {failure}");
    }
    println!("{} kernels, {} failures", results.len(), failures.len());
    if failures.is_empty() {
        return Ok(());
    }
    bail!(
        "consoles are in {}",
        command::target().join("kernels").display()
    );
}

fn boot(kernel: Kernel) -> Result<machine::Report> {
    let directory = kernel.directory();
    fs::create_dir_all(&directory)?;
    let files = packages::get(kernel.suite(), &directory)?;
    let archive = directory.join("initramfs");
    fs::write(&archive, initramfs::build(&files.modules)?)?;
    machine::run(
        kernel.name(),
        &files.image,
        &archive,
        &directory.join("console"),
    )
}
