//! What the packet path has heard of a colour's servers.

use bg_common::signals::{Signals, Times};
use serde::{Deserialize, Serialize};

use crate::signals::quantile;

/// Of TCP connections, since the daemon listens to them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SignalStatus {
    /// Connections that clients began.
    pub opened: u64,
    /// Those whose SYN the client sent again.
    pub opened_again: u64,
    /// Connections that servers took.
    pub accepted: u64,
    /// Connections that servers refused.
    pub refused: u64,
    /// Connections that servers had taken, and reset.
    pub reset: u64,
    /// Requests: what clients sent after servers had answered.
    pub asked: u64,
    /// Requests that clients began to send again.
    pub asked_again: u64,
    /// Segments with data that servers sent again.
    pub repeated: u64,
    /// Answers: what servers sent first after clients had sent something.
    pub answers: u64,
    /// Of those, with an HTTP/1 status of 1xx to 5xx, in this order.
    pub status: [u64; 5],
    /// From SYN to SYN-ACK.
    pub handshake: Quantiles,
    /// From a request's first segment to its answer's.
    pub answer: Quantiles,
}

/// Times, microseconds; up to a quarter too long. `null`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Quantiles {
    /// Half of them are not longer.
    pub p50_us: Option<u64>,
    /// 90 %.
    pub p90_us: Option<u64>,
    /// 99 %.
    pub p99_us: Option<u64>,
}

impl Quantiles {
    fn of(times: &Times) -> Self {
        let at = |part| quantile(times, part).map(|time| time.as_micros() as u64);
        Self {
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
        }
    }
}

impl From<&Signals> for SignalStatus {
    fn from(heard: &Signals) -> Self {
        let [_, status @ ..] = heard.status;
        Self {
            opened: heard.opened,
            opened_again: heard.opened_again,
            accepted: heard.accepted,
            refused: heard.refused,
            reset: heard.reset,
            asked: heard.asked,
            asked_again: heard.asked_again,
            repeated: heard.repeated,
            answers: heard.answers(),
            status,
            handshake: Quantiles::of(&heard.handshake),
            answer: Quantiles::of(&heard.answer),
        }
    }
}
