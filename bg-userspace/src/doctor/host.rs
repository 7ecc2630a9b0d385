//! The kernel, what this process may do, and where state lies.

use std::{fs, path::Path};

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit},
    unistd::{AccessFlags, Group, Uid, eaccess},
};

use super::Findings;
use crate::{
    config::Paths,
    datapath::{Error, inspect},
};

/// The oldest kernel that the packet path runs on.
const OLDEST: (u32, u32) = (5, 10);
/// From here on BPF's memory counts as its process' cgroup's, not against `memlock`.
const NO_MEMLOCK: (u32, u32) = (5, 11);
/// Capabilities by number (capability.h); `CAP_SYS_ADMIN` stands for the two others.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

pub(super) fn look(findings: &mut Findings, paths: &Paths) {
    kernel(findings);
    let may = rights(findings);
    bpf(findings, may);
    bpffs(findings, paths);
    directories(findings, paths);
}

fn kernel(findings: &mut Findings) {
    let (major, minor) = inspect::release();
    let release = format!("Linux {major}.{minor}");
    if (major, minor) < OLDEST {
        let message = format!("{release}: 5.10 or newer is needed");
        findings.trouble("kernel", message, None);
    } else {
        findings.ok("kernel", release);
    }
    let jit = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable");
    match jit.as_deref().map(str::trim) {
        Ok("0") => findings.trouble(
            "jit",
            "net.core.bpf_jit_enable is 0: packets are interpreted, many times slower",
            Some("sysctl -w net.core.bpf_jit_enable=1".to_owned()),
        ),
        Ok(_) => findings.ok("jit", "BPF is compiled"),
        // Some kernels always compile, and let nobody but the host's own namespace see.
        Err(error) => findings.unseen("jit", format!("net.core.bpf_jit_enable: {error}")),
    }
    if (major, minor) >= NO_MEMLOCK {
        return;
    }
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((limit, _)) if limit < 1 << 30 => findings.note(
            "memlock",
            format!("{limit} bytes may be locked: before kernel 5.11 maps count as locked memory"),
            Some("ulimit -l unlimited   # systemd: LimitMEMLOCK=infinity".to_owned()),
        ),
        Ok(_) => findings.ok("memlock", "maps may be as large as they are"),
        Err(error) => findings.unseen("memlock", error.to_string()),
    }
}

/// Whether this process may do what the daemon does.
fn rights(findings: &mut Findings) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    let Some(effective) = effective else {
        findings.unseen("rights", "/proc/self/status does not tell capabilities");
        return false;
    };
    let has = |bit: u32| effective & (1 << bit) != 0;
    let lacks: Vec<&str> = [
        (has(CAP_NET_ADMIN), "CAP_NET_ADMIN"),
        (has(CAP_BPF) || has(CAP_SYS_ADMIN), "CAP_BPF"),
    ]
    .into_iter()
    .filter_map(|(has, name)| (!has).then_some(name))
    .collect();
    if lacks.is_empty() {
        findings.ok("rights", "this process may load and attach BPF programs");
        return true;
    }
    let message = format!(
        "this process lacks {}, so some of what follows cannot be seen; the daemon needs them",
        lacks.join(" and ")
    );
    findings.unseen("rights", message);
    false
}

fn bpf(findings: &mut Findings, may: bool) {
    if !may {
        return findings.unseen("bpf", "only a process with these rights may ask the kernel");
    }
    match inspect::features() {
        Ok(features) if features.large_frames => {
            findings.ok("bpf", "XDP also on frames in several buffers");
        }
        Ok(_) => findings.note(
            "bpf",
            "no XDP on frames in several buffers (kernel 6.3 has it): every MTU must fit one page",
            None,
        ),
        Err(error @ Error::NotPermitted { .. }) => findings.unseen("bpf", error.to_string()),
        Err(error) => findings.trouble("bpf", error.to_string(), None),
    }
}

fn bpffs(findings: &mut Findings, paths: &Paths) {
    let shown = paths.bpffs.display();
    match inspect::is_on_bpffs(&paths.bpffs) {
        Ok(true) => findings.ok("bpffs", format!("{shown} is on a BPF file system")),
        Ok(false) => {
            let error = Error::NoBpffs {
                path: paths.bpffs.clone(),
            };
            let mends = "mount -t bpf bpf /sys/fs/bpf".to_owned();
            findings.trouble("bpffs", error.to_string(), Some(mends));
        }
        Err(error) => return findings.unseen("bpffs", format!("{shown}: {error}")),
    }
    match inspect::check_pins(&paths.bpffs) {
        Ok(()) => {}
        Err(error @ Error::NotPermitted { .. }) => findings.unseen("pins", error.to_string()),
        Err(error) => {
            let mends = Some("bgswitch detach".to_owned());
            findings.trouble("pins", error.to_string(), mends);
        }
    }
}

fn directories(findings: &mut Findings, paths: &Paths) {
    let socket = paths.socket.parent().unwrap_or(Path::new("/"));
    directory(findings, "state", &paths.state_dir);
    directory(findings, "socket", socket);
    if !matches!(Group::from_name("bgswitch"), Ok(Some(_))) {
        findings.note(
            "socket",
            "there is no group bgswitch: only root may use the daemon",
            Some("groupadd --system bgswitch".to_owned()),
        );
    }
}

/// A directory that the daemon makes, and writes to.
fn directory(findings: &mut Findings, about: &str, path: &Path) {
    let there = path.ancestors().find(|ancestor| ancestor.exists());
    let there = there.unwrap_or(Path::new("/"));
    let shown = there.display();
    if !there.is_dir() {
        let mends = format!("mv {shown} {shown}.old");
        let message = format!(
            "{shown} is no directory, and {} is to be one",
            path.display()
        );
        return findings.trouble(about, message, Some(mends));
    }
    match eaccess(there, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => findings.ok(about, format!("{} can be written", path.display())),
        Err(Errno::EROFS) => {
            let message = format!("{shown} is on a file system that is read-only");
            findings.trouble(about, message, Some(format!("mount -o remount,rw {shown}")));
        }
        Err(error) if Uid::effective().is_root() => {
            findings.trouble(about, format!("{shown} cannot be written: {error}"), None);
        }
        Err(_) => {
            let message = format!("{shown} is not this user's: whether root may write is not seen");
            findings.unseen(about, message);
        }
    }
}
