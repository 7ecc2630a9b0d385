//! Programs that know nothing of us, across a flip: curl over IPv6, iperf3 through
//! links of different sizes, and dig.

use std::{
    net::{SocketAddr, UdpSocket},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bg_tests::{
    kernel::in_namespace,
    lab::{Lab, Place, SERVERS, SERVICE, SERVICE_V6, default_service, service},
    load::until,
};
use serde_json::{Value, json};

/// Starts a client, to be waited for.
fn start(lab: &Lab, program: &str, words: &[&str]) -> Child {
    let mut command: Command = lab.command(Place::Client, program).unwrap();
    command
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// What a client said that had no trouble.
fn end(client: Child) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = client.wait_with_output().unwrap();
    let said = String::from_utf8(stdout).unwrap();
    let trouble = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{status}: {said} {trouble}");
    said
}

fn curl(lab: &Lab, path: &str) -> Child {
    let url = format!("http://[{SERVICE_V6}]:8000{path}");
    let options = [
        "-6",
        "-g",
        "-sS",
        "--fail",
        "--no-buffer",
        "--max-time",
        "60",
    ];
    start(lab, "curl", &[&options[..], &[&url]].concat())
}

/// Remembered flows of a colour.
fn flows(lab: &Lab, colour: &str) -> u64 {
    let status = lab.status().unwrap();
    status["services"][0]["colours"][colour]["flows"]
        .as_u64()
        .unwrap()
}

#[test]
fn curl_over_ipv6_hears_one_colour_to_the_end() {
    let lab = Lab::serving().unwrap();
    assert_eq!(end(curl(&lab, "/")).trim(), "blue");
    let stream = curl(&lab, "/stream/2");
    until("the stream flows", || flows(&lab, "blue") > 0);
    lab.ask(&["flip", "llm"]).unwrap();
    assert_eq!(end(curl(&lab, "/")).trim(), "green", "a new flow (law 2)");
    let heard = end(stream);
    let lines: Vec<_> = heard.lines().collect();
    assert!(lines.len() > 1, "{heard}");
    assert!(lines.iter().all(|line| *line == "blue"), "{heard}");
}

/// A gateway one of whose links is narrow; blue and green take tests of iperf3.
fn narrow(link: &str) -> Lab {
    let mut lab = Lab::new().unwrap();
    lab.ip(Place::Gateway, &format!("link set {link} mtu 1400"))
        .unwrap();
    lab.configure(&default_service()).unwrap();
    for place in [Place::Blue, Place::Green] {
        // A server takes one test at a time: one for each family.
        for port in ["8000", "8001"] {
            let mut server = lab.command(place, "iperf3").unwrap();
            server
                .args(["--server", "--port", port])
                .stdout(Stdio::null());
            lab.spawn(server).unwrap();
        }
        until("both servers listen", || {
            let listening = lab.run(place, "ss -Hltn").unwrap();
            [":8000 ", ":8001 "]
                .iter()
                .all(|port| listening.contains(port))
        });
    }
    lab.start().unwrap();
    lab
}

/// Runs both families at once, with a flip while all of their connections carry data.
fn assert_tests_end_where_they_began(link: &str, direction: &[&str]) {
    let lab = narrow(link);
    let test = |address: &str, port: &str| {
        let options = [
            "--client",
            address,
            "--port",
            port,
            "--time",
            "3",
            "--bitrate",
            "20M",
            "--json",
        ];
        start(&lab, "iperf3", &[&options, direction].concat())
    };
    let tests = [test(SERVICE, "8000"), test(SERVICE_V6, "8001")];
    // A connection for control, and one for data.
    until("both tests run", || flows(&lab, "blue") == 4);
    lab.ask(&["flip", "llm"]).unwrap();
    for test in tests {
        let report: Value = serde_json::from_str(&end(test)).unwrap();
        assert!(report.get("error").is_none(), "{report}");
        let received = report["end"]["sum_received"]["bytes"].as_u64();
        assert!(received.is_some_and(|bytes| bytes > 1_000_000), "{report}");
    }
    let status = lab.status().unwrap();
    let colours = &status["services"][0]["colours"];
    assert_eq!(colours["blue"]["new_flows"], 4, "{colours}");
    assert_eq!(colours["green"]["new_flows"], 0, "{colours}");
    let told = status["reasons"]["sent_too_big"].as_u64();
    assert!(told.is_some_and(|told| told > 0), "{status}");
}

#[test]
fn uploads_through_a_narrow_way_to_servers_end_where_they_began() {
    assert_tests_end_where_they_began("blue", &[]);
}

#[test]
fn downloads_through_a_narrow_way_to_clients_end_where_they_began() {
    assert_tests_end_where_they_began("clients", &["--reverse"]);
}

// ---- DNS ------------------------------------------------------------------

/// What servers of names and their test share.
#[derive(Default)]
struct Desk {
    /// Questions that came.
    asked: AtomicUsize,
    /// Questions for [`LATER`] may be answered.
    is_open: AtomicBool,
}

/// A name that is answered when the desk opens, and one that is answered at once.
const LATER: &str = "later.test";
const NOW: &str = "now.test";

/// The answer to a question: one TXT record, which says the colour (RFC 1035, section
/// 4). `None` where it is none.
fn answer(question: &[u8], colour: &str) -> Option<Vec<u8>> {
    // The name ends with the root's empty label; type and class come behind it.
    let name = question.get(12..)?.iter().position(|octet| *octet == 0)? + 1;
    let asked = question.get(12..12 + name + 4)?;
    let length = colour.len() as u8;
    let header = [0x84, 0, 0, 1, 0, 1, 0, 0, 0, 0]; // an authoritative answer; 1 and 1
    let record = [0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 0, 0, length + 1, length]; // no TTL
    Some([&question[..2], &header, asked, &record, colour.as_bytes()].concat())
}

/// A gateway before servers of names.
fn names() -> (Lab, Arc<Desk>) {
    let mut lab = Lab::new().unwrap();
    lab.configure(&service("udp_idle = \"10m\"", SERVERS))
        .unwrap();
    let desk = Arc::new(Desk::default());
    for (place, colour, servers) in [
        (Place::Blue, "blue", SERVERS[0]),
        (Place::Green, "green", SERVERS[1]),
    ] {
        for server in servers {
            let at = SocketAddr::new(server.parse().unwrap(), 4433);
            let namespace = lab.enter(place).unwrap();
            let socket = in_namespace(&namespace, || UdpSocket::bind(at)).unwrap();
            let desk = Arc::clone(&desk);
            std::thread::spawn(move || serve_names(&socket, colour, &desk));
        }
    }
    lab.start().unwrap();
    (lab, desk)
}

fn serve_names(socket: &UdpSocket, colour: &'static str, desk: &Arc<Desk>) {
    let mut buffer = [0; 512];
    while let Ok((length, client)) = socket.recv_from(&mut buffer) {
        let question = buffer[..length].to_vec();
        desk.asked.fetch_add(1, Ordering::Relaxed);
        let (socket, desk) = (socket.try_clone().unwrap(), Arc::clone(desk));
        let say = move || {
            let answer = answer(&question, colour).expect("a question");
            socket.send_to(&answer, client).unwrap();
        };
        if buffer[13..].starts_with(b"later") {
            std::thread::spawn(move || {
                until("the desk is open", || desk.is_open.load(Ordering::Relaxed));
                say();
            });
        } else {
            say();
        }
    }
}

/// `dig` asks once, from this port; over IPv4 and over IPv6.
fn dig(lab: &Lab, name: &str, port: u16) -> [Child; 2] {
    let addresses = [("198.51.100.10", SERVICE), ("2001:db8:c::10", SERVICE_V6)];
    addresses.map(|(client, service)| {
        let (from, to) = (format!("{client}#{port}"), format!("@{service}"));
        let words = ["-b", &from, "-p", "4433", &to, "TXT", name];
        let options = ["+short", "+tries=1", "+time=60", "+ignore"];
        start(lab, "dig", &[&words[..], &options].concat())
    })
}

/// What both were answered.
fn answers(digs: [Child; 2]) -> [String; 2] {
    digs.map(|dig| end(dig).trim().trim_matches('"').to_owned())
}

/// Law 2 for datagrams: a flow is a client's port. Each question is sent once.
#[test]
fn each_question_of_dig_is_answered_by_its_ports_colour() {
    let (lab, desk) = names();
    let (old, waiting, new) = (20_000..20_008, 21_000..21_004, 22_000..22_008);
    for port in old.clone() {
        assert_eq!(answers(dig(&lab, NOW, port)), ["blue"; 2]);
    }
    // These are answered after the flip.
    let waits: Vec<_> = waiting.map(|port| dig(&lab, LATER, port)).collect();
    let asked = 2 * (old.len() + waits.len());
    until("all have asked", || {
        desk.asked.load(Ordering::Relaxed) == asked
    });
    lab.ask(&["flip", "llm"]).unwrap();
    desk.is_open.store(true, Ordering::Relaxed);
    for digs in waits {
        assert_eq!(answers(digs), ["blue"; 2], "asked before the flip");
    }
    // Many at once, of ports that were seen and of those that were not.
    let again: Vec<_> = old.clone().map(|port| dig(&lab, NOW, port)).collect();
    let first: Vec<_> = new.clone().map(|port| dig(&lab, NOW, port)).collect();
    for (digs, colour) in again
        .into_iter()
        .map(|digs| (digs, "blue"))
        .chain(first.into_iter().map(|digs| (digs, "green")))
    {
        assert_eq!(answers(digs), [colour; 2]);
    }
    let asked = asked + 2 * (old.len() + new.len());
    assert_eq!(desk.asked.load(Ordering::Relaxed), asked, "each came once");
    let status = lab.status().unwrap();
    let colours = &status["services"][0]["colours"];
    assert_eq!(colours["blue"]["new_flows"], 24, "{colours}");
    assert_eq!(colours["green"]["new_flows"], 16, "{colours}");
    // A question and an answer each.
    assert_eq!(colours["blue"]["packets"], 80, "{colours}");
    assert_eq!(colours["green"]["packets"], 32, "{colours}");
    assert_eq!(status["reasons"]["returned"], json!(asked), "{status}");
}
