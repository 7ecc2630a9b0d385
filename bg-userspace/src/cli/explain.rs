use std::{fmt::Write as _, time::Duration};

use clap::Args;

use super::{
    Common,
    text::{measured, percent},
};
use crate::{
    api::{Explained, ExplainedPacket},
    time,
    uri::escaped,
};

const EXAMPLES: &str = "\
Examples:
  bgswitch explain tcp 198.51.100.7:40000 203.0.113.10:8000
  bgswitch explain udp '[2001:db8::7]:5000' '[2001:db8::10]:4433' -o json

Made packets of that client are run through the packet path as it is at this moment, in a
program that changes nothing: no flow is remembered, no counter counts. Of TCP two are
run: a SYN, which opens a new connection, and one of a connection that exists.";

/// `bgswitch explain PROTOCOL CLIENT LISTENER`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Explain {
    /// Which protocol the client speaks.
    #[arg(value_parser = ["tcp", "udp"])]
    protocol: String,
    /// The client's address and port, like 198.51.100.7:40000.
    client: String,
    /// The listener, like 203.0.113.10:8000 or tcp://203.0.113.10:8000.
    listener: String,
}

impl Explain {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let path = format!(
            "/v1/explain?protocol={}&client={}&listener={}",
            self.protocol,
            escaped(&self.client),
            escaped(&self.listener)
        );
        let explained: Explained = common.get(&path)?;
        common.print(&explained, text)
    }
}

fn text(explained: &Explained) -> String {
    let Explained {
        client,
        listener,
        interface,
        ..
    } = explained;
    let service = explained.service.as_deref().unwrap_or("no service");
    let mut out = format!("{service}  {listener}   client {client}, by {interface}\n");
    if let Some(word) = &explained.word {
        let _ = write!(
            out,
            "word      {} is active, generation {}",
            word.active, word.generation
        );
        if word.canary_percent > 0.0 {
            let share = percent(word.canary_percent);
            let _ = write!(out, "; canary: {share} % of clients go to the standby");
        }
        if let Some(floor) = word.resets_before {
            let _ = write!(
                out,
                "; the standby's flows born before generation {floor} are reset"
            );
        } else if let Some(until) = &word.draining_until {
            let until = time::local(until);
            let _ = write!(out, "; the standby drains until {until}");
        }
        out.push('\n');
        if let Some(colour) = &explained.preview {
            let _ = writeln!(
                out,
                "preview   its flows go to {colour}, whatever the word says"
            );
        }
        let _ = match &explained.flow {
            None => writeln!(out, "flow      not known"),
            Some(flow) => writeln!(
                out,
                "flow      {}, {}: {} {}, generation {}, last packet {} ago",
                flow.table,
                flow.state,
                flow.colour,
                flow.backend.as_deref().unwrap_or("a backend that left"),
                flow.generation,
                measured(Duration::from_millis(flow.idle_ms).as_nanos() as u64)
            ),
        };
    }
    for packet in &explained.packets {
        packet_text(&mut out, packet);
    }
    out
}

fn packet_text(out: &mut String, packet: &ExplainedPacket) {
    let _ = write!(out, "{:<9} {}", packet.packet, packet.reason);
    if let Some(backend) = &packet.backend {
        let _ = write!(
            out,
            " -> {} {backend}",
            packet.colour.as_deref().unwrap_or("?")
        );
        let _ = match &packet.hop {
            Some(hop) => write!(out, " by {} to {}, MTU {}", hop.interface, hop.mac, hop.mtu),
            None => write!(out, ", whose next hop is not resolved"),
        };
    } else if packet.reason == "not_ours" {
        let _ = write!(out, " -> passes untouched to the host's stack");
    }
    let _ = writeln!(out, "\n          {}", packet.meaning);
}
