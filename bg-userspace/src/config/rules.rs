//! What one table may say.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use bg_common::{
    abi::{Room, capacity},
    service::Colour,
};
use toml::Spanned;

use super::{
    ConfigError, DrainPlan, FlipMode, Gateway, MAX_DURATION, Paths, Service, health,
    raw::{RawBackend, RawGateway, RawService},
    release::rules::{self as releases, RawRelease},
    text::Text,
};
use crate::{
    datapath::AttachMode,
    plan::{BackendPlan, ForwardMode, ListenerPlan, Protocol, ServicePlan},
};

const MAX_FLOWS: RangeInclusive<i64> = 1024..=100_000_000;
const MAX_WEIGHT: i64 = 100;
/// Bytes of a journal.
const JOURNAL: RangeInclusive<u64> = 1 << 20..=16 << 30;
/// `sun_path` has 108 bytes; the daemon binds a longer name first.
const MAX_SOCKET_PATH: usize = 100;
/// `IFNAMSIZ` without the final zero.
const MAX_INTERFACE_NAME: usize = 15;

/// A service, and where in the text its parts are.
pub(super) struct Placed {
    pub(super) service: Service,
    pub(super) listeners: Vec<usize>,
    pub(super) backends: [Vec<usize>; 2],
    pub(super) previews: [usize; 2],
}

pub(super) fn gateway(text: &Text<'_>, raw: Spanned<RawGateway>) -> Result<Gateway, ConfigError> {
    let key = |key: &str| format!("gateway.{key}");
    let start = raw.span().start;
    let raw = raw.into_inner();
    let Some(interfaces) = raw.interfaces else {
        let message = "is missing: name the interfaces that XDP runs on, like [\"eth0\", \"eth1\"]";
        return Err(text.error(start, key("interfaces"), message));
    };
    let names = interfaces.get_ref();
    let wrong = |message: String| text.wrong(&interfaces, key("interfaces"), message);
    if names.is_empty() {
        let message = "is empty: name the interfaces that XDP runs on, like [\"eth0\", \"eth1\"]";
        return Err(wrong(message.to_owned()));
    }
    if names.len() > capacity::INTERFACES {
        let message = format!("has {} names, {} fit", names.len(), capacity::INTERFACES);
        return Err(wrong(message));
    }
    let mut seen = BTreeSet::new();
    for name in names {
        let foreign = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        let dots = name == "." || name == "..";
        if name.is_empty() || name.len() > MAX_INTERFACE_NAME || dots || name.contains(foreign) {
            return Err(wrong(format!(
                "`{}` is no interface's name (1 to 15 bytes, no `/`, `:` or blank)",
                name.escape_debug()
            )));
        }
        if !seen.insert(name) {
            return Err(wrong(format!("`{name}` is given twice")));
        }
    }
    let xdp = match &raw.xdp {
        None => AttachMode::Native,
        Some(mode) => match mode.get_ref().as_str() {
            "native" => AttachMode::Native,
            "generic" => AttachMode::Generic,
            other => {
                let message = format!("`{other}` is unknown: \"native\" or \"generic\"");
                return Err(text.wrong(mode, key("xdp"), message));
            }
        },
    };
    let number = |raw: Option<&Spanned<i64>>, name, absent, range: RangeInclusive<i64>| match raw {
        None => Ok(absent),
        Some(given) if range.contains(given.get_ref()) => Ok(*given.get_ref() as u32),
        Some(given) => {
            let (least, most) = range.into_inner();
            let message = format!("{} is not between {least} and {most}", given.get_ref());
            Err(text.wrong(given, key(name), message))
        }
    };
    Ok(Gateway {
        xdp,
        max_flows: number(raw.max_flows.as_ref(), "max_flows", 1_000_000, MAX_FLOWS)?,
        max_services: number(
            raw.max_services.as_ref(),
            "max_services",
            Room::LEAST.services,
            i64::from(Room::LEAST.services)..=i64::from(Room::MOST.services),
        )?,
        paths: paths(text, raw.socket, raw.state_dir, raw.bpffs)?,
        metrics: metrics(text, raw.metrics.as_ref(), &key("metrics"))?,
        journal_max: journal_max(text, raw.journal_max.as_ref(), &key("journal_max"))?,
        interfaces: interfaces.into_inner(),
    })
}

/// Bytes that the journal may take.
fn journal_max(
    text: &Text<'_>,
    raw: Option<&Spanned<String>>,
    key: &str,
) -> Result<u64, ConfigError> {
    let Some(raw) = raw else {
        return Ok(64 << 20);
    };
    let given = raw.get_ref();
    let (number, shift) = match given.split_at_checked(given.len().saturating_sub(1)) {
        Some((number, "M")) => (number, 20),
        Some((number, "G")) => (number, 30),
        _ => ("", 0),
    };
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let bytes = number.parse::<u32>().ok().filter(|_| digits);
    match bytes.map(|number| u64::from(number) << shift) {
        Some(bytes) if JOURNAL.contains(&bytes) => Ok(bytes),
        _ => {
            let message = format!(
                "`{}` is no size between \"1M\" and \"16G\"",
                given.escape_debug()
            );
            Err(text.wrong(raw, key, message))
        }
    }
}

/// Where metrics may be read.
fn metrics(
    text: &Text<'_>,
    raw: Option<&Spanned<String>>,
    key: &str,
) -> Result<Option<SocketAddr>, ConfigError> {
    let Some(raw) = raw else {
        return Ok(None);
    };
    let given = raw.get_ref();
    match given.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(Some(address)),
        _ => {
            let message = format!(
                "`{}` is no address with a port, like \"127.0.0.1:9464\"",
                given.escape_debug()
            );
            Err(text.wrong(raw, key, message))
        }
    }
}

fn paths(
    text: &Text<'_>,
    socket: Option<Spanned<PathBuf>>,
    state_dir: Option<Spanned<PathBuf>>,
    bpffs: Option<Spanned<PathBuf>>,
) -> Result<Paths, ConfigError> {
    let default = Paths::default();
    let absolute = |value: Option<Spanned<PathBuf>>, key: &str, default: PathBuf| match value {
        None => Ok((default, 0)),
        Some(path) if path.get_ref().is_absolute() => {
            let place = path.span().start;
            Ok((path.into_inner(), place))
        }
        Some(path) => {
            let message = format!("`{}` is no absolute path", path.get_ref().display());
            Err(text.wrong(&path, key, message))
        }
    };
    let (socket, place) = absolute(socket, "gateway.socket", default.socket)?;
    if socket.as_os_str().len() > MAX_SOCKET_PATH {
        let message =
            format!("is longer than {MAX_SOCKET_PATH} bytes, more than a socket's name may be");
        return Err(text.error(place, "gateway.socket", message));
    }
    let (state_dir, _) = absolute(state_dir, "gateway.state_dir", default.state_dir)?;
    let (bpffs, place) = absolute(bpffs, "gateway.bpffs", default.bpffs)?;
    if bpffs
        .file_name()
        .is_none_or(|name| name.as_encoded_bytes().contains(&b'.'))
    {
        let message = "must end in a name without dots: the BPF file system allows none";
        return Err(text.error(place, "gateway.bpffs", message));
    }
    Ok(Paths {
        socket,
        state_dir,
        bpffs,
    })
}

pub(super) fn service(
    text: &Text<'_>,
    name: &Spanned<String>,
    raw: RawService,
) -> Result<Placed, ConfigError> {
    let start = name.span().start;
    let name = name.get_ref();
    let key = |key: &str| format!("service.{name}.{key}");
    if !is_name(name) {
        let message = "a service's name has 1 to 63 letters, digits, `-` and `_`";
        return Err(text.error(start, format!("service.{}", name.escape_debug()), message));
    }
    let forward = forward(text, raw.forward.as_ref(), &key("forward"))?;
    let Some(listen) = &raw.listen else {
        let message = "is missing: add listen = [\"tcp://203.0.113.10:8000\"]";
        return Err(text.error(start, key("listen"), message));
    };
    let listeners = listeners(text, listen, &key("listen"))?;
    let drain = drain(text, &raw, &key)?;
    let canary = raw.canary.as_ref().map(|canary| canary.span().start);
    let release = RawRelease {
        parity: raw.parity,
        warm: raw.warm,
        gate: raw.gate,
        approval: raw.approval,
        canary: raw.canary,
        bake: raw.bake,
        standby: raw.standby,
        hook: raw.hook,
    };
    let release = releases::plan(text, release, &key)?;
    let mut versions = [None, None];
    let mut pools = [Vec::new(), Vec::new()];
    let mut places = [Vec::new(), Vec::new()];
    let mut previews = [Vec::new(), Vec::new()];
    let mut preview_places = [0; 2];
    for (colour, raw) in Colour::ALL.into_iter().zip([raw.blue, raw.green]) {
        let part = colour.as_str();
        let Some(raw) = raw else {
            let message = format!(
                "is missing: a service has two colours, [service.{name}.blue] and [service.{name}.green]"
            );
            return Err(text.error(start, key(part), message));
        };
        let index = colour as usize;
        if let Some(list) = &raw.preview {
            previews[index] = preview(text, list, &key(&format!("{part}.preview")), &listeners)?;
            preview_places[index] = list.span().start;
        }
        let key = key(&format!("{part}.backends"));
        let Some(list) = raw.backends else {
            let message = "is missing: a colour needs at least one backend, like [\"10.0.1.10\"]";
            return Err(text.error(start, key, message));
        };
        versions[index] = raw.version;
        pools[index] = pool(text, &list, &key, &listeners, forward)?;
        places[index] = list.get_ref().iter().map(|b| b.span().start).collect();
    }
    let (usual, second) = (Duration::from_secs(30), Duration::from_secs(1));
    let udp_idle = raw.udp_idle.as_ref();
    let udp_idle = duration(text, udp_idle, &key("udp_idle"), usual, second)?;
    let plan = ServicePlan {
        name: name.clone(),
        forward,
        announce: raw.announce.unwrap_or(false),
        udp_idle,
        listeners,
        colours: pools,
        previews,
    };
    let health = raw
        .health
        .map(|raw| health::plan(text, &key("health"), raw, &plan))
        .transpose()?;
    let is_watched = health.is_some() || release.hears();
    if let Some(place) = canary.filter(|_| !is_watched && !release.canary.is_empty()) {
        let message = format!(
            "rises unwatched: add [service.{name}.health], or [service.{name}.bake] with its signals or a rule"
        );
        return Err(text.error(place, key("canary"), message));
    }
    Ok(Placed {
        listeners: listen.get_ref().iter().map(|l| l.span().start).collect(),
        backends: places,
        previews: preview_places,
        service: Service {
            drain,
            release,
            versions,
            on_flip: raw.on_flip.unwrap_or(FlipMode::Drain),
            health,
            plan,
        },
    })
}

/// True for what may be a service's name: it is part of URLs and of metrics.
pub(crate) fn is_name(name: &str) -> bool {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=63).contains(&name.len()) && name.chars().all(valid)
}

/// How packets are forwarded.
fn forward(
    text: &Text<'_>,
    raw: Option<&Spanned<String>>,
    key: &str,
) -> Result<ForwardMode, ConfigError> {
    let Some(raw) = raw else {
        return Ok(ForwardMode::default());
    };
    let given = raw.get_ref();
    let known = ForwardMode::ALL
        .into_iter()
        .find(|mode| mode.as_str() == given);
    known.ok_or_else(|| {
        let message = format!("`{given}` is unknown: \"nat\", \"snat\" or \"dsr\"");
        text.wrong(raw, key, message)
    })
}

/// How the service drains.
fn drain(
    text: &Text<'_>,
    raw: &RawService,
    key: &impl Fn(&str) -> String,
) -> Result<DrainPlan, ConfigError> {
    let usual = DrainPlan::default();
    let duration =
        |value, name: &str, usual| duration(text, value, &key(name), usual, Duration::ZERO);
    Ok(DrainPlan {
        deadline: duration(raw.drain.as_ref(), "drain", usual.deadline)?,
        end: raw.drain_end.unwrap_or(usual.end),
        reset_over: duration(raw.reset_over.as_ref(), "reset_over", usual.reset_over)?,
    })
}

/// A duration, of whole seconds.
pub(super) fn duration(
    text: &Text<'_>,
    value: Option<&Spanned<String>>,
    key: &str,
    usual: Duration,
    smallest: Duration,
) -> Result<Duration, ConfigError> {
    let Some(value) = value else {
        return Ok(usual);
    };
    let given = value.get_ref();
    let wrong = |message: String| text.wrong(value, key, message);
    let Ok(duration) = humantime::parse_duration(given) else {
        return Err(wrong(format!(
            "`{given}` is no duration, like \"30s\" or \"20m\""
        )));
    };
    if duration > MAX_DURATION {
        return Err(wrong(format!("`{given}` is longer than 30 days")));
    }
    if duration.subsec_nanos() != 0 || duration < smallest {
        return Err(wrong(format!(
            "`{given}` is not in whole seconds, at least {}",
            humantime::format_duration(smallest)
        )));
    }
    Ok(duration)
}

fn listeners(
    text: &Text<'_>,
    raw: &Spanned<Vec<Spanned<String>>>,
    key: &str,
) -> Result<Vec<ListenerPlan>, ConfigError> {
    let count = raw.get_ref().len();
    if count == 0 {
        let message = "is empty: a service needs a listener, like \"tcp://203.0.113.10:8000\"";
        return Err(text.wrong(raw, key, message));
    }
    let limit = capacity::ENDPOINTS;
    if count > limit {
        return Err(text.wrong(raw, key, format!("has {count} listeners, {limit} fit")));
    }
    let mut seen = BTreeSet::new();
    let mut listeners = Vec::with_capacity(count);
    for entry in raw.get_ref() {
        let listener = listener(entry.get_ref())
            .and_then(|listener| {
                let new = seen.insert(listener);
                new.then_some(listener).ok_or("is given twice".to_owned())
            })
            .map_err(|trouble| {
                text.wrong(entry, key, format!("`{}` {trouble}", entry.get_ref()))
            })?;
        listeners.push(listener);
    }
    Ok(listeners)
}

fn listener(given: &str) -> Result<ListenerPlan, String> {
    let (protocol, address) = match given.split_once("://") {
        Some(("tcp", address)) => (Protocol::Tcp, address),
        Some(("udp", address)) => (Protocol::Udp, address),
        _ => return Err("must begin with tcp:// or udp://".to_owned()),
    };
    let address: SocketAddr = address.parse().map_err(|_| {
        port_trouble(address).unwrap_or_else(|| {
            "is no address and port, like \"tcp://203.0.113.10:8000\" or \"tcp://[2001:db8::10]:8000\""
                .to_owned()
        })
    })?;
    usable(address.ip())?;
    unscoped(given)?;
    if address.port() == 0 {
        return Err("has port 0: nobody can connect to it".to_owned());
    }
    Ok(ListenerPlan { address, protocol })
}

/// What is wrong with a port that is a number, but none of a port.
fn port_trouble(address: &str) -> Option<String> {
    let (_, port) = address.rsplit_once(':')?;
    let number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let host = address.contains("]:") || address.matches(':').count() == 1;
    (host && number && port.parse::<u16>().is_err())
        .then(|| format!("has port {port}: ports end at 65535"))
}

/// Addresses that packets on the wire can be for.
fn usable(address: IpAddr) -> Result<(), String> {
    let trouble = match address {
        _ if address.is_unspecified() => "is the unspecified address, which names no host",
        _ if address.is_loopback() => "is a loopback address, which no packet on the wire is for",
        _ if address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST) => {
            "is a multicast or broadcast address, which cannot be switched"
        }
        IpAddr::V6(v6) => {
            if let Some(v4) = v6.to_ipv4_mapped() {
                return Err(format!("is an IPv4 address in IPv6 form: write {v4}"));
            }
            if !v6.is_unicast_link_local() {
                return Ok(());
            }
            "is a link-local address, which is not routed"
        }
        IpAddr::V4(_) => return Ok(()),
    };
    Err(trouble.to_owned())
}

/// A zone (RFC 4007) is not in a packet: with one, an address would look like
/// another one here, and be the same on the wire.
fn unscoped(given: &str) -> Result<(), String> {
    if given.contains('%') {
        return Err("has a zone, which no packet carries: leave out `%` and the number".to_owned());
    }
    Ok(())
}

/// Addresses that always reach one colour.
fn preview(
    text: &Text<'_>,
    raw: &Spanned<Vec<Spanned<String>>>,
    key: &str,
    listeners: &[ListenerPlan],
) -> Result<Vec<IpAddr>, ConfigError> {
    let mut addresses = BTreeSet::new();
    for entry in raw.get_ref() {
        let given = entry.get_ref();
        let address = given
            .parse::<IpAddr>()
            .map_err(|_| {
                "is no address, like \"203.0.113.11\": its ports are those of the listeners"
                    .to_owned()
            })
            .and_then(|address| usable(address).map(|()| address))
            .and_then(|address| {
                let mut listeners = listeners.iter();
                if !listeners.any(|listener| listener.address.is_ipv4() == address.is_ipv4()) {
                    return Err("serves no listener: none has its address family".to_owned());
                }
                let new = addresses.insert(address);
                new.then_some(()).ok_or_else(|| "is given twice".to_owned())
            });
        if let Err(trouble) = address {
            let message = format!("`{}` {trouble}", given.escape_debug());
            return Err(text.wrong(entry, key, message));
        }
    }
    Ok(addresses.into_iter().collect())
}

fn pool(
    text: &Text<'_>,
    raw: &Spanned<Vec<Spanned<RawBackend>>>,
    key: &str,
    listeners: &[ListenerPlan],
    forward: ForwardMode,
) -> Result<Vec<BackendPlan>, ConfigError> {
    let count = raw.get_ref().len();
    if count == 0 {
        let message = "is empty: a colour needs at least one backend, like [\"10.0.1.10\"]";
        return Err(text.wrong(raw, key, message));
    }
    let limit = Room::MOST.backends() as usize;
    if count > limit {
        return Err(text.wrong(raw, key, format!("has {count} backends, {limit} fit")));
    }
    let mut pool = Vec::with_capacity(count);
    let mut endpoints = BTreeSet::new();
    for entry in raw.get_ref() {
        let given = entry.get_ref();
        let wrong =
            |trouble: String| text.wrong(entry, key, format!("`{}` {trouble}", given.address));
        let backend = backend(given).map_err(wrong)?;
        let mut serves_any = false;
        for listener in listeners.iter().filter(|listener| backend.serves(listener)) {
            serves_any = true;
            let endpoint = backend.endpoint(listener);
            if endpoint == listener.address {
                return Err(wrong(format!(
                    "is the service's own listener {listener}: packets would go round in circles"
                )));
            }
            if forward == ForwardMode::Dsr && endpoint.port() != listener.address.port() {
                return Err(wrong(format!(
                    "has another port than {listener}: with forward = \"dsr\" nothing is rewritten, \
                     leave the port out"
                )));
            }
            if !endpoints.insert((endpoint, *listener)) {
                return Err(wrong(format!(
                    "is given twice: {listener} has {endpoint} already"
                )));
            }
        }
        if !serves_any {
            let message = "serves no listener: none has its address family";
            return Err(wrong(message.to_owned()));
        }
        pool.push(backend);
    }
    let unserved = |listener: &&ListenerPlan| !pool.iter().any(|b| b.serves(listener));
    match listeners.iter().find(unserved) {
        Some(listener) => {
            let message = format!("has no backend of the address family of {listener}");
            Err(text.wrong(raw, key, message))
        }
        None => Ok(pool),
    }
}

fn backend(given: &RawBackend) -> Result<BackendPlan, String> {
    let text = &given.address;
    let weight = given.weight.unwrap_or(1);
    if !(1..=MAX_WEIGHT).contains(&weight) {
        return Err(format!("has weight {weight}: 1 to {MAX_WEIGHT} is right"));
    }
    let (address, port) = match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
        (Ok(address), _) => (address, None),
        (_, Ok(socket)) => (socket.ip(), Some(socket.port())),
        _ => {
            return Err(port_trouble(text).unwrap_or_else(|| {
                "is no address, like \"10.0.1.10\", \"10.0.1.10:9000\" or \"[2001:db8::1]:9000\""
                    .to_owned()
            }));
        }
    };
    usable(address)?;
    unscoped(text)?;
    if port == Some(0) {
        return Err("has port 0: nobody can connect to it".to_owned());
    }
    Ok(BackendPlan {
        address,
        port,
        weight: weight as u32,
    })
}
