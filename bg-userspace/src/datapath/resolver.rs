//! Next hops: from the host's routes and neighbours into the backend table, and
//! interfaces that come, go and change.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use bg_common::service::{Backend, NextHop};
use tokio::time::{Instant, sleep, timeout};

use super::{
    Error, Inner,
    announcer::Announcer,
    hops::View,
    interfaces::Interfaces,
    layout::{address_of, wide},
    netlink::{Event, Events, Failure, NeighbourKey, Requests},
    slots::Slots,
};

/// Without events, routes and neighbours are asked for anew after this.
const REFRESH: Duration = Duration::from_secs(30);
/// A storm of route changes asks for all routes at most this often.
const ROUTES: Duration = Duration::from_secs(1);
/// Events that come in this time are taken as one.
const BURST: Duration = Duration::from_millis(20);
/// Neighbours that are missing, or stale, are asked for this often.
const ASK: Duration = Duration::from_secs(1);

/// What the way to a backend is asked for by.
struct End {
    address: IpAddr,
    /// Its block of source ports, or 0.
    block: u16,
    /// It replies to clients itself, so it must be a neighbour.
    direct: bool,
}

/// Keeps every backend's next hop as the kernel has it.
#[derive(Debug)]
pub struct Resolver {
    inner: Arc<Inner>,
    interfaces: Arc<Interfaces>,
    announcer: Arc<Announcer>,
}

/// What to ask the kernel for in the next round.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// Nothing: events have told.
    Nothing,
    /// The routes.
    Routes,
    /// The links and their addresses, and the routes with them.
    Links,
    /// All there is.
    Everything,
}

impl Due {
    const fn after(event: Event) -> Self {
        match event {
            Event::Neighbour(..) => Self::Nothing,
            Event::Route => Self::Routes,
            Event::Link(..) | Event::Address => Self::Links,
            Event::Lost => Self::Everything,
        }
    }
}

impl Resolver {
    pub(super) const fn new(
        inner: Arc<Inner>,
        interfaces: Arc<Interfaces>,
        announcer: Arc<Announcer>,
    ) -> Self {
        Self {
            inner,
            interfaces,
            announcer,
        }
    }

    /// Watches links, routes and neighbours, and resolves after every change.
    /// When netlink fails, next hops stay as they are, and it begins anew.
    pub async fn run(self) {
        let mut pause = Duration::from_secs(1);
        loop {
            let begun = Instant::now();
            let Err(error) = self.watch().await;
            if begun.elapsed() > REFRESH {
                pause = Duration::from_secs(1);
            }
            tracing::error!(
                "{error}: next hops stay as they are; watching again in {}",
                humantime::format_duration(pause)
            );
            sleep(pause).await;
            pause = (pause * 2).min(REFRESH);
        }
    }

    async fn watch(&self) -> Result<Infallible, Error> {
        let mut events = Events::open()?;
        let requests = Requests::open()?;
        let mut view = View::default();
        let mut due = Due::Everything;
        let mut refreshed = Instant::now();
        let (mut routed, mut asked) = (None, None);
        loop {
            if due >= Due::Links {
                let interfaces = Arc::clone(&self.interfaces);
                let inner = Arc::clone(&self.inner);
                let followed = tokio::task::spawn_blocking(move || interfaces.follow(&inner)).await;
                followed.map_err(|e| Error::step("following the interfaces", e))??;
                view.slots = self.inner.slots()?;
                self.announcer.follow(&requests).await?;
            }
            if due == Due::Everything {
                view.neighbours = requests.neighbours().await?.into_iter().collect();
            }
            let mut next = Due::Nothing;
            if due >= Due::Routes {
                if is_due(routed, ROUTES) {
                    routed = Some(Instant::now());
                    view.routes.clear();
                } else {
                    next = Due::Routes;
                }
            }
            let backends = self.inner.ends();
            ask_for_routes(
                &requests,
                &mut view,
                backends.values().map(|end| &end.address),
            )
            .await?;
            let wanted = self.inner.settle(&mut view, &backends);
            if is_due(asked, ASK) {
                asked = Some(Instant::now());
                ask_for_neighbours(&requests, wanted).await?;
            }

            due = next;
            // A change, or time to ask again; several changes at once are one.
            let first = timeout(ASK, events.next()).await;
            let mut event = first.ok().transpose()?;
            if event.is_some() {
                sleep(BURST).await;
            }
            while let Some(next) = event {
                due = due.max(Due::after(next));
                view.event(next);
                if let Event::Link(ifindex, false) = next {
                    self.announcer.lost(ifindex).await;
                }
                event = events.at_hand();
            }
            if refreshed.elapsed() > REFRESH {
                refreshed = Instant::now();
                due = Due::Everything;
            }
        }
    }
}

impl Inner {
    /// Resolves until these backends have a next hop, at most for `limit`.
    pub(super) async fn resolve_now(
        &self,
        ids: &BTreeSet<u32>,
        limit: Duration,
    ) -> Result<(), Error> {
        if ids.is_empty() {
            return Ok(());
        }
        let requests = Requests::open()?;
        let deadline = Instant::now() + limit;
        let mut view = View::new(self.slots()?);
        let mut backends = self.ends();
        backends.retain(|id, _| ids.contains(id));
        let mut asked = None;
        loop {
            view.neighbours = requests.neighbours().await?.into_iter().collect();
            ask_for_routes(
                &requests,
                &mut view,
                backends.values().map(|end| &end.address),
            )
            .await?;
            let wanted = self.settle(&mut view, &backends);
            if is_due(asked, ASK) {
                asked = Some(Instant::now());
                ask_for_neighbours(&requests, wanted).await?;
            }
            backends
                .retain(|id, end| self.next_hop(*id) == NextHop::NONE || self.lacks_source(end));
            if backends.is_empty() || Instant::now() >= deadline {
                return Ok(());
            }
            sleep(BURST / 2).await;
        }
    }

    /// Takes the next hops away that lead through a slot.
    pub(super) fn clear_hops(&self, slot: u32) {
        for id in self.backends().into_keys() {
            if self.next_hop(id).slot().map(u32::from) == Some(slot) {
                self.set_next_hop(id, NextHop::NONE);
            }
        }
    }

    /// Stores the next hops that follow from what is known. Returns the neighbours
    /// that the kernel should be asked for.
    fn settle(&self, view: &mut View, backends: &BTreeMap<u32, End>) -> BTreeSet<NeighbourKey> {
        let mut wanted = BTreeSet::new();
        for (id, end) in backends {
            self.settle_source(view, end);
            let (address, held) = (end.address, self.next_hop(*id));
            let step = view.step(*id, address, end.direct, held);
            wanted.extend(step.ask);
            if step.hop != held {
                let resolved = step.hop != NextHop::NONE;
                tracing::info!(backend = %address, resolved, "next hop changed");
                self.set_next_hop(*id, step.hop);
            }
        }
        wanted
    }

    /// Stores the gateway's own address towards a backend, where that wants to know
    /// it. What is not known leaves it as it is (law 3).
    fn settle_source(&self, view: &View, end: &End) {
        let Some(Some(route)) = view.routes.get(&end.address) else {
            return;
        };
        let Some(source) = route.source.filter(|_| end.block != 0).map(wide) else {
            return;
        };
        if self.source(end.block) != source {
            let from = route.source.unwrap_or(end.address);
            tracing::info!(backend = %end.address, %from, "source address changed");
            self.set_source(end.block, &source);
        }
    }

    fn lacks_source(&self, end: &End) -> bool {
        end.block != 0 && self.source(end.block) == [0; 16]
    }

    fn ends(&self) -> BTreeMap<u32, End> {
        let direct = self.applied().direct.clone();
        let end = |(id, backend): (u32, Backend)| {
            let end = End {
                address: address_of(&backend),
                block: backend.block,
                direct: direct.contains(&id),
            };
            (id, end)
        };
        self.backends().into_iter().map(end).collect()
    }

    fn slots(&self) -> Result<BTreeMap<u32, u32>, Error> {
        Slots::open(&self.pins)?.by_device()
    }
}

/// Asks for the routes that the view lacks, once for each address.
async fn ask_for_routes(
    requests: &Requests,
    view: &mut View,
    addresses: impl Iterator<Item = &IpAddr>,
) -> Result<(), Error> {
    let addresses: BTreeSet<&IpAddr> = addresses.collect();
    view.routes.retain(|address, _| addresses.contains(address));
    for address in addresses {
        if view.routes.contains_key(address) {
            continue;
        }
        match requests.route(*address).await {
            Ok(route) => {
                view.routes.insert(*address, route);
            }
            Err(Failure::Refused(error, _)) => tracing::debug!("{address}: {error}"),
            Err(Failure::Broken(error)) => return Err(error),
        }
    }
    Ok(())
}

fn is_due(last: Option<Instant>, every: Duration) -> bool {
    last.is_none_or(|last| last.elapsed() >= every)
}

/// Makes the kernel find or confirm neighbours; the neighbour table tells what
/// came of it.
async fn ask_for_neighbours(
    requests: &Requests,
    wanted: BTreeSet<NeighbourKey>,
) -> Result<(), Error> {
    for key in wanted {
        match requests.use_neighbour(key).await {
            Ok(()) => {}
            Err(Failure::Refused(error, _)) => tracing::debug!("{}: {error}", key.1),
            Err(Failure::Broken(error)) => return Err(error),
        }
    }
    Ok(())
}
