//! `bgswitch monitor`: packets, and what happens between them.

use serde::{Deserialize, Serialize};

/// A line of `GET /v1/monitor`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MonitorLine {
    /// The first one: packets are told from now on.
    Begin(MonitorBegin),
    /// A packet and its verdict.
    Packet(Box<PacketSeen>),
    /// What happened between the packets.
    Event(MonitorEvent),
    /// Each second, so that both sides know of each other.
    Alive {
        /// [`super::SCHEMA`].
        schema: u32,
        /// Packets since the beginning that could not be told: at most so many that
        /// this viewer wanted, exactly so many when it is the only one.
        missed: u64,
    },
}

/// What a viewer will see.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MonitorBegin {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// Only of this service.
    pub service: Option<String>,
    /// One packet of so many, at random.
    pub sample: u32,
}

/// A packet and its verdict. What is `null` the packet does not have, or it was not
/// looked at.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PacketSeen {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// RFC 3339, UTC, microseconds.
    pub time: String,
    /// `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// The reason of the verdict, as in `status`.
    pub reason: String,
    /// `pass` to the stack, `drop`, `transmit` by where it came in, `redirect`.
    pub action: String,
    /// `forward`: from a client; `return`: from a backend.
    pub direction: Option<String>,
    /// `tcp`, `udp`, `icmp`, `icmp6` or a number.
    pub protocol: Option<String>,
    /// Where it came from, as it came.
    pub source: Option<String>,
    /// Where it went to, as it came.
    pub destination: Option<String>,
    /// The client of its flow.
    pub client: Option<String>,
    /// The listener of its flow.
    pub listener: Option<String>,
    /// The backend of its flow.
    pub backend: Option<String>,
    /// Service.
    pub service: Option<String>,
    /// The colour that it was counted for.
    pub colour: Option<String>,
    /// The table that remembers its flow.
    pub flow: Option<String>,
    /// The generation that its flow was born in.
    pub generation: Option<u16>,
    /// Where it came in.
    pub interface: String,
    /// Where it left.
    pub egress: Option<String>,
    /// VLAN ids that it came with, the outer one first.
    pub vlans: Vec<u16>,
    /// Bytes from its IP header.
    pub length: Option<u32>,
    /// TTL or hop limit, as it came.
    pub hops: Option<u8>,
    /// True for a fragment.
    pub fragment: bool,
    /// TCP's flags.
    pub flags: Option<Vec<String>>,
    /// TCP's sequence number.
    pub sequence: Option<u32>,
    /// TCP's acknowledgement.
    pub acknowledgement: Option<u32>,
    /// The CPU that had it.
    pub cpu: u32,
}

/// What happened between the packets.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MonitorEvent {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// RFC 3339, UTC, microseconds.
    pub time: String,
    /// `CLOCK_MONOTONIC`, ns: just before the store, for what is one.
    pub at_ns: u64,
    /// What the store took: packets of that time may have seen the one word or the
    /// other.
    pub store_ns: Option<u64>,
    /// As the journal's action (`flip`, `rollback`, `canary`, `drain_end`, `reload`,
    /// `changed_outside`, `fall`, `rise`, `release`), or `evicted` or `table_full`.
    pub event: String,
    /// Service; `*` for all.
    pub service: String,
    /// The service's generation afterwards.
    pub generation: Option<u16>,
    /// What was done.
    pub detail: String,
    /// Who did it.
    pub actor: Option<String>,
    /// The operator's words.
    pub why: Option<String>,
}
