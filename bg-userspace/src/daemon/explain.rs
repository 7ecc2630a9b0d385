//! What the packet path would do with a client's packets, and why.

use std::net::SocketAddr;

use bg_common::{
    abi::{TICK_SHIFT, tick_ns},
    flow::{FlowTable, bits, is_closing},
    monitor::{NONE, Sighting},
    reason::Reason,
    service::CutoverWord,
};

use super::Daemon;
use crate::{
    api::{
        Explained, ExplainedFlow, ExplainedHop, ExplainedPacket, ExplainedWord, Kind, Refusal,
        SCHEMA,
    },
    datapath::{Fate, Made, Names},
    plan::{ListenerPlan, Protocol},
    sighting::{action_of, colour, table},
    switch::percent,
};

impl Daemon {
    /// Blocks. Changes nothing.
    pub(super) fn explain(
        &self,
        client: SocketAddr,
        listener: ListenerPlan,
    ) -> Result<Explained, Refusal> {
        possible(client, listener)?;
        let mut names = self.datapath.names()?;
        let explanation = self
            .datapath
            .explain(listener.protocol, client, listener.address)?;
        // The flow is the one of a packet inside of a connection.
        let flow = explanation.fates.last().map(|fate| fate.sighting);
        let service = flow.and_then(|flow| names.service(flow.service).map(str::to_owned));
        let word = service.as_ref().and_then(|name| self.datapath.word(name));
        let preview = flow.and_then(|flow| names.preview(flow.key.listener()));
        let flow = flow
            .filter(|flow| flow.table != 0)
            .map(|flow| flow_of(&flow, listener, word, &names));
        let drains = service.as_ref().zip(word).and_then(|(name, word)| {
            let standby = word.active().other();
            let state = self.state();
            state.draining(name, word, standby)?.until()
        });
        Ok(Explained {
            schema: SCHEMA,
            client: client.to_string(),
            listener: listener.to_string(),
            interface: names.interface(explanation.device),
            service,
            preview: preview.map(|colour| colour.as_str().to_owned()),
            word: word.map(|word| ExplainedWord {
                active: word.active().as_str().to_owned(),
                generation: word.generation(),
                canary_percent: percent(word.canary()),
                resets_before: word.floor(),
                draining_until: drains,
            }),
            flow,
            packets: explanation
                .fates
                .iter()
                .map(|fate| packet(fate, &mut names))
                .collect(),
        })
    }
}

/// Refuses what no client could send.
fn possible(client: SocketAddr, listener: ListenerPlan) -> Result<(), Refusal> {
    let refused = |message: String| Err(Refusal::new(Kind::Usage, message));
    if client.is_ipv4() != listener.address.is_ipv4() {
        let family = |address: &SocketAddr| if address.is_ipv4() { "IPv4" } else { "IPv6" };
        return refused(format!(
            "the client {client} is {}, the listener {listener} {}: no packet has both",
            family(&client),
            family(&listener.address)
        ));
    }
    for (what, address) in [("client", client), ("listener", listener.address)] {
        if address.ip().is_unspecified() || address.ip().is_multicast() {
            return refused(format!("{address} is no {what}'s address"));
        }
        if address.port() == 0 {
            return refused(format!("the {what} {address} has no port"));
        }
    }
    Ok(())
}

fn flow_of(
    flow: &Sighting,
    listener: ListenerPlan,
    word: Option<CutoverWord>,
    names: &Names,
) -> ExplainedFlow {
    let of = table(flow.table).unwrap_or(FlowTable::Established);
    let resetting = |word: CutoverWord| word.resets(flow.colour_spread, flow.generation);
    let both = flow.from_client | flow.from_backend;
    let state = if word.is_some_and(resetting) {
        "resetting"
    } else if is_closing(flow.from_client, flow.from_backend) {
        "closing"
    } else if both & bits::FIN != 0 {
        "half_closed"
    } else if of == FlowTable::HalfOpen && both & bits::PROVEN == 0 {
        "opening"
    } else {
        "open"
    };
    let now = (flow.at_ns >> TICK_SHIFT) as u32;
    ExplainedFlow {
        table: of.as_str().to_owned(),
        state: state.to_owned(),
        colour: bg_common::service::Colour::from_bit(flow.colour_spread)
            .as_str()
            .to_owned(),
        backend: (flow.backend != NONE)
            .then(|| names.backend(flow.backend, Some(listener)))
            .flatten()
            .map(|backend| backend.to_string()),
        generation: flow.generation,
        idle_ms: tick_ns(now.saturating_sub(flow.seen)) / 1_000_000,
    }
}

fn packet(fate: &Fate, names: &mut Names) -> ExplainedPacket {
    let sighting = &fate.sighting;
    let reason = Reason::from_index(u32::from(sighting.reason)).unwrap_or(Reason::Inconsistent);
    let made = match fate.made {
        Made::Syn => "syn",
        Made::Ack => "ack",
        Made::Datagram => "datagram",
    };
    let to = fate.to.as_ref();
    ExplainedPacket {
        packet: made.to_owned(),
        reason: reason.as_str().to_owned(),
        meaning: reason.describe().to_owned(),
        action: action_of(sighting.action).to_owned(),
        colour: colour(sighting.colour).map(|colour| colour.as_str().to_owned()),
        backend: to.map(|to| to.address.to_string()),
        hop: to.and_then(|to| to.hop).map(|(mac, interface)| {
            let octets = mac.map(|octet| format!("{octet:02x}"));
            ExplainedHop {
                mac: octets.join(":"),
                interface: names.interface(interface.device),
                mtu: interface.mtu,
            }
        }),
    }
}

/// The listener that is meant: with its protocol in front, or without.
pub(super) fn listener(protocol: &str, text: &str) -> Result<ListenerPlan, Refusal> {
    let usage = |message| Refusal::new(Kind::Usage, message);
    let known = [Protocol::Tcp, Protocol::Udp];
    if !known.iter().any(|known| known.as_str() == protocol) {
        return Err(usage(format!("`{protocol}` is no protocol: tcp or udp")));
    }
    if text.contains("://") {
        let listener: ListenerPlan = text.parse().map_err(usage)?;
        if listener.protocol.as_str() != protocol {
            return Err(usage(format!("{listener} is no listener for {protocol}")));
        }
        return Ok(listener);
    }
    format!("{protocol}://{text}").parse().map_err(|_| {
        let example = "like 203.0.113.10:8000 or [2001:db8::10]:8000";
        usage(format!("`{text}` is no listener, {example}"))
    })
}

/// A client's address and port.
pub(super) fn client(text: &str) -> Result<SocketAddr, Refusal> {
    let parsed: Option<SocketAddr> = text.parse().ok();
    let plain = |address: &SocketAddr| match address {
        SocketAddr::V4(_) => true,
        SocketAddr::V6(v6) => v6.scope_id() == 0,
    };
    parsed.filter(plain).ok_or_else(|| {
        let example = "like 198.51.100.7:40000 or [2001:db8::7]:40000";
        let message = format!("`{text}` is no client with its port, {example}");
        Refusal::new(Kind::Usage, message)
    })
}
