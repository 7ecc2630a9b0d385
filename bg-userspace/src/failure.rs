//! How a command fails: the exit code that scripts read, and the sentence that
//! people read.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a command failed: its exit code. 0 is success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// 1: something went wrong that has no code of its own.
    Failed,
    /// 2: the command line or the configuration is wrong.
    Usage,
    /// 3: the daemon is not running.
    NotRunning,
    /// 4: the user may not do this.
    NotPermitted,
    /// 5: the state is not the one the request was made for.
    Conflict,
    /// 8: the target colour is not ready for traffic.
    Unhealthy,
    /// 9: no answer in time.
    TimedOut,
    /// 11: the packet path: load, attach, map.
    PacketPath,
}

impl Kind {
    /// The process's exit code.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotRunning => 3,
            Self::NotPermitted => 4,
            Self::Conflict => 5,
            Self::Unhealthy => 8,
            Self::TimedOut => 9,
            Self::PacketPath => 11,
        }
    }
}

/// A failed command: what happened, why, and what to do, in one message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The class, as the exit code tells it.
    pub kind: Kind,
    /// The message; several lines where there are several problems.
    pub message: String,
}

impl Failure {
    /// A failure of `kind`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A failure that has no code of its own.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_that_scripts_know() {
        let kinds = [
            (Kind::Failed, 1),
            (Kind::Usage, 2),
            (Kind::NotRunning, 3),
            (Kind::NotPermitted, 4),
            (Kind::Conflict, 5),
            (Kind::Unhealthy, 8),
            (Kind::TimedOut, 9),
            (Kind::PacketPath, 11),
        ];
        for (kind, code) in kinds {
            assert_eq!(kind.exit_code(), code);
        }
    }
}
