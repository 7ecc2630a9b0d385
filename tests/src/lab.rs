//! A gateway with clients and two colours of servers, in network namespaces of
//! its own: real stacks, real packets, nothing outside of it.

use std::{
    fs::{self, File},
    os::fd::AsRawFd as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// The namespaces of a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Clients.
    Client,
    /// The gateway.
    Gateway,
    /// Blue servers.
    Blue,
    /// Green servers.
    Green,
}

const PLACES: [(Place, &str); 4] = [
    (Place::Client, "client"),
    (Place::Gateway, "gateway"),
    (Place::Blue, "blue"),
    (Place::Green, "green"),
];

/// Service address over IPv4.
pub const SERVICE: &str = "203.0.113.10";
/// Service address over IPv6.
pub const SERVICE_V6: &str = "2001:db8::10";
/// Addresses of the servers, by colour: two over IPv4, one over IPv6.
pub const SERVERS: [[&str; 3]; 2] = [
    ["10.0.1.10", "10.0.1.11", "fd00:1::10"],
    ["10.0.2.10", "10.0.2.11", "fd00:2::10"],
];

/// Namespaces, their links, a directory for state, and a gateway's daemon. All
/// of it is gone when it is dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
    directory: PathBuf,
    binary: PathBuf,
    daemon: Option<Child>,
    children: Vec<Child>,
}

static LABS: AtomicU32 = AtomicU32::new(0);
const PREFIX: &str = "bglab";

impl Lab {
    /// Makes the namespaces and their links.
    pub fn new() -> Result<Self> {
        ensure!(
            nix::unistd::Uid::effective().is_root(),
            "namespaces and BPF need root"
        );
        sweep_leftovers();
        mount_bpffs()?;
        let name = format!(
            "{PREFIX}{}-{}",
            std::process::id(),
            LABS.fetch_add(1, Ordering::Relaxed)
        );
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir_all(&directory)?;
        let binary = binary()?;
        let lab = Self {
            name,
            directory,
            binary,
            daemon: None,
            children: Vec::new(),
        };
        lab.wire()?;
        Ok(lab)
    }

    fn wire(&self) -> Result<()> {
        for (place, _) in PLACES {
            ip(&format!("netns add {}", self.namespace(place)))?;
            self.ip(place, "link set lo up")?;
            for key in ["all", "default"] {
                self.run(
                    place,
                    &format!("sysctl -qw net.ipv6.conf.{key}.accept_dad=0"),
                )?;
            }
        }
        let sides = [
            (Place::Client, "clients", "198.51.100", "2001:db8:c:"),
            (Place::Blue, "blue", "10.0.1", "fd00:1:"),
            (Place::Green, "green", "10.0.2", "fd00:2:"),
        ];
        for (place, link, v4, v6) in sides {
            let far = self.namespace(place);
            self.ip(
                Place::Gateway,
                &format!("link add name {link} type veth peer name eth0 netns {far}"),
            )?;
            let ends = [(Place::Gateway, link), (place, "eth0")];
            for (place, link) in ends {
                // A local sender leaves checksums to the "hardware", and a veth
                // takes redirected frames only if its other end has GRO on (or
                // XDP) by the time it comes up.
                self.run(place, &format!("ethtool -K {link} tx off gro on"))?;
            }
            for (place, link) in ends {
                self.ip(place, &format!("link set {link} up"))?;
            }
            self.ip(Place::Gateway, &format!("addr add {v4}.1/24 dev {link}"))?;
            self.ip(
                Place::Gateway,
                &format!("addr add {v6}:1/64 dev {link} nodad"),
            )?;
            for address in [
                format!("{v4}.10/24"),
                format!("{v4}.11/24"),
                format!("{v6}:10/64"),
            ] {
                self.ip(place, &format!("addr add {address} dev eth0 nodad"))?;
            }
            self.ip(place, &format!("route add default via {v4}.1"))?;
            self.ip(place, &format!("-6 route add default via {v6}:1"))?;
        }
        Ok(())
    }

    /// Name of a namespace.
    pub fn namespace(&self, place: Place) -> String {
        let part = PLACES
            .iter()
            .find(|(of, _)| *of == place)
            .map_or("", |(_, name)| name);
        format!("{}-{part}", self.name)
    }

    /// The namespace's file, to be entered by a thread.
    pub fn enter(&self, place: Place) -> Result<File> {
        let path = Path::new("/run/netns").join(self.namespace(place));
        File::open(&path).with_context(|| format!("opening {}", path.display()))
    }

    /// The lab's own directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A command that runs in a namespace, with the mounts of this process.
    pub fn command(&self, place: Place, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let namespace = self.enter(place)?;
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only setns is called, which is a plain
        // system call on a descriptor that the closure owns.
        unsafe {
            command.pre_exec(move || {
                let result = libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET);
                if result == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            });
        }
        Ok(command)
    }

    /// Runs a command, given as words between blanks, in a namespace to its end.
    pub fn run(&self, place: Place, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command")?;
        let output = self.command(place, program)?.args(words).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{line} in {place:?}: {text}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a command in a namespace, to be ended with the lab.
    pub fn spawn(&mut self, mut command: Command) -> Result<()> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        self.children.push(child);
        Ok(())
    }

    /// Runs `ip` in a namespace.
    pub fn ip(&self, place: Place, line: &str) -> Result<()> {
        ip(&format!("-n {} {line}", self.namespace(place)))
    }

    /// The path of the configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("bgswitch.toml")
    }

    /// Where the gateway's pins are.
    pub fn bpffs(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.name)
    }

    /// Writes a configuration; `service` is the part after `[gateway]`.
    pub fn configure(&self, service: &str) -> Result<()> {
        let directory = self.directory.display();
        let text = format!(
            "[gateway]\ninterfaces = [\"clients\", \"blue\", \"green\"]\nmax_flows = 100000\n\
             socket = \"{directory}/sock\"\nstate_dir = \"{directory}/state\"\nbpffs = \"{}\"\n{service}",
            self.bpffs().display()
        );
        Ok(fs::write(self.config(), text)?)
    }

    /// The service of most scenarios: two TCP ports over both families, one UDP
    /// port, two servers a colour.
    pub fn configure_default(&self) -> Result<()> {
        self.configure(&default_service())
    }

    /// A `bgswitch` command in the gateway.
    pub fn bgswitch(&self, words: &[&str]) -> Result<Command> {
        let mut command = self.command(Place::Gateway, &self.binary)?;
        command.arg("--config").arg(self.config()).args(words);
        Ok(command)
    }

    /// Runs a `bgswitch` command: exit code, stdout, stderr.
    pub fn tell(&self, words: &[&str]) -> Result<(i32, String, String)> {
        let output = self.bgswitch(words)?.output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((
            output.status.code().unwrap_or(-1),
            text(output.stdout),
            text(output.stderr),
        ))
    }

    /// Runs a `bgswitch` command that must succeed, and parses its JSON.
    pub fn ask(&self, words: &[&str]) -> Result<Value> {
        let (code, out, err) = self.tell(&[&["-o", "json"], words].concat())?;
        ensure!(
            code == 0,
            "bgswitch {}: exit code {code}: {err}",
            words.join(" ")
        );
        Ok(serde_json::from_str(&out)?)
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) -> Result<()> {
        self.start_binary(&self.binary.clone())
    }

    /// Starts the daemon from another binary.
    pub fn start_binary(&mut self, binary: &Path) -> Result<()> {
        let log = self.directory.join("daemon.log");
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)?;
        let mut command = self.command(Place::Gateway, binary)?;
        command
            .arg("--config")
            .arg(self.config())
            .arg("run")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file);
        self.daemon = Some(command.spawn().context("starting bgswitch run")?);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let (code, _, err) = self.tell(&["status"])?;
            if code == 0 {
                return Ok(());
            }
            let ended = self
                .daemon
                .as_mut()
                .and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(log).unwrap_or_default();
                anyhow::bail!("the daemon did not get ready: {err}\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Process id of the daemon.
    pub fn daemon_pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// Kills the daemon with a signal and waits for its end.
    pub fn end_daemon(&mut self, signal: Signal) -> Result<()> {
        if let Some(mut child) = self.daemon.take() {
            kill(Pid::from_raw(child.id() as i32), signal)?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for child in self.daemon.iter_mut().chain(&mut self.children) {
            let _ = child.kill();
            let _ = child.wait();
        }
        remove_pins(&self.bpffs());
        for (place, _) in PLACES {
            let _ = ip(&format!("netns del {}", self.namespace(place)));
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The `[service.llm]` part of a configuration.
pub fn default_service() -> String {
    let colour = |servers: [&str; 3]| format!("backends = [\"{}\"]", servers.join("\", \""));
    format!(
        "[service.llm]\nlisten = [\"tcp://{SERVICE}:8000\", \"tcp://{SERVICE}:8001\", \
         \"tcp://[{SERVICE_V6}]:8000\", \"tcp://[{SERVICE_V6}]:8001\", \"udp://{SERVICE}:4433\"]\n\
         [service.llm.blue]\nversion = \"model@1\"\n{}\n[service.llm.green]\nversion = \"model@2\"\n{}\n",
        colour(SERVERS[0]),
        colour(SERVERS[1])
    )
}

/// `bgswitch`, as built beside this test or demo.
pub fn binary() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    own.ancestors()
        .skip(1)
        .map(|directory| directory.join("bgswitch"))
        .find(|file| file.is_file())
        .context("target/release/bgswitch is not built: `cargo build --release`")
}

fn ip(line: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(line.split_whitespace())
        .output()
        .context("running ip")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {line}: {text}");
    Ok(())
}

fn mount_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf"))
    {
        return Ok(());
    }
    let status = Command::new("mount")
        .args(["-t", "bpf", "bpf", "/sys/fs/bpf"])
        .status()?;
    ensure!(status.success(), "mounting the BPF file system failed");
    Ok(())
}

fn remove_pins(path: &Path) {
    if path.is_dir() {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            remove_pins(&entry.path());
        }
        let _ = fs::remove_dir(path);
    } else {
        let _ = fs::remove_file(path);
    }
}

/// Removes what a lab left behind whose process was killed.
fn sweep_leftovers() {
    let owner_is_gone = |name: &str| {
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        pid.is_some_and(|pid| !pid.is_empty() && !Path::new("/proc").join(pid).exists())
    };
    let names = |directory: &str| -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|n| owner_is_gone(n))
            .collect()
    };
    for name in names("/run/netns") {
        let _ = ip(&format!("netns del {name}"));
    }
    for name in names("/sys/fs/bpf") {
        remove_pins(&Path::new("/sys/fs/bpf").join(name));
    }
}
