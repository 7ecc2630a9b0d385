//! What the kernel says over netlink: links, routes, neighbours, and their
//! changes.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use bg_common::port::Tags;
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        link::{
            InfoData, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
            XdpAttached,
        },
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        route::{RouteAddress, RouteAttribute, RouteVia},
    },
};
use tokio::{sync::mpsc, task::JoinHandle};

use super::Error;

/// A request that is not answered in this time never will be.
const ANSWER: Duration = Duration::from_secs(2);

/// A link: a network interface as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub ifindex: u32,
    /// Ethernet address; zero where there is none.
    pub mac: [u8; 6],
    /// Largest L3 packet, bytes.
    pub mtu: u32,
    /// It is up, and has a carrier.
    pub running: bool,
    /// Mode (`native`, `generic`, `another`) and id of its XDP program.
    pub xdp: Option<(&'static str, u32)>,
    /// What it is, where it is a VLAN device.
    pub vlan: Option<Vlan>,
}

/// A VLAN device: what it puts around the frames of another link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// Index of the link below, in the same network namespace.
    pub parent: u32,
    /// EtherType of its tag.
    pub protocol: u16,
    /// VLAN id.
    pub id: u16,
}

/// The next station on the way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The interface it leaves by.
    pub ifindex: u32,
    /// The neighbour it goes to.
    pub via: IpAddr,
    /// The host's own address for packets that go there.
    pub source: Option<IpAddr>,
}

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    /// Its MAC address, and whether that was confirmed of late.
    Usable([u8; 6], bool),
    /// The kernel asks for its MAC address.
    Asked,
    /// It does not answer.
    Failed,
}

/// An interface's neighbour, by address.
pub type NeighbourKey = (u32, IpAddr);

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The link of this index came, went or changed; and whether it runs.
    Link(u32, bool),
    /// An interface has an address more or less.
    Address,
    /// Routes or rules changed.
    Route,
    /// A neighbour is so now, or is gone.
    Neighbour(NeighbourKey, Option<Neighbour>),
    /// Events were lost.
    Lost,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// The kernel refused this one request, with this `errno`.
    Refused(Error, i32),
    /// The connection is of no use any more.
    Broken(Error),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(error, _) | Failure::Broken(error) => error,
        }
    }
}

/// A connection for requests only, so that no flood of events takes an answer's
/// place.
#[derive(Debug)]
pub struct Requests {
    pub(super) handle: Handle,
    connection: JoinHandle<()>,
}

impl Requests {
    /// Opens one; in a runtime.
    pub fn open() -> Result<Self, Error> {
        let (connection, handle, _) =
            new_connection().map_err(Error::io("opening a netlink socket"))?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// The link of this index.
    pub async fn link(&self, ifindex: u32) -> Result<Option<Link>, Failure> {
        let what = "asking for a link";
        let mut links = self.handle.link().get().match_index(ifindex).execute();
        let link = in_time(what, links.try_next()).await?;
        Ok(link.as_ref().map(link_of))
    }

    /// All links.
    pub async fn links(&self) -> Result<Vec<Link>, Failure> {
        let what = "reading the links";
        let mut found = Vec::new();
        let mut messages = self.handle.link().get().execute();
        while let Some(message) = in_time(what, messages.try_next()).await? {
            found.push(link_of(&message));
        }
        Ok(found)
    }

    /// The way to an address; `None` when the kernel says that there is none.
    pub async fn route(&self, to: IpAddr) -> Result<Option<Route>, Failure> {
        let message = match to {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(ip, 32)
                .build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(ip, 128)
                .build(),
        };
        let what = "asking for a route";
        let mut replies = self.handle.route().get(message).execute();
        let reply = tokio::time::timeout(ANSWER, replies.try_next()).await;
        match reply.map_err(|_| no_answer(what))? {
            Err(rtnetlink::Error::NetlinkError(error)) if is_no_route(error.raw_code()) => Ok(None),
            Err(error) => Err(failure(what, &error)),
            Ok(None) => Err(Failure::Broken(Error::step(what, "an empty answer"))),
            Ok(Some(reply)) => Ok(route_of(to, &reply.attributes)),
        }
    }

    /// The neighbour tables of both families.
    pub async fn neighbours(&self) -> Result<Vec<(NeighbourKey, Neighbour)>, Failure> {
        let what = "reading the neighbour table";
        let mut found = Vec::new();
        let mut messages = self.handle.neighbours().get().execute();
        while let Some(message) = in_time(what, messages.try_next()).await? {
            found.extend(neighbour_of(&message));
        }
        Ok(found)
    }

    /// Makes the kernel find a neighbour, or confirm one that it knows: as if a
    /// packet had been sent to it (`NTF_USE`).
    pub async fn use_neighbour(&self, (ifindex, address): NeighbourKey) -> Result<(), Failure> {
        let neighbours = self.handle.neighbours();
        let request = neighbours
            .add(ifindex, address)
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace();
        in_time("asking for a neighbour", request.execute()).await
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Waits for an answer, as long as one may take.
pub(super) async fn in_time<T>(
    what: &str,
    answer: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(ANSWER, answer).await {
        Ok(answer) => answer.map_err(|error| failure(what, &error)),
        Err(_) => Err(no_answer(what)),
    }
}

fn no_answer(what: &str) -> Failure {
    Failure::Broken(Error::step(what, "the kernel did not answer"))
}

fn failure(what: &str, error: &rtnetlink::Error) -> Failure {
    match error {
        rtnetlink::Error::NetlinkError(refusal) => {
            Failure::Refused(Error::step(what, error), refusal.raw_code().abs())
        }
        _ => Failure::Broken(Error::step(what, error)),
    }
}

/// The errors that are an answer: unreachable, prohibited, blackhole.
fn is_no_route(code: i32) -> bool {
    [
        libc::ENETUNREACH,
        libc::EHOSTUNREACH,
        libc::EACCES,
        libc::EINVAL,
    ]
    .contains(&code.abs())
}

fn route_of(to: IpAddr, attributes: &[RouteAttribute]) -> Option<Route> {
    let (mut ifindex, mut via, mut source) = (None, to, None);
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(ip))
            | RouteAttribute::Via(RouteVia::Inet(ip)) => via = IpAddr::V4(*ip),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip))
            | RouteAttribute::Via(RouteVia::Inet6(ip)) => via = IpAddr::V6(*ip),
            RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => source = Some(IpAddr::V4(*ip)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => source = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    Some(Route {
        ifindex: ifindex?,
        via,
        source,
    })
}

/// The neighbour that a message is about; `None` where it says no address.
pub(super) fn neighbour_of(message: &NeighbourMessage) -> Option<(NeighbourKey, Neighbour)> {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some(IpAddr::V4(*ip));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some(IpAddr::V6(*ip));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            _ => {}
        }
    }
    let neighbour = match message.header.state {
        NeighbourState::Reachable | NeighbourState::Permanent | NeighbourState::Noarp => {
            Neighbour::Usable(mac?, true)
        }
        NeighbourState::Stale | NeighbourState::Delay | NeighbourState::Probe => {
            Neighbour::Usable(mac?, false)
        }
        NeighbourState::Failed => Neighbour::Failed,
        _ => Neighbour::Asked,
    };
    Some(((message.header.ifindex, address?), neighbour))
}

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        ifindex: message.header.index,
        running: is_running(message),
        ..Link::default()
    };
    let (mut mode, mut id) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => {
                link.mac = bytes.as_slice().try_into().unwrap_or_default();
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Xdp(parts) => {
                for part in parts {
                    match part {
                        LinkXdp::Attached(XdpAttached::Driver) => mode = Some("native"),
                        LinkXdp::Attached(XdpAttached::SocketBuffer) => mode = Some("generic"),
                        LinkXdp::Attached(XdpAttached::None) => {}
                        LinkXdp::Attached(_) => mode = Some("another"),
                        LinkXdp::ProgId(program) => id = Some(*program),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link.xdp = mode.zip(id);
    link.vlan = vlan_of(&message.attributes);
    link
}

/// The VLAN that a link is, above a link of the same namespace.
fn vlan_of(attributes: &[LinkAttribute]) -> Option<Vlan> {
    let (mut parent, mut protocol, mut id) = (None, None, None);
    for attribute in attributes {
        match attribute {
            LinkAttribute::Link(index) => parent = Some(*index),
            // The index is another namespace's.
            LinkAttribute::LinkNetNsId(_) => return None,
            LinkAttribute::LinkInfo(infos) => {
                let vlan = infos.iter().find_map(|info| match info {
                    LinkInfo::Data(InfoData::Vlan(parts)) => Some(parts),
                    _ => None,
                });
                for part in vlan.into_iter().flatten() {
                    match part {
                        InfoVlan::Id(is) => id = Some(*is),
                        InfoVlan::Protocol(is) => protocol = Some(u16::from(*is)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(Vlan {
        parent: parent?,
        protocol: protocol.unwrap_or(Tags::C),
        id: id?,
    })
}

fn is_running(message: &LinkMessage) -> bool {
    let both = LinkFlags::Up | LinkFlags::LowerUp;
    message.header.flags.contains(both)
}

/// A connection for events only.
#[derive(Debug)]
pub struct Events {
    events: mpsc::UnboundedReceiver<Event>,
    connection: JoinHandle<()>,
}

impl Events {
    /// Opens one; in a runtime.
    pub fn open() -> Result<Self, Error> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, _, mut messages) = new_multicast_connection(&groups)
            .map_err(Error::io("watching routes and neighbours"))?;
        let (sender, events) = mpsc::unbounded_channel();
        let forward = async move {
            while let Some((message, _)) = messages.next().await {
                if event_of(&message).is_some_and(|event| sender.send(event).is_err()) {
                    return;
                }
            }
        };
        let connection = tokio::spawn(async move {
            futures_util::future::join(connection, forward).await;
        });
        Ok(Self { events, connection })
    }

    /// The next event; an error when no more will come.
    pub async fn next(&mut self) -> Result<Event, Error> {
        let closed = || Error::step("watching routes and neighbours", "the socket closed");
        self.events.recv().await.ok_or_else(closed)
    }

    /// An event that has come already.
    pub fn at_hand(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn event_of(message: &NetlinkMessage<RouteNetlinkMessage>) -> Option<Event> {
    let message = match &message.payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(Event::Lost),
        _ => return None,
    };
    Some(match message {
        RouteNetlinkMessage::NewLink(link) => Event::Link(link.header.index, is_running(link)),
        RouteNetlinkMessage::DelLink(link) => Event::Link(link.header.index, false),
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Event::Address,
        RouteNetlinkMessage::NewRoute(_)
        | RouteNetlinkMessage::DelRoute(_)
        | RouteNetlinkMessage::NewRule(_)
        | RouteNetlinkMessage::DelRule(_) => Event::Route,
        RouteNetlinkMessage::NewNeighbour(message) => {
            let (key, neighbour) = neighbour_of(message)?;
            Event::Neighbour(key, Some(neighbour))
        }
        RouteNetlinkMessage::DelNeighbour(message) => {
            Event::Neighbour(neighbour_of(message)?.0, None)
        }
        _ => return None,
    })
}

/// Runs a few requests to their end, on a thread and in a runtime of their own,
/// so that it works inside and outside of another one.
pub fn block_on<R, F>(work: impl FnOnce() -> F + Send) -> Result<R, Error>
where
    R: Send,
    F: Future<Output = Result<R, Error>>,
{
    let run = || -> Result<R, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::io("talking to the kernel over netlink"))?;
        runtime.block_on(async { work().await })
    };
    std::thread::scope(|scope| {
        scope
            .spawn(run)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::{ErrorMessage, NetlinkDeserializable as _, NetlinkHeader};

    use super::*;

    #[test]
    fn an_ipv6_gateway_of_an_ipv4_route_is_the_next_hop() {
        let (to, via): (IpAddr, Ipv6Addr) =
            ("10.0.1.10".parse().unwrap(), "fe80::1".parse().unwrap());
        let attributes = [
            RouteAttribute::Oif(7),
            RouteAttribute::Via(RouteVia::Inet6(via)),
            RouteAttribute::PrefSource(RouteAddress::Inet(Ipv4Addr::new(10, 0, 0, 1))),
        ];
        let route = Route {
            ifindex: 7,
            via: via.into(),
            source: Some(Ipv4Addr::new(10, 0, 0, 1).into()),
        };
        assert_eq!(route_of(to, &attributes), Some(route));
    }

    #[test]
    fn only_some_errors_say_that_there_is_no_route() {
        assert!(is_no_route(-libc::ENETUNREACH) && is_no_route(-libc::EHOSTUNREACH));
        assert!(!is_no_route(-libc::ENOBUFS) && !is_no_route(-libc::EINTR));
        let refused = rtnetlink::Error::NetlinkError(ErrorMessage::default());
        assert!(matches!(failure("x", &refused), Failure::Refused(..)));
        let broken = rtnetlink::Error::RequestFailed;
        assert!(matches!(failure("x", &broken), Failure::Broken(_)));
    }

    /// An attribute as netlink has it: length, kind, value, padding.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (value.len() as u16 + 4).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// A link's message (`RTM_NEWLINK`, `linux/if_link.h`) with these attributes.
    fn link_message(index: u32, attributes: &[Vec<u8>]) -> Link {
        const RTM_NEWLINK: u16 = 16;
        // struct ifinfomsg: family, padding, type, index, flags, change.
        let mut payload = vec![0, 0, 1, 0];
        payload.extend(index.to_ne_bytes());
        payload.extend([0; 8]);
        payload.extend(attributes.concat());
        let mut header = NetlinkHeader::default();
        header.message_type = RTM_NEWLINK;
        let message = RouteNetlinkMessage::deserialize(&header, &payload).unwrap();
        let RouteNetlinkMessage::NewLink(message) = message else {
            panic!("not a link: {message:?}");
        };
        link_of(&message)
    }

    #[test]
    fn a_vlan_device_says_what_it_is() {
        const IFLA_LINK: u16 = 5;
        const IFLA_LINKINFO: u16 = 18;
        const IFLA_LINK_NETNSID: u16 = 37;
        let data = |id: u16, protocol: u16| {
            [
                attribute(1, &id.to_ne_bytes()),       // IFLA_VLAN_ID
                attribute(5, &protocol.to_be_bytes()), // IFLA_VLAN_PROTOCOL
            ]
            .concat()
        };
        let info = |data: &[u8]| {
            let kind = attribute(1, b"vlan\0"); // IFLA_INFO_KIND
            attribute(IFLA_LINKINFO, &[kind, attribute(2, data)].concat())
        };
        let below = attribute(IFLA_LINK, &7u32.to_ne_bytes());
        let outer = link_message(9, &[below.clone(), info(&data(100, Tags::S))]);
        let vlan = Vlan {
            parent: 7,
            protocol: Tags::S,
            id: 100,
        };
        assert_eq!((outer.ifindex, outer.vlan), (9, Some(vlan)));
        let elsewhere = attribute(IFLA_LINK_NETNSID, &3i32.to_ne_bytes());
        let foreign = link_message(9, &[below.clone(), elsewhere, info(&data(100, Tags::C))]);
        assert_eq!(foreign.vlan, None);
        assert_eq!(link_message(9, &[below]).vlan, None);
    }

    #[test]
    fn a_full_buffer_is_an_event() {
        let overrun = NetlinkPayload::Overrun(Vec::new());
        let message = NetlinkMessage::new(NetlinkHeader::default(), overrun);
        assert_eq!(event_of(&message), Some(Event::Lost));
    }
}
