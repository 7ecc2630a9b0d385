//! The flow table's promises, over the packet path's own algorithms on the host.

use bg_common::flow::{
    CLOSING, ESTABLISHED_IDLE, Flow, FlowKey, FlowTable, HALF_OPEN_IDLE, LINES, TableShape, bits,
    buckets_for,
};
use bg_tests::flow_table::FlowTables;

const SEED: u64 = 0x5eed_5eed_5eed_5eed;
const NOW: u32 = 1_000_000;

/// All three tables with room for so many flows each.
fn tables(flows: u32) -> FlowTables {
    FlowTables::new([TableShape::new(SEED, buckets_for(flows)); FlowTable::ALL.len()])
}

/// All three tables of one bucket.
fn small() -> FlowTables {
    FlowTables::new([TableShape::new(SEED, 1); FlowTable::ALL.len()])
}

/// Clients as they are: neighbours in address and port.
fn key(number: u32) -> FlowKey {
    let client = FlowKey::client_v4((0x0a00_0000 + number / 1000).to_be_bytes());
    let port = (1024 + number % 1000) as u16;
    FlowKey::new(client, port.to_be_bytes(), 1)
}

fn seen(seen: u32) -> Flow {
    Flow {
        seen,
        ..Flow::default()
    }
}

fn numbered(number: u32) -> Flow {
    Flow {
        backend: number,
        ..seen(NOW)
    }
}

#[test]
fn as_many_flows_as_were_asked_for_find_room_and_are_found() {
    const FLOWS: u32 = 300_000;
    let tables = tables(FLOWS);
    let established = FlowTable::Established;
    for number in 0..FLOWS {
        let room = tables.insert(established, &key(number), &numbered(number), NOW);
        assert!(room, "no room for flow {number}");
    }
    for number in 0..FLOWS {
        let found = tables.get(established, &key(number));
        assert_eq!(found.map(|flow| flow.backend), Some(number));
    }
    assert_eq!(tables.get(established, &key(FLOWS)), None);
    assert_eq!(tables.flows(established).count(), FLOWS as usize);
}

/// Law 7: what lives in a full table stays, whoever comes.
#[test]
fn a_full_table_of_established_flows_takes_nobody_and_loses_nobody() {
    let tables = small();
    let established = FlowTable::Established;
    for number in 0..LINES as u32 {
        assert!(tables.insert(established, &key(number), &numbered(number), NOW));
    }
    for number in 1000..2000 {
        assert!(!tables.insert(established, &key(number), &numbered(number), NOW));
    }
    for number in 0..LINES as u32 {
        let found = tables.get(established, &key(number));
        assert_eq!(found.map(|flow| flow.backend), Some(number));
    }
}

#[test]
fn a_flow_that_is_over_makes_room() {
    let established = FlowTable::Established;
    let closed = Flow {
        from_client: bits::FIN,
        from_backend: bits::FIN,
        ..seen(NOW)
    };
    for (over, after) in [(seen(NOW), ESTABLISHED_IDLE), (closed, CLOSING)] {
        let tables = small();
        for number in 0..LINES as u32 {
            let flow = if number == 5 { over } else { numbered(number) };
            assert!(tables.insert(established, &key(number), &flow, NOW));
        }
        for number in (0..LINES as u32).filter(|number| *number != 5) {
            let cell = tables.find(established, &key(number)).unwrap();
            cell.seen.set(NOW + after + 1);
        }
        let newcomer = key(1000);
        let flow = seen(NOW + after);
        assert!(!tables.insert(established, &newcomer, &flow, NOW + after));
        assert!(tables.insert(established, &newcomer, &flow, NOW + after + 1));
        assert_eq!(tables.get(established, &key(5)), None);
        assert_eq!(tables.flows(established).count(), LINES);
    }
}

#[test]
fn a_flow_is_there_once_however_often_it_is_remembered() {
    let tables = tables(1000);
    for table in FlowTable::ALL {
        for round in 0..3 {
            for number in 0..500 {
                assert!(tables.insert(table, &key(number), &numbered(round), NOW));
            }
        }
        assert_eq!(tables.flows(table).count(), 500);
        assert!(tables.flows(table).all(|(_, flow)| flow.backend == 2));
    }
}

#[test]
fn without_proof_the_longest_silent_goes_first() {
    let tables = small();
    let half_open = FlowTable::HalfOpen;
    for number in 0..LINES as u32 {
        let flow = seen(NOW + [7, 3, 8, 5, 2, 6, 4, 9][number as usize]);
        assert!(tables.insert(half_open, &key(number), &flow, NOW));
    }
    assert!(tables.insert(half_open, &key(1000), &seen(NOW + 10), NOW + 10));
    assert_eq!(tables.get(half_open, &key(4)), None);
    assert!(tables.insert(half_open, &key(1001), &seen(NOW + 10), NOW + 10));
    assert_eq!(tables.get(half_open, &key(1)), None);
    assert!(tables.get(half_open, &key(1000)).is_some());
}

#[test]
fn what_a_handshake_left_behind_goes_before_a_handshake() {
    let tables = small();
    let half_open = FlowTable::HalfOpen;
    for number in 0..LINES as u32 {
        let moved = Flow {
            from_client: bits::MOVED,
            ..seen(NOW + HALF_OPEN_IDLE)
        };
        let flow = if number == 3 { moved } else { seen(NOW) };
        assert!(tables.insert(half_open, &key(number), &flow, NOW));
    }
    let now = NOW + HALF_OPEN_IDLE + 1;
    let waits = |number: u32| tables.find(half_open, &key(number)).unwrap().seen.set(now);
    (0..LINES as u32)
        .filter(|number| *number != 3)
        .for_each(waits);
    assert!(tables.insert(half_open, &key(1000), &seen(now), now));
    assert_eq!(tables.get(half_open, &key(3)), None);
}

/// Law 7, where the established table is full: a handshake that just began gives way
/// before a proven flow that has been silent for long.
#[test]
fn what_is_proven_goes_after_all_that_is_not() {
    let tables = small();
    let half_open = FlowTable::HalfOpen;
    let proven = |side: u32| Flow {
        from_client: if side == 0 { bits::PROVEN } else { 0 },
        from_backend: if side == 0 { 0 } else { bits::PROVEN },
        ..seen(NOW)
    };
    for number in 0..LINES as u32 {
        let flow = if number == 6 {
            seen(NOW + 500)
        } else {
            proven(number % 2)
        };
        assert!(tables.insert(half_open, &key(number), &flow, NOW + 500));
    }
    for newcomer in 1000..1010 {
        assert!(tables.insert(half_open, &key(newcomer), &seen(NOW + 501), NOW + 501));
        for number in (0..LINES as u32).filter(|number| *number != 6) {
            assert!(tables.get(half_open, &key(number)).is_some(), "{number}");
        }
        assert!(tables.get(half_open, &key(newcomer)).is_some());
    }
    assert_eq!(tables.get(half_open, &key(6)), None);
}
