//! The generator of frames that the benchmark measures with.

use std::net::SocketAddr;

use bg_tests::{
    frame::{Frame, Macs, wrong_checksum},
    generator::{Client, Generator, halves, over_ports, stream},
};

const MACS: Macs = Macs {
    to: [2, 0, 0, 0, 0, 1],
    from: [2, 0, 0, 0, 0, 2],
};

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn each_frame_is_its_flows_whole_and_with_right_checksums() {
    const FIRST: u32 = 0xc612_fffe;
    let mut generator = Generator::load().unwrap();
    let server = address("203.0.113.10:8000");
    let server_v6 = address("[2001:db8::10]:8000");
    let frame = |client: Client, of: &dyn Fn(SocketAddr, SocketAddr, u32) -> Frame, n: u16| {
        let port = if n == 0 { 0 } else { 1023 + n };
        let (v4, number) = if n == 0 {
            (address("0.0.0.0:0"), 0)
        } else {
            (SocketAddr::from(([0xc6, 0x12, 0xff, 0xfe], port)), n - 1)
        };
        match client {
            Client::Source => of(v4, server, number.into()),
            Client::Destination => of(server, v4, number.into()),
        }
        .bytes()
    };
    let tcp = |from, to, number| {
        Frame::tcp(MACS, from, to, "A")
            .numbers(7, number)
            .padding(10)
    };
    let syn = |from, to, _| Frame::tcp(MACS, from, to, "S").padding(10);
    let udp = |from, to, _| Frame::udp(MACS, from, to).payload(&[0x5a; 22]);
    let kinds: [&dyn Fn(SocketAddr, SocketAddr, u32) -> Frame; 3] = [&tcp, &syn, &udp];
    for client in [Client::Source, Client::Destination] {
        for kind in kinds {
            let template = frame(client, kind, 0);
            generator
                .set(&stream(&template, client, 3, FIRST).unwrap())
                .unwrap();
            for n in 1..=3 {
                let sent = generator.frame().unwrap();
                assert_eq!(sent, frame(client, kind, n), "{client:?}, frame {n}");
                assert_eq!(wrong_checksum(&sent), None);
            }
        }
    }

    let tcp = |from, number| {
        Frame::tcp(MACS, from, server_v6, "A")
            .numbers(7, number)
            .padding(6)
    };
    let template = tcp(address("[2001:2::]:0"), 0).bytes();
    generator
        .set(&stream(&template, Client::Source, 20_000, 0).unwrap())
        .unwrap();
    let first = tcp(address("[2001:2::]:1024"), 0).bytes();
    assert_eq!(generator.frame().unwrap(), first);
    let second = tcp(address("[2001:2::]:1025"), 1).bytes();
    assert_eq!(generator.frame().unwrap(), second);
}

#[test]
fn flows_take_the_other_ends_ports_in_turn_and_halves_are_all_of_them() {
    let mut generator = Generator::load().unwrap();
    let tcp = |port, other| {
        let client = SocketAddr::from(([198, 18, 0, 0], port));
        let server = SocketAddr::from(([203, 0, 113, 10], other));
        Frame::tcp(MACS, client, server, "S").padding(10).bytes()
    };
    let template = Frame::tcp(MACS, address("0.0.0.0:0"), address("203.0.113.10:0"), "S")
        .padding(10)
        .bytes();
    let first = u32::from_be_bytes([198, 18, 0, 0]);
    let stream = stream(&template, Client::Source, 5, first).unwrap();
    let [low, high] = halves(over_ports(stream, 9000, 3));
    for (half, flows) in [(low, vec![0, 1, 0]), (high, vec![2, 3, 4, 2])] {
        generator.set(&half).unwrap();
        for flow in flows {
            let sent = generator.frame().unwrap();
            assert_eq!(sent, tcp(1024 + flow, 9000 + flow % 3));
            assert_eq!(wrong_checksum(&sent), None);
        }
    }
}
