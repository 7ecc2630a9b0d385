//! A gateway with clients and two colours of servers, in network namespaces of
//! its own: real stacks, real packets, nothing outside of it.

use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use bg_common::{abi::LAYOUT, service::Listener};
use bg_userspace::{
    datapath::{Directory, PinnedWords},
    plan::{ListenerPlan, Protocol},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    load::{self, Load, Mood, Reuse},
    pass,
};

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
    /// Between all of them, where the gateway has one arm.
    Router,
}

const PLACES: [(Place, &str); 5] = [
    (Place::Client, "client"),
    (Place::Gateway, "gateway"),
    (Place::Blue, "blue"),
    (Place::Green, "green"),
    (Place::Router, "router"),
];

/// Who is attached to the hub, by which link, in which networks.
const SIDES: [(Place, &str, &str, &str); 3] = [
    (Place::Client, "clients", "198.51.100", "2001:db8:c:"),
    (Place::Blue, "blue", "10.0.1", "fd00:1:"),
    (Place::Green, "green", "10.0.2", "fd00:2:"),
];

/// Room for established flows, unless a scenario needs more.
const MAX_FLOWS: u32 = 100_000;
/// Service address over IPv4.
pub const SERVICE: &str = "203.0.113.10";
/// Service address over IPv6.
pub const SERVICE_V6: &str = "2001:db8::10";
const SERVICE_IP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const SERVICE_IP_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);
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
    /// The gateway's interfaces, as the configuration has them.
    interfaces: &'static str,
    daemon: Option<Child>,
    children: Vec<Child>,
    /// Programs at the far ends of the gateway's links.
    far_ends: Vec<OwnedFd>,
}

static LABS: AtomicU32 = AtomicU32::new(0);
const PREFIX: &str = "bglab";

impl Lab {
    /// Clients, blue and green, each at an interface of the gateway.
    pub fn new() -> Result<Self> {
        let mut lab = Self::empty(r#"["clients", "blue", "green"]"#)?;
        lab.add(&[Place::Client, Place::Gateway, Place::Blue, Place::Green])?;
        for side in SIDES {
            lab.side(Place::Gateway, side)?;
        }
        Ok(lab)
    }

    /// Clients, blue and green behind a router, and the gateway at one interface
    /// of it: the router sends it what is for the service, and what the servers
    /// answer.
    pub fn one_arm() -> Result<Self> {
        let mut lab = Self::empty(r#"["eth0"]"#)?;
        lab.add(&PLACES.map(|(place, _)| place))?;
        for side in SIDES {
            lab.side(Place::Router, side)?;
        }
        lab.link((Place::Router, "gateway"), (Place::Gateway, "eth0"))?;
        lab.ip(Place::Router, "addr add 192.0.2.1/24 dev gateway")?;
        lab.ip(Place::Router, "addr add fd00:f::1/64 dev gateway nodad")?;
        lab.ip(Place::Gateway, "addr add 192.0.2.2/24 dev eth0")?;
        lab.ip(Place::Gateway, "addr add fd00:f::2/64 dev eth0 nodad")?;
        lab.ip(Place::Gateway, "route add default via 192.0.2.1")?;
        lab.ip(Place::Gateway, "-6 route add default via fd00:f::1")?;
        lab.forward(Place::Router)?;
        for (family, to, via, servers) in [
            ("-4", SERVICE, "192.0.2.2", ["10.0.1.0/24", "10.0.2.0/24"]),
            (
                "-6",
                SERVICE_V6,
                "fd00:f::2",
                ["fd00:1::/64", "fd00:2::/64"],
            ),
        ] {
            let router = |line: &str| lab.ip(Place::Router, &format!("{family} {line}"));
            router(&format!("route add {to} via {via}"))?;
            router(&format!("route add default via {via} table 100"))?;
            for from in servers {
                router(&format!("rule add from {from} lookup 100"))?;
            }
        }
        Ok(lab)
    }

    /// Like [`Self::new`], with a switch between clients and gateway that has room
    /// for another gateway: a bridge of the router's, which may have addresses of
    /// its own.
    pub fn switched() -> Result<Self> {
        let mut lab = Self::empty(r#"["clients", "blue", "green"]"#)?;
        lab.add(&PLACES.map(|(place, _)| place))?;
        let [clients, blue, green] = SIDES;
        lab.ip(
            Place::Router,
            "link add switch type bridge mcast_snooping 0",
        )?;
        lab.link((Place::Router, "port1"), (Place::Client, "eth0"))?;
        lab.link((Place::Router, "port2"), (Place::Gateway, clients.1))?;
        for line in ["port1 master switch", "port2 master switch", "switch up"] {
            lab.ip(Place::Router, &format!("link set {line}"))?;
        }
        lab.address(Place::Gateway, clients)?;
        for side in [blue, green] {
            lab.side(Place::Gateway, side)?;
        }
        Ok(lab)
    }

    /// Gives a place behind the gateway a second link, to the switch of
    /// [`Self::switched`], with addresses in the clients' networks: a way to clients
    /// that passes the gateway by.
    pub fn beside(&mut self, place: Place, port: &str, host: u8) -> Result<()> {
        self.link((Place::Router, port), (place, "eth1"))?;
        self.ip(Place::Router, &format!("link set {port} master switch"))?;
        let (_, _, v4, v6) = SIDES[0];
        for address in [format!("{v4}.{host}/24"), format!("{v6}:{host}/64")] {
            self.ip(place, &format!("addr add {address} dev eth1 nodad"))?;
        }
        Ok(())
    }

    /// A lab that serves: the service of most scenarios, its servers and the
    /// daemon.
    pub fn serving() -> Result<Self> {
        Self::new()?.served()
    }

    /// Adds the service of most scenarios, its servers and the daemon.
    pub fn served(self) -> Result<Self> {
        self.served_as(&default_service())
    }

    /// Adds a service, the usual servers and the daemon.
    pub fn served_as(self, service: &str) -> Result<Self> {
        self.served_for(MAX_FLOWS, service)
    }

    /// The same, with green servers of a mood.
    pub fn served_in(self, service: &str, green: &Arc<Mood>) -> Result<Self> {
        self.served_by(MAX_FLOWS, service, green)
    }

    /// The same, with room for `max_flows` flows.
    pub fn served_for(self, max_flows: u32, service: &str) -> Result<Self> {
        self.served_by(max_flows, service, &Arc::default())
    }

    fn served_by(mut self, max_flows: u32, service: &str, green: &Arc<Mood>) -> Result<Self> {
        self.configure_for(max_flows, service)?;
        for (place, colour, [a, b, v6], mood) in [
            (Place::Blue, "blue", SERVERS[0], &Arc::default()),
            (Place::Green, "green", SERVERS[1], green),
        ] {
            let udp = [
                format!("{a}:4433"),
                format!("{b}:4433"),
                format!("[{v6}]:4433"),
            ];
            let udp = udp
                .iter()
                .map(|text| text.parse())
                .collect::<Result<Vec<_>, _>>()?;
            load::serve_in(self.enter(place)?, colour, &[8000, 8001, 8002], &udp, mood)?;
        }
        self.start()?;
        Ok(self)
    }

    fn empty(interfaces: &'static str) -> Result<Self> {
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
        Ok(Self {
            name,
            directory,
            binary: binary()?,
            interfaces,
            daemon: None,
            children: Vec::new(),
            far_ends: Vec::new(),
        })
    }

    fn add(&self, places: &[Place]) -> Result<()> {
        for place in places {
            ip(&format!("netns add {}", self.namespace(*place)))?;
            self.ip(*place, "link set lo up")?;
            // Root's group may ping by datagram sockets.
            self.sysctl(*place, "net.ipv4.ping_group_range=0 0")?;
            for key in ["all", "default"] {
                self.sysctl(*place, &format!("net.ipv6.conf.{key}.accept_dad=0"))?;
                self.sysctl(*place, &format!("net.ipv4.conf.{key}.rp_filter=0"))?;
            }
        }
        Ok(())
    }

    /// Joins two places by a link that carries what XDP sends.
    fn link(&mut self, one: (Place, &str), other: (Place, &str)) -> Result<()> {
        let (link, far) = (one.1, self.namespace(other.0));
        self.ip(
            one.0,
            &format!(
                "link add name {link} type veth peer name {} netns {far}",
                other.1
            ),
        )?;
        for (place, link) in [one, other] {
            // A local sender leaves checksums to the "hardware", and a veth
            // takes redirected frames only if its other end has GRO on (or
            // XDP) by the time it comes up.
            self.run(place, &format!("ethtool -K {link} tx off gro on"))?;
        }
        for (place, link) in [one, other] {
            self.ip(place, &format!("link set {link} up"))?;
        }
        for (near, far) in [(one, other), (other, one)] {
            if near.0 == Place::Gateway {
                self.far_ends
                    .push(pass::attach(&self.enter(far.0)?, far.1)?);
            }
        }
        Ok(())
    }

    /// Attaches a place to the hub, its default gateway.
    fn side(&mut self, hub: Place, side: (Place, &str, &str, &str)) -> Result<()> {
        self.link((hub, side.1), (side.0, "eth0"))?;
        self.address(hub, side)
    }

    /// Gives both their addresses.
    fn address(&self, hub: Place, (place, link, v4, v6): (Place, &str, &str, &str)) -> Result<()> {
        self.ip(hub, &format!("addr add {v4}.1/24 dev {link}"))?;
        self.ip(hub, &format!("addr add {v6}:1/64 dev {link} nodad"))?;
        for address in [
            format!("{v4}.10/24"),
            format!("{v4}.11/24"),
            format!("{v6}:10/64"),
        ] {
            self.ip(place, &format!("addr add {address} dev eth0 nodad"))?;
        }
        self.route(place)
    }

    /// Takes the gateway's link to a place away, and makes another one of its name.
    pub fn remake(&mut self, place: Place) -> Result<()> {
        let link = side_of(place)?.1;
        self.ip(Place::Gateway, &format!("link del {link}"))?;
        self.make_again(place)
    }

    /// Makes the gateway's link to a place again, which was taken away.
    pub fn make_again(&mut self, place: Place) -> Result<()> {
        self.side(Place::Gateway, side_of(place)?)
    }

    /// Gives a place its default routes, which it loses with its link.
    pub fn route(&self, place: Place) -> Result<()> {
        let (_, _, v4, v6) = side_of(place)?;
        self.ip(place, &format!("route replace default via {v4}.1"))?;
        self.ip(place, &format!("-6 route replace default via {v6}:1"))
    }

    /// Takes the programs away that pass everything at the far ends of the
    /// gateway's links, to make room for others.
    pub fn free_far_ends(&mut self) {
        self.far_ends.clear();
    }

    /// Gives both ends of all links to the gateway this MTU. The programs at the far
    /// ends go: they are for frames in one page.
    pub fn resize(&mut self, mtu: u32) -> Result<()> {
        self.free_far_ends();
        for (place, link, ..) in SIDES {
            self.ip(Place::Gateway, &format!("link set {link} mtu {mtu}"))?;
            self.ip(place, &format!("link set eth0 mtu {mtu}"))?;
        }
        Ok(())
    }

    /// Gives both ends of all links to the gateway so many queues, so that each CPU has
    /// one: two by two, for no end may send from more queues than the other one has.
    pub fn queues(&self, count: u32) -> Result<()> {
        for direction in ["rx", "tx"] {
            for (place, link, ..) in SIDES {
                let give = |to| format!("ethtool -L {to} {direction} {count}");
                self.run(Place::Gateway, &give(link))?;
                self.run(place, &give("eth0"))?;
            }
        }
        Ok(())
    }

    /// Moves the gateway's link to blue into a VLAN: both ends get a VLAN device with
    /// the addresses that they had.
    pub fn tag_blue(&self, vlan: u16) -> Result<()> {
        let (place, link, v4, v6) = SIDES[1];
        for (at, below) in [(Place::Gateway, link), (place, "eth0")] {
            // Tags that are no part of the frame are not seen by XDP.
            self.run(at, &format!("ethtool -K {below} txvlan off rxvlan off"))?;
            self.ip(at, &format!("addr flush dev {below}"))?;
            let device = format!("{below}.{vlan}");
            self.ip(
                at,
                &format!("link add link {below} name {device} type vlan id {vlan}"),
            )?;
            self.ip(at, &format!("link set {device} up"))?;
            let addresses = if at == Place::Gateway {
                vec![format!("{v4}.1/24"), format!("{v6}:1/64")]
            } else {
                ["10/24", "11/24"]
                    .map(|host| format!("{v4}.{host}"))
                    .into_iter()
                    .chain([format!("{v6}:10/64")])
                    .collect()
            };
            for address in addresses {
                self.ip(at, &format!("addr add {address} dev {device} nodad"))?;
            }
        }
        self.route(place)
    }

    /// Makes a place's stack forward.
    pub fn forward(&self, place: Place) -> Result<()> {
        self.sysctl(place, "net.ipv4.ip_forward=1")?;
        self.sysctl(place, "net.ipv6.conf.all.forwarding=1")
    }

    /// Sets a sysctl of a place, given as `key=value`.
    pub fn sysctl(&self, place: Place, setting: &str) -> Result<()> {
        let output = self
            .command(place, "sysctl")?
            .args(["-qw", setting])
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "sysctl {setting} in {place:?}: {text}"
        );
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

    /// The pin of a map of the gateway.
    pub fn pinned_map(&self, name: &str) -> PathBuf {
        self.bpffs().join(format!("v{LAYOUT}/maps/{name}"))
    }

    /// The packet path's directory of endpoints.
    pub fn endpoints(&self) -> Result<Directory> {
        let maps = Directory::MAPS.map(|name| MapData::from_pin(self.pinned_map(name)));
        let [word, pilots, lines] = maps;
        Ok(Directory::map([word?, pilots?, lines?])?)
    }

    /// What the packet path knows of a listener.
    pub fn listener(&self, listener: ListenerPlan) -> Result<Listener> {
        let listeners = self.endpoints()?.read().listeners;
        let found = listeners.get(&listener).copied();
        found.with_context(|| format!("no listener {listener}"))
    }

    /// Writes a configuration; `service` is the part after `[gateway]`.
    pub fn configure(&self, service: &str) -> Result<()> {
        self.configure_for(MAX_FLOWS, service)
    }

    /// Writes a configuration with room for `max_flows` flows.
    pub fn configure_for(&self, max_flows: u32, service: &str) -> Result<()> {
        self.configure_with(&format!("max_flows = {max_flows}"), service)
    }

    /// Writes a configuration with more keys of `[gateway]`, a line each.
    pub fn configure_with(&self, keys: &str, service: &str) -> Result<()> {
        let directory = self.directory.display();
        let text = format!(
            "[gateway]\ninterfaces = {}\n{keys}\nsocket = \"{directory}/sock\"\n\
             state_dir = \"{directory}/state\"\nbpffs = \"{}\"\n{service}",
            self.interfaces,
            self.bpffs().display()
        );
        Ok(fs::write(self.config(), text)?)
    }

    /// The service of most scenarios: TCP and UDP over both families, three
    /// servers a colour.
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

    /// What the daemon says in `status`.
    pub fn status(&self) -> Result<Value> {
        self.ask(&["status"])
    }

    /// Some 500 requests a second of its clients, half of them on connections that are
    /// kept; all have been answered.
    pub fn load(&self) -> Result<Load> {
        let clients = (0..50).map(|n| {
            let reuse = [Reuse::KeepAlive, Reuse::Never][n % 2];
            (listener(8000), reuse)
        });
        let pause = Duration::from_millis(100);
        let load = Load::start(self.enter(Place::Client)?, clients.collect(), pause);
        load.advance(500);
        Ok(load)
    }

    /// A service's word and its id, through the pins.
    pub fn words(&self) -> Result<(PinnedWords, u32)> {
        let words = PinnedWords::open(&self.bpffs())?;
        let listener = ListenerPlan {
            address: listener(8000),
            protocol: Protocol::Tcp,
        };
        let id = words
            .service(None, &[listener])
            .context("the service is not in the packet path")?;
        Ok((words, id))
    }

    /// The Ethernet address of an interface.
    pub fn mac(&self, place: Place, interface: &str) -> Result<[u8; 6]> {
        let text = self.run(place, &format!("ip -o link show dev {interface}"))?;
        let mut words = text.split_whitespace();
        words.find(|word| *word == "link/ether");
        let octets = words.next().context("no Ethernet address")?;
        let octets = octets
            .split(':')
            .map(|octet| u8::from_str_radix(octet, 16))
            .collect::<Result<Vec<_>, _>>()?;
        octets
            .try_into()
            .map_err(|_| anyhow::anyhow!("an Ethernet address of the wrong length"))
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

fn side_of(place: Place) -> Result<(Place, &'static str, &'static str, &'static str)> {
    let side = SIDES.into_iter().find(|side| side.0 == place);
    side.context("it has no link of its own")
}

/// The `[service.llm]` part of a configuration.
pub fn default_service() -> String {
    service("", SERVERS)
}

/// The same with more keys of the service, a line each, and other servers.
pub fn service<const N: usize>(keys: &str, servers: [[&str; N]; 2]) -> String {
    let backends = |servers: [&str; N]| format!("backends = [\"{}\"]", servers.join("\", \""));
    let [blue, green] = servers.map(backends);
    format!(
        "[service.llm]\nlisten = [\"tcp://{SERVICE}:8000\", \"tcp://{SERVICE}:8001\", \
         \"tcp://[{SERVICE_V6}]:8000\", \"tcp://[{SERVICE_V6}]:8001\", \
         \"udp://{SERVICE}:4433\", \"udp://[{SERVICE_V6}]:4433\"]\n{keys}\n\
         [service.llm.blue]\nversion = \"model@1\"\n{blue}\n[service.llm.green]\nversion = \"model@2\"\n{green}\n",
    )
}

/// A listener's address.
pub fn listener(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(SERVICE_IP), port)
}

/// A listener's address over IPv6.
pub fn listener_v6(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(SERVICE_IP_V6), port)
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

/// `target/NAME`, a directory beside the profile's one that this program is in; as
/// seen from the current directory, where that is above it.
pub fn beside_the_build(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let target = own
        .ancestors()
        .nth(2)
        .context("this program is in no target directory")?
        .join(name);
    fs::create_dir_all(&target).with_context(|| format!("making {}", target.display()))?;
    let here = std::env::current_dir()?;
    Ok(target
        .strip_prefix(&here)
        .map(Path::to_owned)
        .unwrap_or(target))
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
