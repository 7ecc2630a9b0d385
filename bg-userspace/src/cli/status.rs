use std::{
    fmt::Write as _,
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use clap::Args;

use super::{
    Common, Output,
    text::{flows, measured, percent},
};
use crate::{
    api::{
        self, BackendStatus, ColourStatus, InterfaceStatus, Refusal, ServiceStatus, SignalStatus,
    },
    plan::ListenerPlan,
    release::State,
    time,
};

const EXAMPLES: &str = "\
Examples:
  bgswitch status llm --watch                 a view that renews itself
  bgswitch status --watch -o json             one JSON object a line, for scripts";

/// `bgswitch status`.
#[derive(Debug, Default, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Status {
    /// Only this service.
    service: Option<String>,
    /// Show it anew each second.
    #[arg(long)]
    watch: bool,
}

impl Status {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        loop {
            let mut status: api::Status = common.get("/v1/status")?;
            if let Some(name) = &self.service {
                if !status.services.iter().any(|service| service.name == *name) {
                    let known = status.services.iter().map(|s| s.name.as_str());
                    return Err(Refusal::unknown_service(name, known).into());
                }
                status.services.retain(|service| service.name == *name);
            }
            let terminal = std::io::stdout().is_terminal();
            if self.watch && common.output == Output::Text && terminal {
                std::io::stdout().write_all(b"\x1b[H\x1b[2J")?;
            }
            common.print(&status, |status| text(status, terminal))?;
            if !self.watch {
                return Ok(());
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn text(status: &api::Status, colours: bool) -> String {
    let mut out = String::new();
    for service in &status.services {
        service_text(&mut out, service, colours);
    }
    let interfaces: Vec<String> = status.interfaces.iter().map(interface_text).collect();
    let _ = writeln!(out, "interfaces  {}", interfaces.join(", "));
    let table = &status.flow_table;
    let _ = write!(
        out,
        "flow table  {} of {} entries",
        table.entries, table.capacity
    );
    let pressure = [
        (table.full, "found no room"),
        (table.evicted_half_open, "half-open ones gave way"),
        (table.evicted_udp, "of UDP gave way"),
    ];
    for (count, what) in pressure.into_iter().filter(|(count, _)| *count > 0) {
        let _ = write!(out, "; {count} {what}");
    }
    out.push('\n');
    let mut reasons: Vec<_> = status
        .reasons
        .iter()
        .filter(|(_, count)| **count > 0)
        .collect();
    reasons.sort_by(|a, b| b.1.cmp(a.1));
    let reasons: Vec<String> = reasons
        .iter()
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    let _ = writeln!(
        out,
        "packets     {}",
        if reasons.is_empty() {
            "none yet".into()
        } else {
            reasons.join("  ")
        }
    );
    out
}

fn interface_text(interface: &InterfaceStatus) -> String {
    let InterfaceStatus {
        name,
        mode,
        program_id,
        running,
    } = interface;
    match (program_id, running) {
        (0, _) => format!("{name} (ABSENT: nothing is forwarded there)"),
        (_, true) => format!("{name} ({mode}, program {program_id})"),
        (_, false) => format!("{name} ({mode}, program {program_id}, LINK DOWN)"),
    }
}

/// Each announced address once, and where it is.
fn announced_text(service: &ServiceStatus) -> String {
    let mut texts: Vec<String> = Vec::new();
    for (listener, interface) in &service.announced {
        let Ok(listener) = listener.parse::<ListenerPlan>() else {
            continue;
        };
        let address = listener.address.ip();
        let text = match interface {
            Some(interface) => format!("{address} on {interface}"),
            None => format!("{address} on NO INTERFACE"),
        };
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    texts.join(", ")
}

fn service_text(out: &mut String, service: &ServiceStatus, colours: bool) {
    let active = paint(&service.active, &service.active, colours);
    let draining = service
        .colours
        .iter()
        .find_map(|(name, colour)| drain_of(name, colour));
    let _ = writeln!(
        out,
        "{}  {}  new flows: {active} {} %{}  generation {}",
        service.name,
        state_text(&service.state, draining),
        percent(100.0 - service.canary_percent),
        canary(service, colours),
        service.generation
    );
    let forward = match service.forward.as_str() {
        "" | "nat" => String::new(),
        other => format!("  ({other})"),
    };
    let _ = writeln!(out, "  listeners  {}{forward}", service.listeners.join(" "));
    if !service.announced.is_empty() {
        let _ = writeln!(out, "  announced  {}", announced_text(service));
    }
    for (name, colour) in &service.colours {
        let label = paint(&format!("{name:<9}"), name, colours);
        let role = if *name == service.active {
            "active "
        } else {
            "standby"
        };
        let version = colour.version.as_deref().unwrap_or("-");
        let _ = write!(
            out,
            "  {label}  {role}  {version:<12}  {}",
            flows(colour.flows)
        );
        out.push_str(&ends(colour));
        if colour.all_down {
            out.push_str(", ALL DOWN: new flows go to all of them");
        }
        out.push('\n');
        if !colour.preview.is_empty() {
            let _ = writeln!(out, "             preview {}", colour.preview.join(" "));
        }
        for backend in &colour.backends {
            let trouble = trouble(backend);
            let weight = if backend.weight == 1 {
                String::new()
            } else {
                format!("  weight {}", backend.weight)
            };
            let _ = writeln!(
                out,
                "             {:<24} {}{weight}{trouble}",
                backend.address,
                flows(backend.flows)
            );
        }
        let heard = colour
            .signals
            .as_ref()
            .filter(|heard| heard.opened > 0 || heard.answers > 0);
        if let Some(heard) = heard {
            let _ = writeln!(out, "             {}", heard_text(heard));
        }
    }
    out.push('\n');
}

/// What was heard of a colour's servers, in a line.
fn heard_text(heard: &SignalStatus) -> String {
    let untaken = heard.refused + heard.opened_again;
    let [.., failed] = heard.status;
    let mut text = format!(
        "heard: {} connections, {untaken} not taken, {} reset; {} answers, {failed} of 5xx",
        heard.opened, heard.reset, heard.answers
    );
    if let Some(p90) = heard.answer.p90_us {
        let _ = write!(text, ", 9 of 10 within {}", measured(p90 * 1000));
    }
    text
}

/// Where the release is, and what is draining; either is left out where there is
/// nothing to tell.
fn state_text(state: &str, draining: Option<String>) -> String {
    match draining {
        None => state.to_owned(),
        Some(draining) if state == State::Steady.as_str() => draining,
        Some(draining) => format!("{state}, {draining}"),
    }
}

/// What keeps a backend from serving, or what is not known of it; empty where it is
/// not probed and can be reached.
fn trouble(backend: &BackendStatus) -> String {
    let mut trouble = String::new();
    if let Some(health) = &backend.health {
        let since = time::local(&health.since);
        trouble = match backend.healthy {
            Some(true) => "  healthy".to_owned(),
            Some(false) => format!("  UNHEALTHY since {since}"),
            None => "  health not known yet".to_owned(),
        };
        if let Some(why) = &health.why {
            let _ = write!(trouble, ": {why}");
        }
    }
    if !backend.reachable {
        trouble.push_str("  no next hop known");
    }
    if !backend.in_pool {
        trouble.push_str("  (gets no new flows)");
    }
    trouble
}

/// What a colour's drain is at, if it has flows that it is about.
fn drain_of(name: &str, colour: &ColourStatus) -> Option<String> {
    let end = colour.drain_end.as_deref()?;
    match (end, colour.draining_flows, colour.resetting_flows) {
        (_, 0, 0) => None,
        ("reset", _, 1..) => Some(format!("resetting {name}")),
        _ => Some(format!("draining {name}")),
    }
}

/// The standby's share of new flows, if it has one.
fn canary(service: &ServiceStatus, colours: bool) -> String {
    let standby = service.colours.keys().find(|name| **name != service.active);
    match standby.filter(|_| service.canary_percent > 0.0) {
        None => String::new(),
        Some(name) => format!(
            ", {} {} % (canary)",
            paint(name, name, colours),
            percent(service.canary_percent)
        ),
    }
}

/// How the flows of a colour will end, where that is not with themselves.
fn ends(colour: &ColourStatus) -> String {
    let draining = match (&colour.draining_until, &colour.resets_until) {
        (Some(from), Some(to)) if from != to => {
            format!("reset from {} to {}", time::local(from), time::local(to))
        }
        (Some(at), _) => format!("reset at {}", time::local(at)),
        (None, _) => "until they end".to_owned(),
    };
    let rest = colour.flows - colour.draining_flows - colour.resetting_flows;
    let parts = [
        (colour.resetting_flows, "reset with the next packet"),
        (colour.draining_flows, draining.as_str()),
        (rest, "of the canary"),
    ];
    let mut out = String::new();
    if rest == colour.flows {
        return out;
    }
    for (count, what) in parts.into_iter().filter(|(count, _)| *count > 0) {
        let _ = match count {
            all if all == colour.flows => write!(out, ", {what}"),
            some => write!(out, ", {some} {what}"),
        };
    }
    out
}

fn paint(text: &str, colour: &str, colours: bool) -> String {
    let code = match colour {
        "blue" if colours => "\x1b[34m",
        "green" if colours => "\x1b[32m",
        _ => return text.to_owned(),
    };
    format!("{code}{text}\x1b[0m")
}
