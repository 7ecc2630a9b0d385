//! What a packet and a flow may cost, told without a clock: look-ups, instructions
//! and memory. Each bound is what is needed now and a little room; nanoseconds are the
//! benchmark's.

use bg_common::flow::FlowTable;
use bg_tests::{
    cases,
    kernel::{Kernel, in_new_namespace},
    world::Lookup::{self, Flow, Listener, Return},
};
use bg_userspace::datapath::Features;

/// Instructions that the kernel's verifier may follow; it gives up after a million.
const VERIFIED: u32 = 330_000;
/// Bytes of translated program.
const TRANSLATED: u32 = 188_000;
/// Bytes of memory a flow.
const FLOW: u64 = 128;

/// Packets of known flows, by the name of their case, and what they may look up by a
/// hash.
const PACKETS: [(&str, &[Lookup]); 6] = [
    (
        "an established flow stays on its backend after a flip (law 2)",
        &[Listener, Flow(FlowTable::Established)],
    ),
    (
        "UDP: a flow sticks to its backend after a flip (law 2)",
        &[Listener, Flow(FlowTable::Udp)],
    ),
    (
        "a reply leaves as the listener's",
        &[Listener, Return, Flow(FlowTable::Established)],
    ),
    (
        "UDP: a reply leaves as the listener's",
        &[Listener, Return, Flow(FlowTable::Udp)],
    ),
    (
        "snat: an established flow keeps its backend and its port over a flip (law 2)",
        &[Listener, Flow(FlowTable::Established)],
    ),
    ("another port of the address", &[Listener, Return]),
];

#[test]
fn a_packet_of_a_known_flow_looks_that_flow_up_once() {
    for (name, wanted) in PACKETS {
        let mut seen = 0;
        for case in cases::all([11, 12], 1_000_000) {
            if case.name == name {
                let (_, _, lookups) = case.world.clone().run_watched(&case.frame);
                assert_eq!(lookups, wanted, "{name}");
                seen += 1;
            }
        }
        assert!(seen > 0, "no case is called {name:?}");
    }
}

#[test]
fn the_verifier_follows_no_more_than_it_must() {
    let has = Features::probe().unwrap();
    for large_frames in [false, has.large_frames] {
        let features = Features { large_frames };
        let cost = in_new_namespace(|| Kernel::load_for(features).unwrap().cost().unwrap());
        assert!(
            cost.verified.is_none_or(|count| count <= VERIFIED),
            "{features:?}: {cost:?}"
        );
        assert!(cost.translated <= TRANSLATED, "{features:?}: {cost:?}");
    }
}

#[test]
fn a_flow_takes_no_more_memory_than_it_must() {
    let flows = 100_000;
    let bytes = in_new_namespace(|| {
        Kernel::load_sized(flows)
            .unwrap()
            .memory_of_flows()
            .unwrap()
    });
    assert!(
        (1..=FLOW).contains(&(bytes / u64::from(flows))),
        "{bytes} bytes for {flows} flows"
    );
}
