//! `bgswitch doctor`: everything that would keep packets from being forwarded is made so in
//! namespaces, and found, with what mends it.

use std::{fs, os::unix::fs::PermissionsExt as _, os::unix::process::CommandExt as _};

use bg_tests::{
    conversation::ping,
    lab::{Lab, Place, SERVICE, binary, default_service, service},
};
use nix::{sys::signal::Signal, unistd::Uid};
use serde_json::Value;

/// A host that forwards, as a gateway should.
fn lab() -> Lab {
    let lab = Lab::new().unwrap();
    lab.forward(Place::Gateway).unwrap();
    lab
}

/// The report, which must agree with its exit code.
fn report(lab: &Lab) -> Vec<Value> {
    let (code, out, err) = lab.tell(&["-o", "json", "doctor"]).unwrap();
    let report: Value = serde_json::from_str(&out).unwrap();
    let findings = report["findings"].as_array().unwrap().clone();
    let any = findings.iter().any(|finding| finding["found"] == "trouble");
    assert_eq!(
        (&report["well"], code),
        (&Value::from(!any), i32::from(any))
    );
    assert_eq!(err.contains("in the way of the packet path"), any, "{err}");
    findings
}

/// What is said of one thing, and what mends it.
fn said(findings: &[Value], found: &str, about: &str) -> Vec<String> {
    let of = findings
        .iter()
        .filter(|f| f["found"] == found && f["about"] == about);
    of.map(|f| {
        let mends = f["mends"].as_str().unwrap_or("-");
        format!("{} | {mends}", f["message"].as_str().unwrap())
    })
    .collect()
}

#[track_caller]
fn assert_trouble(lab: &Lab, about: &str, message: &str, mends: &str) {
    let findings = report(lab);
    let said = said(&findings, "trouble", about);
    let is = |line: &String| line.contains(message) && line.contains(mends);
    assert!(said.iter().any(is), "{about}: {said:?} of {findings:#?}");
}

#[test]
fn a_host_that_is_well_is_well_with_and_without_a_daemon() {
    let mut lab = lab();
    lab.configure_default().unwrap();
    let findings = report(&lab);
    let troubles: Vec<&Value> = findings
        .iter()
        .filter(|f| f["found"] == "trouble")
        .collect();
    assert!(troubles.is_empty(), "{troubles:?}");
    for about in [
        "configuration",
        "kernel",
        "rights",
        "bpf",
        "bpffs",
        "state",
        "clients",
        "blue",
        "green",
        "sysctl",
        "addresses",
    ] {
        assert_eq!(
            said(&findings, "ok", about).len(),
            1,
            "{about}: {findings:#?}"
        );
    }
    let daemon = said(&findings, "note", "daemon");
    assert!(
        daemon[0].contains("is not running") && daemon[0].contains("bgswitch run"),
        "{daemon:?}"
    );
    assert!(!lab.bpffs().exists(), "it changes nothing");

    lab.start().unwrap();
    let findings = report(&lab);
    let daemon = said(&findings, "ok", "daemon");
    assert!(
        daemon[0].contains(&format!("process {}", lab.daemon_pid().unwrap())),
        "{daemon:?}"
    );
    let (code, out, err) = lab.tell(&["doctor", "--quiet"]).unwrap();
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(!out.lines().any(|line| line.starts_with("ok ")), "{out}");
    // An interface that went away under it.
    lab.ip(Place::Gateway, "link del blue").unwrap();
    assert_trouble(&lab, "blue", "there is no interface blue here", "");
    lab.end_daemon(Signal::SIGTERM).unwrap();
}

/// The usual configuration with other interfaces.
fn configure(lab: &Lab, names: &str) {
    lab.configure_default().unwrap();
    let text = fs::read_to_string(lab.config()).unwrap();
    let usual = "interfaces = [\"clients\", \"blue\", \"green\"]";
    assert!(text.contains(usual));
    let text = text.replace(usual, &format!("interfaces = {names}"));
    fs::write(lab.config(), text).unwrap();
}

#[test]
fn interfaces_without_xdp_are_found() {
    let lab = lab();
    for line in [
        "link add plain type bridge",
        "link set plain up",
        "link add switch type bridge",
        "link add many numrxqueues 1 numtxqueues 1 type veth peer name other numrxqueues 4 numtxqueues 4",
    ] {
        lab.ip(Place::Gateway, line).unwrap();
    }
    configure(
        &lab,
        "[\"clients\", \"plain\", \"many\", \"nowhere\", \"lo\"]",
    );
    assert_trouble(&lab, "plain", "no native XDP: its driver has none", "-");
    assert_trouble(
        &lab,
        "many",
        "its other end has more queues",
        "ethtool -L PEER tx 1",
    );
    assert_trouble(
        &lab,
        "many",
        "it is down, or has no carrier",
        "ip link set many up",
    );
    assert_trouble(&lab, "nowhere", "there is no interface nowhere here", "-");
    assert_trouble(&lab, "lo", "no Ethernet address", "-");

    configure(&lab, "[\"clients\", \"blue\", \"green\"]");
    lab.ip(Place::Gateway, "link set green master switch")
        .unwrap();
    assert_trouble(
        &lab,
        "green",
        "a port of switch",
        "ip link set green nomaster",
    );
    lab.ip(Place::Gateway, "link set green nomaster").unwrap();
    assert!(said(&report(&lab), "trouble", "green").is_empty());
}

#[test]
fn vlans_that_xdp_would_not_see_are_found() {
    let lab = lab();
    let vlan = "link add link blue name blue.7 type vlan id 7";
    if let Err(error) = lab.ip(Place::Gateway, vlan) {
        assert!(error.to_string().contains("Unknown device type"), "{error}");
        println!("skipped: this kernel has no VLANs (CONFIG_VLAN_8021Q)");
        return;
    }
    lab.ip(Place::Gateway, "link set blue.7 up").unwrap();
    configure(&lab, "[\"clients\", \"blue.7\"]");
    assert_trouble(&lab, "blue.7", "name the interface below", "-");
    configure(&lab, "[\"clients\", \"blue\", \"green\"]");
    // A card that takes the tags out.
    lab.run(Place::Gateway, "ethtool -K blue rxvlan on")
        .unwrap();
    let mends = "ethtool -K blue rxvlan off";
    assert_trouble(&lab, "blue", "VLAN tags are taken out", mends);
    lab.run(Place::Gateway, mends).unwrap();
    assert!(said(&report(&lab), "trouble", "blue").is_empty());
}

/// What is sent to a veth is lost when nobody at its other end takes it.
#[test]
fn a_veth_whose_other_end_takes_nothing_is_found() {
    let mut lab = lab();
    lab.configure_default().unwrap();
    lab.free_far_ends();
    lab.run(Place::Blue, "ethtool -K eth0 gro off").unwrap();
    assert_trouble(
        &lab,
        "blue",
        "neither GRO nor an XDP program",
        "ethtool -K PEER gro on",
    );
    lab.run(Place::Blue, "ethtool -K eth0 gro on").unwrap();
    assert!(said(&report(&lab), "trouble", "blue").is_empty());
}

#[test]
fn programs_of_others_and_the_other_mode_are_found() {
    let mut lab = lab();
    lab.configure_default().unwrap();
    let foreign = bg_tests::pass::attach(&lab.enter(Place::Gateway).unwrap(), "blue").unwrap();
    assert_trouble(
        &lab,
        "blue",
        "an XDP program of somebody else",
        "ip link set blue xdp off",
    );
    drop(foreign);
    assert!(said(&report(&lab), "trouble", "blue").is_empty());
    lab.start().unwrap();
    assert!(
        said(&report(&lab), "trouble", "blue").is_empty(),
        "our own is none"
    );
    // Pinned tables keep their size.
    let text = fs::read_to_string(lab.config()).unwrap();
    let larger = text.replacen("interfaces =", "max_services = 2048\ninterfaces =", 1);
    fs::write(lab.config(), larger).unwrap();
    let notes = said(&report(&lab), "note", "pins");
    assert!(
        notes.len() == 1 && notes[0].contains("room for 1024 services, not for 2048"),
        "{notes:?}"
    );
}

#[test]
fn settings_and_addresses_that_are_in_the_way_are_found() {
    let lab = Lab::switched().unwrap();
    lab.configure(&service(
        "forward = \"snat\"",
        [["10.0.1.10", "fd00:1::10"], ["10.0.2.10", "fd00:2::10"]],
    ))
    .unwrap();
    assert_trouble(
        &lab,
        "sysctl",
        "net.ipv4.conf.clients.forwarding is 0",
        "sysctl -w net.ipv4.ip_forward=1",
    );
    assert_trouble(
        &lab,
        "sysctl",
        "net.ipv6.conf.all.forwarding is 0",
        "net.ipv6.conf.all.forwarding=1",
    );
    lab.forward(Place::Gateway).unwrap();
    assert!(said(&report(&lab), "trouble", "sysctl").is_empty());
    lab.sysctl(Place::Gateway, "net.ipv4.ip_local_port_range=1024 60999")
        .unwrap();
    assert_trouble(
        &lab,
        "sysctl",
        "ip_local_port_range begins at 1024",
        "32768 60999",
    );
    lab.sysctl(Place::Gateway, "net.ipv4.conf.blue.rp_filter=1")
        .unwrap();
    let notes = said(&report(&lab), "note", "sysctl");
    assert!(
        notes[0].contains("rp_filter of blue is strict"),
        "{notes:?}"
    );
    assert!(
        notes[0].ends_with("sysctl -w net.ipv4.conf.blue.rp_filter=2"),
        "{notes:?}"
    );

    // Another host has the service's address, and the gateway has met it.
    lab.ip(Place::Router, &format!("addr add {SERVICE}/24 dev switch"))
        .unwrap();
    lab.ip(Place::Gateway, "addr add 203.0.113.1/24 dev clients")
        .unwrap();
    let gateway = lab.enter(Place::Gateway).unwrap();
    assert!(ping(&gateway, SERVICE.parse().unwrap()).unwrap());
    assert_trouble(
        &lab,
        "addresses",
        &format!("{SERVICE} is another host's on clients"),
        "ip neigh show",
    );
    // It may be gone since.
    let stale = format!("neigh change {SERVICE} dev clients nud stale");
    lab.ip(Place::Gateway, &stale).unwrap();
    let findings = report(&lab);
    assert!(said(&findings, "trouble", "addresses").is_empty());
    let notes = said(&findings, "note", "addresses");
    assert!(
        notes.len() == 1 && notes[0].contains("was another host's on clients"),
        "{notes:?}"
    );
    // What the gateway has itself is no other host's.
    lab.ip(
        Place::Gateway,
        &format!("addr add {SERVICE}/32 dev clients"),
    )
    .unwrap();
    let findings = report(&lab);
    assert_eq!(said(&findings, "ok", "addresses").len(), 1, "{findings:#?}");
}

#[test]
fn files_that_are_in_the_way_are_found() {
    let lab = lab();
    lab.configure_default().unwrap();
    let text = fs::read_to_string(lab.config()).unwrap();
    let directory = lab.directory().display().to_string();
    // No BPF file system, and no directory.
    fs::write(lab.directory().join("file"), "").unwrap();
    let bpffs = format!("bpffs = \"{}\"", lab.bpffs().display());
    let wrong = text
        .replace(&bpffs, &format!("bpffs = \"{directory}/pins\""))
        .replace(
            &format!("{directory}/state"),
            &format!("{directory}/file/state"),
        );
    fs::write(lab.config(), wrong).unwrap();
    assert_trouble(
        &lab,
        "bpffs",
        "is not on a BPF file system",
        "mount -t bpf bpf /sys/fs/bpf",
    );
    assert_trouble(&lab, "state", "file is no directory", "mv ");
    // Pins of another version.
    fs::write(lab.config(), &text).unwrap();
    fs::create_dir_all(lab.bpffs().join("v1")).unwrap();
    assert_trouble(&lab, "pins", "another bgswitch version", "bgswitch detach");
    fs::remove_dir(lab.bpffs().join("v1")).unwrap();
    // No configuration, which still says where the rest is.
    fs::write(lab.config(), text.replace("[service.llm]", "[service.llm")).unwrap();
    assert_trouble(&lab, "configuration", "bgswitch.toml:", "-");
    assert_eq!(said(&report(&lab), "ok", "bpffs").len(), 1);
}

/// What somebody without any rights is told, which must be no trouble.
fn told_to_nobody(lab: &Lab) -> Vec<Value> {
    // Where everybody may go.
    let open = lab.directory().join("bgswitch");
    fs::copy(binary().unwrap(), &open).unwrap();
    for path in [lab.directory(), &open] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = lab.command(Place::Gateway, &open).unwrap();
    command.args([
        "--config",
        lab.config().to_str().unwrap(),
        "-o",
        "json",
        "doctor",
    ]);
    let nobody = 65534;
    // SAFETY: between fork and exec only system calls are made. The namespace, which
    // needs root, is entered before.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setgroups(&[])?;
            nix::unistd::setgid(nobody.into())?;
            Ok(nix::unistd::setuid(Uid::from_raw(nobody))?)
        });
    }
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap().clone();
    assert_eq!(report["well"], true, "{findings:#?}");
    assert_eq!(output.status.code(), Some(0));
    findings
}

/// Whoever is not root hears what could not be seen, and nothing that is not so.
#[test]
fn without_rights_it_says_what_it_could_not_see() {
    let mut lab = lab();
    lab.configure(&default_service()).unwrap();
    let findings = told_to_nobody(&lab);
    let rights = said(&findings, "unseen", "rights");
    assert!(
        rights[0].contains("lacks CAP_NET_ADMIN and CAP_BPF"),
        "{rights:?}"
    );
    assert_eq!(said(&findings, "unseen", "bpf").len(), 1);
    assert_eq!(said(&findings, "ok", "blue").len(), 1, "{findings:#?}");

    // Our own program is nobody else's, and pins that cannot be seen are not none.
    lab.start().unwrap();
    let findings = told_to_nobody(&lab);
    for about in ["pins", "clients", "blue", "green"] {
        assert_eq!(
            said(&findings, "unseen", about).len(),
            1,
            "{about}: {findings:#?}"
        );
    }
}
