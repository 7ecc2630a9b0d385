//! From a plan to table entries: ids, endpoints and pools. Pure: what the kernel
//! holds comes in, what it shall hold goes out (law 8: whole, before any change).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use bg_common::{
    abi::{MAGLEV_ROW, capacity, ticks},
    maglev::{self, Member},
    service::{Backend, Colour, Listener, PoolWord, ReturnPath},
};

use super::error::Error;
use crate::plan::{BackendPlan, ListenerPlan, Plan, Protocol};

/// What the kernel holds, in the daemon's terms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Listeners by endpoint.
    pub listeners: BTreeMap<ListenerPlan, Listener>,
    /// Return paths by backend endpoint.
    pub returns: BTreeMap<ListenerPlan, ReturnPath>,
    /// Backends by id.
    pub backends: BTreeMap<u32, Backend>,
}

/// What it shall hold.
#[derive(Debug, Default)]
pub struct Layout {
    /// Entries.
    pub tables: Tables,
    /// Service ids by name.
    pub services: BTreeMap<String, u32>,
    /// Services that are new in the kernel.
    pub new_services: BTreeSet<u32>,
    /// Members of each pool, by index of its word.
    pub pools: BTreeMap<u32, Vec<Member>>,
}

/// The address part, 16 bytes wide, IPv4 first.
pub fn wide(address: IpAddr) -> [u8; 16] {
    let mut wide = [0; 16];
    match address {
        IpAddr::V4(v4) => wide[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => wide = v6.octets(),
    }
    wide
}

/// The address of a backend.
pub fn address_of(backend: &Backend) -> IpAddr {
    let [a, b, c, d, ..] = backend.address;
    if backend.family == 4 {
        IpAddr::from([a, b, c, d])
    } else {
        IpAddr::from(backend.address)
    }
}

/// Lays a plan out over what the kernel holds: what stays keeps its id.
pub fn lay_out(plan: &Plan, held: &Tables) -> Result<Layout, Error> {
    let mut layout = Layout::default();
    let mut service_ids = Ids::new("services", capacity::SERVICES as u32);
    let mut listener_ids = Ids::new("listeners", u32::from(u16::MAX));
    service_ids
        .taken
        .extend(held.listeners.values().map(|listener| listener.service));
    service_ids
        .taken
        .extend(held.backends.values().map(|backend| backend.service));
    listener_ids.taken.extend(
        held.listeners
            .values()
            .map(|listener| u32::from(listener.id)),
    );
    listener_ids
        .taken
        .extend(held.returns.values().map(|path| u32::from(path.listener)));
    let mut backend_ids = Ids::new("backends", capacity::BACKENDS as u32);
    backend_ids.taken.extend(held.backends.keys());
    let mut adopted = BTreeSet::new();

    for service in &plan.services {
        let known = service
            .listeners
            .iter()
            .filter_map(|listener| held.listeners.get(listener))
            .map(|listener| listener.service)
            .find(|id| !adopted.contains(id));
        let id = match known {
            Some(id) => id,
            None => service_ids.free()?,
        };
        if known.is_none() {
            layout.new_services.insert(id);
        }
        adopted.insert(id);
        layout.services.insert(service.name.clone(), id);

        let mut members: BTreeMap<BackendPlan, (Colour, u32)> = BTreeMap::new();
        for colour in Colour::ALL {
            for backend in service.backends(colour) {
                let entry = Backend {
                    next_hop: 0,
                    address: wide(backend.address),
                    port: backend.port.unwrap_or(0).to_be_bytes(),
                    family: if backend.address.is_ipv4() { 4 } else { 6 },
                    colour: colour as u8,
                    service: id,
                };
                let same = held.backends.iter().find(|(_, held)| {
                    Backend {
                        next_hop: 0,
                        ..**held
                    } == entry
                });
                let (backend_id, entry) = match same {
                    Some((id, held)) => (*id, *held),
                    None => (backend_ids.free()?, entry),
                };
                layout.tables.backends.insert(backend_id, entry);
                members.insert(*backend, (colour, backend_id));
                let pool = PoolWord::index(id, colour, backend.address.is_ipv6());
                layout.pools.entry(pool).or_default().push(Member {
                    id: backend_id,
                    name: maglev::name(&wide(backend.address), entry.port),
                    weight: backend.weight,
                });
            }
        }
        for listener in &service.listeners {
            let listener_id = match held.listeners.get(listener) {
                Some(known) if known.service == id => known.id,
                _ => listener_ids.free()? as u16,
            };
            let idle = ticks(service.udp_idle.as_nanos() as u64);
            layout.tables.listeners.insert(
                *listener,
                Listener {
                    service: id,
                    id: listener_id,
                    zero: 0,
                    idle,
                },
            );
            let path = ReturnPath {
                address: wide(listener.address.ip()),
                port: listener.address.port().to_be_bytes(),
                listener: listener_id,
                service: id,
            };
            for backend in service
                .colours
                .iter()
                .flatten()
                .filter(|backend| backend.serves(listener))
            {
                let from = ListenerPlan {
                    address: backend.endpoint(listener),
                    protocol: listener.protocol,
                };
                layout.tables.returns.insert(from, path);
            }
        }
    }
    let (new, listeners, returns) = (&layout.tables, capacity::LISTENERS, capacity::RETURNS);
    for (what, wanted, limit) in [
        (
            "listeners over IPv4, with those that leave",
            together(&held.listeners, &new.listeners, true),
            listeners,
        ),
        (
            "listeners over IPv6, with those that leave",
            together(&held.listeners, &new.listeners, false),
            listeners,
        ),
        (
            "backend endpoints over IPv4, with those that leave",
            together(&held.returns, &new.returns, true),
            returns,
        ),
        (
            "backend endpoints over IPv6, with those that leave",
            together(&held.returns, &new.returns, false),
            returns,
        ),
    ] {
        if wanted > limit {
            return Err(Error::Full {
                what,
                wanted,
                limit,
            });
        }
    }
    Ok(layout)
}

/// Entries of one family while a change is under way: what comes is set before
/// what leaves is removed.
fn together<V>(
    held: &BTreeMap<ListenerPlan, V>,
    new: &BTreeMap<ListenerPlan, V>,
    v4: bool,
) -> usize {
    held.keys()
        .chain(new.keys().filter(|key| !held.contains_key(key)))
        .filter(|key| key.address.is_ipv4() == v4)
        .count()
}

/// Fills a pool's table.
pub fn pool_table(members: &[Member]) -> Vec<u32> {
    let total = members.iter().map(|member| u64::from(member.weight)).sum();
    let mut table = vec![0; maglev::size(members.len(), total) as usize];
    maglev::fill(members, &mut vec![0; members.len()], &mut table);
    table
}

/// Finds `slots` slots of the arena that no pool in `used` takes up.
pub fn allocate(used: &[PoolWord], slots: u32) -> Result<u32, Error> {
    let arena = capacity::MAGLEV_ROWS as u32 * MAGLEV_ROW;
    let rows = |slots: u32| slots.next_multiple_of(MAGLEV_ROW);
    let mut used: Vec<(u32, u32)> = used
        .iter()
        .filter(|pool| pool.slots() > 0)
        .map(|pool| (pool.base(), rows(pool.slots())))
        .collect();
    used.sort_unstable();
    let mut base = 0;
    for (start, length) in used {
        if start.saturating_sub(base) >= rows(slots) {
            return Ok(base);
        }
        base = base.max(start + length);
    }
    if base + rows(slots) > arena {
        let (wanted, limit) = ((base + slots) as usize, arena as usize);
        return Err(Error::Full {
            what: "slots of the pools' hash tables",
            wanted,
            limit,
        });
    }
    Ok(base)
}

/// The plan's name of a return path's listener.
pub fn listener_of(path: &ReturnPath, from: &ListenerPlan) -> ListenerPlan {
    let [a, b, c, d, ..] = path.address;
    let address = if from.address.is_ipv4() {
        IpAddr::from([a, b, c, d])
    } else {
        IpAddr::from(path.address)
    };
    ListenerPlan {
        address: SocketAddr::new(address, u16::from_be_bytes(path.port)),
        protocol: from.protocol,
    }
}

/// Ids of one kind: the lowest free one next.
struct Ids {
    what: &'static str,
    limit: u32,
    taken: BTreeSet<u32>,
}

impl Ids {
    const fn new(what: &'static str, limit: u32) -> Self {
        Self {
            what,
            limit,
            taken: BTreeSet::new(),
        }
    }

    fn free(&mut self) -> Result<u32, Error> {
        let id = (0..self.limit)
            .find(|id| !self.taken.contains(id))
            .ok_or(Error::Full {
                what: self.what,
                wanted: self.limit as usize + 1,
                limit: self.limit as usize,
            })?;
        self.taken.insert(id);
        Ok(id)
    }
}

/// The protocol of a number in an endpoint.
pub const fn protocol_of(number: u8) -> Protocol {
    if number == bg_common::key::UDP {
        Protocol::Udp
    } else {
        Protocol::Tcp
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::plan::ServicePlan;

    fn plan(listeners: &[&str], blue: &[&str], green: &[&str]) -> Plan {
        let backends = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| BackendPlan {
                    address: text.parse().unwrap(),
                    port: None,
                    weight: 1,
                })
                .collect()
        };
        let listeners = listeners
            .iter()
            .map(|text| ListenerPlan {
                address: text.parse().unwrap(),
                protocol: Protocol::Tcp,
            })
            .collect();
        let colours = [backends(blue), backends(green)];
        let service = ServicePlan {
            name: "llm".into(),
            listeners,
            udp_idle: Duration::from_secs(30),
            colours,
        };
        Plan {
            services: vec![service],
        }
    }

    #[test]
    fn what_stays_keeps_its_id() {
        let before = lay_out(
            &plan(&["192.0.2.1:80"], &["10.0.0.1", "10.0.0.2"], &["10.1.0.1"]),
            &Tables::default(),
        );
        let before = before.unwrap();
        let after = plan(
            &["192.0.2.1:81", "192.0.2.1:80"],
            &["10.0.0.3", "10.0.0.2"],
            &["10.1.0.1"],
        );
        let after = lay_out(&after, &before.tables).unwrap();
        assert_eq!(after.services, before.services);
        assert!(after.new_services.is_empty());
        let id = |layout: &Layout, address: &str| {
            let address: IpAddr = address.parse().unwrap();
            layout
                .tables
                .backends
                .iter()
                .find(|(_, b)| address_of(b) == address)
                .map(|(id, _)| *id)
        };
        assert_eq!(id(&after, "10.0.0.2"), id(&before, "10.0.0.2"));
        assert_ne!(
            id(&after, "10.0.0.3"),
            id(&before, "10.0.0.1"),
            "its flows may still be there"
        );
        let listener = ListenerPlan {
            address: "192.0.2.1:80".parse().unwrap(),
            protocol: Protocol::Tcp,
        };
        assert_eq!(
            after.tables.listeners[&listener],
            before.tables.listeners[&listener]
        );
    }

    #[test]
    fn the_arena_gives_gaps_back() {
        let used = [PoolWord::new(0, 251), PoolWord::new(1024, 251)];
        assert_eq!(allocate(&used, 251).unwrap(), 256);
        assert_eq!(allocate(&used, 1021).unwrap(), 1280);
        assert!(allocate(&used, capacity::MAGLEV_ROWS as u32 * MAGLEV_ROW).is_err());
    }
}
