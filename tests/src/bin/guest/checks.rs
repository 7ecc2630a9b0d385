//! The checks. Each returns what it found, in a line.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{EbpfLoader, programs::XdpMode};
use bg_common::abi::map;
use bg_tests::{
    conversation::Conversation,
    exchange::{DOWNLOAD, PORT, UPLOAD, measured, serve},
    kernel::{Kernel, hold_cases, hold_large, in_new_namespace},
    lab::{Lab, Place, listener, listener_v6},
};
use bg_userspace::datapath::{Features, Loaded};

/// A check.
pub type Check = fn() -> Result<String>;

/// The checks and their names, in the order in which they run.
pub const CHECKS: [(&str, Check); 10] = [
    ("features", features),
    ("load", load),
    ("virtio", virtio),
    ("veth", veth),
    ("large", large),
    ("cases", cases),
    ("flip", flip),
    ("large-cases", large_cases),
    ("transfer", transfer),
    ("vlan", vlan),
];
/// What is found where a kernel cannot have large frames.
const NO_FRAGS: &str = "no xdp.frags";

/// In a machine without acceleration a case can take long, and a route that it
/// calls fresh is fresh for a second.
const FRESH: usize = 16;
const LARGE_MTU: u32 = 9000;

fn features() -> Result<String> {
    let features = Features::probe()?;
    Ok(format!("large_frames={}", features.large_frames))
}

fn loaded() -> Result<Loaded> {
    let mut loader = EbpfLoader::new();
    loader.map_max_entries(map::FLOWS, 1024);
    Ok(Features::probe()?.load(&mut loader)?)
}

fn load() -> Result<String> {
    let mut loaded = loaded()?;
    let info = loaded.program()?.info()?;
    Ok(info.verified_instruction_count().map_or_else(
        || "verified".to_owned(),
        |count| format!("{count} instructions"),
    ))
}

fn virtio() -> Result<String> {
    let driver = fs::read_link("/sys/class/net/eth0/device/driver").context("eth0")?;
    ensure!(
        driver.ends_with("virtio_net"),
        "eth0 is {}",
        driver.display()
    );
    attach("eth0", "1500")
}

fn veth() -> Result<String> {
    in_new_namespace(|| {
        ip("link add one type veth peer name other")?;
        attach("one", "1500")
    })
}

/// With an MTU that does not fit one page.
fn large() -> Result<String> {
    in_new_namespace(|| {
        let mtu = LARGE_MTU.to_string();
        ip(&format!(
            "link add one mtu {mtu} type veth peer name other mtu {mtu}"
        ))?;
        match (Features::probe()?.large_frames, attach("one", &mtu)) {
            (true, attached) => attached,
            (false, Err(_)) => Ok("refused, as it must be without xdp.frags".to_owned()),
            (false, Ok(_)) => bail!("attached, though the kernel has no xdp.frags"),
        }
    })
}

/// Attaches in the driver, which fails where the driver cannot.
fn attach(interface: &str, mtu: &str) -> Result<String> {
    ip(&format!("link set {interface} mtu {mtu} up"))?;
    let mut loaded = loaded()?;
    loaded.program()?.attach(interface, XdpMode::Driver)?;
    let shown = ip(&format!("-o link show {interface}"))?;
    ensure!(shown.contains(" xdp "), "the kernel says: {shown}");
    Ok(format!("native, MTU {mtu}"))
}

fn cases() -> Result<String> {
    in_new_namespace(|| {
        let mut kernel = Kernel::load()?;
        let (held, wrong) = hold_cases(&mut kernel, FRESH);
        for case in &wrong {
            eprintln!("{case}");
        }
        let all = held + wrong.len();
        ensure!(wrong.is_empty() && all > 0, "{held} of {all}");
        Ok(format!("{held} of {all}"))
    })
}

/// Real TCP over veth: old conversations stay through a flip, new ones take green,
/// and a rollback resets what was born on green.
fn flip() -> Result<String> {
    let lab = Lab::serving()?;
    let namespace = lab.enter(Place::Client)?;
    let ports = [listener(8000), listener(8001), listener_v6(8000)];
    let open = |colour: &str| {
        let mut opened = Vec::new();
        for to in ports {
            let mut conversation = Conversation::open(&namespace, to)?;
            let answer = conversation.ask()?;
            ensure!(answer == colour, "{to}: {answer} answers, not {colour}");
            opened.push(conversation);
        }
        Ok(opened)
    };
    let mut blue = open("blue")?;
    lab.ask(&["flip", "llm"])?;
    let mut green = open("green")?;
    for conversation in &mut blue {
        ensure!(conversation.ask()? == "blue", "an old flow moved");
    }
    lab.ask(&["rollback", "llm"])?;
    for conversation in &mut green {
        ensure!(conversation.ask().is_err(), "a flow outlived the rollback");
    }
    open("blue")?;
    Ok("TCP over IPv4 and IPv6".to_owned())
}

/// Every frame of the case table, too long for one page.
fn large_cases() -> Result<String> {
    if !Features::probe()?.large_frames {
        return Ok(NO_FRAGS.to_owned());
    }
    in_new_namespace(|| {
        let (reasons, wrong) = hold_large(&mut Kernel::load()?)?;
        for case in &wrong {
            eprintln!("{case}");
        }
        let all: usize = reasons.values().sum();
        ensure!(
            wrong.is_empty() && all > 0,
            "{} of {all} wrong",
            wrong.len()
        );
        Ok(format!("{all} of {all}"))
    })
}

/// Real TCP in segments that no page holds, both ways.
fn transfer() -> Result<String> {
    if !Features::probe()?.large_frames {
        return Ok(NO_FRAGS.to_owned());
    }
    let mut lab = Lab::new()?;
    lab.resize(LARGE_MTU)?;
    lab.configure_default()?;
    serve(&lab)?;
    lab.start()?;
    let mut segments = Vec::new();
    for to in [listener(PORT), listener_v6(PORT)] {
        for what in [UPLOAD, DOWNLOAD] {
            let (down, segment) = measured(&lab, to, what)?;
            ensure!(
                down == what.down as usize && segment > 8800,
                "{down} bytes, {segment} a segment"
            );
            segments.push(segment.to_string());
        }
    }
    segments.dedup();
    Ok(format!("segments of {} bytes", segments.join(" and ")))
}

/// Blue servers behind a VLAN device, which the host's kernel does not have.
fn vlan() -> Result<String> {
    let lab = Lab::new()?;
    lab.tag_blue(100)?;
    let lab = lab.served()?;
    let namespace = lab.enter(Place::Client)?;
    for to in [listener(8000), listener_v6(8000)] {
        for _ in 0..3 {
            let answer = Conversation::open(&namespace, to)?.ask()?;
            ensure!(answer == "blue", "{to}: {answer}");
        }
    }
    let reasons = lab.status()?["reasons"].clone();
    for reason in ["forwarded", "returned"] {
        ensure!(
            reasons[reason].as_u64() > Some(0),
            "{reason}: {}",
            reasons[reason]
        );
    }
    Ok("TCP over IPv4 and IPv6".to_owned())
}

fn ip(line: &str) -> Result<String> {
    let output = Command::new("ip").args(line.split_whitespace()).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {line}: {text}");
    Ok(String::from_utf8(output.stdout)?)
}
