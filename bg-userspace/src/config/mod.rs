//! The configuration file: text in, validated [`Config`] out. Nothing else sees
//! the raw text.

mod across;
mod health;
mod raw;
mod release;
mod rules;
mod text;

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use bg_common::abi::Room;
use serde::Deserialize;

pub use self::release::{
    ApprovalPlan, BakePlan, CanaryStep, Figure, GateKind, GatePlan, GrpcGate, HookPlan, HttpGate,
    LoadGate, NoData, OnExpiry, OnFailure, OnTrouble, ParityGate, PrometheusPlan, PromptsGate,
    ReleasePlan, RulePlan, Share, SignalPlan, StandbyPlan, WarmGate, WebhookGate, When,
};
pub(crate) use self::rules::is_name;
use self::{raw::Raw, text::Text};
use crate::{
    datapath::AttachMode,
    file::{self, Trouble},
    health::HealthPlan,
    plan::{Plan, ServicePlan, Standing},
};

/// Where the configuration is, unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/bgswitch/bgswitch.toml";

/// Drain deadlines and idle times are at most this long.
pub const MAX_DURATION: Duration = Duration::from_hours(720);

/// A file beyond this is no configuration.
const MAX_BYTES: u64 = 16 << 20;

/// A validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The `[gateway]` table.
    pub gateway: Gateway,
    /// The `[service.*]` tables, by name.
    pub services: BTreeMap<String, Service>,
}

/// The host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Interfaces to attach to.
    pub interfaces: Vec<String>,
    /// How.
    pub xdp: AttachMode,
    /// Established TCP flows that fit, per address family.
    pub max_flows: u32,
    /// Services that fit.
    pub max_services: u32,
    /// Socket, state and pins.
    pub paths: Paths,
    /// Bytes that the journal may take.
    pub journal_max: u64,
    /// Where metrics may be read, if anywhere.
    pub metrics: Option<SocketAddr>,
}

/// Where a gateway's socket, state and pins are: what a command needs to know
/// even when the rest of the file is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Journal and state.
    pub state_dir: PathBuf,
    /// Pins.
    pub bpffs: PathBuf,
}

/// What happens to old flows after a flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize, clap::ValueEnum)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum FlipMode {
    /// They live on until they end or the drain deadline passes.
    Drain,
    /// They are reset at once.
    Cut,
}

impl FlipMode {
    /// `"drain"` or `"cut"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Drain => "drain",
            Self::Cut => "cut",
        }
    }
}

/// What happens to the flows that are left when a drain's deadline passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DrainEnd {
    /// They are reset.
    Reset,
    /// There is no deadline: they stay until they end.
    Keep,
}

impl DrainEnd {
    /// `"reset"` or `"keep"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Keep => "keep",
        }
    }
}

/// How a service drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainPlan {
    /// From the flip to the deadline, whole seconds.
    pub deadline: Duration,
    /// What happens then.
    pub end: DrainEnd,
    /// From the first reset to the last, whole seconds; zero: all at once.
    pub reset_over: Duration,
}

impl Default for DrainPlan {
    fn default() -> Self {
        Self {
            deadline: Duration::from_mins(20),
            end: DrainEnd::Reset,
            reset_over: Duration::from_secs(30),
        }
    }
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// What the packet path needs.
    pub plan: ServicePlan,
    /// Versions by colour.
    pub versions: [Option<String>; 2],
    /// Default mode of a flip.
    pub on_flip: FlipMode,
    /// How it drains, unless a flip says otherwise.
    pub drain: DrainPlan,
    /// What its releases go through.
    pub release: ReleasePlan,
    /// How its backends are probed, if they are.
    pub health: Option<HealthPlan>,
}

/// What is wrong with a configuration: where, what, and what would be right.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// Line, from 1, where there is one.
    pub line: Option<usize>,
    /// The key.
    pub key: String,
    /// The trouble, and its cure.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads and validates a file.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        Self::parse(file, &read(file)?)
    }

    /// Validates a text.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let text = Text { file, text };
        let raw: Raw = text.parse()?;
        let Some(gateway) = raw.gateway else {
            let message =
                "is missing: add a [gateway] table with interfaces = [\"eth0\", \"eth1\"]";
            return Err(text.error(0, "gateway", message));
        };
        let metrics = gateway.get_ref().metrics.as_ref();
        let metrics = metrics.map_or(0, |metrics| metrics.span().start);
        let gateway = rules::gateway(&text, gateway)?;
        let mut services = BTreeMap::new();
        for (name, service) in raw.service {
            let placed = rules::service(&text, &name, service)?;
            services.insert(name.into_inner(), placed);
        }
        if services.is_empty() {
            return Err(text.error(0, "service", "there is none: add a [service.NAME] table"));
        }
        let room = Room {
            services: gateway.max_services,
        };
        across::check(&text, &services, room)?;
        across::metrics(&text, metrics, gateway.metrics, &services)?;
        let services = services
            .into_iter()
            .map(|(name, placed)| (name, placed.service))
            .collect();
        Ok(Self { gateway, services })
    }

    /// What the packet path needs. Nothing is known of who is probed.
    pub fn plan(&self) -> Plan {
        let services = self.services.values();
        let probed = services.clone().filter(|service| service.health.is_some());
        let names = probed.flat_map(|service| service.plan.names());
        Plan {
            standings: names.map(|name| (name, Standing::AsItWas)).collect(),
            services: services.map(|service| service.plan.clone()).collect(),
        }
    }
}

impl Paths {
    /// Reads the paths only, and passes over everything else in the file. Without
    /// a file they are the default ones.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct File {
            #[serde(default)]
            gateway: Table,
        }
        #[derive(Default, Deserialize)]
        struct Table {
            socket: Option<PathBuf>,
            state_dir: Option<PathBuf>,
            bpffs: Option<PathBuf>,
        }
        let default = Self::default();
        if !file.exists() {
            return Ok(default);
        }
        let text = read(file)?;
        let gateway = Text { file, text: &text }.parse::<File>()?.gateway;
        Ok(Self {
            socket: gateway.socket.unwrap_or(default.socket),
            state_dir: gateway.state_dir.unwrap_or(default.state_dir),
            bpffs: gateway.bpffs.unwrap_or(default.bpffs),
        })
    }
}

impl Paths {
    /// Reads the paths of a file that may be half edited: what can be read of
    /// `[gateway]`, and the default ones for the rest. Says what is wrong, too.
    pub fn salvage(file: &Path) -> (Self, Option<ConfigError>) {
        match Self::load(file) {
            Ok(paths) => (paths, None),
            Err(error) => {
                let text = fs::read(file).unwrap_or_default();
                (Self::lines(&String::from_utf8_lossy(&text)), Some(error))
            }
        }
    }

    /// The paths in a text, from the lines of `[gateway]` that are right in
    /// themselves.
    fn lines(text: &str) -> Self {
        let mut paths = Self::default();
        let lines = text
            .lines()
            .map(str::trim)
            .skip_while(|line| !line.starts_with("[gateway]"))
            .skip(1)
            .take_while(|line| !line.starts_with('['));
        for line in lines {
            let Ok(table) = toml::from_str::<BTreeMap<String, PathBuf>>(line) else {
                continue;
            };
            for (key, value) in table {
                match key.as_str() {
                    "socket" => paths.socket = value,
                    "state_dir" => paths.state_dir = value,
                    "bpffs" => paths.bpffs = value,
                    _ => {}
                }
            }
        }
        paths
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            socket: "/run/bgswitch/bgswitch.sock".into(),
            state_dir: "/var/lib/bgswitch".into(),
            bpffs: "/sys/fs/bpf/bgswitch".into(),
        }
    }
}

fn read(file: &Path) -> Result<String, ConfigError> {
    let wrong = |message: String| ConfigError {
        file: file.to_owned(),
        line: None,
        key: String::new(),
        message,
    };
    // Also of a pipe: `bgswitch check /dev/stdin`.
    file::text_of_any(file, MAX_BYTES).map_err(|trouble| match trouble {
        Trouble::Io(error) if error.kind() == io::ErrorKind::NotFound => {
            wrong("there is no such file: name one with --config".to_owned())
        }
        trouble @ Trouble::TooLarge(_) => wrong(format!("{trouble}: no configuration")),
        trouble => wrong(trouble.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_file_still_tells_its_paths() {
        let text = "[gateway]\ninterfaces = [\"eth0\"\nsocket = \"/run/a.sock\" # here\nbpffs = /oops\n\
                    state_dir = \"/srv/a\"\n[service.llm\nsocket = \"/run/b.sock\"\n";
        let file = std::env::temp_dir().join(format!("bgswitch-broken-{}", std::process::id()));
        fs::write(&file, text).unwrap();
        let (paths, error) = Paths::salvage(&file);
        fs::remove_file(&file).unwrap();
        assert!(error.is_some());
        assert_eq!(paths.socket, Path::new("/run/a.sock"));
        assert_eq!(paths.state_dir, Path::new("/srv/a"));
        assert_eq!(paths.bpffs, Paths::default().bpffs);
    }
}
