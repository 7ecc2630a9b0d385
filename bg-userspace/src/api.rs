//! What goes over the socket: requests, answers, errors. JSON never loses a
//! field within one `schema`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::FlipMode;

/// The schema number of every answer.
pub const SCHEMA: u32 = 1;

/// `bgswitch status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The daemon.
    pub daemon: DaemonStatus,
    /// Where XDP is attached.
    pub interfaces: Vec<InterfaceStatus>,
    /// Services, by name.
    pub services: Vec<ServiceStatus>,
    /// Packets by reason.
    pub reasons: BTreeMap<String, u64>,
    /// Remembered flows.
    pub flow_table: FlowTableStatus,
}

/// The daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Version.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since its start.
    pub uptime_s: u64,
}

/// An interface.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// Name.
    pub name: String,
    /// `native` or `generic`, as the kernel says; `absent` while the interface is
    /// not there.
    pub mode: String,
    /// Kernel id of the program.
    pub program_id: u32,
    /// True when it is up and has a carrier.
    #[serde(default)]
    pub running: bool,
}

/// A service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Name.
    pub name: String,
    /// The colour new flows go to.
    pub active: String,
    /// How often it has flipped, or a canary was rolled back, modulo 65 536.
    pub generation: u16,
    /// Of its release: always `STEADY` in this version.
    pub state: String,
    /// Share of new flows that go to the standby, as it is: a multiple of 1/655.36.
    pub canary_percent: f64,
    /// Listeners.
    pub listeners: Vec<String>,
    /// How packets are forwarded: `nat`, `snat` or `dsr`.
    #[serde(default)]
    pub forward: String,
    /// Listeners whose address is announced, and the interface that has it; `null`
    /// while none does.
    #[serde(default)]
    pub announced: BTreeMap<String, Option<String>>,
    /// Both colours, by name.
    pub colours: BTreeMap<String, ColourStatus>,
}

/// One service by itself: `GET /v1/services/{service}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OneService {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The service.
    #[serde(flatten)]
    pub service: ServiceStatus,
}

/// A colour of a service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ColourStatus {
    /// Version, as configured.
    pub version: Option<String>,
    /// Remembered flows, closing ones left out.
    pub flows: u64,
    /// Packets, both directions.
    pub packets: u64,
    /// Bytes, both directions.
    pub bytes: u64,
    /// Flows that ever chose the colour.
    pub new_flows: u64,
    /// TCP resets sent for its flows.
    pub resets: u64,
    /// When its old flows are reset, RFC 3339: from then on, the first of them.
    pub draining_until: Option<String>,
    /// When the last of them is reset, RFC 3339.
    #[serde(default)]
    pub resets_until: Option<String>,
    /// How its drain ends, while there is one: `reset` or `keep`.
    #[serde(default)]
    pub drain_end: Option<String>,
    /// Of its flows, those that a drain's end will reset, or would if it were no
    /// `keep`: born before the last flip.
    #[serde(default)]
    pub draining_flows: u64,
    /// Of its flows, those that are reset with their next packet.
    #[serde(default)]
    pub resetting_flows: u64,
    /// Its pool.
    pub backends: Vec<BackendStatus>,
}

/// A backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Address, and the port that packets go to, unless that differs from
    /// listener to listener.
    pub address: String,
    /// Weight in its pool.
    pub weight: u32,
    /// True when its next hop is known: packets can reach it. (There are no
    /// health checks in this version.)
    pub healthy: bool,
    /// Remembered flows, closing ones left out.
    pub flows: u64,
}

/// The flow tables.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FlowTableStatus {
    /// Established TCP flows, both families.
    pub entries: u64,
    /// How many fit.
    pub capacity: u64,
    /// Established flows that found no room, and are forwarded all the same.
    #[serde(default)]
    pub full: u64,
    /// Half-open flows that had to give way to newer ones.
    #[serde(default)]
    pub evicted_half_open: u64,
    /// UDP flows that had to give way to newer ones.
    #[serde(default)]
    pub evicted_udp: u64,
}

/// `bgswitch flip`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FlipRequest {
    /// `blue` or `green`; the standby if absent.
    pub to: Option<String>,
    /// As configured if absent.
    pub mode: Option<FlipMode>,
    /// Drain deadline, seconds; as configured if absent. With it, old flows are
    /// reset then, also where `drain_end` is `keep`.
    pub drain_s: Option<u64>,
    /// Only at this generation.
    pub if_generation: Option<u16>,
    /// Say what would happen, change nothing.
    pub dry_run: bool,
    /// Also to a colour that cannot be reached.
    pub force: bool,
    /// For the journal.
    pub why: Option<String>,
}

/// `bgswitch rollback`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RollbackRequest {
    /// Cut if absent: the bad colour's flows are reset.
    pub mode: Option<FlipMode>,
    /// The colour that new flows shall not go to any more, `blue` or `green`. If
    /// absent: the standby while it has a canary, otherwise the active one.
    pub leave: Option<String>,
    /// Only at this generation: keeps a second rollback from undoing the first.
    pub if_generation: Option<u16>,
    /// For the journal.
    pub why: Option<String>,
}

/// `bgswitch canary`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CanaryRequest {
    /// Share of new flows that shall go to the standby, 0 to 100; required.
    pub percent: Option<f64>,
    /// Only at this generation. A canary does not change it: it keeps out flips, not
    /// other canaries.
    pub if_generation: Option<u16>,
    /// Say what would happen, change nothing.
    pub dry_run: bool,
    /// Also to a colour that cannot be reached.
    pub force: bool,
    /// For the journal.
    pub why: Option<String>,
}

/// What a canary did, or would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Canaried {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Service.
    pub service: String,
    /// The active colour.
    pub active: String,
    /// The standby: the canary's colour.
    pub standby: String,
    /// Generation, before and after.
    pub generation: u16,
    /// Share of new flows before, percent.
    pub canary_percent_before: f64,
    /// Share of new flows after: the nearest to what was asked for, percent.
    pub canary_percent: f64,
    /// The same in parts of 65 536.
    pub share: u16,
    /// `CLOCK_MONOTONIC` just before the store, ns; `null` in a dry run.
    pub at_ns: Option<u64>,
    /// What the store took; `null` in a dry run.
    pub store_ns: Option<u64>,
    /// Flows on the standby; `null` when they were not counted in time.
    pub standby_flows: Option<u64>,
    /// True when nothing was changed.
    pub dry_run: bool,
    /// What did not work beside the change itself, like the journal.
    pub warnings: Vec<String>,
}

/// What a flip or a rollback did, or would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Flipped {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Service.
    pub service: String,
    /// The colour that was left: the active one before, or a canary's.
    pub from: String,
    /// The active colour after.
    pub to: String,
    /// Generation before.
    pub generation_before: u16,
    /// Generation after.
    pub generation: u16,
    /// `drain` or `cut`.
    pub mode: String,
    /// Share of new flows that went to the standby before, percent. (A flip and a
    /// rollback end a canary.)
    #[serde(default)]
    pub canary_percent_before: f64,
    /// True when it was no flip: the canary of `from` was taken back.
    #[serde(default)]
    pub canary_rollback: bool,
    /// Length of the drain, seconds; `null` without a deadline.
    pub drain_s: Option<u64>,
    /// How the drain ends: `reset` or `keep`; `null` with `cut`.
    #[serde(default)]
    pub drain_end: Option<String>,
    /// From the first reset at the drain's end to the last, seconds.
    #[serde(default)]
    pub reset_over_s: Option<u64>,
    /// `CLOCK_MONOTONIC` just before the store, ns; `null` in a dry run.
    pub at_ns: Option<u64>,
    /// What the store took; `null` in a dry run.
    pub store_ns: Option<u64>,
    /// From the store to the first new flow on the new colour, as stamped by
    /// the packet path; `null` when none came while the command waited.
    pub first_new_flow_us: Option<f64>,
    /// Flows on the old colour; `null` when they were not counted in time.
    pub old_flows: Option<u64>,
    /// When they are reset, RFC 3339: from then on, the first of them.
    pub draining_until: Option<String>,
    /// When the last of them is reset, RFC 3339.
    #[serde(default)]
    pub resets_until: Option<String>,
    /// True when nothing was changed.
    pub dry_run: bool,
    /// True when the service was there already: somebody else rolled it back in
    /// the same moment, and nothing was changed.
    #[serde(default)]
    pub already: bool,
    /// What did not work beside the flip itself, like the journal.
    pub warnings: Vec<String>,
}

/// One line of `bgswitch flows`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FlowLine {
    /// Service.
    pub service: String,
    /// Client.
    pub client: String,
    /// Colour.
    pub colour: String,
    /// Backend.
    pub backend: Option<String>,
    /// Generation it was born in.
    pub generation: u16,
    /// `established`, `half_open` or `udp`.
    pub table: String,
    /// Milliseconds since its last packet (67 ms steps).
    pub idle_ms: u64,
    /// It is closed or reset.
    pub closing: bool,
    /// With `snat`: the gateway's port that the backend sees.
    #[serde(default)]
    pub source_port: Option<u16>,
    /// The drain that it is in resets it with its first packet after this, RFC 3339.
    #[serde(default)]
    pub reset_at: Option<String>,
    /// It is reset with its next packet.
    #[serde(default)]
    pub resetting: bool,
}

/// Remembered flows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Flows {
    /// [`SCHEMA`].
    pub schema: u32,
    /// How many there are of the kind that was asked for.
    pub total: u64,
    /// How many are half open or closing: among `flows` only when all are asked for.
    #[serde(default)]
    pub not_live: u64,
    /// As many as were asked for.
    pub flows: Vec<FlowLine>,
}

/// The journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct History {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Oldest first.
    pub entries: Vec<crate::journal::Entry>,
}

/// `bgswitch reload`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reloaded {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The difference, a line each.
    pub changes: Vec<String>,
    /// What is true now and should not be.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// True when nothing was changed.
    pub dry_run: bool,
}

/// A line of `GET /v1/monitor`.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
        /// [`SCHEMA`].
        schema: u32,
        /// Packets since the beginning that could not be told: at most so many that
        /// this viewer wanted, exactly so many when it is the only one.
        missed: u64,
    },
}

/// What a viewer will see.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MonitorBegin {
    /// [`SCHEMA`].
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
pub struct PacketSeen {
    /// [`SCHEMA`].
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
pub struct MonitorEvent {
    /// [`SCHEMA`].
    pub schema: u32,
    /// RFC 3339, UTC, microseconds.
    pub time: String,
    /// `CLOCK_MONOTONIC`, ns: of the store, for what is one.
    pub at_ns: u64,
    /// As the journal's action (`flip`, `rollback`, `canary`, `drain_end`, `reload`,
    /// `changed_outside`), or `evicted` or `table_full`.
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

/// `bgswitch explain`: what the packet path would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explained {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The client.
    pub client: String,
    /// The listener that was asked for, whether it is one or not.
    pub listener: String,
    /// The interface that the client's packets come in by.
    pub interface: String,
    /// The listener's service; `null` when it is no listener.
    pub service: Option<String>,
    /// What the service's word says.
    pub word: Option<ExplainedWord>,
    /// The flow of this client that is remembered.
    pub flow: Option<ExplainedFlow>,
    /// Packets, and what would become of each.
    pub packets: Vec<ExplainedPacket>,
}

/// What a word says.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
pub struct ExplainedHop {
    /// Its MAC address.
    pub mac: String,
    /// The interface that leads there.
    pub interface: String,
    /// That interface's largest packet, bytes.
    pub mtu: u32,
}

/// Why a command was refused or failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Failed.
    Failed,
    /// Usage or configuration.
    Usage,
    /// No such service, or no such path.
    NotFound,
    /// The daemon is not running.
    NoDaemon,
    /// Not permitted.
    NotPermitted,
    /// The service is not at the generation that was asked for.
    StaleGeneration,
    /// Changed at the same time, or nothing to flip.
    Conflict,
    /// The target cannot be reached.
    Unhealthy,
    /// Timed out.
    TimedOut,
    /// Packet path.
    Datapath,
}

impl Kind {
    /// The exit code of the command.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed => exit::FAILED,
            Self::Usage | Self::NotFound => exit::USAGE,
            Self::NoDaemon => exit::NO_DAEMON,
            Self::NotPermitted => exit::NOT_PERMITTED,
            Self::StaleGeneration | Self::Conflict => exit::CONFLICT,
            Self::Unhealthy => exit::UNHEALTHY,
            Self::TimedOut => exit::TIMED_OUT,
            Self::Datapath => exit::DATAPATH,
        }
    }
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What happened, why, and what to do.
    pub error: String,
    /// Of what kind it is.
    pub kind: Kind,
    /// The exit code of the command.
    pub code: u8,
}

impl Refusal {
    /// A refusal.
    pub fn new(kind: Kind, error: impl Into<String>) -> Self {
        Self {
            schema: SCHEMA,
            error: error.into(),
            kind,
            code: kind.exit_code(),
        }
    }

    /// There is no such service; these are.
    pub fn unknown_service<'a>(service: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known: Vec<&str> = known.into_iter().collect();
        let message = format!(
            "there is no service `{service}`, only: {}",
            known.join(", ")
        );
        Self::new(Kind::NotFound, message)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.error)
    }
}

impl std::error::Error for Refusal {}

/// Header of a request that is void from this moment on (`CLOCK_MONOTONIC`, ns):
/// whoever sent it has given up, or has done it without the daemon.
pub const DEADLINE: &str = "bgswitch-deadline-ns";

/// Exit codes of the command line.
pub mod exit {
    /// Failed.
    pub const FAILED: u8 = 1;
    /// Usage or configuration.
    pub const USAGE: u8 = 2;
    /// The daemon is not running.
    pub const NO_DAEMON: u8 = 3;
    /// Not permitted.
    pub const NOT_PERMITTED: u8 = 4;
    /// Stale generation, or nothing to flip.
    pub const CONFLICT: u8 = 5;
    /// The target cannot be reached.
    pub const UNHEALTHY: u8 = 8;
    /// Timed out.
    pub const TIMED_OUT: u8 = 9;
    /// Packet path.
    pub const DATAPATH: u8 = 11;
}
