//! Next hops: from the host's routes and neighbours into the backend table.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use aya::maps::{HashMap, Map};
use bg_common::{abi::map, service::NextHop};
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_multicast_connection,
    packet_route::{
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{RouteAddress, RouteAttribute},
    },
};

use super::{Error, Inner, layout::address_of};

/// Keeps every backend's next hop as the kernel has it.
#[derive(Debug)]
pub struct Resolver {
    inner: Arc<Inner>,
}

type Neighbours = BTreeMap<(u32, IpAddr), ([u8; 6], bool)>;

impl Resolver {
    pub(super) const fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Watches links, routes and neighbours, and resolves after every change and
    /// every second. Returns only when netlink fails.
    pub async fn run(self) -> Result<(), Error> {
        let groups = [
            MulticastGroup::Neigh,
            MulticastGroup::Link,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, handle, mut events) = new_multicast_connection(&groups)
            .map_err(Error::io("watching routes and neighbours"))?;
        tokio::spawn(connection);
        let mut probes = 0u64;
        loop {
            self.resolve(&handle, probes.is_multiple_of(30)).await?;
            probes += 1;
            // A change, or the next second; several changes at once are one.
            let _ = tokio::time::timeout(Duration::from_secs(1), events.next()).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            while events.try_recv().is_ok() {}
        }
    }

    /// Resolves until every backend has a next hop, at most for `limit`.
    pub async fn resolve_now(&self, limit: Duration) -> Result<(), Error> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(Error::io("asking for routes and neighbours"))?;
        let task = tokio::spawn(connection);
        let deadline = tokio::time::Instant::now() + limit;
        while !self.resolve(&handle, true).await? && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        task.abort();
        Ok(())
    }

    /// One round; true when every backend has a next hop. With `probe`, asks the
    /// kernel to confirm neighbours it has not heard from for a while.
    async fn resolve(&self, handle: &Handle, probe: bool) -> Result<bool, Error> {
        let backends = self.inner.backends();
        let slots = self.slots()?;
        let neighbours = neighbours(handle).await?;
        let mut all = true;
        for (id, backend) in backends {
            let address = address_of(&backend);
            let hop = match route(handle, address).await {
                Some((ifindex, via)) => {
                    match (slots.get(&ifindex), neighbours.get(&(ifindex, via))) {
                        (Some(slot), Some((mac, fresh))) => {
                            if probe && !fresh {
                                ask(address);
                            }
                            NextHop::new(*mac, *slot as u16)
                        }
                        (Some(_), None) => {
                            ask(address);
                            NextHop::NONE
                        }
                        (None, _) => NextHop::NONE,
                    }
                }
                None => NextHop::NONE,
            };
            all &= hop != NextHop::NONE;
            if self.inner.next_hop(id) != hop {
                tracing::info!(backend = %address, resolved = hop != NextHop::NONE, "next hop changed");
                self.inner.set_next_hop(id, hop);
            }
        }
        Ok(all)
    }

    fn slots(&self) -> Result<BTreeMap<u32, u32>, Error> {
        let slots: HashMap<_, u32, u32> = self.inner.open_map(map::SLOTS, Map::HashMap)?;
        slots
            .iter()
            .collect::<Result<_, _>>()
            .map_err(|e| Error::step("reading SLOTS", e))
    }
}

/// Usable neighbours by interface and address: MAC, and whether it was
/// confirmed of late.
async fn neighbours(handle: &Handle) -> Result<Neighbours, Error> {
    let mut found = Neighbours::new();
    let mut messages = handle.neighbours().get().execute();
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(|e| Error::step("reading the neighbour table", e))?
    {
        let fresh = match message.header.state {
            NeighbourState::Reachable | NeighbourState::Permanent | NeighbourState::Noarp => true,
            NeighbourState::Stale | NeighbourState::Delay | NeighbourState::Probe => false,
            _ => continue,
        };
        let (mut address, mut mac) = (None, None);
        for attribute in message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                    address = Some(IpAddr::V4(ip));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                    address = Some(IpAddr::V6(ip));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = <[u8; 6]>::try_from(bytes).ok();
                }
                _ => {}
            }
        }
        if let (Some(address), Some(mac)) = (address, mac) {
            found.insert((message.header.ifindex, address), (mac, fresh));
        }
    }
    Ok(found)
}

/// The interface and the next hop's address on the way to `to`.
async fn route(handle: &Handle, to: IpAddr) -> Option<(u32, IpAddr)> {
    let message = match to {
        IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(ip, 32)
            .build(),
        IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(ip, 128)
            .build(),
    };
    let reply = handle
        .route()
        .get(message)
        .execute()
        .try_next()
        .await
        .ok()??;
    let (mut ifindex, mut via) = (None, to);
    for attribute in reply.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(index),
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => via = IpAddr::V4(ip),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => via = IpAddr::V6(ip),
            _ => {}
        }
    }
    Some((ifindex?, via))
}

/// Makes the kernel resolve the next hop towards a backend: an empty datagram to
/// the discard port (RFC 863) needs it.
fn ask(backend: IpAddr) {
    let local: SocketAddr = match backend {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Not answered, not waited for: the neighbour table tells what came of it.
    if let Ok(socket) = UdpSocket::bind(local) {
        let _ = socket.set_nonblocking(true);
        let _ = socket.send_to(&[], (backend, 9));
    }
}
