//! Programs that know nothing of us, across a flip: curl over IPv6, and iperf3
//! through links of different sizes.

use std::process::{Child, Command, Output, Stdio};

use bg_tests::{
    lab::{Lab, Place, SERVICE, SERVICE_V6, default_service},
    load::until,
};
use serde_json::Value;

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
