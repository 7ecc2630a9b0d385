//! Ports that `snat` lends, taken on several CPUs in the same moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use bg_common::{
    flow::{FlowKey, FlowTable},
    snat::{index, via},
};
use bg_ebpf::pipeline::Action::Redirect;
use bg_tests::{
    frame::Frame,
    kernel::{Kernel, in_new_namespace, tick},
    world::{CLIENTS, FROM_CLIENT, World, addr, at, key, xdp_action},
};

/// Flows that begin in the same moment, and look for a port at the same place: as often
/// as this, each time at another place.
const ROUNDS: usize = 600;
/// Rounds in one world.
const TURN: usize = 20;

/// Clients of one listener.
struct Clients {
    table: FlowTable,
    service: &'static str,
    /// Listener's id.
    listener: u16,
    /// A client's address, by number.
    address: fn(u8) -> String,
}

const ALL: [Clients; 4] = [
    Clients {
        table: FlowTable::HalfOpen,
        service: at::SERVICE,
        listener: 1,
        address: v4,
    },
    Clients {
        table: FlowTable::HalfOpen,
        service: at::SERVICE_V6,
        listener: 2,
        address: v6,
    },
    Clients {
        table: FlowTable::Udp,
        service: at::SERVICE_UDP,
        listener: 3,
        address: v4,
    },
    Clients {
        table: FlowTable::Udp,
        service: at::SERVICE_UDP_V6,
        listener: 4,
        address: v6,
    },
];

fn v4(number: u8) -> String {
    format!("198.51.100.{number}")
}

fn v6(number: u8) -> String {
    format!("2001:db8:c::{number:x}")
}

impl Clients {
    fn key(&self, client: SocketAddr) -> FlowKey {
        key(client, self.listener)
    }

    fn frame(&self, client: SocketAddr) -> Vec<u8> {
        let service = addr(self.service);
        match self.table {
            FlowTable::Udp => Frame::udp(FROM_CLIENT, client, service).payload(b"question"),
            _ => Frame::tcp(FROM_CLIENT, client, service, "S"),
        }
        .bytes()
    }

    /// Groups of so many clients each that look for a port at the same place.
    fn rivals(&self, many: usize) -> Vec<Vec<SocketAddr>> {
        let mut places: BTreeMap<u32, Vec<SocketAddr>> = BTreeMap::new();
        for number in 1..=many as u8 {
            let address = (self.address)(number).parse().unwrap();
            for port in 1..=u16::MAX {
                let client = SocketAddr::new(address, port);
                let first = World::candidates(&self.key(client), self.table).next();
                places.entry(first.unwrap()).or_default().push(client);
            }
        }
        let enough = places.into_values().filter(|rivals| rivals.len() >= many);
        let groups = enough.map(|rivals| rivals[..many].to_vec());
        let groups: Vec<_> = groups.take(ROUNDS).collect();
        assert_eq!(groups.len(), ROUNDS);
        groups
    }
}

/// The source port of a frame.
fn source_port(frame: &[u8]) -> u16 {
    let at = if frame[12..14] == [8, 0] { 34 } else { 54 };
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

#[test]
fn no_port_is_lent_twice_however_many_cpus_ask_for_it() {
    let cpus = std::thread::available_parallelism().unwrap().get().min(4);
    assert!(cpus > 1, "one CPU alone has no rivals");
    in_new_namespace(|| {
        let mut kernel = Kernel::load().unwrap();
        for clients in ALL {
            let rivals = clients.rivals(cpus);
            for rivals in rivals.chunks(TURN) {
                hold(&mut kernel, &clients, rivals, cpus);
            }
        }
    });
}

/// Lets rivals begin together, round by round: each is lent a port of its own, whose
/// lease and flow name each other.
fn hold(kernel: &mut Kernel, clients: &Clients, rivals: &[Vec<SocketAddr>], cpus: usize) {
    let mut world = World::new(kernel.ifindexes_of(CLIENTS)).with_snat();
    world.tick = tick();
    kernel.set(&world).unwrap();
    let frames: Vec<Vec<Vec<u8>>> = (0..cpus)
        .map(|cpu| rivals.iter().map(|of| clients.frame(of[cpu])).collect())
        .collect();
    let ingress = world.interfaces[CLIENTS as usize].ifindex;
    let ran = kernel.run_together(&frames, ingress).unwrap();
    let blue = if addr(clients.service).is_ipv4() {
        0
    } else {
        2
    };
    let block = u32::from(world.backends[blue].block);
    let flows = kernel.flows();
    let mut ports = BTreeSet::new();
    for (cpu, ran) in ran.iter().enumerate() {
        for ((action, frame), rivals) in ran.iter().zip(rivals) {
            let (client, port) = (rivals[cpu], source_port(frame));
            assert_eq!(*action, xdp_action(Redirect(0)), "{client}");
            assert!(via::is_port(port), "{client}: {port}");
            assert!(ports.insert(port), "{client}: {port} was lent already");
            let key = clients.key(client);
            let lease = kernel.lease(block, index(port).unwrap()).unwrap();
            assert_eq!(lease.key(), key, "{client}: {port} is another flow's");
            // In a table this small a later flow may have taken its line.
            let flow = flows.get(&(clients.table, key));
            assert!(
                flow.is_none_or(|flow| flow.via == port),
                "{client}: {flow:?}"
            );
        }
    }
}
