//! `bgswitch explain`.

use serde::{Deserialize, Serialize};

/// `bgswitch explain`: what the packet path would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Explained {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// The client.
    pub client: String,
    /// The listener that was asked for, whether it is one or not.
    pub listener: String,
    /// The interface that the client's packets come in by.
    pub interface: String,
    /// The listener's service; `null` when it is no listener.
    pub service: Option<String>,
    /// The colour that all of the listener's flows go to, whatever the word says, when it
    /// is a preview.
    #[serde(default)]
    pub preview: Option<String>,
    /// What the service's word says.
    pub word: Option<ExplainedWord>,
    /// The flow of this client that is remembered.
    pub flow: Option<ExplainedFlow>,
    /// Packets, and what would become of each.
    pub packets: Vec<ExplainedPacket>,
}

/// What a word says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ExplainedWord {
    /// The colour that new flows go to.
    pub active: String,
    /// Its generation.
    pub generation: u16,
    /// Share of new flows that go to the standby.
    pub canary_percent: f64,
    /// The standby's flows born in a generation before this one are reset: at once, or
    /// one after the other while a drain ends.
    pub resets_before: Option<u16>,
    /// When the standby's old flows are reset, RFC 3339.
    pub draining_until: Option<String>,
}

/// A remembered flow.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ExplainedFlow {
    /// `established`, `half_open` or `udp`.
    pub table: String,
    /// `open`, `opening`, `half_closed`, `closing` or `resetting`.
    pub state: String,
    /// Its colour.
    pub colour: String,
    /// Its backend; `null` when that left.
    pub backend: Option<String>,
    /// The generation it was born in.
    pub generation: u16,
    /// Milliseconds since its last packet (67 ms steps).
    pub idle_ms: u64,
}

/// What would become of a packet.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ExplainedPacket {
    /// `syn`, which opens a connection; `ack`, one of a connection that exists; or
    /// `datagram`.
    pub packet: String,
    /// The verdict's reason, as in `status`.
    pub reason: String,
    /// What that means.
    pub meaning: String,
    /// `pass` to the stack, `drop`, `transmit` by where it came in, `redirect`.
    pub action: String,
    /// The colour it would be counted for.
    pub colour: Option<String>,
    /// The backend it would be sent to.
    pub backend: Option<String>,
    /// Where it would be sent first; `null` when that is not resolved.
    pub hop: Option<ExplainedHop>,
}

/// A backend's next hop.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ExplainedHop {
    /// Its MAC address.
    pub mac: String,
    /// The interface that leads there.
    pub interface: String,
    /// That interface's largest packet, bytes.
    pub mtu: u32,
}
