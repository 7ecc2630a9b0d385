//! What is known of routes and neighbours, and the next hops that follow from
//! it. Pure: what the kernel said comes in, steps go out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use bg_common::service::NextHop;

use super::netlink::{Event, Neighbour, NeighbourKey, Route};

/// The routes and neighbours in use, as the kernel has told.
#[derive(Debug, Default)]
pub struct View {
    /// Routes by backend address; `None` = the kernel says that there is none. An
    /// address that is not here could not be asked for.
    pub routes: BTreeMap<IpAddr, Option<Route>>,
    /// Neighbours.
    pub neighbours: BTreeMap<NeighbourKey, Neighbour>,
    /// Slots by the device that routes name.
    pub slots: BTreeMap<u32, u32>,
    /// The neighbour that each backend's next hop was taken from.
    taken: BTreeMap<u32, NeighbourKey>,
    /// Backends that should be neighbours, and are none: they were complained about.
    far: BTreeSet<u32>,
}

/// What to do about a next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it shall be.
    pub hop: NextHop,
    /// The neighbour that the kernel should be made to find, or to confirm: it
    /// sees nothing of the packets that pass it by.
    pub ask: Option<NeighbourKey>,
}

impl View {
    /// Nothing is known yet but the slots.
    pub fn new(slots: BTreeMap<u32, u32>) -> Self {
        Self {
            slots,
            ..Self::default()
        }
    }

    /// Takes a neighbour's event in.
    pub fn event(&mut self, event: Event) {
        match event {
            Event::Neighbour(key, Some(neighbour)) => {
                self.neighbours.insert(key, neighbour);
            }
            Event::Neighbour(key, None) => {
                self.neighbours.remove(&key);
            }
            Event::Link(..) | Event::Address | Event::Route | Event::Lost => {}
        }
    }

    /// The next hop of a backend that has `held` now. It is taken away only by a
    /// definite answer: there is no route through our interfaces, or the
    /// neighbour does not answer. What is not known leaves it as it is (law 3).
    /// One that is to be reached `direct`ly is not behind a router: that would send
    /// its packets, which still have the listener's address, back to us.
    pub fn step(&mut self, backend: u32, address: IpAddr, direct: bool, held: NextHop) -> Step {
        let done = |hop| Step { hop, ask: None };
        let route = match self.routes.get(&address) {
            None => return done(held),
            Some(None) => return done(NextHop::NONE),
            Some(Some(route)) if direct && route.via != address => {
                if self.far.insert(backend) {
                    tracing::error!(
                        "{address} is behind the router {}: with forward = \"dsr\" a backend must be on \
                         a network of the gateway's; it gets no packets",
                        route.via
                    );
                }
                return done(NextHop::NONE);
            }
            Some(Some(route)) => route,
        };
        let Some(slot) = self.slots.get(&route.ifindex) else {
            return done(NextHop::NONE);
        };
        let key = (route.ifindex, route.via);
        match self.neighbours.get(&key) {
            Some(Neighbour::Usable(mac, fresh)) => {
                self.taken.insert(backend, key);
                Step {
                    hop: NextHop::new(*mac, *slot as u16),
                    ask: (!fresh).then_some(key),
                }
            }
            Some(Neighbour::Failed) => Step {
                hop: NextHop::NONE,
                ask: Some(key),
            },
            Some(Neighbour::Asked) | None => {
                // The entry is young, or was collected: the neighbour is the one
                // it was, unless the route leads to another one now.
                let same = held.slot().map(u32::from) == Some(*slot)
                    && self.taken.get(&backend).is_none_or(|taken| *taken == key);
                Step {
                    hop: if same { held } else { NextHop::NONE },
                    ask: Some(key),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const HELD: NextHop = NextHop::new(MAC, 3);

    fn address() -> IpAddr {
        "10.0.1.10".parse().unwrap()
    }

    fn key(via: &str) -> NeighbourKey {
        (7, via.parse().unwrap())
    }

    fn route(ifindex: u32, via: IpAddr) -> Route {
        Route {
            ifindex,
            via,
            source: None,
        }
    }

    /// The backend's route leads by interface 7, slot 3, to a router.
    fn view(neighbour: Option<Neighbour>) -> View {
        let (ifindex, via) = key("10.0.0.1");
        View {
            routes: [(address(), Some(route(ifindex, via)))].into(),
            neighbours: neighbour
                .map(|is| (key("10.0.0.1"), is))
                .into_iter()
                .collect(),
            slots: [(7, 3)].into(),
            ..View::default()
        }
    }

    fn hop(view: &mut View, held: NextHop) -> NextHop {
        view.step(1, address(), false, held).hop
    }

    #[test]
    fn a_usable_neighbour_is_taken() {
        let mut view = view(Some(Neighbour::Usable(MAC, false)));
        let step = view.step(1, address(), false, NextHop::NONE);
        assert_eq!((step.hop, step.ask), (HELD, Some(key("10.0.0.1"))));
    }

    #[test]
    fn what_is_not_known_changes_nothing() {
        let mut no_answer = view(Some(Neighbour::Usable(MAC, true)));
        no_answer.routes.clear();
        assert_eq!(hop(&mut no_answer, HELD), HELD);
        for missing in [None, Some(Neighbour::Asked)] {
            let step = view(missing).step(1, address(), false, HELD);
            assert_eq!((step.hop, step.ask), (HELD, Some(key("10.0.0.1"))));
            assert_eq!(hop(&mut view(missing), NextHop::NONE), NextHop::NONE);
        }
    }

    #[test]
    fn a_definite_answer_takes_the_hop_away() {
        assert_eq!(hop(&mut view(Some(Neighbour::Failed)), HELD), NextHop::NONE);
        let mut no_route = view(Some(Neighbour::Usable(MAC, true)));
        no_route.routes.insert(address(), None);
        assert_eq!(hop(&mut no_route, HELD), NextHop::NONE);
        let mut elsewhere = view(Some(Neighbour::Usable(MAC, true)));
        elsewhere.slots.clear();
        assert_eq!(hop(&mut elsewhere, HELD), NextHop::NONE);
    }

    #[test]
    fn a_new_route_does_not_keep_the_old_neighbour() {
        let mut view = view(Some(Neighbour::Usable(MAC, true)));
        assert_eq!(hop(&mut view, NextHop::NONE), HELD);
        let (ifindex, via) = key("10.0.0.2");
        view.routes.insert(address(), Some(route(ifindex, via)));
        assert_eq!(hop(&mut view, HELD), NextHop::NONE);
    }

    #[test]
    fn a_direct_backend_is_a_neighbour_or_gets_nothing() {
        let mut view = view(Some(Neighbour::Usable(MAC, true)));
        assert_eq!(view.step(1, address(), true, HELD).hop, NextHop::NONE);
        view.routes.insert(address(), Some(route(7, address())));
        view.neighbours
            .insert((7, address()), Neighbour::Usable(MAC, true));
        assert_eq!(view.step(1, address(), true, NextHop::NONE).hop, HELD);
    }

    #[test]
    fn events_count_at_once() {
        let mut view = view(None);
        let other = [2, 0, 0, 0, 0, 9];
        view.event(Event::Neighbour(
            key("10.0.0.1"),
            Some(Neighbour::Usable(other, true)),
        ));
        assert_eq!(hop(&mut view, HELD), NextHop::new(other, 3));
        view.event(Event::Neighbour(key("10.0.0.1"), None));
        assert_eq!(
            hop(&mut view, NextHop::new(other, 3)),
            NextHop::new(other, 3)
        );
    }
}
