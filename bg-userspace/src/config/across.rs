//! What only shows when all services are seen together.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use bg_common::{
    abi::{Room, capacity},
    service::Colour,
    signals,
};

use super::{ConfigError, rules::Placed, text::Text};
use crate::plan::{ForwardMode, ListenerPlan, Preview, Protocol};

pub(super) fn check(
    text: &Text<'_>,
    services: &BTreeMap<String, Placed>,
    room: Room,
) -> Result<(), ConfigError> {
    let mut listeners = listeners(text, services)?;
    previews(text, services, &mut listeners)?;
    backends(text, services, &listeners)?;
    fits(text, services, room)
}

/// Metrics, at a place in the text, are not where packets go to backends.
pub(super) fn metrics(
    text: &Text<'_>,
    place: usize,
    address: Option<SocketAddr>,
    services: &BTreeMap<String, Placed>,
) -> Result<(), ConfigError> {
    for (name, placed) in services {
        for endpoint in placed.service.plan.endpoints() {
            if endpoint.protocol == Protocol::Tcp && Some(endpoint.address) == address {
                let message = format!(
                    "`{}` is a listener of service.{name}: nobody would reach the metrics there",
                    endpoint.address
                );
                return Err(text.error(place, "gateway.metrics", message));
            }
        }
    }
    Ok(())
}

/// Every listener, and the service it belongs to.
fn listeners<'a>(
    text: &Text<'_>,
    services: &'a BTreeMap<String, Placed>,
) -> Result<BTreeMap<ListenerPlan, &'a str>, ConfigError> {
    let mut listeners = BTreeMap::new();
    for (name, placed) in services {
        for (listener, place) in placed.service.plan.listeners.iter().zip(&placed.listeners) {
            if let Some(other) = listeners.insert(*listener, name.as_str()) {
                let message = format!("`{listener}` is a listener of service.{other} already");
                return Err(text.error(*place, format!("service.{name}.listen"), message));
            }
        }
    }
    Ok(listeners)
}

/// Adds the previews: each is an endpoint of its own, and a server is of one of them.
fn previews<'a>(
    text: &Text<'_>,
    services: &'a BTreeMap<String, Placed>,
    listeners: &mut BTreeMap<ListenerPlan, &'a str>,
) -> Result<(), ConfigError> {
    let mut served = BTreeMap::new();
    for (name, placed) in services {
        let plan = &placed.service.plan;
        for Preview { colour, at } in plan.previews() {
            let wrong = |message: String| {
                let key = format!("service.{name}.{}.preview", colour.as_str());
                text.error(placed.previews[colour as usize], key, message)
            };
            if let Some(other) = listeners.insert(at, name) {
                return Err(wrong(format!("`{at}` is one of service.{other} already")));
            }
            for (_, from) in plan.replies(at, &[colour]) {
                if let Some(other) = served.insert((from, at.protocol), at) {
                    return Err(wrong(format!(
                        "{from} would serve both {other} and {at}: its replies could not be told apart"
                    )));
                }
            }
        }
    }
    Ok(())
}

fn backends(
    text: &Text<'_>,
    services: &BTreeMap<String, Placed>,
    listeners: &BTreeMap<ListenerPlan, &str>,
) -> Result<(), ConfigError> {
    let mut served: BTreeMap<(SocketAddr, Protocol), ListenerPlan> = BTreeMap::new();
    for (name, placed) in services {
        for colour in Colour::ALL {
            let pool = placed.service.plan.backends(colour);
            for (backend, place) in pool.iter().zip(&placed.backends[colour as usize]) {
                let wrong = |message: String| {
                    let key = format!("service.{name}.{}.backends", colour.as_str());
                    text.error(*place, key, format!("`{backend}` {message}"))
                };
                let own = &placed.service.plan.listeners;
                for listener in own.iter().filter(|listener| backend.serves(listener)) {
                    let address = backend.endpoint(listener);
                    let same = ListenerPlan {
                        address,
                        ..*listener
                    };
                    if let Some(other) = listeners.get(&same) {
                        let message = format!(
                            "is the listener {same} of service.{other}: a packet is switched once"
                        );
                        return Err(wrong(message));
                    }
                    // Replies do not come back through here.
                    if placed.service.plan.forward == ForwardMode::Dsr {
                        continue;
                    }
                    match served.insert((address, listener.protocol), *listener) {
                        Some(other) if other != *listener => {
                            let message = format!(
                                "would serve both {other} and {listener} from {address}: its replies could not \
                                 be told apart. Give it another port or address for one of them"
                            );
                            return Err(wrong(message));
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    Ok(())
}

/// Refuses more than the tables of the packet path hold.
fn fits(
    text: &Text<'_>,
    services: &BTreeMap<String, Placed>,
    room: Room,
) -> Result<(), ConfigError> {
    let mut backends = 0;
    let mut endpoints = BTreeSet::new();
    let mut previewed = 0;
    let mut blocks = BTreeSet::new();
    let mut listened = 0;
    for (count, (name, placed)) in services.iter().enumerate() {
        let plan = &placed.service.plan;
        backends += plan.colours.iter().map(Vec::len).sum::<usize>();
        for Preview { colour, at } in plan.previews() {
            endpoints.insert(at);
            previewed += plan.replies(at, &[colour]).count();
        }
        for listener in &plan.listeners {
            endpoints.insert(*listener);
            for (backend, address) in plan.replies(*listener, &Colour::ALL) {
                if plan.forward == ForwardMode::Snat {
                    blocks.insert(backend.address);
                }
                endpoints.insert(ListenerPlan {
                    address,
                    ..*listener
                });
            }
        }
        listened += usize::from(placed.service.release.bake.signals.is_some());
        for (what, wanted, limit) in [
            (
                "services (gateway.max_services)",
                count + 1,
                room.services as usize,
            ),
            (
                "backends (16 times gateway.max_services)",
                backends,
                room.backends() as usize,
            ),
            (
                "services with a bake by signals (signals = false there)",
                listened,
                signals::SERVICES,
            ),
            // Block 0 is nobody's.
            ("backends with snat", blocks.len(), capacity::BLOCKS - 1),
            (
                "endpoints of listeners and of their backends",
                endpoints.len() + previewed,
                capacity::ENDPOINTS,
            ),
        ] {
            if wanted > limit {
                let message = format!("makes {wanted} {what}, {limit} fit");
                return Err(text.error(placed.listeners[0], format!("service.{name}"), message));
            }
        }
    }
    Ok(())
}
