//! Law 7: a flood cannot evict the innocent.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use bg_common::{
    abi::map,
    flow::{Flow, FlowKey, FlowTable},
    service::Colour,
};
use bg_ebpf::stream;
use bg_tests::{
    conversation::{Conversation, Datagrams},
    flow_table::FlowTables,
    flows::flow_of,
    frame::{Frame, Macs},
    generator::{self, Client, Generator},
    kernel::tick,
    lab::{Lab, Place, SERVICE, default_service, listener},
};

/// Established flows before the flood.
const FLOWS: u32 = 200_000;
/// How long the flood lasts.
const FLOOD: Duration = Duration::from_secs(30);
/// Frames of one kind before the other one's turn.
const TURN: u32 = 200_000;
/// Spoofed senders come round after so many.
const STRANGERS: u32 = 4_000_000;
/// Where the innocent begin, and the spoofed: the benchmark networks of RFC 2544.
const INNOCENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
const SPOOFED: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 0);

/// Sends frames to the gateway from a client's place.
struct Flood {
    generator: Generator,
    macs: Macs,
    cpu: usize,
}

impl Flood {
    fn new(lab: &Lab) -> Self {
        let cpus = std::thread::available_parallelism().unwrap().get();
        Self {
            generator: Generator::load().unwrap(),
            macs: Macs {
                to: lab.mac(Place::Gateway, "clients").unwrap(),
                from: lab.mac(Place::Client, "eth0").unwrap(),
            },
            cpu: cpus - 1,
        }
    }

    /// Sends `frames` frames of so many clients, `frame` says to whom and what.
    fn send(
        &mut self,
        lab: &Lab,
        frame: impl Fn(Macs, SocketAddr) -> Frame,
        (clients, first): (u32, Ipv4Addr),
        frames: u32,
    ) {
        let anyone = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let frame = frame(self.macs, anyone).numbers(1000, 0).bytes();
        let stream = generator::stream(&frame, Client::Source, clients, first.to_bits()).unwrap();
        self.generator.set(&stream).unwrap();
        let namespace = lab.enter(Place::Client).unwrap();
        self.generator
            .run(&namespace, "eth0", frames, self.cpu)
            .unwrap();
    }
}

fn syn(macs: Macs, from: SocketAddr) -> Frame {
    Frame::tcp(macs, from, listener(8000), "S").padding(10)
}

fn ack(macs: Macs, from: SocketAddr) -> Frame {
    Frame::tcp(macs, from, listener(8000), "A").padding(10)
}

fn datagram(macs: Macs, from: SocketAddr) -> Frame {
    Frame::udp(macs, from, listener(4433)).payload(&[0; 22])
}

fn tables(lab: &Lab) -> FlowTables {
    FlowTables::pinned(lab.pinned_map(map::FLOWS).parent().unwrap()).unwrap()
}

/// Keys of the innocent flows on the listener with this id.
fn innocent(listener: u16) -> impl Iterator<Item = FlowKey> {
    (0..FLOWS).map(move |number| {
        let (offset, port) = stream::client(number);
        let client = (INNOCENT.to_bits() + offset).to_be_bytes();
        FlowKey::new(FlowKey::client_v4(client), port.to_be_bytes(), listener)
    })
}

fn listener_id(lab: &Lab) -> u16 {
    let listener = format!("tcp://{SERVICE}:8000").parse().unwrap();
    lab.listener(listener).unwrap().id
}

/// Packets that went to each colour's servers.
fn packets(lab: &Lab) -> [u64; 2] {
    let status = lab.status().unwrap();
    ["blue", "green"].map(|colour| {
        let colour = &status["services"][0]["colours"][colour];
        colour["packets"].as_u64().unwrap()
    })
}

fn reason(lab: &Lab, name: &str) -> u64 {
    lab.status().unwrap()["reasons"][name].as_u64().unwrap()
}

/// Law 7: 200 000 established flows outlive half a minute of spoofed SYNs,
/// spoofed acknowledgements and datagrams at full speed, and a flip: each still
/// reaches its backend, and new flows work.
#[test]
fn a_flood_evicts_no_established_flow() {
    let lab = Lab::new()
        .unwrap()
        .served_for(FLOWS + 50_000, &default_service())
        .unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    let mut real: Vec<Conversation> = (0..8)
        .map(|_| {
            let mut conversation = Conversation::open(&namespace, listener(8000)).unwrap();
            assert_eq!(conversation.ask().unwrap(), "blue");
            conversation
        })
        .collect();

    let listener_id = listener_id(&lab);
    let like = flow_of(&lab, &real[0]).unwrap();
    let flow = Flow {
        seen: tick(),
        routed: 0,
        ..like
    };
    let tables = tables(&lab);
    for key in innocent(listener_id) {
        assert!(tables.insert(FlowTable::Established, &key, &flow, flow.seen));
    }

    let mut flood = Flood::new(&lab);
    let spoofed = (STRANGERS, SPOOFED);
    let until = Instant::now() + FLOOD;
    while Instant::now() < until {
        flood.send(&lab, syn, spoofed, TURN);
        flood.send(&lab, ack, spoofed, TURN);
        flood.send(&lab, datagram, spoofed, TURN);
    }
    assert!(reason(&lab, "forwarded_new") > u64::from(FLOWS));
    let (code, _, error) = lab.tell(&["flip", "llm"]).unwrap();
    assert_eq!(code, 0, "{error}");

    for key in innocent(listener_id) {
        let now = tables.get(FlowTable::Established, &key);
        let place = now.map(|flow| (flow.backend, flow.generation, flow.colour()));
        assert_eq!(place, Some((like.backend, 0, Colour::Blue)), "{key:?}");
    }
    let is_spoofed = |key: &FlowKey| {
        let [.., a, b, _, _] = key.address();
        [a, b] == [198, 19]
    };
    let strangers = tables
        .flows(FlowTable::Established)
        .filter(|(key, _)| is_spoofed(key))
        .count();
    assert_eq!(strangers, 0, "no spoofed sender has proven anything");

    // Every innocent flow sends once more.
    let (before, forwarded) = (packets(&lab), reason(&lab, "forwarded"));
    flood.send(&lab, ack, (FLOWS, INNOCENT), FLOWS);
    let after = packets(&lab);
    assert!(after[0] - before[0] >= u64::from(FLOWS));
    assert!(after[1] - before[1] < u64::from(FLOWS) / 100);
    assert!(reason(&lab, "forwarded") - forwarded >= u64::from(FLOWS));

    for conversation in &mut real {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    let mut new = Conversation::open(&namespace, listener(8001)).unwrap();
    assert_eq!(new.ask().unwrap(), "green");
    let datagrams = Datagrams::open(&namespace, listener(4433)).unwrap();
    assert_eq!(datagrams.ask().unwrap(), "green");
}
