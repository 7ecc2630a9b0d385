//! Cuts: a flip that resets the old colour's flows at once, and those alone
//! (law 2).

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread::sleep,
    time::{Duration, Instant},
};

use bg_tests::{
    conversation::{Conversation, Datagrams},
    frame::{Frame, Macs},
    kernel::in_namespace,
    lab::{Lab, Place, listener, listener_v6},
    load::{Load, PATIENCE, Reuse, mix},
    wire::Wire,
};
use nix::sys::socket::{setsockopt, sockopt};

fn open(lab: &Lab, to: SocketAddr, colour: &str) -> Conversation {
    let namespace = lab.enter(Place::Client).unwrap();
    let mut conversation = Conversation::open(&namespace, to).unwrap();
    assert_eq!(conversation.ask().unwrap(), colour);
    conversation
}

/// Waits until no established connection from a port is left in a place.
fn no_connection_is_left(lab: &Lab, place: Place, port: u16) {
    let begun = Instant::now();
    loop {
        let line = format!("ss -Htan state established sport = :{port}");
        let left = lab.run(place, &line).unwrap();
        if left.is_empty() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "still there: {left}");
        sleep(Duration::from_millis(50));
    }
}

/// Law 2, cut: the client's next packet on an old flow is answered with a RST
/// that its stack accepts, and the connection it makes then is green's.
#[test]
fn a_cut_answers_a_clients_next_packet_with_a_reset() {
    let lab = Lab::serving().unwrap();
    let ports = [listener(8000), listener(8001), listener_v6(8000)];
    let old = ports.map(|to| (to, open(&lab, to, "blue")));
    let flipped = lab.ask(&["flip", "llm", "--mode", "cut"]).unwrap();
    assert_eq!(
        (&flipped["mode"], &flipped["old_flows"]),
        (&"cut".into(), &3.into())
    );
    assert!(flipped["draining_until"].is_null());
    for (to, mut conversation) in old {
        let error = conversation.ask().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{to}");
        open(&lab, to, "green");
    }
    let status = lab.status().unwrap();
    assert_eq!(status["services"][0]["colours"]["blue"]["flows"], 0);
    let resets = &status["services"][0]["colours"]["blue"]["resets"];
    assert!(resets.as_u64() >= Some(3), "{resets}");
}

/// Law 2, cut: a client that only listens is reset by its server's next packet,
/// and the server by the one after it: neither side is left with a dead
/// connection.
#[test]
fn a_cut_resets_both_sides_of_a_stream() {
    let lab = Lab::serving().unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    let mut streams = [listener(8000), listener_v6(8000)].map(|to| {
        let mut conversation = Conversation::open(&namespace, to).unwrap();
        assert_eq!(conversation.listen(600).unwrap(), "blue");
        conversation
    });
    lab.ask(&["flip", "llm", "--mode", "cut"]).unwrap();
    for stream in &mut streams {
        let error = stream.to_its_end().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    no_connection_is_left(&lab, Place::Blue, 8000);
    let reasons = &lab.status().unwrap()["reasons"];
    for reason in ["reset_client", "reset_backend"] {
        assert!(reasons[reason].as_u64() >= Some(2), "{reasons}");
    }
}

/// Law 2, cut: a server whose client was reset learns of it with the next thing
/// it says, if only that it is still there.
#[test]
fn a_cut_resets_a_server_that_only_keeps_alive() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    let blue = lab.enter(Place::Blue).unwrap();
    let server = in_namespace(&blue, || TcpListener::bind("0.0.0.0:8000")).unwrap();
    let server = std::thread::spawn(move || {
        let (mut connection, _) = server.accept().unwrap();
        setsockopt(&connection, sockopt::KeepAlive, &true).unwrap();
        setsockopt(&connection, sockopt::TcpKeepIdle, &1).unwrap();
        setsockopt(&connection, sockopt::TcpKeepInterval, &1).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut byte = [0];
        connection.read_exact(&mut byte).unwrap();
        connection.write_all(&byte).unwrap();
        connection.read(&mut byte)
    });
    let client = lab.enter(Place::Client).unwrap();
    let mut client = in_namespace(&client, || TcpStream::connect(listener(8000))).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut byte = [0];
    client.write_all(b"a").unwrap();
    client.read_exact(&mut byte).unwrap();
    lab.ask(&["flip", "llm", "--mode", "cut"]).unwrap();
    let _ = client.write_all(b"b");
    let error = client.read(&mut byte).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let error = server.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// Law 2, cut: a client at work loses an old connection once; what it begins
/// after the store is green's and does not fail.
#[test]
fn a_cut_costs_an_old_flow_one_reset_and_a_new_one_nothing() {
    let lab = Lab::serving().unwrap();
    let load = Load::start(
        lab.enter(Place::Client).unwrap(),
        mix(48),
        Duration::from_millis(5),
    );
    load.advance(480);
    let flipped = lab.ask(&["flip", "llm", "--mode", "cut"]).unwrap();
    load.advance(480);
    let answers = load.finish().unwrap();
    let before = flipped["at_ns"].as_u64().unwrap();
    let after = before + flipped["store_ns"].as_u64().unwrap();
    let mut failures = 0;
    for answer in &answers {
        if answer.done_ns < before {
            assert_eq!(answer.result.as_deref(), Ok("blue"), "{answer:?}");
        } else if answer.connected_ns > after {
            assert_eq!(answer.result.as_deref(), Ok("green"), "{answer:?}");
        } else {
            failures += usize::from(answer.result.is_err());
        }
    }
    let kept = mix(48)
        .iter()
        .filter(|(_, reuse)| *reuse == Reuse::KeepAlive)
        .count();
    assert!(
        (kept..=48).contains(&failures),
        "{failures} failures, {kept} clients with a connection"
    );
    // Counted as they were before, not as they are once reset (law 10).
    let counted = flipped["old_flows"].as_u64();
    assert!(counted.is_none_or(|count| count > 0), "{flipped}");
}

/// Law 2, cut: a UDP flow of the old colour takes the new one with its next
/// datagram.
#[test]
fn a_cut_moves_a_udp_flow_with_its_next_datagram() {
    let lab = Lab::serving().unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    let flows =
        [listener(4433), listener_v6(4433)].map(|to| Datagrams::open(&namespace, to).unwrap());
    for flow in &flows {
        assert_eq!(flow.ask().unwrap(), "blue");
    }
    lab.ask(&["flip", "llm", "--mode", "cut"]).unwrap();
    for flow in &flows {
        assert_eq!(flow.ask().unwrap(), "green");
    }
}

/// Law 2: a rollback resets the flows of the bad colour; those that were on the
/// good one before, and lived through the flip, live on.
#[test]
fn a_rollback_resets_the_bad_colours_flows_only() {
    let lab = Lab::serving().unwrap();
    let ports = [listener(8000), listener_v6(8000)];
    let mut good = ports.map(|to| open(&lab, to, "blue"));
    lab.ask(&["flip", "llm"]).unwrap();
    let bad = ports.map(|to| open(&lab, to, "green"));
    let back = lab.ask(&["rollback", "llm", "-m", "errors"]).unwrap();
    assert_eq!(
        (&back["to"], &back["mode"], &back["old_flows"]),
        (&"blue".into(), &"cut".into(), &2.into())
    );
    for mut conversation in bad {
        let error = conversation.ask().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    for conversation in &mut good {
        for _ in 0..3 {
            assert_eq!(conversation.ask().unwrap(), "blue");
        }
    }
    for to in ports {
        open(&lab, to, "blue");
    }
}

/// Law 2: a RST outside of the window, which anybody may send, ends nothing:
/// the flow is not given up, and stays where it is through a flip.
#[test]
fn a_forged_reset_outside_the_window_ends_no_flow() {
    let lab = Lab::serving().unwrap();
    let wire = Wire::open(&lab.enter(Place::Client).unwrap(), "eth0").unwrap();
    let macs = Macs {
        to: lab.mac(Place::Gateway, "clients").unwrap(),
        from: lab.mac(Place::Client, "eth0").unwrap(),
    };
    let forge = |conversation: &Conversation, to: SocketAddr| {
        let client = conversation.local().unwrap();
        // Sixteen numbers spread over the whole space: at most one can be
        // inside a window of 64 KiB.
        for n in 0..16u32 {
            let frame = Frame::tcp(macs, client, to, "R").numbers(n << 28, 0);
            wire.send(&frame.bytes()).unwrap();
        }
    };
    let mut survived = 0;
    for to in [listener(8000), listener_v6(8000)] {
        for _ in 0..4 {
            let mut conversation = open(&lab, to, "blue");
            forge(&conversation, to);
            let client = conversation.local().unwrap().to_string();
            let flows = lab.ask(&["flows", "llm"]).unwrap();
            let flows = flows["flows"].as_array().unwrap();
            let flow = flows.iter().find(|flow| flow["client"] == client).unwrap();
            let held = flow["closing"] == false;
            survived += usize::from(held);
            if held {
                assert_eq!(conversation.ask().unwrap(), "blue", "{to}");
            }
        }
    }
    // A number inside the window is one in 4096 for each of them.
    assert!(survived >= 7, "{survived} of 8 flows survived");
}
