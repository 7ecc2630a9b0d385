//! Where the packet path is attached, what it is adopted from, and what a start
//! that cannot succeed leaves behind: nothing.

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use aya::{
    EbpfLoader,
    maps::{HashMap, Map, MapData},
    programs::{Xdp, XdpMode},
};
use bg_common::{
    abi::{LAYOUT, PROGRAM, map},
    port::Port,
    reason::REASONS,
};
use bg_tests::{
    kernel::in_namespace,
    lab::{Lab, Place, default_service},
    load::until,
};
use bg_userspace::datapath::Endpoints;
use nix::sys::signal::Signal;

const DATAPATH: i32 = 11;

#[test]
fn native_is_what_is_asked_for_and_what_is_reported() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    let status = lab.ask(&["status"]).unwrap();
    for (interface, name) in status["interfaces"]
        .as_array()
        .unwrap()
        .iter()
        .zip(["clients", "blue", "green"])
    {
        assert_eq!(interface["name"], name);
        assert_eq!(interface["mode"], "native");
        assert_eq!(
            xdp(&lab, name),
            Some(("xdp".to_owned(), interface["program_id"].as_u64().unwrap()))
        );
    }
    let (_, text, _) = lab.tell(&["status"]).unwrap();
    assert!(
        text.contains("\ninterfaces  clients (native, program "),
        "{text}"
    );
}

#[test]
fn generic_only_when_configured() {
    let mut lab = Lab::new().unwrap();
    gateway(&lab, |text| {
        text.replace("max_flows", "xdp = \"generic\"\nmax_flows")
    });
    lab.start().unwrap();
    let status = lab.ask(&["status"]).unwrap();
    assert_eq!(status["interfaces"][0]["mode"], "generic");
    assert_eq!(xdp(&lab, "clients").unwrap().0, "xdpgeneric");

    // Adopted in another mode than configured: neither changed nor accepted.
    lab.end_daemon(Signal::SIGTERM).unwrap();
    let before = snapshot(&lab);
    lab.configure_default().unwrap();
    assert_eq!(
        run(&lab),
        (
            DATAPATH,
            "XDP could not be attached to clients in native mode: it is attached in generic mode; \
             `bgswitch detach` first, or set gateway.xdp"
                .to_owned()
        )
    );
    assert_eq!(snapshot(&lab), before);
}

#[test]
fn a_device_without_native_xdp_is_an_error_and_nothing_is_left_behind() {
    let lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    // The other interfaces are attached before this one.
    bridge(&lab);
    gateway(&lab, |text| {
        text.replace("\"green\"]", "\"green\", \"third\"]")
    });
    let (code, error) = run(&lab);
    assert_eq!(code, DATAPATH, "{error}");
    assert!(
        error.starts_with("XDP could not be attached to third in native mode: "),
        "{error}"
    );
    assert!(
        error.ends_with("xdp = \"generic\" runs on any driver, slower"),
        "{error}"
    );
    untouched(&lab);

    // The loopback device has no Ethernet frames.
    gateway(&lab, |text| text.replace("\"green\"]", "\"lo\"]"));
    assert_eq!(
        run(&lab),
        (
            DATAPATH,
            "interface lo has no Ethernet address: it cannot carry what bgswitch rewrites"
                .to_owned()
        )
    );
    untouched(&lab);
}

#[test]
fn a_start_that_fails_half_way_changes_nothing_on_an_adopted_gateway() {
    let mut lab = Lab::new().unwrap();
    let two = |text: String| text.replace(", \"green\"]", "]");
    gateway(&lab, two);
    lab.start().unwrap();
    lab.tell(&["flip", "llm", "--force"]).unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let before = snapshot(&lab);
    assert_eq!(before.xdp[2], None);

    // Another listener, a third interface, and a fourth that cannot be attached.
    bridge(&lab);
    let four = |text: String| {
        text.replace(":8001\"", ":8002\"")
            .replace("\"green\"]", "\"green\", \"third\"]")
    };
    gateway(&lab, four);
    let (code, error) = run(&lab);
    assert_eq!(code, DATAPATH, "{error}");
    assert_eq!(snapshot(&lab), before);

    // The old configuration still finds the old word; the new one works once
    // the interface does.
    gateway(&lab, two);
    lab.start().unwrap();
    assert_eq!(
        lab.ask(&["status"]).unwrap()["services"][0]["generation"],
        1
    );
    lab.end_daemon(Signal::SIGTERM).unwrap();
    for line in [
        "link del third",
        "link add third type veth peer name third-far",
        "link set third-far up",
        "link set third up",
    ] {
        lab.ip(Place::Gateway, line).unwrap();
    }
    gateway(&lab, four);
    lab.start().unwrap();
    let after = snapshot(&lab);
    assert_ne!(after.endpoints, before.endpoints);
    assert!(after.xdp[2].is_some());
}

#[test]
fn a_start_that_fails_beside_the_packet_path_leaves_nothing_behind() {
    let lab = Lab::new().unwrap();
    let directory = lab.directory().display().to_string();
    fs::write(lab.directory().join("file"), "").unwrap();
    for (from, to, error) in [
        (
            format!("socket = \"{directory}/sock\""),
            format!("socket = \"{directory}/file/sock\""),
            format!("listening on {directory}/file/sock: "),
        ),
        (
            format!("state_dir = \"{directory}/state\""),
            format!("state_dir = \"{directory}/file/state\""),
            format!("the journal {directory}/file/state/journal.jsonl was not written: "),
        ),
    ] {
        gateway(&lab, |text| text.replace(&from, &to));
        let (code, text) = run(&lab);
        assert_eq!(code, 1, "{text}");
        assert!(text.starts_with(&error), "{text}");
        untouched(&lab);
    }
}

#[test]
fn a_foreign_program_is_named_and_left_alone() {
    let lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    let namespace = lab.enter(Place::Gateway).unwrap();
    let foreign = in_namespace(&namespace, || {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries(map::FLOWS, 1)
            .load(bg_userspace::object::OBJECT)
            .unwrap();
        let program: &mut Xdp = ebpf.program_mut(PROGRAM).unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach("blue", XdpMode::Driver).unwrap();
        ebpf
    });
    let (_, id) = xdp(&lab, "blue").unwrap();
    assert_eq!(
        run(&lab),
        (
            DATAPATH,
            format!(
                "interface blue already has an XDP program of somebody else (id {id}, `bgswitch`): remove it \
                 first (`ip link set blue xdp off`)"
            )
        )
    );
    assert_eq!(xdp(&lab, "blue"), Some(("xdp".to_owned(), id)));
    assert_eq!((xdp(&lab, "clients"), xdp(&lab, "green")), (None, None));
    assert!(!lab.bpffs().exists());
    drop(foreign);
}

#[test]
fn a_second_daemon_is_locked_out_and_the_first_goes_on() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    let before = snapshot(&lab);
    let locked = format!(
        "a bgswitch daemon runs on {} and holds the packet path: stop it first",
        lab.bpffs().display()
    );
    assert_eq!(run(&lab), (DATAPATH, locked.clone()));

    // Detach would pull the packet path from under it.
    let (code, out, err) = lab.tell(&["detach"]).unwrap();
    assert_eq!((code, out.as_str()), (DATAPATH, ""));
    assert_eq!(err, format!("bgswitch: {locked}\n"));

    // Other pins, but the same socket: it is not stolen either.
    let pins = lab.bpffs().display().to_string();
    gateway(&lab, |text| text.replace(&pins, &format!("{pins}/second")));
    let (code, error) = run(&lab);
    assert_eq!(code, 1);
    assert!(error.starts_with("another process listens on "), "{error}");
    assert!(!Path::new(&format!("{pins}/second")).exists());

    assert_eq!(snapshot(&lab), before);
    let pid = lab.ask(&["status"]).unwrap()["daemon"]["pid"].as_u64();
    assert_eq!(pid, lab.daemon_pid().map(u64::from));
}

#[test]
fn another_layout_is_refused_with_the_way_out() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    lab.end_daemon(Signal::SIGTERM).unwrap();
    let other = lab.bpffs().join("v999");
    fs::rename(lab.bpffs().join(layout()), &other).unwrap();
    let (code, error) = run(&lab);
    assert_eq!(code, DATAPATH);
    assert_eq!(
        error,
        format!(
            "{} holds the state of another bgswitch version (this one uses layout v{LAYOUT}). Go back to that \
             version, or run `bgswitch detach`, which stops forwarding and forgets all flows",
            other.display()
        )
    );
    assert!(xdp(&lab, "clients").is_some(), "it is refused, not removed");
    detach_and_start(&mut lab);
}

#[test]
fn a_pinned_map_of_another_shape_is_refused_not_adopted() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    lab.end_daemon(Signal::SIGTERM).unwrap();
    let maps = lab.bpffs().join(layout()).join("maps");
    let words = maps.join(map::WORDS);
    fs::rename(maps.join(map::REASONS), &words).unwrap();
    let expected = format!(
        "the pinned map {} has type PerCpuArray, key 4, value 8, {REASONS} entries, flags 0x0, expected type Array, \
         key 4, value 8, 1024 entries, flags 0x400: it is not ours or from another build. `bgswitch detach` \
         removes it, stops forwarding and forgets all flows",
        words.display()
    );
    assert_eq!(run(&lab), (DATAPATH, expected.clone()));
    // A rollback without the daemon does not write into it either.
    let (code, _, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, DATAPATH);
    assert!(err.contains(&expected), "{err}");
    assert!(
        !maps.join(map::REASONS).exists(),
        "nothing was made beside it"
    );
    detach_and_start(&mut lab);
}

#[test]
fn links_outlive_the_daemon_and_detach_removes_them() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    // Somebody else's directory beside ours is none of our business.
    let foreign = lab.bpffs().join("vendor");
    fs::create_dir_all(&foreign).unwrap();
    lab.start().unwrap();
    let (_, first) = xdp(&lab, "clients").unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        lab.end_daemon(signal).unwrap();
        assert!(xdp(&lab, "clients").is_some(), "{signal}");
        lab.start().unwrap();
    }
    let (_, last) = xdp(&lab, "clients").unwrap();
    assert_ne!(
        first, last,
        "each start puts its own program behind the link"
    );
    lab.end_daemon(Signal::SIGTERM).unwrap();

    let (code, out, err) = lab.tell(&["detach", "-m", "moving"]).unwrap();
    assert_eq!((code, err.as_str()), (0, ""));
    let pins = 3 + 1 + map::ALL.len();
    assert_eq!(
        out,
        format!("detached: {pins} pins removed, nothing is forwarded any more\n")
    );
    assert!(foreign.exists() && !lab.bpffs().join(layout()).exists());
    for interface in ["clients", "blue", "green"] {
        assert_eq!(xdp(&lab, interface), None);
    }
    let history = lab.ask(&["history"]).unwrap();
    let last = history["entries"]
        .as_array()
        .unwrap()
        .last()
        .unwrap()
        .clone();
    assert_eq!(
        (&last["action"], &last["why"]),
        (&"detach".into(), &"moving".into())
    );
    assert_eq!(last["actor"], "root(0)");

    fs::remove_dir(foreign).unwrap();
    let again = lab.ask(&["detach"]).unwrap();
    assert_eq!(again["removed"], serde_json::json!([]));
    assert!(!lab.bpffs().exists());
}

#[test]
fn an_interface_that_does_not_exist_is_refused() {
    let mut lab = Lab::new().unwrap();
    gateway(&lab, |text| text.replace("\"green\"]", "\"nowhere\"]"));
    let expected = "gateway.interfaces: there is no interface nowhere here (`ip link` lists them)";
    assert_eq!(run(&lab), (DATAPATH, expected.to_owned()));
    untouched(&lab);

    // One that has gone since the start: a reload says so, and changes nothing.
    lab.configure_default().unwrap();
    lab.start().unwrap();
    lab.ip(Place::Gateway, "link set green down").unwrap();
    lab.ip(Place::Gateway, "link set green name elsewhere")
        .unwrap();
    until("the daemon has seen it", || {
        lab.status().unwrap()["interfaces"][2]["mode"] == "absent"
    });
    let before = snapshot(&lab);
    let (code, _, err) = lab.tell(&["reload"]).unwrap();
    assert_eq!(code, 2);
    assert_eq!(
        err,
        "bgswitch: gateway.interfaces: there is no interface green here (`ip link` lists them). Nothing was applied\n"
    );
    assert_eq!(snapshot(&lab), before);
}

#[test]
fn an_interface_whose_name_has_a_dot_is_attached_and_adopted() {
    let mut lab = Lab::new().unwrap();
    lab.ip(Place::Gateway, "link set green down").unwrap();
    lab.ip(Place::Gateway, "link set green name green.100")
        .unwrap();
    lab.ip(Place::Gateway, "link set green.100 up").unwrap();
    gateway(&lab, |text| text.replace("\"green\"]", "\"green.100\"]"));
    for _ in 0..2 {
        lab.start().unwrap();
        let status = lab.ask(&["status"]).unwrap();
        assert_eq!(status["interfaces"][2]["name"], "green.100");
        assert_eq!(
            xdp(&lab, "green.100").map(|(_, id)| id),
            status["interfaces"][2]["program_id"].as_u64()
        );
        lab.end_daemon(Signal::SIGTERM).unwrap();
    }
}

#[test]
fn an_interface_that_leaves_the_configuration_is_let_go() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    gateway(&lab, |text| text.replace(", \"green\"]", "]"));
    let (code, out, err) = lab.tell(&["reload"]).unwrap();
    assert_eq!((code, out.as_str()), (2, ""));
    assert_eq!(
        err,
        format!(
            "bgswitch: {}: gateway.interfaces changed, which is read at the start only: restart the daemon \
             (forwarding goes on), or take the change back. Nothing was applied\n",
            lab.config().display()
        )
    );
    assert!(xdp(&lab, "green").is_some());
    lab.end_daemon(Signal::SIGTERM).unwrap();
    lab.start().unwrap();
    assert_eq!(xdp(&lab, "green"), None);
    assert!(xdp(&lab, "blue").is_some());
}

#[test]
fn pins_belong_on_a_bpf_file_system() {
    let lab = Lab::new().unwrap();
    let pins = lab.bpffs().display().to_string();
    let elsewhere = lab.directory().join("pins");
    gateway(&lab, |text| {
        text.replace(&pins, &elsewhere.display().to_string())
    });
    assert_eq!(
        run(&lab),
        (
            DATAPATH,
            format!(
                "{} is not on a BPF file system: `mount -t bpf bpf /sys/fs/bpf`",
                elsewhere.display()
            )
        )
    );
    assert!(!elsewhere.exists());
}

/// Makes an interface whose driver has no native XDP.
fn bridge(lab: &Lab) {
    lab.ip(Place::Gateway, "link add third type bridge")
        .unwrap();
    lab.ip(Place::Gateway, "link set third up").unwrap();
}

/// What a start must leave alone when it fails.
#[derive(Debug, PartialEq)]
struct Snapshot {
    xdp: [Option<(String, u64)>; 3],
    pins: Vec<String>,
    endpoints: Endpoints,
    slots: Vec<(Port, u32)>,
}

fn snapshot(lab: &Lab) -> Snapshot {
    let data = MapData::from_pin(lab.pinned_map(map::SLOTS)).unwrap();
    let slots: HashMap<_, Port, u32> = Map::HashMap(data).try_into().unwrap();
    let mut slots: Vec<_> = slots.iter().collect::<Result<_, _>>().unwrap();
    slots.sort_unstable();
    let mut pins = Vec::new();
    list(&lab.bpffs(), &mut pins);
    Snapshot {
        xdp: ["clients", "blue", "green"].map(|interface| xdp(lab, interface)),
        pins,
        endpoints: lab.endpoints().unwrap().read(),
        slots,
    }
}

/// The directory of this version's pins.
fn layout() -> String {
    format!("v{LAYOUT}")
}

fn list(directory: &Path, into: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        into.push(entry.path().display().to_string());
        list(&entry.path(), into);
    }
    into.sort_unstable();
}

/// No program on any interface, no pin, no socket.
fn untouched(lab: &Lab) {
    for interface in ["clients", "blue", "green"] {
        assert_eq!(xdp(lab, interface), None, "{interface}");
    }
    assert!(!lab.bpffs().exists());
    assert!(!lab.directory().join("sock").exists());
}

/// Mode and id of the program on an interface of the gateway, as `ip` has them.
fn xdp(lab: &Lab, interface: &str) -> Option<(String, u64)> {
    let line = format!("ip -j -d link show dev {interface}");
    let Ok(json) = lab.run(Place::Gateway, &line) else {
        return None;
    };
    let link: serde_json::Value = serde_json::from_str(&json).unwrap();
    let xdp = &link[0]["xdp"];
    let id = xdp["prog"]["id"].as_u64()?;
    let mode = match xdp["mode"].as_u64()? {
        1 => "xdp",
        2 => "xdpgeneric",
        _ => "another",
    };
    Some((mode.to_owned(), id))
}

/// Writes the configuration of most tests, edited.
fn gateway(lab: &Lab, edit: impl FnOnce(String) -> String) {
    lab.configure(&default_service()).unwrap();
    let text = fs::read_to_string(lab.config()).unwrap();
    let edited = edit(text.clone());
    assert_ne!(edited, text);
    fs::write(lab.config(), edited).unwrap();
}

/// Runs a daemon that must end by itself: its exit code, and its last words.
fn run(lab: &Lab) -> (i32, String) {
    let log = lab.directory().join("refused.log");
    let mut child = lab
        .bgswitch(&["run"])
        .unwrap()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!(
                "the daemon runs, but must not:\n{}",
                fs::read_to_string(log).unwrap()
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let text = fs::read_to_string(log).unwrap();
    let error = text
        .lines()
        .find_map(|line| line.strip_prefix("bgswitch: "))
        .unwrap_or_else(|| panic!("no error in:\n{text}"));
    (status.code().unwrap_or(-1), error.to_owned())
}

fn detach_and_start(lab: &mut Lab) {
    let (code, out, err) = lab.tell(&["detach"]).unwrap();
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("detached: "), "{out}");
    untouched(lab);
    lab.start().unwrap();
    assert_eq!(
        lab.ask(&["status"]).unwrap()["services"][0]["generation"],
        0
    );
}
