//! Gateways that carry HTTP in a lab: ours, and peers as their experts would set
//! them up.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bg_common::service::Colour;
use bg_tests::{
    lab::{Lab, Place, SERVERS, SERVICE, default_service},
    load::{self, PATIENCE},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Serialize;

use crate::tools::Tool;

/// Where the service listens.
pub const PORT: u16 = 8000;

/// Room for flows, as it is unless configured otherwise.
pub const MAX_FLOWS: u32 = 1_000_000;

/// What costs nftables packets and buys nothing here: events nobody listens to, and
/// the checks of checksums and windows. Frames of the generator have no window.
const CONNTRACK: [&str; 4] = [
    "nf_conntrack_events=0",
    "nf_conntrack_checksum=0",
    "nf_conntrack_acct=0",
    "nf_conntrack_tcp_be_liberal=1",
];
/// Short connections by the thousand a second fill the table otherwise.
const SHORT_LIVED: [&str; 3] = [
    "nf_conntrack_tcp_timeout_time_wait=1",
    "nf_conntrack_tcp_timeout_fin_wait=5",
    "nf_conntrack_tcp_timeout_close=1",
];

/// Who carries the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    /// Ours.
    Bgswitch,
    /// Destination NAT by map.
    Nftables,
    /// TCP mode.
    Haproxy,
    /// The stream module.
    Nginx,
}

impl Peer {
    /// All, ours first.
    pub const ALL: [Self; 4] = [Self::Bgswitch, Self::Nftables, Self::Haproxy, Self::Nginx];

    /// Name in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bgswitch => "bgswitch",
            Self::Nftables => "nftables, DNAT by map",
            Self::Haproxy => "HAProxy, TCP mode",
            Self::Nginx => "nginx, stream",
        }
    }

    /// How it is flipped.
    pub const fn flip(self) -> &'static str {
        match self {
            Self::Bgswitch => "bgswitch flip",
            Self::Nftables => "nft: replace the map's element",
            Self::Haproxy => "HAProxy: set map, runtime API",
            Self::Nginx => "nginx: reload",
        }
    }
}

/// A lab with servers of both colours, and a gateway that leads to blue. All of it is
/// gone when it is dropped.
pub struct Gateway {
    peer: Peer,
    proxy: Option<Child>,
    /// Last, so that it goes last.
    lab: Lab,
}

impl Gateway {
    /// Sets it up; a proxy and the servers run on these CPUs.
    pub fn new(peer: Peer, proxy: &CpuSet, servers: &CpuSet) -> Result<Self> {
        Self::with_room(MAX_FLOWS, peer, proxy, servers)
    }

    /// The same; ours has room for `max_flows` flows.
    pub fn with_room(max_flows: u32, peer: Peer, proxy: &CpuSet, servers: &CpuSet) -> Result<Self> {
        let mut lab = Lab::new()?;
        // They are for what XDP sends back; here nothing is.
        lab.free_far_ends();
        for place in [Place::Client, Place::Gateway] {
            for setting in ["ip_local_port_range=1024 65535", "tcp_tw_reuse=1"] {
                lab.sysctl(place, &format!("net.ipv4.{setting}"))?;
            }
        }
        for place in [Place::Client, Place::Gateway, Place::Blue, Place::Green] {
            lab.sysctl(place, "net.core.somaxconn=8192")?;
            lab.sysctl(place, "net.ipv4.tcp_max_syn_backlog=8192")?;
        }
        for (place, colour) in [(Place::Blue, "blue"), (Place::Green, "green")] {
            let namespace = lab.enter(place)?;
            on(servers, || load::serve(namespace, colour, &[PORT], &[]))?;
        }
        let mut gateway = Self {
            peer,
            proxy: None,
            lab,
        };
        match peer {
            Peer::Bgswitch => {
                gateway.lab.configure_for(max_flows, &default_service())?;
                gateway.lab.start()?;
            }
            Peer::Nftables => {
                gateway.lab.forward(Place::Gateway)?;
                nftables(&gateway.lab)?;
                for setting in SHORT_LIVED {
                    let setting = format!("net.netfilter.{setting}");
                    gateway.lab.sysctl(Place::Gateway, &setting)?;
                }
            }
            Peer::Haproxy => gateway.proxy(Self::haproxy, proxy)?,
            Peer::Nginx => gateway.proxy(Self::nginx, proxy)?,
        }
        gateway.wait()?;
        Ok(gateway)
    }

    /// The lab.
    pub const fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Process ids of what carries the connections beside the kernel.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let main = self.proxy.as_ref().map(Child::id).or(self.lab.daemon_pid());
        let Some(main) = main else {
            return Ok(Vec::new());
        };
        let mut all = vec![main];
        all.extend(children(main)?);
        Ok(all)
    }

    /// Leads new connections to a colour; what the command took, from its start to
    /// its end.
    pub fn flip(&self, to: Colour) -> Result<Duration> {
        let server = SERVERS[to as usize][0];
        let begun = Instant::now();
        match self.peer {
            Peer::Bgswitch => {
                self.lab.ask(&["flip", "llm", "-m", "bench"])?;
            }
            Peer::Nftables => {
                let key = format!("{SERVICE} . {PORT}");
                nft(
                    &self.lab,
                    &[&format!(
                        "delete element ip gateway active {{ {key} }}; \
                         add element ip gateway active {{ {key} : {server} . {PORT} }}"
                    )],
                )?;
            }
            Peer::Haproxy => {
                let map = self.lab.directory().join("haproxy.map");
                let answer = self.haproxy_says(&format!(
                    "set map {} active {}\n",
                    map.display(),
                    to.as_str()
                ))?;
                ensure!(answer.trim().is_empty(), "HAProxy: {answer}");
            }
            Peer::Nginx => {
                self.upstream(to)?;
                let master = self.proxy.as_ref().context("nginx does not run")?.id();
                kill(Pid::from_raw(master as i32), Signal::SIGHUP)?;
            }
        }
        Ok(begun.elapsed())
    }

    fn haproxy_says(&self, command: &str) -> Result<String> {
        let mut socket = UnixStream::connect(self.lab.directory().join("haproxy.sock"))?;
        socket.write_all(command.as_bytes())?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn upstream(&self, colour: Colour) -> Result<()> {
        let text = format!("server {}:{PORT};\n", SERVERS[colour as usize][0]);
        Ok(fs::write(self.lab.directory().join("upstream.conf"), text)?)
    }

    /// Starts a proxy that listens on the service's address.
    fn proxy(&mut self, start: fn(&Self, usize) -> Result<Command>, cpus: &CpuSet) -> Result<()> {
        self.lab
            .ip(Place::Gateway, &format!("addr add {SERVICE}/32 dev lo"))?;
        let count = (0..CpuSet::count())
            .filter(|cpu| cpus.is_set(*cpu).unwrap_or(false))
            .count();
        let mut command = start(self, count)?;
        let log = fs::File::create(self.lab.directory().join("proxy.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.proxy = Some(on(cpus, || {
            let child = command.spawn();
            child.with_context(|| format!("starting {command:?}"))
        })?);
        Ok(())
    }

    fn haproxy(&self, _cpus: usize) -> Result<Command> {
        let directory = self.lab.directory();
        let config = self.write("haproxy.cfg", include_str!("peers/haproxy.cfg"), &[])?;
        fs::write(directory.join("haproxy.map"), "active blue\n")?;
        let tool = Tool::find("haproxy")?;
        let mut command = self.lab.command(Place::Gateway, tool.path())?;
        tool.prepare(&mut command);
        command.arg("-db").arg("-f").arg(config);
        Ok(command)
    }

    fn nginx(&self, cpus: usize) -> Result<Command> {
        let tool = Tool::find("nginx")?;
        let module = tool.file("usr/lib/nginx/modules/ngx_stream_module.so");
        let config = self.write(
            "nginx.conf",
            include_str!("peers/nginx.conf"),
            &[
                ("@MODULE@", module.to_string_lossy().into_owned()),
                ("@CPUS@", cpus.to_string()),
            ],
        )?;
        self.upstream(Colour::Blue)?;
        let mut command = self.lab.command(Place::Gateway, tool.path())?;
        tool.prepare(&mut command);
        command
            .arg("-p")
            .arg(self.lab.directory())
            .arg("-e")
            .arg(self.lab.directory().join("nginx.log"))
            .arg("-c")
            .arg(config);
        Ok(command)
    }

    /// Writes a peer's configuration, as it is in the repository but for what it
    /// cannot know.
    fn write(
        &self,
        name: &str,
        text: &str,
        places: &[(&str, String)],
    ) -> Result<std::path::PathBuf> {
        let directory = self.lab.directory();
        let mut text = text.replace("@DIRECTORY@", &directory.to_string_lossy());
        for (place, value) in places {
            text = text.replace(place, value);
        }
        let path = directory.join(name);
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Waits until a request is answered by blue.
    fn wait(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let to = format!("{SERVICE}:{PORT}").parse()?;
        loop {
            let answer = load::once(self.lab.enter(Place::Client)?, to);
            if answer.as_deref().is_ok_and(|colour| colour == "blue") {
                return Ok(());
            }
            let ended = match &mut self.proxy {
                Some(child) => child.try_wait()?.is_some(),
                None => false,
            };
            if ended || Instant::now() > deadline {
                let log = fs::read_to_string(self.lab.directory().join("proxy.log"));
                let name = self.peer.name();
                let answer = answer.unwrap_or_else(|error| format!("{error:#}"));
                bail!(
                    "{name} does not serve: {answer}\n{}",
                    log.unwrap_or_default()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let Some(proxy) = &mut self.proxy else { return };
        // What a reload left behind is no longer told by its parent.
        let children = children(proxy.id()).unwrap_or_default();
        for process in [proxy.id()].into_iter().chain(children) {
            let _ = kill(Pid::from_raw(process as i32), Signal::SIGTERM);
        }
        let _ = proxy.wait();
    }
}

/// Sets nftables up in the gateway.
pub fn nftables(lab: &Lab) -> Result<()> {
    let rules = lab.directory().join("nftables.nft");
    fs::write(&rules, include_str!("peers/nftables.nft"))?;
    nft(lab, &["-f", &rules.to_string_lossy()])?;
    for setting in CONNTRACK {
        lab.sysctl(Place::Gateway, &format!("net.netfilter.{setting}"))?;
    }
    Ok(())
}

/// Runs `nft` in the gateway.
fn nft(lab: &Lab, arguments: &[&str]) -> Result<()> {
    let tool = Tool::find("nft")?;
    let mut command = lab.command(Place::Gateway, tool.path())?;
    tool.prepare(&mut command);
    let output = command.args(arguments).output()?;
    ensure!(
        output.status.success(),
        "nft {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Does work on some CPUs; what it starts stays on them.
pub fn on<R: Send>(cpus: &CpuSet, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                sched_setaffinity(Pid::from_raw(0), cpus).context("choosing CPUs")?;
                work()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Processes that a process has started.
fn children(parent: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(process) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        // A process that has ended meanwhile has no file.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let of = after_name.split(' ').nth(1);
        if of == Some(parent.to_string().as_str()) {
            found.push(process);
        }
    }
    Ok(found)
}
