//! Programs that the benchmark compares with: Debian's packages, unpacked beside
//! the build. Nothing is installed, so no service of theirs is enabled or started.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{self, is_root},
    toolchain,
};

/// Programs, and the packages that hold them.
const PROGRAMS: [(&str, &str); 3] = [
    ("nft", "nftables"),
    ("haproxy", "haproxy"),
    ("nginx", "nginx-light"),
];
/// nginx's proxy for TCP, and the file that shows that it is there.
const MODULE: (&str, &str) = (
    "usr/lib/nginx/modules/ngx_stream_module.so",
    "libnginx-mod-stream",
);

/// Finds or fetches them; says what it fetches.
pub fn fetch() -> Result<()> {
    let root = command::target().join("peers");
    let there = |path: &str| root.join(path).exists() || PathBuf::from("/").join(path).exists();
    let mut packages: Vec<&str> = PROGRAMS
        .iter()
        .filter(|(program, _)| {
            !there(&format!("usr/sbin/{program}")) && !toolchain::has_program(program)
        })
        .map(|(_, package)| *package)
        .collect();
    if !there(MODULE.0) {
        packages.push(MODULE.1);
    }
    if packages.is_empty() {
        return Ok(());
    }
    if !toolchain::has_program("apt-get") {
        bail!(
            "this is no Debian; install what these of its packages hold, then try again: {}",
            packages.join(" ")
        );
    }
    if !is_root() {
        bail!("comparing with peers needs root");
    }
    eprintln!(
        "setup: unpacking {} into {} (not installed: no service starts)",
        packages.join(", "),
        root.display()
    );
    let archives = root.join("archives");
    fs::create_dir_all(archives.join("partial"))
        .with_context(|| format!("making {}", archives.display()))?;
    command::run(Command::new("apt-get").args(["update", "-q"]))?;
    command::run(
        Command::new("apt-get")
            .args(["install", "-q", "-y", "--no-install-recommends"])
            .arg("--download-only")
            .arg("-o")
            .arg(format!("Dir::Cache::archives={}", absolute(&archives)?))
            .args(&packages),
    )?;
    for file in fs::read_dir(&archives)? {
        let file = file?.path();
        if file.extension().is_some_and(|ending| ending == "deb") {
            command::run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&root))?;
        }
    }
    fs::remove_dir_all(&archives).with_context(|| format!("removing {}", archives.display()))
}

fn absolute(path: &std::path::Path) -> Result<String> {
    Ok(std::path::absolute(path)?.display().to_string())
}
