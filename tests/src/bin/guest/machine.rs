//! A machine with nothing on it: mounts, modules, the checks one after the other,
//! the end.

use std::{
    convert::Infallible,
    fs::{self, File},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::reboot::{RebootMode, reboot},
};

/// Type and place.
const MOUNTS: [(&str, &str); 6] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("bpf", "/sys/fs/bpf"),
];
/// The modules of this kernel, a file name a line, each after what it needs.
const MODULES: &str = "/modules/order";

/// Runs the checks, and ends the machine. What xtask reads begins with
/// `bgswitch-kernels`; the last of it is `done`, without which nothing counts.
pub fn run<'a>(checks: impl Iterator<Item = &'a str>) -> Result<Infallible> {
    for (kind, place) in MOUNTS {
        fs::create_dir_all(place)?;
        mount(
            Some(kind),
            place,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mounting {place}"))?;
    }
    let order = fs::read_to_string(MODULES).context(MODULES)?;
    for name in order.lines() {
        insert(name).with_context(|| format!("the module {name}"))?;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("bgswitch-kernels release {}", release.trim());
    for name in checks {
        let (word, found) = check(name);
        println!("bgswitch-kernels {name} {word} {found}");
    }
    println!("bgswitch-kernels done");
    nix::unistd::sync();
    Ok(reboot(RebootMode::RB_POWER_OFF)?)
}

fn insert(name: &str) -> Result<()> {
    let file = File::open(format!("/modules/{name}"))?;
    Ok(finit_module(&file, c"", ModuleInitFlags::empty())?)
}

/// `ok` or `failed`, and the last line that the check printed.
fn check(name: &str) -> (&'static str, String) {
    match in_a_process(name) {
        Ok((true, found)) => ("ok", found),
        Ok((false, found)) => ("failed", found),
        Err(error) => ("failed", format!("{error:#}")),
    }
}

fn in_a_process(name: &str) -> Result<(bool, String)> {
    let output = Command::new("/proc/self/exe")
        .arg(name)
        .env("PATH", "/bin")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let found = text.lines().last().unwrap_or_default();
    ensure!(
        !found.is_empty(),
        "it ended without a word: {}",
        output.status
    );
    Ok((output.status.success(), found.to_owned()))
}
