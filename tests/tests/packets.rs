//! The case table on the host and in the kernel, and both packet paths against
//! each other on frames that nobody thought of.

use std::collections::BTreeSet;

use bg_common::{flow::Flow, reason::Reason, service::Fragment, snat::Lease};
use bg_tests::{
    cases,
    frame::{fragments, wrong_checksum},
    kernel::{Kernel, hold_cases, in_new_namespace, tick},
    world::{Flows, Fragments, World, xdp_action},
};
use bg_userspace::datapath::Features;
use proptest::{
    collection::vec,
    prelude::{Strategy, any},
    sample::Index,
    test_runner::{Config, TestRunner},
};

const IFINDEXES: [u32; 2] = [11, 12];
/// What a fragment carries, bytes: less than an MTU of 1500 over both families.
const FRAGMENT: usize = 1400;
/// In the kernel cases are made anew after so many: a route that they call fresh is
/// fresh for a second.
const FRESH: usize = 32;

#[test]
fn the_case_table_holds_on_the_host() {
    for case in cases::all(IFINDEXES, 1_000_000) {
        let mut world = case.world.clone();
        let (verdict, out) = world.run(&case.frame);
        assert_eq!(
            (verdict.action, verdict.reason),
            (case.action, case.reason),
            "{}",
            case.name
        );
        case.check_out(&out).unwrap();
        case.check_flow(&world.flows).unwrap();
    }
}

#[test]
fn the_case_table_holds_in_the_kernel() {
    assert_cases_hold(Features::probe().unwrap());
}

#[test]
fn the_case_table_holds_in_the_kernel_loaded_as_for_an_old_one() {
    for features in loads() {
        assert_cases_hold(features);
    }
}

/// The loads that an older kernel than this one would get.
fn loads() -> Vec<Features> {
    let has = Features::probe().unwrap();
    let old = Features {
        large_frames: false,
    };
    [old].into_iter().filter(|load| *load != has).collect()
}

fn assert_cases_hold(features: Features) {
    in_new_namespace(|| {
        let mut kernel = Kernel::load_for(features).unwrap();
        let (held, wrong) = hold_cases(&mut kernel, FRESH);
        assert!(
            wrong.is_empty() && held > 0,
            "{features:?}: {held} cases hold, not these: {}",
            wrong.join("\n")
        );
    });
}

#[test]
fn both_packet_paths_agree_on_mutated_frames() {
    in_new_namespace(|| {
        let mut kernel = Kernel::load().unwrap();
        let ifindexes = kernel.ifindexes;
        let pool: Vec<(World, Vec<u8>)> = cases::all(ifindexes, tick())
            .into_iter()
            .map(|case| (case.world, case.frame))
            .collect();
        let mut runner = TestRunner::new(Config {
            cases: 6000,
            failure_persistence: None,
            ..Config::default()
        });
        let kernel = std::cell::RefCell::new(&mut kernel);
        let worlds = (any::<Index>(), any::<Index>());
        runner
            .run(&(worlds, mutations()), |((world, frame), mutations)| {
                let mut host = world.get(&pool).0.clone();
                host.move_to(tick());
                let frame = mutate(&frame.get(&pool).1, &mutations);
                let mut kernel = kernel.borrow_mut();
                kernel.set(&host).unwrap();
                let (returned, reason, kernel_out) = kernel
                    .run(&frame, ifindexes[host.ingress as usize])
                    .unwrap();
                let was_right = wrong_checksum(&frame).is_none();
                let (verdict, host_out) = host.run(&frame);
                assert_eq!(
                    (returned, reason),
                    (xdp_action(verdict.action), verdict.reason)
                );
                assert_eq!(kernel_out, host_out);
                assert_eq!(timeless(&kernel.flows()), timeless(&host.flows));
                for ((block, index), lease) in &host.leases {
                    let found = kernel.lease(*block, *index).unwrap();
                    assert_eq!(
                        Lease {
                            since: lease.since,
                            ..found
                        },
                        *lease
                    );
                }
                let v4 = kernel.fragments_v4().unwrap();
                let v6 = kernel.fragments_v6().unwrap();
                assert_eq!(planned(&v4), planned(&host.fragments_v4));
                assert_eq!(planned(&v6), planned(&host.fragments_v6));
                if was_right {
                    assert_eq!(
                        wrong_checksum(&host_out),
                        None,
                        "a checksum that was right must stay right"
                    );
                }
                Ok(())
            })
            .unwrap();
    });
}

#[test]
fn packets_in_fragments_leave_in_fragments() {
    in_new_namespace(|| {
        let mut kernel = Kernel::load().unwrap();
        for (whole, out) in cases::large(kernel.ifindexes, tick()) {
            let mut host = whole.world.clone();
            kernel.set(&whole.world).unwrap();
            let ingress = kernel.ifindexes[whole.world.ingress as usize];
            let sent = fragments(&whole.frame, FRAGMENT);
            for (number, (fragment, out)) in sent.iter().zip(fragments(&out, FRAGMENT)).enumerate()
            {
                let (verdict, host_out) = host.run(fragment);
                assert_eq!(host_out, out, "{}: on the host", whole.name);
                let reason = match number {
                    0 => whole.reason,
                    _ => of_later_ones(whole.reason),
                };
                let wanted = (whole.action, reason);
                assert_eq!((verdict.action, verdict.reason), wanted, "{}", whole.name);
                let (returned, reason, kernel_out) = kernel.run(fragment, ingress).unwrap();
                assert_eq!(kernel_out, out, "{}: in the kernel", whole.name);
                let host = (xdp_action(verdict.action), verdict.reason);
                assert_eq!((returned, reason), host, "{}", whole.name);
            }
        }
    });
}

/// The reason that is given for later fragments, by that of the first one.
fn of_later_ones(first: Reason) -> Reason {
    match first {
        Reason::Forwarded | Reason::ForwardedNew => Reason::ForwardedFragment,
        Reason::Returned => Reason::ReturnedFragment,
        Reason::NotOurs => Reason::Fragment,
        Reason::NoBackend => Reason::FragmentDropped,
        same => same,
    }
}

#[derive(Clone, Debug)]
enum Mutation {
    Set(Index, u8),
    Cut(Index),
    Extend(Vec<u8>),
    Swap(Index, Index),
    /// Anything at all behind the EtherType.
    Noise(Vec<u8>),
}

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let one = proptest::prop_oneof![
        6 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        1 => any::<Index>().prop_map(Mutation::Cut),
        1 => vec(any::<u8>(), 1..40).prop_map(Mutation::Extend),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Mutation::Swap(a, b)),
        1 => vec(any::<u8>(), 0..120).prop_map(Mutation::Noise),
    ];
    vec(one, 0..4)
}

fn mutate(frame: &[u8], mutations: &[Mutation]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for mutation in mutations {
        match mutation {
            Mutation::Set(at, byte) => *at.get_mut(&mut frame) = *byte,
            // The kernel's test run takes no frame without an Ethernet header.
            Mutation::Cut(at) => frame.truncate(14 + at.index(frame.len() - 13)),
            Mutation::Extend(bytes) => frame.extend(bytes),
            Mutation::Noise(bytes) => {
                frame.truncate(14);
                frame.extend(bytes);
            }
            Mutation::Swap(a, b) => {
                let (a, b) = (a.index(frame.len()), b.index(frame.len()));
                frame.swap(a, b);
            }
        }
    }
    frame
}

/// Flows without the times, which differ by when each path ran.
fn timeless(flows: &Flows) -> BTreeSet<String> {
    flows
        .iter()
        .map(|(key, flow)| {
            format!(
                "{key:?} {:?}",
                Flow {
                    seen: 0,
                    routed: 0,
                    ..*flow
                }
            )
        })
        .collect()
}

/// What becomes of fragments, without the times.
fn planned<A: Copy + std::fmt::Debug>(fragments: &Fragments<A>) -> BTreeSet<String> {
    fragments
        .iter()
        .map(|(key, fragment)| {
            format!(
                "{key:?} {:?}",
                Fragment {
                    seen: 0,
                    ..*fragment
                }
            )
        })
        .collect()
}
