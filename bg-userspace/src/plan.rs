//! What the packet path shall do: a validated configuration, without the parts
//! that only the daemon needs.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bg_common::{key, service::Colour};

/// A transport protocol that a listener can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The IANA protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => key::TCP,
            Self::Udp => key::UDP,
        }
    }

    /// The protocol with this IANA number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            key::TCP => Some(Self::Tcp),
            key::UDP => Some(Self::Udp),
            _ => None,
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

/// A virtual address, port and protocol that clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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

/// One server of a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendPlan {
    /// Address.
    pub address: IpAddr,
    /// Port; `None` = the listener's.
    pub port: Option<u16>,
    /// Share of new flows relative to the other backends of the pool; at least 1.
    pub weight: u32,
}

/// What flips as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// Name, unique.
    pub name: String,
    /// Listeners, at least one.
    pub listeners: Vec<ListenerPlan>,
    /// A UDP flow silent for longer is new again.
    pub udp_idle: Duration,
    /// Backends; index: [`Colour`].
    pub colours: [Vec<BackendPlan>; 2],
}

impl ServicePlan {
    /// The backends of `colour`. A listener uses those of its address family.
    pub fn backends(&self, colour: Colour) -> &[BackendPlan] {
        &self.colours[colour as usize]
    }
}

/// Everything that the packet path shall switch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Services; no two share a listener.
    pub services: Vec<ServicePlan>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_reads_as_in_the_configuration() {
        let listener = ListenerPlan {
            address: "[2001:db8::10]:8000".parse().unwrap(),
            protocol: Protocol::Udp,
        };
        assert_eq!(listener.to_string(), "udp://[2001:db8::10]:8000");
    }
}
