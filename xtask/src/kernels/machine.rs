//! A virtual machine: its kernel, its console, its end.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::command;

/// A machine that says nothing more is ended after this time.
const LIMIT: Duration = Duration::from_mins(5);
/// What the guest's lines begin with.
const MARK: &str = "bgswitch-kernels ";

/// What the guest said of itself.
#[derive(Debug)]
pub struct Report {
    /// The kernel's own name.
    pub release: String,
    /// Check to what it found, or why it failed.
    pub checks: BTreeMap<String, Result<String, String>>,
}

/// What a kernel says that meets a breakpoint which is none of its own any more. While it
/// patches its code (`text_poke_bp`, at each XDP attach: the dispatcher), it puts one
/// there; an emulated processor may run it when it is gone already, a real one cannot.
const STALE: &str = "Oops: int3";

/// In a network namespace of its own, at one end of a link of many queues: a driver
/// on an old kernel gives every processor one for XDP. The other end is nobody.
const SCRIPT: &str =
    "ip tuntap add dev tap0 mode tap multi_queue && ip link set tap0 up && exec \"$@\"";

/// Boots a kernel without the help of the processor, which not every machine has,
/// and reads what the guest says to its end.
pub fn run(name: &str, image: &Path, archive: &Path, console: &Path) -> Result<Report> {
    let mut qemu = Command::new("unshare");
    qemu.args(["--net", "sh", "-c", SCRIPT, "sh", "qemu-system-x86_64"])
        .args([
            "-machine",
            "pc,accel=tcg",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "1024",
        ])
        .args([
            "-nographic",
            "-no-reboot",
            "-nodefaults",
            "-serial",
            "stdio",
        ])
        .args([
            "-netdev",
            "tap,id=net,ifname=tap0,script=no,downscript=no,queues=4,vhost=off",
        ])
        .args([
            "-device",
            "virtio-net-pci,netdev=net,mq=on,vectors=10,romfile=",
        ])
        .args(["-append", "console=ttyS0 quiet panic=-1 net.ifnames=0"])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(archive);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut boot = || {
        eprintln!("kernels: {name}: $ {}", command::line(&qemu));
        let child = qemu
            .spawn()
            .with_context(|| format!("starting `{}`", command::line(&qemu)))?;
        Machine(child).console(name, console)
    };
    let mut lines = boot()?;
    if lines.iter().any(|line| line.contains(STALE)) {
        eprintln!("kernels: {name}: QEMU ran a breakpoint that was gone already: once more");
        lines = boot()?;
    }
    parse(&lines)
}

/// A machine that does not outlive this.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// What the machine prints until it ends, which is kept in a file too.
    fn console(mut self, name: &str, file: &Path) -> Result<Vec<String>> {
        let output = self.0.stdout.take().context("QEMU has no stdout")?;
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut file = fs::File::create(file)?;
        let begun = Instant::now();
        let deadline = begun + LIMIT;
        let mut lines = Vec::new();
        loop {
            match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    let second = begun.elapsed().as_secs();
                    eprintln!("kernels: {name}: {second} s: {line}");
                    writeln!(file, "{line}")?;
                    lines.push(line);
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(lines),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the machine did not end in {} s", LIMIT.as_secs())
                }
            }
        }
    }
}

/// Nothing counts unless the guest came to its end.
fn parse(lines: &[String]) -> Result<Report> {
    let mut report = Report {
        release: String::new(),
        checks: BTreeMap::new(),
    };
    let mut done = false;
    for line in lines {
        let Some((_, said)) = line.split_once(MARK) else {
            continue;
        };
        let mut words = said.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("release"), Some(release), None) => release.clone_into(&mut report.release),
            (Some("done"), None, None) => done = true,
            (Some(check), Some("ok"), Some(found)) => {
                report.checks.insert(check.to_owned(), Ok(found.to_owned()));
            }
            (Some(check), _, why) => {
                let why = why.unwrap_or("it gave no reason").to_owned();
                report.checks.insert(check.to_owned(), Err(why));
            }
            (None, ..) => {}
        }
    }
    if !done {
        let last = lines.iter().rev().find(|line| !line.is_empty());
        bail!(
            "the machine ended before the checks did; its last line: {}",
            last.map_or("none", String::as_str)
        );
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Result<Report> {
        let lines: Vec<_> = lines.iter().map(|line| (*line).to_owned()).collect();
        parse(&lines)
    }

    #[test]
    fn a_machine_that_did_not_come_to_its_end_counts_as_nothing() {
        assert!(read(&[]).is_err());
        let died = ["bgswitch-kernels load ok 5 instructions", "Kernel panic"];
        assert!(
            read(&died)
                .unwrap_err()
                .to_string()
                .contains("Kernel panic")
        );
    }

    #[test]
    fn what_is_not_ok_is_a_failure() {
        let report = read(&[
            "noise",
            "bgswitch-kernels release 5.10.0",
            "bgswitch-kernels load ok 5 instructions",
            "bgswitch-kernels veth failed no",
            "[0.1] bgswitch-kernels virtio",
            "bgswitch-kernels done",
        ]);
        let report = report.unwrap();
        assert_eq!(report.release, "5.10.0");
        assert_eq!(report.checks["load"], Ok("5 instructions".to_owned()));
        assert_eq!(report.checks["veth"], Err("no".to_owned()));
        assert!(report.checks["virtio"].is_err());
    }
}
