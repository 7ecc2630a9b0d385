use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, Write as _},
    ops::ControlFlow,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use bg_common::reason::Reason;
use clap::{Args, builder::PossibleValuesParser};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Common, Output, say, text};
use crate::{
    api::{Kind, MonitorEvent, MonitorLine, PacketSeen, Refusal, Status},
    client::End,
    config::is_name,
    time::local_micros,
};

const EXAMPLES: &str = "\
Examples:
  bgswitch monitor --service llm              its packets, and what becomes of them
  bgswitch monitor --reason reset_client --reason cut_dropped
  bgswitch monitor --sample 1000              one packet of a thousand, at random
  bgswitch monitor --reason forwarded_new --count 1 -o json | jq .

A line: time, reason, protocol, client -> listener -> backend (or <- for what comes back),
service and colour, the interface it came in by. Flips, rollbacks, canaries, ends of
drains, reloads, backends that fall or rise, and flows that had to give way stand between
the packets, by the time of their store. Packets are chosen in the kernel; who does not watch pays nothing. A
processor tells of some 15 000 packets a second at most: what goes beyond is counted, and
said. Ctrl-C ends it, with a summary.";

/// The daemon cuts no reader before that (`daemon/http/patience.rs`).
const PATIENCE: Duration = Duration::from_secs(30);

/// `bgswitch monitor`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Monitor {
    /// Only packets with this reason; may be given several times [default: all].
    #[arg(long, value_name = "REASON", hide_possible_values = true, value_parser = reasons())]
    reason: Vec<String>,
    /// Only packets and events of this service.
    #[arg(long)]
    service: Option<String>,
    /// One packet of so many, at random.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,
    /// End after so many packets.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

fn reasons() -> PossibleValuesParser {
    PossibleValuesParser::new(Reason::ALL.iter().map(|reason| reason.as_str()))
}

impl Monitor {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let mut path = format!("/v1/monitor?sample={}", self.sample);
        if !self.reason.is_empty() {
            let _ = write!(path, "&reason={}", self.reason.join(","));
        }
        if let Some(service) = &self.service {
            if !is_name(service) {
                let message = format!("`{}` is no service's name", service.escape_debug());
                return Err(Refusal::new(Kind::Usage, message).into());
            }
            let _ = write!(path, "&service={service}");
        }
        let mut watched = Watched::new(common.output, self.count);
        let end = common.stream(&path, |lines| watched.take(lines))?;
        say(&watched.summary());
        if end == End::Closed {
            if let Ok(status) = common.get::<Status>("/v1/status")
                && watched.was_cut(&status)
            {
                let message = "the daemon cut the connection, because nothing was read of it for 30 s: \
                               watch again";
                return Err(Refusal::new(Kind::Failed, message).into());
            }
            let message =
                "the daemon stopped: nobody tells of packets now; forwarding goes on as it is";
            return Err(Refusal::new(Kind::NoDaemon, message).into());
        }
        Ok(())
    }
}

/// What was shown so far.
struct Watched {
    output: Output,
    left: Option<u64>,
    began: Instant,
    reasons: BTreeMap<String, u64>,
    events: u64,
    missed: u64,
}

impl Watched {
    fn new(output: Output, count: Option<u64>) -> Self {
        Self {
            output,
            left: count,
            began: Instant::now(),
            reasons: BTreeMap::new(),
            events: 0,
            missed: 0,
        }
    }

    fn take(&mut self, lines: &str) -> anyhow::Result<ControlFlow<()>> {
        let mut out = String::new();
        for line in lines.lines() {
            self.line(line, &mut out)?;
            if self.left == Some(0) {
                break;
            }
        }
        let mut stdout = io::stdout();
        stdout.write_all(out.as_bytes())?;
        stdout.flush()?;
        let enough = self.left == Some(0) || nobody_reads();
        Ok(if enough {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    }

    fn line(&mut self, json: &str, out: &mut String) -> anyhow::Result<()> {
        let line: MonitorLine = serde_json::from_str(json)?;
        match &line {
            MonitorLine::Begin(begin) => {
                let sample = match begin.sample {
                    1 => "every packet".to_owned(),
                    sample => format!("one packet of {sample}"),
                };
                let of = begin.service.as_ref();
                let of = of.map_or_else(String::new, |service| format!(" of {service}"));
                say(&format!("watching {sample}{of}; Ctrl-C ends it"));
            }
            MonitorLine::Packet(packet) => {
                *self.reasons.entry(packet.reason.clone()).or_default() += 1;
                self.left = self.left.map(|left| left - 1);
                if self.output == Output::Text {
                    packet_text(out, packet);
                }
            }
            MonitorLine::Event(event) => {
                self.events += 1;
                if self.output == Output::Text {
                    event_text(out, event);
                }
            }
            MonitorLine::Alive { missed, .. } => {
                if *missed == self.missed {
                    return Ok(());
                }
                let more = missed.saturating_sub(self.missed);
                self.missed = *missed;
                if self.output == Output::Text {
                    let _ = writeln!(out, "{:<15}  {} not shown", "...", text::count(more));
                }
            }
        }
        if self.output == Output::Json {
            out.push_str(json);
            out.push('\n');
        }
        Ok(())
    }

    /// Whether the daemon that told, and tells no more, still runs: then nothing was read
    /// for too long. One that began after the watching has taken the other's place.
    fn was_cut(&self, status: &Status) -> bool {
        let watched = self.began.elapsed();
        watched >= PATIENCE && status.daemon.uptime_s >= watched.as_secs()
    }

    fn summary(&self) -> String {
        let packets: u64 = self.reasons.values().sum();
        let mut reasons: Vec<_> = self.reasons.iter().collect();
        reasons.sort_by(|a, b| b.1.cmp(a.1));
        let reasons: Vec<String> = reasons
            .iter()
            .map(|(reason, count)| format!("{reason} {}", text::count(**count)))
            .collect();
        let reasons = match &reasons[..] {
            [] => String::new(),
            reasons => format!(" ({})", reasons.join(", ")),
        };
        let seconds = Duration::from_millis(self.began.elapsed().as_millis() as u64);
        format!(
            "{} packet{}{reasons} and {} event{} in {}; {} not shown",
            text::count(packets),
            plural(packets),
            text::count(self.events),
            plural(self.events),
            humantime::format_duration(seconds),
            text::count(self.missed)
        )
    }
}

const fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// True when stdout is a pipe whose reader is gone: asked each second, also when there
/// is nothing to write.
fn nobody_reads() -> bool {
    let stdout = io::stdout();
    let mut out = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let polled = poll(&mut out, PollTimeout::ZERO);
    let found = out[0].revents().unwrap_or(PollFlags::empty());
    polled.is_ok() && found.contains(PollFlags::POLLERR)
}

fn packet_text(out: &mut String, packet: &PacketSeen) {
    let unknown = || "?".to_owned();
    let address = |listener: &String| {
        let address = listener.split_once("://").map(|(_, address)| address);
        address.unwrap_or(listener).to_owned()
    };
    let ends = match (&packet.client, &packet.listener) {
        (Some(client), Some(listener)) => {
            let arrow = match packet.direction.as_deref() {
                Some("forward") => "->",
                Some(_) => "<-",
                None => "--",
            };
            let mut ends = format!("{client:<21} {arrow} {:<21}", address(listener));
            if let Some(backend) = &packet.backend {
                let _ = write!(ends, " {arrow} {backend}");
            }
            ends
        }
        _ => match (&packet.source, &packet.destination) {
            (Some(source), Some(destination)) => format!("{source:<21} -> {destination}"),
            _ => unknown(),
        },
    };
    let owner = match (&packet.service, &packet.colour) {
        (Some(service), Some(colour)) => format!("{service} {colour}"),
        (Some(service), None) => service.clone(),
        _ => "-".to_owned(),
    };
    let flags = packet
        .flags
        .as_ref()
        .map_or_else(String::new, |flags| flags.join(","));
    let _ = write!(
        out,
        "{}  {:<20} {:<5} {ends:<71}  {owner:<14} {:<10} {flags}",
        local_micros(&packet.time),
        packet.reason,
        packet.protocol.as_deref().unwrap_or("-"),
        packet.interface,
    );
    if let Some(length) = packet.length {
        let gap = if flags.is_empty() { "" } else { " " };
        let _ = write!(out, "{gap}{length} B");
    }
    if packet.fragment {
        out.push_str(" fragment");
    }
    out.push('\n');
}

fn event_text(out: &mut String, event: &MonitorEvent) {
    let _ = write!(
        out,
        "{}  == {} {}: {}",
        local_micros(&event.time),
        event.event,
        event.service,
        event.detail
    );
    if let Some(generation) = event.generation {
        let _ = write!(out, "  generation {generation}");
    }
    if let Some(actor) = &event.actor {
        let _ = write!(out, "  by {actor}");
    }
    if let Some(why) = &event.why {
        let _ = write!(out, "  ({why})");
    }
    out.push('\n');
}
