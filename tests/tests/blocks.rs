//! Blocks of the source ports that `snat` lends: each is made before the configuration
//! that needs it is applied, and a daemon may end in between.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    process::Stdio,
};

use aya::{
    EbpfLoader,
    maps::{Array, ArrayOfMaps, HashMap, Map, MapData},
};
use bg_common::{
    abi::{capacity, map},
    key::EndpointV4,
    service::{Backend, Listener, forward},
    snat::Lease,
};
use bg_tests::{
    conversation::Conversation,
    lab::{Lab, Place, SERVERS, listener, listener_v6, service},
    load::until,
};
use bg_userspace::datapath::block_of;
use nix::sys::signal::Signal;

/// A server that is not there: looking for its next hop takes two seconds.
const SILENT: &str = "10.0.2.99";

type Leases = ArrayOfMaps<MapData, Array<MapData, Lease>>;

fn leases(lab: &Lab) -> Leases {
    let leases = MapData::from_pin(lab.pinned_map(map::LEASES)).unwrap();
    Leases::try_from(Map::ArrayOfMaps(leases)).unwrap()
}

/// The blocks that there are.
fn blocks(lab: &Lab) -> BTreeSet<u16> {
    let leases = leases(lab);
    let is_there = |id: &u16| leases.get(&u32::from(*id), 0).is_ok();
    (0..capacity::BLOCKS as u16).filter(is_there).collect()
}

/// The blocks that a backend has, and those backends' addresses.
fn named(lab: &Lab) -> (BTreeSet<u16>, BTreeSet<IpAddr>) {
    let backends = MapData::from_pin(lab.pinned_map(map::BACKENDS)).unwrap();
    let backends: Array<_, Backend> = Map::Array(backends).try_into().unwrap();
    let has = |backend: &Backend| backend.family != 0 && backend.block != 0;
    let having = backends.iter().map(Result::unwrap).filter(has);
    having
        .map(|backend| {
            let [a, b, c, d, ..] = backend.address;
            let v4 = IpAddr::from([a, b, c, d]);
            let is_v4 = backend.family == 4;
            (
                backend.block,
                if is_v4 { v4 } else { backend.address.into() },
            )
        })
        .unzip()
}

/// How the listeners over IPv4 forward.
fn modes(lab: &Lab) -> BTreeSet<u16> {
    let listeners = MapData::from_pin(lab.pinned_map(map::LISTENERS_V4)).unwrap();
    let listeners: HashMap<_, EndpointV4, Listener> = Map::HashMap(listeners).try_into().unwrap();
    let listeners = listeners.iter().map(Result::unwrap);
    listeners.map(|(_, listener)| listener.forward).collect()
}

/// Opens a connection: whom the server sees.
fn peer(lab: &Lab, to: SocketAddr) -> (Conversation, SocketAddr) {
    let mut conversation = Conversation::open(&lab.enter(Place::Client).unwrap(), to).unwrap();
    let (colour, peer) = conversation.ask_for_peer().unwrap();
    assert_eq!(colour, "blue");
    (conversation, peer)
}

fn assert_forwards_by_nat(lab: &Lab) {
    for to in [listener(8000), listener_v6(8000)] {
        let (conversation, peer) = peer(lab, to);
        assert_eq!(peer, conversation.local().unwrap());
    }
}

fn assert_forwards_by_snat(lab: &Lab) {
    for (to, own) in [
        (listener(8000), "10.0.1.1"),
        (listener_v6(8000), "fd00:1::1"),
    ] {
        assert_eq!(peer(lab, to).1.ip().to_string(), own);
    }
}

/// `snat`, and one of green's servers is silent.
fn snat() -> String {
    let [blue, [one, _, v6]] = SERVERS;
    service("forward = \"snat\"", [blue, [one, SILENT, v6]])
}

/// A gateway whose daemon was killed in a reload to [`snat`]: the blocks are made, and
/// nothing uses them.
fn killed_in_between() -> (Lab, Conversation) {
    let mut lab = Lab::serving().unwrap();
    let (old, _) = peer(&lab, listener(8001));
    assert_eq!(blocks(&lab), BTreeSet::new());
    lab.configure(&snat()).unwrap();
    let mut reload = lab.bgswitch(&["reload"]).unwrap();
    let mut reload = reload
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let leases = leases(&lab);
    until("a block is made", || leases.get(&1, 0).is_ok());
    lab.end_daemon(Signal::SIGKILL).unwrap();
    assert!(!reload.wait().unwrap().success());
    assert_eq!(modes(&lab), [forward::NAT].into(), "it is not applied");
    assert!(!blocks(&lab).is_empty());
    (lab, old)
}

/// Law 3, and the next daemon goes on where that one ended.
#[test]
fn a_daemon_killed_between_blocks_and_configuration_is_followed_by_one_that_applies_it() {
    let (mut lab, mut old) = killed_in_between();
    assert_forwards_by_nat(&lab);
    assert_eq!(old.ask().unwrap(), "blue");
    lab.start().unwrap();
    assert_eq!(modes(&lab), [forward::SNAT].into());
    assert_forwards_by_snat(&lab);
    assert_eq!(old.ask_for_peer().unwrap().1, old.local().unwrap());
    // One for each address.
    let (named, addresses) = named(&lab);
    assert_eq!(blocks(&lab), named);
    assert_eq!(named.len(), addresses.len());
    assert!(
        addresses.contains(&SILENT.parse().unwrap()),
        "{addresses:?}"
    );
}

#[test]
fn a_daemon_killed_between_blocks_and_configuration_leaves_nothing_to_one_without_it() {
    let (mut lab, mut old) = killed_in_between();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    assert_forwards_by_nat(&lab);
    assert_eq!(old.ask().unwrap(), "blue");
    until(
        "the server that never came is forgotten, with its block",
        || {
            let (named, addresses) = named(&lab);
            !addresses.contains(&SILENT.parse().unwrap()) && blocks(&lab) == named
        },
    );
}

/// Killed some microseconds earlier: blocks are made, and no backend names them. Made
/// here by hand, through the pins.
#[test]
fn blocks_that_no_backend_names_are_given_back() {
    let mut lab = Lab::serving().unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let mut leases = leases(&lab);
    for id in [1, 9, capacity::BLOCKS as u32 - 1] {
        let mut loader = EbpfLoader::new();
        loader.map_max_entries(map::FLOWS, 1);
        leases.set(id, &block_of(&mut loader).unwrap(), 0).unwrap();
    }
    assert_eq!(blocks(&lab).len(), 3);
    lab.start().unwrap();
    assert_eq!(blocks(&lab), BTreeSet::new());
    assert_forwards_by_nat(&lab);
    lab.configure(&service("forward = \"snat\"", SERVERS))
        .unwrap();
    lab.ask(&["reload"]).unwrap();
    assert_forwards_by_snat(&lab);
    let (named, addresses) = named(&lab);
    assert_eq!((blocks(&lab), named.len()), (named, addresses.len()));
}
