//! What goes over the socket: requests, answers, errors. JSON never loses a
//! field within one `schema`.

mod explain;
mod monitor;
mod release;
mod signals;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::{
    explain::{Explained, ExplainedFlow, ExplainedHop, ExplainedPacket, ExplainedWord},
    monitor::{MonitorBegin, MonitorEvent, MonitorLine, PacketSeen},
    release::{
        DecisionRequest, ExtendRequest, GateReport, NoteReport, ReleaseReport, ReleaseRequest,
        ReleaseStatus,
    },
    signals::{Quantiles, SignalStatus},
};
use crate::{
    config::FlipMode,
    datapath,
    journal::{Entry, Last},
};

/// The schema number of every answer.
pub const SCHEMA: u32 = 1;

/// `bgswitch status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ServiceStatus {
    /// Name.
    pub name: String,
    /// The colour new flows go to.
    pub active: String,
    /// How often it has flipped, or a canary was rolled back, modulo 65 536.
    pub generation: u16,
    /// Of its release: see [`ReleaseStatus`]; `STEADY` before the first one.
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct OneService {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The service.
    #[serde(flatten)]
    pub service: ServiceStatus,
}

/// A colour of a service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ColourStatus {
    /// Version, as configured.
    pub version: Option<String>,
    /// Remembered flows, closing ones left out.
    pub flows: u64,
    /// Packets, both directions.
    pub packets: u64,
    /// Bytes, both directions.
    pub bytes: u64,
    /// Flows that ever chose the colour; those that came by its preview are not counted.
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
    /// True when one of its pools (there is one per address family) has no healthy
    /// backend and one that fell: then it keeps all of them.
    #[serde(default)]
    pub all_down: bool,
    /// What was heard of its servers; `null` where nobody listens.
    #[serde(default)]
    pub signals: Option<SignalStatus>,
    /// Where clients always reach it, whatever is active.
    #[serde(default)]
    pub preview: Vec<String>,
    /// Its pool.
    pub backends: Vec<BackendStatus>,
}

/// A backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BackendStatus {
    /// Address, and the port that packets go to, unless that differs from
    /// listener to listener.
    pub address: String,
    /// Weight in its pool.
    pub weight: u32,
    /// Where it is probed: what the probes say, `null` as long as too few agree. Where
    /// it is not: as `reachable`.
    pub healthy: Option<bool>,
    /// True when its next hop is known: packets can reach it.
    #[serde(default)]
    pub reachable: bool,
    /// True when new flows go there, if they go to its colour.
    #[serde(default)]
    pub in_pool: bool,
    /// What is known from probes; `null` where there are none.
    #[serde(default)]
    pub health: Option<HealthStatus>,
    /// Remembered flows, closing ones left out.
    pub flows: u64,
}

/// What is known of a backend from probes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct HealthStatus {
    /// The kind of the probes.
    pub kind: String,
    /// Since when `healthy` is what it is, RFC 3339.
    pub since: String,
    /// Why it is not healthy, or what speaks against it; `null` when nothing does.
    pub why: Option<String>,
}

/// The flow tables.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
    /// Only while the canary's share of new flows is this, of 65 536.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub if_share: Option<u16>,
    /// Say what would happen, change nothing.
    pub dry_run: bool,
    /// Also to a colour that cannot be reached, or that is not healthy.
    pub force: bool,
    /// For the journal.
    pub why: Option<String>,
}

/// `bgswitch rollback`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CanaryRequest {
    /// Share of new flows that shall go to the standby, 0 to 100; required.
    pub percent: Option<f64>,
    /// Only at this generation. A canary does not change it: it keeps out flips, not
    /// other canaries.
    pub if_generation: Option<u16>,
    /// Only while the share is this, of 65 536: keeps other canaries out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub if_share: Option<u16>,
    /// Say what would happen, change nothing.
    pub dry_run: bool,
    /// Also to a colour that cannot be reached, or that is not healthy.
    pub force: bool,
    /// For the journal.
    pub why: Option<String>,
}

/// What a canary did, or would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
    /// True when it was no flip: the canary of `from` was taken back, or, with
    /// `canary_percent_before` 0, a release was ended before it flipped.
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
    /// True when the service was there already, and nothing was changed: somebody else rolled
    /// it back in the same moment, or a release that is over has nothing to roll back.
    #[serde(default)]
    pub already: bool,
    /// What did not work beside the flip itself, like the journal.
    pub warnings: Vec<String>,
}

/// One line of `bgswitch flows`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FlowLine {
    /// Service.
    pub service: String,
    /// Client.
    pub client: String,
    /// The listener or the preview that it came by, like `tcp://203.0.113.10:8000`.
    #[serde(default)]
    pub listener: Option<String>,
    /// It came by a preview.
    #[serde(default)]
    pub preview: bool,
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct History {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The newest ones that were asked for, oldest first.
    pub entries: Vec<Entry>,
    /// True when there are older ones that were asked for.
    #[serde(default)]
    pub more: bool,
}

impl From<Last> for History {
    fn from(Last { entries, more }: Last) -> Self {
        Self {
            schema: SCHEMA,
            entries,
            more,
        }
    }
}

/// `bgswitch reload`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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

/// Why a command was refused or failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
    /// A gate of a release failed.
    GateFailed,
    /// A release waits for a human.
    Inconclusive,
    /// The target cannot be reached, or is not healthy.
    Unhealthy,
    /// Timed out.
    TimedOut,
    /// A release rolled back by itself.
    RolledBack,
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
            Self::GateFailed => exit::GATE,
            Self::Inconclusive => exit::INCONCLUSIVE,
            Self::Unhealthy => exit::UNHEALTHY,
            Self::TimedOut => exit::TIMED_OUT,
            Self::RolledBack => exit::ROLLED_BACK,
            Self::Datapath => exit::DATAPATH,
        }
    }
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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

/// The packet path says why.
impl From<datapath::Error> for Refusal {
    fn from(error: datapath::Error) -> Self {
        Self::new(Kind::Datapath, error.to_string())
    }
}

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
    /// Stale generation, another release runs, or nothing to flip.
    pub const CONFLICT: u8 = 5;
    /// A gate failed.
    pub const GATE: u8 = 6;
    /// Inconclusive, or waiting for an approval.
    pub const INCONCLUSIVE: u8 = 7;
    /// The target cannot be reached, or is not healthy.
    pub const UNHEALTHY: u8 = 8;
    /// Timed out.
    pub const TIMED_OUT: u8 = 9;
    /// A release rolled back by itself.
    pub const ROLLED_BACK: u8 = 10;
    /// Packet path.
    pub const DATAPATH: u8 = 11;
}
