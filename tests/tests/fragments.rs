//! Datagrams larger than the MTU, through the gateway and across a flip.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use bg_tests::lab::{Lab, Place, SERVERS, listener, listener_v6};
use nix::sched::{CloneFlags, setns};

const PORT: u16 = 4433;
/// Six fragments over IPv4 and IPv6 alike.
const LARGE: usize = 8000;
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `work` on a thread in a namespace, to its end.
fn there<R: Send + 'static>(
    lab: &Lab,
    place: Place,
    work: impl FnOnce() -> R + Send + 'static,
) -> R {
    let namespace = lab.enter(place).unwrap();
    let thread = std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    });
    thread.join().unwrap()
}

/// A colour's servers send back what they get, with the colour's letter in front.
fn serve(lab: &Lab, place: Place, letter: u8, addresses: [&str; 3]) {
    for address in addresses {
        let address = SocketAddr::new(address.parse().unwrap(), PORT);
        let socket = there(lab, place, move || UdpSocket::bind(address).unwrap());
        std::thread::spawn(move || {
            let mut buffer = vec![0; 2 * LARGE];
            // A client that got nothing has its own complaint.
            while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                let answer = [&[letter], &buffer[..length]].concat();
                let _ = socket.send_to(&answer, client);
            }
        });
    }
}

/// A client's socket.
fn client(lab: &Lab, to: SocketAddr) -> UdpSocket {
    let any: SocketAddr = if to.is_ipv4() {
        "0.0.0.0:0".parse().unwrap()
    } else {
        "[::]:0".parse().unwrap()
    };
    let socket = there(lab, Place::Client, move || UdpSocket::bind(any).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// Sends a large datagram; the letter of who sent it back whole.
fn exchange(socket: &UdpSocket) -> u8 {
    let request: Vec<u8> = (0..LARGE).map(|at| ((at * 31) >> 3) as u8).collect();
    assert_eq!(socket.send(&request).unwrap(), LARGE);
    let mut answer = vec![0; 2 * LARGE];
    let length = socket.recv(&mut answer).unwrap();
    assert!(
        answer[1..length] == request,
        "what came back is what was sent"
    );
    answer[0]
}

#[test]
fn large_datagrams_get_through_and_stay_on_their_colour() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    serve(&lab, Place::Blue, b'b', SERVERS[0]);
    serve(&lab, Place::Green, b'g', SERVERS[1]);
    lab.start().unwrap();
    let services = [listener(PORT), listener_v6(PORT)];
    let old = services.map(|to| client(&lab, to));
    for socket in &old {
        assert_eq!(exchange(socket), b'b');
    }
    lab.ask(&["flip", "llm"]).unwrap();
    for (socket, to) in old.iter().zip(services) {
        assert_eq!(exchange(socket), b'b', "{to}: a drained flow stays (law 2)");
        assert_eq!(
            exchange(&client(&lab, to)),
            b'g',
            "{to}: a new one does not"
        );
    }
    let reasons = &lab.status().unwrap()["reasons"];
    // Three exchanges over each family, six fragments a way, the first one apart.
    for reason in ["forwarded_fragment", "returned_fragment"] {
        assert_eq!(reasons[reason], 30, "{reason}");
    }
    assert_eq!(reasons["fragment"], 0);
}
