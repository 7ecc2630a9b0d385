//! Keeps the announced addresses on their interfaces while the daemon runs, and
//! tells the network where they are whenever that may have changed.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use nix::net::if_::if_nametoindex;
use tokio::sync::Mutex;

use super::{
    Error,
    addresses::{Change, Made, Noted, Place},
    advertise,
    netlink::{Failure, Link, Requests},
    packet_socket,
};

/// An address is announced twice, this far apart (RFC 5227, section 1.1:
/// `ANNOUNCE_NUM`, `ANNOUNCE_INTERVAL`).
const AGAIN: Duration = Duration::from_secs(2);

/// The announced addresses.
#[derive(Debug, Default)]
pub struct Announcer {
    spots: Mutex<BTreeMap<IpAddr, Spot>>,
}

/// An announced address.
#[derive(Clone, Debug)]
struct Spot {
    interface: String,
    ours: bool,
    /// The interface has it.
    is_there: bool,
    /// What the network has been told.
    told: Option<Told>,
}

/// Interface index and MAC that an address was announced with.
type Told = (u32, [u8; 6]);

/// Where an announced address is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The interface that it belongs on.
    pub interface: String,
    /// The interface has it.
    pub is_there: bool,
}

impl Announcer {
    /// Makes a change of addresses, then `rest`; both, or neither. Blocks.
    pub fn change(
        &self,
        change: Change,
        rest: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        // Held to the end: what is removed here is not put back by `follow`.
        let mut spots = self.spots.blocking_lock();
        let places = change.places.clone();
        let made: Made = change.make_blocking()?;
        rest()?;
        made.keep();
        *spots = places
            .into_iter()
            .map(|(address, place)| {
                let told = spots.get(&address).and_then(|spot| spot.told);
                (address, Spot::new(place, told))
            })
            .collect();
        Ok(())
    }

    /// The addresses that are ours, with their interfaces. Blocks.
    pub fn noted(&self) -> Noted {
        let spots = self.spots.blocking_lock();
        let ours = spots.iter().filter(|(_, spot)| spot.ours);
        ours.map(|(address, spot)| (*address, spot.interface.clone()))
            .collect()
    }

    /// Where the announced addresses are. Blocks.
    pub fn statuses(&self) -> BTreeMap<IpAddr, Announced> {
        let spots = self.spots.blocking_lock();
        let status = |spot: &Spot| Announced {
            interface: spot.interface.clone(),
            is_there: spot.is_there,
        };
        spots
            .iter()
            .map(|(address, spot)| (*address, status(spot)))
            .collect()
    }

    /// A link lost its carrier: what its neighbours knew counts no more.
    pub async fn lost(&self, ifindex: u32) {
        for spot in self.spots.lock().await.values_mut() {
            spot.told = spot.told.filter(|told| told.0 != ifindex);
        }
    }

    /// Puts back what has left its interface, and announces what is new there.
    pub async fn follow(self: &Arc<Self>, requests: &Requests) -> Result<(), Error> {
        let mut spots = self.spots.lock().await;
        if spots.is_empty() {
            return Ok(());
        }
        let held = requests.addresses().await?;
        let mut due = BTreeMap::new();
        for (address, spot) in spots.iter_mut() {
            let link = link(requests, &spot.interface).await?;
            let is_it = |ifindex| {
                move |held: &super::host_addresses::Held| {
                    (held.ifindex, held.address) == (ifindex, *address)
                }
            };
            let is_there = link
                .as_ref()
                .is_some_and(|link| held.iter().any(is_it(link.ifindex)));
            if spot.is_there && !is_there {
                tracing::warn!("{address} has left {}", spot.interface);
            }
            spot.is_there = is_there;
            let Some(link) = link.filter(|link| link.running) else {
                spot.told = None;
                continue;
            };
            let now = (link.ifindex, link.mac);
            if !is_there {
                spot.told = None;
                put_back(requests, *address, spot, link.ifindex).await?;
            } else if spot.told != Some(now) {
                spot.told = Some(now);
                due.insert(*address, now);
                tracing::info!("announcing {address} on {}", spot.interface);
            }
        }
        drop(spots);
        if !due.is_empty() {
            tokio::spawn(Arc::clone(self).tell(due));
        }
        Ok(())
    }

    /// Announces addresses, and those that are where they were again after a
    /// while.
    async fn tell(self: Arc<Self>, due: BTreeMap<IpAddr, Told>) {
        send(&due);
        tokio::time::sleep(AGAIN).await;
        let spots = self.spots.lock().await;
        let is_so = |address: &IpAddr, told: &Told| {
            let spot = spots.get(address);
            spot.is_some_and(|spot| spot.told == Some(*told))
        };
        let again = due
            .into_iter()
            .filter(|(address, told)| is_so(address, told));
        send(&again.collect());
    }
}

impl Spot {
    fn new(place: Place, told: Option<Told>) -> Self {
        Self {
            interface: place.interface,
            ours: place.ours,
            is_there: true,
            told: told.filter(|told| told.0 == place.ifindex),
        }
    }
}

/// The link of this name, if there is one.
async fn link(requests: &Requests, name: &str) -> Result<Option<Link>, Error> {
    let Ok(ifindex) = if_nametoindex(name) else {
        return Ok(None);
    };
    match requests.link(ifindex).await {
        Ok(link) => Ok(link),
        // It has gone in this moment.
        Err(Failure::Refused(..)) => Ok(None),
        Err(Failure::Broken(error)) => Err(error),
    }
}

/// Puts an address back that is ours. The kernel tells of it, and it is
/// announced then.
async fn put_back(
    requests: &Requests,
    address: IpAddr,
    spot: &Spot,
    ifindex: u32,
) -> Result<(), Error> {
    if !spot.ours {
        return Ok(());
    }
    match requests.add_address(ifindex, address).await {
        Ok(_) => tracing::warn!("put {address} back on {}", spot.interface),
        Err(Failure::Refused(error, _)) => {
            tracing::error!(
                "{address} cannot be put back on {}: {error}",
                spot.interface
            );
        }
        Err(Failure::Broken(error)) => return Err(error),
    }
    Ok(())
}

fn send(due: &BTreeMap<IpAddr, Told>) {
    for (address, (ifindex, mac)) in due {
        let frame = advertise::frame(*address, *mac);
        if let Err(error) = packet_socket::send(*ifindex, &frame) {
            tracing::error!("{address} was not announced: {error}");
        }
    }
}
