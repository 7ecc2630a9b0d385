//! The configuration file: text in, validated [`Config`] out. Nothing else sees
//! the raw text.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use bg_common::service::Colour;
use serde::Deserialize;
use toml::Spanned;

use crate::{
    datapath::AttachMode,
    plan::{BackendPlan, ListenerPlan, Plan, Protocol, ServicePlan},
};

/// Where the configuration is, unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/bgswitch/bgswitch.toml";
/// Where the daemon listens, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/bgswitch/bgswitch.sock";

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
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Journal and state.
    pub state_dir: PathBuf,
    /// Pins.
    pub bpffs: PathBuf,
}

/// What happens to old flows after a flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize, clap::ValueEnum)]
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

/// A service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// What the packet path needs.
    pub plan: ServicePlan,
    /// Versions by colour.
    pub versions: [Option<String>; 2],
    /// Default mode of a flip.
    pub on_flip: FlipMode,
    /// Default drain deadline.
    pub drain: Duration,
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
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError {
            file: file.to_owned(),
            line: None,
            key: String::new(),
            message: format!("cannot be read: {error}"),
        })?;
        Self::parse(file, &text)
    }

    /// Validates a text.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let at = At { file, text };
        let raw: Raw = toml::from_str(text).map_err(|error| ConfigError {
            file: file.to_owned(),
            line: error.span().map(|span| at.line(span.start)),
            key: String::new(),
            message: error.message().to_owned(),
        })?;
        let gateway = gateway(&at, raw.gateway)?;
        let mut services = BTreeMap::new();
        for (name, service) in raw.service {
            let validated = validate_service(&at, name.get_ref(), name.span().start, service)?;
            services.insert(name.into_inner(), validated);
        }
        if services.is_empty() {
            return Err(at.error(0, "service", "there is none: add a [service.NAME] table"));
        }
        across_services(&at, &services)?;
        Ok(Self { gateway, services })
    }

    /// What the packet path needs.
    pub fn plan(&self) -> Plan {
        Plan {
            services: self
                .services
                .values()
                .map(|service| service.plan.clone())
                .collect(),
        }
    }
}

/// A place in the file.
struct At<'a> {
    file: &'a Path,
    text: &'a str,
}

impl At<'_> {
    fn line(&self, offset: usize) -> usize {
        self.text
            .as_bytes()
            .iter()
            .take(offset)
            .filter(|byte| **byte == b'\n')
            .count()
            + 1
    }

    fn error(
        &self,
        offset: usize,
        key: impl Into<String>,
        message: impl Into<String>,
    ) -> ConfigError {
        ConfigError {
            file: self.file.to_owned(),
            line: Some(self.line(offset)),
            key: key.into(),
            message: message.into(),
        }
    }

    fn of<T>(
        &self,
        value: &Spanned<T>,
        key: impl Into<String>,
        message: impl Into<String>,
    ) -> ConfigError {
        self.error(value.span().start, key, message)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    gateway: RawGateway,
    #[serde(default)]
    service: BTreeMap<Spanned<String>, RawService>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGateway {
    interfaces: Spanned<Vec<String>>,
    xdp: Option<Spanned<String>>,
    max_flows: Option<Spanned<u32>>,
    socket: Option<Spanned<PathBuf>>,
    state_dir: Option<Spanned<PathBuf>>,
    bpffs: Option<Spanned<PathBuf>>,
    metrics: Option<Spanned<toml::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    listen: Spanned<Vec<Spanned<String>>>,
    forward: Option<Spanned<String>>,
    announce: Option<Spanned<bool>>,
    on_flip: Option<FlipMode>,
    drain: Option<Spanned<String>>,
    drain_end: Option<Spanned<String>>,
    reset_over: Option<Spanned<String>>,
    udp_idle: Option<Spanned<String>>,
    blue: RawColour,
    green: RawColour,
    health: Option<Spanned<toml::Value>>,
    parity: Option<Spanned<toml::Value>>,
    gate: Option<Spanned<toml::Value>>,
    approval: Option<Spanned<toml::Value>>,
    bake: Option<Spanned<toml::Value>>,
    standby: Option<Spanned<toml::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawColour {
    version: Option<String>,
    backends: Spanned<Vec<Spanned<RawBackend>>>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "an address, \"ADDRESS:PORT\", or { address = \"...\", weight = N }"
)]
enum RawBackend {
    Text(String),
    Table(RawBackendTable),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBackendTable {
    address: String,
    weight: Option<u32>,
}

const NOT_YET: &str = "is not supported by this version yet: remove it";
const MAX_FLOWS: std::ops::RangeInclusive<u32> = 1024..=100_000_000;

fn gateway(at: &At, raw: RawGateway) -> Result<Gateway, ConfigError> {
    let key = |key: &str| format!("gateway.{key}");
    let names = raw.interfaces.get_ref();
    let unique: BTreeSet<&String> = names.iter().collect();
    if names.is_empty()
        || unique.len() != names.len()
        || names.iter().any(|n| n.is_empty() || n.len() > 15)
    {
        let message =
            "needs each interface once, by name: [\"eth0\", \"eth1\"], or one name for one arm";
        return Err(at.of(&raw.interfaces, key("interfaces"), message));
    }
    if let Some(metrics) = &raw.metrics {
        return Err(at.of(metrics, key("metrics"), NOT_YET));
    }
    let xdp = match raw.xdp.as_ref().map(|xdp| xdp.get_ref().as_str()) {
        None | Some("native") => AttachMode::Native,
        Some("generic") => AttachMode::Generic,
        Some(other) => {
            let xdp = raw.xdp.as_ref().map_or(0, |xdp| xdp.span().start);
            return Err(at.error(
                xdp,
                key("xdp"),
                format!("`{other}` is neither native nor generic"),
            ));
        }
    };
    let max_flows = match &raw.max_flows {
        None => 1_000_000,
        Some(flows) if MAX_FLOWS.contains(flows.get_ref()) => *flows.get_ref(),
        Some(flows) => {
            let message = format!(
                "must lie between {} and {}",
                MAX_FLOWS.start(),
                MAX_FLOWS.end()
            );
            return Err(at.of(flows, key("max_flows"), message));
        }
    };
    let path = |value: Option<Spanned<PathBuf>>, name: &str, default: &str| match value {
        None => Ok(PathBuf::from(default)),
        Some(path) if path.get_ref().is_absolute() => Ok(path.into_inner()),
        Some(path) => Err(at.of(&path, key(name), "must be an absolute path")),
    };
    Ok(Gateway {
        xdp,
        max_flows,
        socket: path(raw.socket, "socket", DEFAULT_SOCKET)?,
        state_dir: path(raw.state_dir, "state_dir", "/var/lib/bgswitch")?,
        bpffs: path(raw.bpffs, "bpffs", "/sys/fs/bpf/bgswitch")?,
        interfaces: raw.interfaces.into_inner(),
    })
}

fn validate_service(
    at: &At,
    name: &str,
    start: usize,
    raw: RawService,
) -> Result<Service, ConfigError> {
    let key = |key: &str| format!("service.{name}.{key}");
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 63 || !name.chars().all(valid) {
        let message = "a service's name has 1 to 63 letters, digits, `-` and `_`";
        return Err(at.error(start, format!("service.{name}"), message));
    }
    for (part, name) in [
        (&raw.health, "health"),
        (&raw.parity, "parity"),
        (&raw.gate, "gate"),
        (&raw.approval, "approval"),
        (&raw.bake, "bake"),
        (&raw.standby, "standby"),
    ] {
        if let Some(part) = part {
            return Err(at.of(part, key(name), NOT_YET));
        }
    }
    if let Some(announce) = raw.announce.as_ref().filter(|announce| *announce.get_ref()) {
        let message = "is not supported by this version yet: route the address to this host, and remove the key";
        return Err(at.of(announce, key("announce"), message));
    }
    for (value, name, allowed, later) in [
        (&raw.forward, "forward", "nat", ["snat", "dsr"].as_slice()),
        (&raw.drain_end, "drain_end", "reset", &["keep"]),
        (&raw.reset_over, "reset_over", "0s", &[]),
    ] {
        let Some(value) = value.as_ref().filter(|value| value.get_ref() != allowed) else {
            continue;
        };
        let given = value.get_ref();
        let message = if later.contains(&given.as_str()) || name == "reset_over" {
            format!("`{given}` is not supported by this version yet, only `{allowed}`")
        } else {
            format!("`{given}` is unknown, `{allowed}` is right")
        };
        return Err(at.of(value, key(name), message));
    }
    let listeners = listeners(at, &raw.listen, &key("listen"))?;
    let blue = backends(at, &raw.blue.backends, &key("blue.backends"), &listeners)?;
    let green = backends(at, &raw.green.backends, &key("green.backends"), &listeners)?;
    let duration = |value: &Option<Spanned<String>>, name: &str, default: Duration| {
        let Some(value) = value else {
            return Ok(default);
        };
        match humantime::parse_duration(value.get_ref()) {
            Ok(duration) if duration <= MAX_DURATION => Ok(duration),
            _ => {
                let message = format!(
                    "`{}` is no duration up to 30 days, like \"30s\" or \"20m\"",
                    value.get_ref()
                );
                Err(at.of(value, key(name), message))
            }
        }
    };
    Ok(Service {
        drain: duration(&raw.drain, "drain", Duration::from_mins(20))?,
        plan: ServicePlan {
            name: name.to_owned(),
            udp_idle: duration(&raw.udp_idle, "udp_idle", Duration::from_secs(30))?,
            listeners,
            colours: [blue, green],
        },
        versions: [raw.blue.version, raw.green.version],
        on_flip: raw.on_flip.unwrap_or(FlipMode::Drain),
    })
}

const MAX_DURATION: Duration = Duration::from_hours(720);

fn listeners(
    at: &At,
    raw: &Spanned<Vec<Spanned<String>>>,
    key: &str,
) -> Result<Vec<ListenerPlan>, ConfigError> {
    if raw.get_ref().is_empty() {
        return Err(at.of(
            raw,
            key,
            "needs at least one, like \"tcp://203.0.113.10:8000\"",
        ));
    }
    let mut listeners = Vec::new();
    for text in raw.get_ref() {
        let wrong = |message: String| at.of(text, key, message);
        let given = text.get_ref();
        let (protocol, address) = match given.split_once("://") {
            Some(("tcp", address)) => (Protocol::Tcp, address),
            Some(("udp", address)) => (Protocol::Udp, address),
            _ => return Err(wrong(format!("`{given}` must begin with tcp:// or udp://"))),
        };
        let address: SocketAddr = address.parse().map_err(|_| {
            wrong(format!("`{given}` is no address and port, like \"tcp://203.0.113.10:8000\" or \"tcp://[2001:db8::10]:8000\""))
        })?;
        if address.port() == 0 {
            return Err(wrong(format!("`{given}`: port 0 cannot be listened on")));
        }
        usable(address.ip()).map_err(|trouble| wrong(format!("`{given}`: {trouble}")))?;
        let listener = ListenerPlan { address, protocol };
        if listeners.contains(&listener) {
            return Err(wrong(format!("`{given}` is given twice")));
        }
        listeners.push(listener);
    }
    Ok(listeners)
}

fn usable(address: IpAddr) -> Result<(), &'static str> {
    if address.is_unspecified() {
        Err("the unspecified address names no host")
    } else if address.is_multicast() || address == IpAddr::from([255, 255, 255, 255]) {
        Err("a multicast or broadcast address cannot be switched")
    } else if address.is_loopback() {
        Err("a loopback address never reaches an interface")
    } else {
        Ok(())
    }
}

fn backends(
    at: &At,
    raw: &Spanned<Vec<Spanned<RawBackend>>>,
    key: &str,
    listeners: &[ListenerPlan],
) -> Result<Vec<BackendPlan>, ConfigError> {
    if raw.get_ref().is_empty() {
        return Err(at.of(raw, key, "is empty: a colour needs at least one backend"));
    }
    let mut backends: Vec<BackendPlan> = Vec::new();
    for entry in raw.get_ref() {
        let wrong = |message: String| at.of(entry, key, message);
        let (text, weight) = match entry.get_ref() {
            RawBackend::Text(text) => (text, 1),
            RawBackend::Table(table) => (&table.address, table.weight.unwrap_or(1)),
        };
        if !(1..=100).contains(&weight) {
            return Err(wrong(format!(
                "`{text}`: weight {weight} must lie between 1 and 100"
            )));
        }
        let (address, port) = match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
            (Ok(address), _) => (address, None),
            (_, Ok(socket)) if socket.port() == 0 => {
                return Err(wrong(format!("`{text}`: port 0 cannot be connected to")));
            }
            (_, Ok(socket)) => (socket.ip(), Some(socket.port())),
            _ => {
                let message = format!(
                    "`{text}` is no address, like \"10.0.1.10\", \"10.0.1.10:9000\" or \"[2001:db8::1]:9000\""
                );
                return Err(wrong(message));
            }
        };
        usable(address).map_err(|trouble| wrong(format!("`{text}`: {trouble}")))?;
        let backend = BackendPlan {
            address,
            port,
            weight,
        };
        if !listeners.iter().any(|listener| backend.serves(listener)) {
            return Err(wrong(format!(
                "`{text}`: no listener of the service has its address family, so nothing could reach it"
            )));
        }
        if backends
            .iter()
            .any(|b| (b.address, b.port) == (address, port))
        {
            return Err(wrong(format!("`{text}` is given twice")));
        }
        if let Some(listener) = listeners.iter().find(|l| l.address == backend.endpoint(l)) {
            return Err(wrong(format!(
                "`{text}` is the service's own listener {listener}: packets would go round in circles"
            )));
        }
        backends.push(backend);
    }
    if let Some(listener) = listeners
        .iter()
        .find(|l| !backends.iter().any(|b| b.serves(l)))
    {
        return Err(at.of(
            raw,
            key,
            format!("has no backend of the address family of {listener}"),
        ));
    }
    Ok(backends)
}

/// What only shows when all services are seen together.
fn across_services(at: &At, services: &BTreeMap<String, Service>) -> Result<(), ConfigError> {
    let mut listeners: BTreeMap<ListenerPlan, &str> = BTreeMap::new();
    for service in services.values() {
        for listener in &service.plan.listeners {
            if let Some(other) = listeners.insert(*listener, &service.plan.name) {
                let message = format!("{listener} is also a listener of service.{other}");
                return Err(at.error(
                    at.find(&service.plan.name),
                    format!("service.{}.listen", service.plan.name),
                    message,
                ));
            }
        }
    }
    let mut endpoints: BTreeMap<(SocketAddr, Protocol), ListenerPlan> = BTreeMap::new();
    for service in services.values() {
        for listener in &service.plan.listeners {
            for colour in Colour::ALL {
                for backend in service
                    .plan
                    .backends(colour)
                    .iter()
                    .filter(|b| b.serves(listener))
                {
                    let endpoint = backend.endpoint(listener);
                    let key = format!("service.{}.{}.backends", service.plan.name, colour.as_str());
                    let place = at.find(&service.plan.name);
                    if let Some(other) = listeners.get(&ListenerPlan {
                        address: endpoint,
                        ..*listener
                    }) {
                        let message = format!(
                            "{endpoint} is a listener of service.{other}: a packet is switched once"
                        );
                        return Err(at.error(place, key, message));
                    }
                    match endpoints.insert((endpoint, listener.protocol), *listener) {
                        Some(other) if other != *listener => {
                            let message = format!(
                                "{endpoint} would serve both {other} and {listener}: its replies could not be told \
                                 apart. Give the backend another port or address for one of them"
                            );
                            return Err(at.error(place, key, message));
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    Ok(())
}

impl At<'_> {
    /// Where a service's table begins.
    fn find(&self, service: &str) -> usize {
        self.text.find(&format!("[service.{service}]")).unwrap_or(0)
    }
}
