//! From a plan to table entries: ids, endpoints and pools. Pure: what the kernel
//! holds comes in, what it shall hold goes out (law 8: whole, before any change).

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{IpAddr, SocketAddr},
    slice,
};

use bg_common::{
    abi::{Room, capacity, ticks},
    key,
    maglev::{self, Member},
    service::{Backend, Colour, CutoverWord, Listener, PoolWord, ReturnPath},
};

use super::{
    directory::Endpoints,
    error::Error,
    ids::Ids,
    naming::{InUse, Known, name_services},
};
use crate::plan::{ForwardMode, ListenerPlan, Plan, Protocol};

/// What the kernel holds, in the daemon's terms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Listeners, and return paths.
    pub endpoints: Endpoints,
    /// Backends by id.
    pub backends: BTreeMap<u32, Backend>,
    /// Words of the services that have listeners.
    pub words: BTreeMap<u32, CutoverWord>,
}

impl Tables {
    /// The id of the service that one of these listeners belongs to.
    pub fn service_of(&self, listeners: &[ListenerPlan]) -> Option<u32> {
        let mut listeners = listeners.iter();
        listeners.find_map(|listener| self.endpoints.service_at(listener))
    }
}

/// What it shall hold.
#[derive(Debug, Default)]
pub struct Layout {
    /// Entries.
    pub tables: Tables,
    /// Service ids by name.
    pub services: BTreeMap<String, u32>,
    /// Services that are new in the kernel, and their first words.
    pub new_services: BTreeMap<u32, CutoverWord>,
    /// Backends that reply to clients themselves.
    pub direct: BTreeSet<u32>,
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

/// Lays a plan out over what the kernel holds and what is known of its services:
/// what stays keeps its id.
pub fn lay_out(
    plan: &Plan,
    known: &BTreeMap<String, Known>,
    held: &Tables,
    in_use: &InUse,
    room: Room,
) -> Result<Layout, Error> {
    let mut layout = Layout::default();
    name_services(&mut layout, plan, known, held, in_use, room)?;
    let mut listener_ids = Ids::new(
        "listeners, with those that old flows hold",
        1, // 0 is nobody's: an unused line of a flow table
        u32::from(u16::MAX),
        held.endpoints
            .listeners
            .values()
            .map(|listener| listener.id)
            .chain(held.endpoints.returns.values().map(|path| path.listener))
            .chain(held.endpoints.previews.values().map(|path| path.listener))
            .chain(in_use.listeners.iter().copied())
            .map(u32::from),
    );
    let mut backend_ids = Ids::new(
        "backends, with those that old flows hold",
        0,
        room.backends(),
        held.backends.keys().copied(),
    );
    let held_backends: BTreeMap<_, u32> = held
        .backends
        .iter()
        .map(|(id, backend)| (identity(backend), *id))
        .collect();

    // A block, once given, stays with its address as long as a backend has it.
    let mut blocks: BTreeMap<IpAddr, u16> = held
        .backends
        .values()
        .filter(|backend| backend.block != 0)
        .map(|backend| (address_of(backend), backend.block))
        .collect();
    let mut block_ids = Ids::new(
        "backends with snat, with those that old flows hold",
        1, // 0 is nobody's
        capacity::BLOCKS as u32,
        blocks.values().copied().map(u32::from),
    );

    for service in &plan.services {
        let id = layout.services[&service.name];
        let addresses = service.colours.iter().flatten().map(|b| b.address);
        for address in addresses.filter(|_| service.forward == ForwardMode::Snat) {
            if let Entry::Vacant(vacant) = blocks.entry(address) {
                vacant.insert(block_ids.free()? as u16);
            }
        }
        for colour in Colour::ALL {
            for backend in service.backends(colour) {
                let entry = Backend {
                    next_hop: 0,
                    address: wide(backend.address),
                    port: backend.port.unwrap_or(0).to_be_bytes(),
                    family: if backend.address.is_ipv4() { 4 } else { 6 },
                    colour: colour as u8,
                    service: id as u16,
                    block: blocks.get(&backend.address).copied().unwrap_or(0),
                };
                let backend_id = match held_backends.get(&identity(&entry)) {
                    Some(id) => *id,
                    None => backend_ids.free()?,
                };
                layout.tables.backends.insert(backend_id, entry);
                if service.forward == ForwardMode::Dsr {
                    layout.direct.insert(backend_id);
                }
                let pool = PoolWord::index(id, colour, backend.address.is_ipv6());
                layout.pools.entry(pool).or_default().push(Member {
                    id: backend_id,
                    name: maglev::name(&wide(backend.address), entry.port),
                    weight: backend.weight,
                });
            }
        }
        let listeners = service.listeners.iter().map(|listener| (None, *listener));
        let previews = service.previews().map(|p| (Some(p.colour), p.at));
        for (only, at) in listeners.chain(previews) {
            let listener_id = match held.endpoints.listeners.get(&at) {
                Some(held) if held.service == id && held.is_preview() == only.is_some() => held.id,
                _ => listener_ids.free()? as u16,
            };
            let entry = Listener {
                service: id,
                id: listener_id,
                forward: service.forward.number(),
                only: Listener::only(only),
                idle: ticks(service.udp_idle.as_nanos() as u64),
            };
            layout.tables.endpoints.listeners.insert(at, entry);
            let colours: &[Colour] = only.as_ref().map_or(&Colour::ALL, slice::from_ref);
            for (backend, address) in service.replies(at, colours) {
                let from = ListenerPlan { address, ..at };
                let path = ReturnPath {
                    address: wide(at.address.ip()),
                    port: at.address.port().to_be_bytes(),
                    listener: listener_id,
                    service: id as u16,
                    block: blocks.get(&backend.address).copied().unwrap_or(0),
                    previewed: 0,
                };
                let endpoints = &mut layout.tables.endpoints;
                match only {
                    None => endpoints.returns.insert(from, path),
                    Some(_) => endpoints.previews.insert(from, path),
                };
            }
        }
    }
    check_room(&layout.tables.endpoints, &held.endpoints)?;
    Ok(layout)
}

/// What makes two entries of the backend table the same backend.
const fn identity(backend: &Backend) -> (u16, u8, u8, [u8; 2], [u8; 16]) {
    let Backend {
        service,
        colour,
        family,
        port,
        address,
        ..
    } = *backend;
    (service, colour, family, port, address)
}

/// Refuses what does not fit while old and new entries are there together.
fn check_room(new: &Endpoints, held: &Endpoints) -> Result<(), Error> {
    let mut together = held.clone();
    together.listeners.extend(&new.listeners);
    together.returns.extend(&new.returns);
    together.previews.extend(&new.previews);
    let wanted = together.count();
    if wanted > capacity::ENDPOINTS {
        return Err(Error::Full {
            what: "endpoints of listeners and of their backends, with those that leave",
            wanted,
            limit: capacity::ENDPOINTS,
        });
    }
    Ok(())
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

/// The protocol of a number in an endpoint.
pub const fn protocol_of(number: u8) -> Protocol {
    if number & !key::PREVIEW == key::UDP {
        Protocol::Udp
    } else {
        Protocol::Tcp
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::plan::{BackendPlan, ServicePlan};

    fn service(name: &str, listeners: &[&str], blue: &[&str], green: &[&str]) -> ServicePlan {
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
        ServicePlan {
            name: name.into(),
            listeners: listeners.iter().map(|text| tcp(text)).collect(),
            forward: ForwardMode::Nat,
            announce: false,
            udp_idle: Duration::from_secs(30),
            colours: [backends(blue), backends(green)],
            previews: [Vec::new(), Vec::new()],
        }
    }

    fn tcp(text: &str) -> ListenerPlan {
        format!("tcp://{text}").parse().unwrap()
    }

    /// A gateway that has seen some plans.
    #[derive(Default)]
    struct Gateway {
        held: Tables,
        known: BTreeMap<String, Known>,
        in_use: InUse,
    }

    impl Gateway {
        fn apply(&mut self, services: Vec<ServicePlan>) -> Layout {
            let plan = Plan {
                services,
                ..Plan::default()
            };
            let layout =
                lay_out(&plan, &self.known, &self.held, &self.in_use, Room::LEAST).unwrap();
            let mut words = self.held.words.clone();
            words.extend(&layout.new_services);
            self.held = Tables {
                words,
                ..layout.tables.clone()
            };
            for known in self.known.values_mut() {
                known.id = None;
            }
            for service in plan.services {
                let id = layout.services[&service.name];
                let known = Known {
                    id: Some(id),
                    word: self.held.words[&id],
                    listeners: service.listeners,
                };
                self.known.insert(service.name, known);
            }
            layout
        }

        fn flip(&mut self, name: &str) {
            let known = self.known.get_mut(name).unwrap();
            known.word = known.word.flipped(known.word.active().other(), false);
            self.held.words.insert(known.id.unwrap(), known.word);
        }
    }

    #[test]
    fn what_stays_keeps_its_id() {
        let mut gateway = Gateway::default();
        let blue = ["10.0.0.1", "10.0.0.2"];
        let before = gateway.apply(vec![service(
            "llm",
            &["192.0.2.1:80"],
            &blue,
            &["10.1.0.1"],
        )]);
        // The flows of a backend that left may still be there.
        gateway.held.backends = before.tables.backends.clone();
        let after = gateway.apply(vec![service(
            "llm",
            &["192.0.2.1:81", "192.0.2.1:80"],
            &["10.0.0.3", "10.0.0.2"],
            &["10.1.0.1"],
        )]);
        assert_eq!(after.services, before.services);
        assert!(after.new_services.is_empty());
        let id = |layout: &Layout, address: &str| {
            let address: IpAddr = address.parse().unwrap();
            let mut backends = layout.tables.backends.iter();
            backends
                .find(|(_, b)| address_of(b) == address)
                .map(|(id, _)| *id)
        };
        assert_eq!(id(&after, "10.0.0.2"), id(&before, "10.0.0.2"));
        assert_ne!(id(&after, "10.0.0.3"), id(&before, "10.0.0.1"));
        let listener = tcp("192.0.2.1:80");
        assert_eq!(
            after.tables.endpoints.listeners[&listener],
            before.tables.endpoints.listeners[&listener]
        );
    }

    #[test]
    fn a_service_keeps_its_word_when_all_its_listeners_change() {
        let mut gateway = Gateway::default();
        let llm = |port: &str| service("llm", &[port], &["10.0.0.1"], &["10.1.0.1"]);
        let before = gateway.apply(vec![llm("192.0.2.1:80")]);
        let after = gateway.apply(vec![llm("192.0.2.1:81")]);
        assert_eq!(after.services, before.services);
        assert!(after.new_services.is_empty());
    }

    #[test]
    fn a_new_service_takes_a_listener_but_neither_id_nor_flows() {
        let (one, two) = ("192.0.2.1:80", "192.0.2.1:81");
        let llm = |listeners: &[&str]| service("llm", listeners, &["10.0.0.1"], &["10.1.0.1"]);
        let embed = service("embed", &[two], &["10.0.0.2"], &["10.1.0.2"]);
        let mut gateway = Gateway::default();
        let before = gateway.apply(vec![llm(&[one, two])]);
        gateway.flip("llm");
        let after = gateway.apply(vec![embed, llm(&[one])]);
        assert_eq!(after.services["llm"], before.services["llm"]);
        let kept = tcp(one);
        assert_eq!(
            after.tables.endpoints.listeners[&kept],
            before.tables.endpoints.listeners[&kept]
        );
        let taken = tcp(two);
        assert_ne!(
            after.tables.endpoints.listeners[&taken].id,
            before.tables.endpoints.listeners[&taken].id
        );
        let word = after.new_services[&after.services["embed"]];
        assert_eq!(word.active(), Colour::Green, "its traffic stays on green");
    }

    #[test]
    fn a_new_name_over_the_same_listeners_is_the_same_service() {
        let named = |name| {
            vec![service(
                name,
                &["192.0.2.1:80"],
                &["10.0.0.1"],
                &["10.1.0.1"],
            )]
        };
        let mut gateway = Gateway::default();
        let before = gateway.apply(named("llm"));
        let after = gateway.apply(named("chat"));
        assert_eq!(after.services["chat"], before.services["llm"]);
        assert!(after.new_services.is_empty());
    }

    #[test]
    fn a_known_name_starts_where_it_was() {
        let llm = || {
            vec![service(
                "llm",
                &["192.0.2.1:80"],
                &["10.0.0.1"],
                &["10.1.0.1"],
            )]
        };
        let mut gateway = Gateway::default();
        gateway.apply(llm());
        gateway.flip("llm");
        // The host was rebooted: no tables, but a state file.
        gateway.held = Tables::default();
        let after = gateway.apply(llm());
        let word = after.new_services[&after.services["llm"]];
        assert_eq!((word.active(), word.generation()), (Colour::Green, 1));
    }

    #[test]
    fn ids_that_flows_hold_are_not_given_away() {
        let in_use = InUse {
            listeners: [0, 1].into(),
            services: [0].into(),
        };
        let mut gateway = Gateway {
            in_use,
            ..Gateway::default()
        };
        let layout = gateway.apply(vec![service(
            "llm",
            &["192.0.2.1:80"],
            &["10.0.0.1"],
            &["10.1.0.1"],
        )]);
        assert_eq!(layout.services["llm"], 1);
        assert_eq!(
            layout.tables.endpoints.listeners[&tcp("192.0.2.1:80")].id,
            2
        );
    }

    #[test]
    fn old_and_new_endpoints_must_fit_together() {
        let many = |net: &str, count: usize| {
            let listener = |n| (tcp(&format!("{net}:{}", n + 1)), Listener::default());
            Endpoints {
                listeners: (0..count).map(listener).collect(),
                ..Endpoints::default()
            }
        };
        let (ports, rest) = (65_535, capacity::ENDPOINTS - 65_535);
        let held = many("192.0.2.1", ports);
        assert!(check_room(&held, &held).is_ok());
        assert!(check_room(&many("[2001:db8::1]", rest), &held).is_ok());
        assert!(check_room(&many("[2001:db8::1]", rest + 1), &held).is_err());
    }

    #[test]
    fn all_backends_that_fit_are_laid_out_and_stay() {
        let addresses: Vec<String> = (0..Room::LEAST.backends())
            .map(|n| IpAddr::from((0x0a00_0000 + n).to_be_bytes()).to_string())
            .collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let (blue, green) = addresses.split_at(addresses.len() / 2);
        let mut gateway = Gateway::default();
        for _ in 0..2 {
            gateway.apply(vec![service("llm", &["192.0.2.1:80"], blue, green)]);
        }
        assert_eq!(gateway.held.backends.len(), addresses.len());
    }
}
