//! Path MTU discovery (RFC 1191, RFC 8201) for real TCP through the gateway: the
//! sender of what is too big hears of it, whoever noticed.

use bg_tests::{
    exchange::{DOWNLOAD, Exchange, PORT, UPLOAD, exchange, serve},
    lab::{Lab, Place, listener, listener_v6},
    load::until,
};

fn count(lab: &Lab, reason: &str) -> u64 {
    lab.status().unwrap()["reasons"][reason].as_u64().unwrap()
}

/// Both families get everything through, and needed to hear what `reason` counts.
fn assert_arrives(lab: &Lab, what: Exchange, reason: &str) {
    for to in [listener(PORT), listener_v6(PORT)] {
        let before = count(lab, reason);
        assert_eq!(exchange(lab, to, what).unwrap(), what.down as usize, "{to}");
        assert!(count(lab, reason) > before, "{to}: {reason}");
    }
}

#[test]
fn a_server_hears_that_the_gateways_way_to_clients_is_narrow() {
    let mut lab = Lab::new().unwrap();
    // Only the gateway's end: the client offers to take segments of full size.
    lab.ip(Place::Gateway, "link set clients mtu 1400").unwrap();
    lab.configure_default().unwrap();
    serve(&lab).unwrap();
    lab.start().unwrap();
    assert_arrives(&lab, DOWNLOAD, "sent_too_big");
}

#[test]
fn a_client_hears_that_the_gateways_way_to_servers_is_narrow() {
    let mut lab = Lab::new().unwrap();
    lab.ip(Place::Gateway, "link set blue mtu 1400").unwrap();
    lab.configure_default().unwrap();
    serve(&lab).unwrap();
    lab.start().unwrap();
    assert_arrives(&lab, UPLOAD, "sent_too_big");
}

/// An interface's size that changes while the daemon runs counts at once, without
/// a start or a reload.
#[test]
fn a_size_that_changes_is_followed() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    serve(&lab).unwrap();
    lab.start().unwrap();
    let passes = |to| {
        let before = count(&lab, "sent_too_big");
        assert_eq!(exchange(&lab, to, UPLOAD).unwrap(), UPLOAD.down as usize);
        count(&lab, "sent_too_big") == before
    };
    for to in [listener(PORT), listener_v6(PORT)] {
        assert!(passes(to), "{to}");
        lab.ip(Place::Gateway, "link set blue mtu 1400").unwrap();
        until("the client hears of it", || !passes(to));
        lab.ip(Place::Gateway, "link set blue mtu 1500").unwrap();
        until("it is wide again", || {
            // What the client heard counts for minutes.
            for family in ["-4", "-6"] {
                let line = format!("{family} route flush cache");
                lab.ip(Place::Client, &line).unwrap();
            }
            passes(to)
        });
    }
}

#[test]
fn a_server_hears_what_a_router_on_the_way_to_clients_says() {
    let mut lab = Lab::one_arm().unwrap();
    lab.ip(Place::Router, "link set clients mtu 1400").unwrap();
    lab.configure_default().unwrap();
    serve(&lab).unwrap();
    lab.start().unwrap();
    assert_arrives(&lab, DOWNLOAD, "forwarded_error");
}

#[test]
fn a_packet_without_hops_left_is_answered() {
    let lab = Lab::serving().unwrap();
    lab.sysctl(Place::Client, "net.ipv4.ip_default_ttl=1")
        .unwrap();
    lab.sysctl(Place::Client, "net.ipv6.conf.eth0.hop_limit=1")
        .unwrap();
    for to in [listener(PORT), listener_v6(PORT)] {
        let before = count(&lab, "sent_time_exceeded");
        let error = exchange(&lab, to, DOWNLOAD).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{to}");
        assert!(count(&lab, "sent_time_exceeded") > before, "{to}");
    }
}
