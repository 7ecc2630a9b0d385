//! What a validated configuration asks of the packet path.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use bg_common::{
    key,
    service::{Colour, forward},
};

/// A transport protocol that can be switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// IANA protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => key::TCP,
            Self::Udp => key::UDP,
        }
    }

    /// `"tcp"` or `"udp"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// How packets are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ForwardMode {
    /// The destination is rewritten; replies come back through the gateway.
    #[default]
    Nat,
    /// The source too: replies come back to the gateway's own address.
    Snat,
    /// Nothing is rewritten: backends have the listener's address, and reply to the
    /// client themselves.
    Dsr,
}

impl ForwardMode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::Nat, Self::Snat, Self::Dsr];

    /// `"nat"`, `"snat"` or `"dsr"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Snat => "snat",
            Self::Dsr => "dsr",
        }
    }

    /// Its number in the packet path.
    pub const fn number(self) -> u8 {
        match self {
            Self::Nat => forward::NAT,
            Self::Snat => forward::SNAT,
            Self::Dsr => forward::DSR,
        }
    }
}

/// A virtual address, port and protocol that clients connect to.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct ListenerPlan {
    /// Address and port.
    pub address: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for ListenerPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.protocol.as_str(), self.address)
    }
}

impl FromStr for ListenerPlan {
    type Err = String;

    /// The inverse of `Display`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no listener, like \"tcp://203.0.113.10:8000\"");
        let (protocol, address) = text.split_once("://").ok_or_else(wrong)?;
        let protocol = [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .find(|known| known.as_str() == protocol)
            .ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        Ok(Self { address, protocol })
    }
}

impl TryFrom<String> for ListenerPlan {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ListenerPlan> for String {
    fn from(listener: ListenerPlan) -> Self {
        listener.to_string()
    }
}

/// One server of a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendPlan {
    /// Address.
    pub address: IpAddr,
    /// Port; `None` = the listener's.
    pub port: Option<u16>,
    /// Share of new flows relative to the pool's other members.
    pub weight: u32,
}

impl BackendPlan {
    /// True when a listener of this address can use the backend.
    pub const fn serves(&self, listener: &ListenerPlan) -> bool {
        self.address.is_ipv4() == listener.address.is_ipv4()
    }

    /// The endpoint that packets of the listener are sent to.
    pub fn endpoint(&self, listener: &ListenerPlan) -> SocketAddr {
        SocketAddr::new(self.address, self.port.unwrap_or(listener.address.port()))
    }
}

impl fmt::Display for BackendPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.port) {
            (address, Some(port)) => write!(f, "{}", SocketAddr::new(address, port)),
            (address, None) => write!(f, "{address}"),
        }
    }
}

/// What flips as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// Name in the configuration.
    pub name: String,
    /// Listeners, at least one.
    pub listeners: Vec<ListenerPlan>,
    /// How packets are forwarded.
    pub forward: ForwardMode,
    /// The addresses of listeners and previews are put on an interface, and announced.
    pub announce: bool,
    /// UDP: a flow silent for longer is new.
    pub udp_idle: Duration,
    /// Backends by colour; index: `Colour as usize`.
    pub colours: [Vec<BackendPlan>; 2],
    /// Addresses that always reach one colour, by colour: at each of them are the listeners
    /// of its family.
    pub previews: [Vec<IpAddr>; 2],
}

/// What always reaches one colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preview {
    /// The colour.
    pub colour: Colour,
    /// Where clients connect to. The port is that of a listener.
    pub at: ListenerPlan,
}

impl ServicePlan {
    /// What a backend of the service is called.
    pub fn name_of(&self, colour: Colour, backend: &BackendPlan) -> BackendName {
        BackendName {
            service: self.name.clone(),
            colour,
            address: backend.address,
            port: backend.port,
        }
    }

    /// What all backends of the service are called.
    pub fn names(&self) -> impl Iterator<Item = BackendName> {
        let of = move |colour| {
            let backends = self.backends(colour).iter();
            backends.map(move |backend| self.name_of(colour, backend))
        };
        Colour::ALL.into_iter().flat_map(of)
    }

    /// What always reaches one colour.
    pub fn previews(&self) -> impl Iterator<Item = Preview> {
        let of = |colour| {
            let previews = self.previews_of(colour);
            previews.map(move |at| Preview { colour, at })
        };
        Colour::ALL.into_iter().flat_map(of)
    }

    /// Where clients always reach a colour. Two listeners with one port are one there.
    pub fn previews_of(&self, colour: Colour) -> impl Iterator<Item = ListenerPlan> {
        let mut seen = BTreeSet::new();
        let addresses = self.previews[colour as usize].iter();
        let all = addresses.flat_map(|address| {
            let listeners = self.listeners.iter();
            let same = listeners.filter(|l| l.address.is_ipv4() == address.is_ipv4());
            same.map(|listener| ListenerPlan {
                address: SocketAddr::new(*address, listener.address.port()),
                ..*listener
            })
        });
        all.filter(move |at| seen.insert(*at))
    }

    /// Which backends of these colours reply to what clients sent to `at`, a listener or a
    /// preview, and from where: with `dsr`, none by way of the gateway.
    pub fn replies(
        &self,
        at: ListenerPlan,
        colours: &[Colour],
    ) -> impl Iterator<Item = (&BackendPlan, SocketAddr)> {
        let colours = colours.iter().filter(|_| self.forward != ForwardMode::Dsr);
        let backends = colours.flat_map(|colour| self.backends(*colour));
        let serving = backends.filter(move |backend| backend.serves(&at));
        serving.map(move |backend| (backend, backend.endpoint(&at)))
    }

    /// Where clients connect to: the listeners, and then the previews.
    pub fn endpoints(&self) -> impl Iterator<Item = ListenerPlan> {
        let previews = self.previews().map(|preview| preview.at);
        self.listeners.iter().copied().chain(previews)
    }

    /// The backends of a colour.
    pub fn backends(&self, colour: Colour) -> &[BackendPlan] {
        &self.colours[colour as usize]
    }
}

/// What a backend is called, whatever its weight and its id are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendName {
    /// Its service.
    pub service: String,
    /// Its colour.
    pub colour: Colour,
    /// Its address.
    pub address: IpAddr,
    /// Its port; `None` = the listener's.
    pub port: Option<u16>,
}

impl fmt::Display for BackendName {
    /// Its address, with its port if it has one of its own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}", SocketAddr::new(self.address, port)),
            None => write!(f, "{}", self.address),
        }
    }
}

/// Where a backend stands that is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// In its pool.
    In,
    /// Out of its pool, as long as others are in.
    Out,
    /// Where it was: nothing is known of it yet.
    AsItWas,
}

/// All services of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Plan {
    /// In the order of the file.
    pub services: Vec<ServicePlan>,
    /// Where backends stand; one that is not here is in its pool.
    pub standings: BTreeMap<BackendName, Standing>,
}

impl Plan {
    /// The addresses to announce, each with the first service that asks for it.
    pub fn announced(&self) -> BTreeMap<IpAddr, String> {
        let mut announced = BTreeMap::new();
        for service in self.services.iter().filter(|service| service.announce) {
            for endpoint in service.endpoints() {
                announced
                    .entry(endpoint.address.ip())
                    .or_insert_with(|| service.name.clone());
            }
        }
        announced
    }
}
