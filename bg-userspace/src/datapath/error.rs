//! What can go wrong with the packet path, and what to do about it.

use std::{error::Error as StdError, io, net::IpAddr, path::PathBuf};

use bg_common::{abi::LAYOUT, service::CutoverWord};

/// Why the packet path could not be loaded, attached or changed. The exit code
/// is 4 for [`Error::NotPermitted`], 11 for all others.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another daemon holds the pins.
    #[error("a bgswitch daemon runs on {0} and holds the packet path: stop it first")]
    Locked(PathBuf),
    /// Not by this user.
    #[error("{what}: {cause}: be root (CAP_BPF, CAP_NET_ADMIN)")]
    NotPermitted {
        /// Of what.
        what: String,
        /// The kernel's word.
        cause: String,
    },
    /// No BPF file system.
    #[error("{path} is not on a BPF file system: `mount -t bpf bpf /sys/fs/bpf`")]
    NoBpffs {
        /// The configured path.
        path: PathBuf,
    },
    /// Pins of another layout version.
    #[error(
        "{0} holds the state of another bgswitch version (this one uses layout v{LAYOUT}). Go back \
         to that version, or run `bgswitch detach`, which stops forwarding and forgets all flows"
    )]
    OtherLayout(PathBuf),
    /// A pinned map has another shape.
    #[error(
        "the pinned map {path} has {found}, expected {expected}: it is not ours or from another \
         build. `bgswitch detach` removes it, stops forwarding and forgets all flows"
    )]
    WrongShape {
        /// The pin.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What the object wants.
        expected: String,
    },
    /// The interface has an XDP program of somebody else.
    #[error(
        "interface {interface} already has an XDP program of somebody else ({program}): remove it first (`ip link set {interface} xdp off`)"
    )]
    ForeignProgram {
        /// The interface.
        interface: String,
        /// Id and name of the program.
        program: String,
    },
    /// An interface of the configuration does not exist.
    #[error("gateway.interfaces: there is no interface {0} here (`ip link` lists them)")]
    NoInterface(String),
    /// It cannot be told where an address is to be announced.
    #[error(
        "service.{service}.announce: {address} belongs on none of gateway.interfaces: {cause}. Put it on \
         the clients' interface yourself (`ip addr add {address} dev IF`): there it is left alone, and \
         announced; or set announce = false"
    )]
    NoPlace {
        /// A service that asks for it.
        service: String,
        /// The address.
        address: IpAddr,
        /// Why not.
        cause: String,
    },
    /// An announced address could not be changed.
    #[error("{address} could not be {done} {interface}: {cause}")]
    Address {
        /// The address.
        address: IpAddr,
        /// What was tried.
        done: &'static str,
        /// The interface.
        interface: String,
        /// The kernel's word.
        cause: String,
    },
    /// An interface whose frames are no Ethernet frames.
    #[error("interface {0} has no Ethernet address: it cannot carry what bgswitch rewrites")]
    NotEthernet(String),
    /// Native XDP is not to be had.
    #[error("XDP could not be attached to {interface} in {mode} mode: {cause}")]
    Attach {
        /// The interface.
        interface: String,
        /// `native` or `generic`.
        mode: &'static str,
        /// The kernel's word.
        cause: String,
    },
    /// The library attached without a link that outlives us.
    #[error(
        "the kernel gave no BPF link for {0}: forwarding would end with the daemon, so it was not attached (kernel 5.9 or newer is needed)"
    )]
    NotPinnable(String),
    /// More than a table holds.
    #[error("{what}: {wanted} are needed, {limit} fit")]
    Full {
        /// Of what.
        what: &'static str,
        /// How many.
        wanted: usize,
        /// How many fit.
        limit: usize,
    },
    /// No such service in the packet path.
    #[error("there is no service `{0}` in the packet path")]
    UnknownService(String),
    /// A step failed.
    #[error("{what}: {cause}")]
    Step {
        /// Of what.
        what: String,
        /// Why.
        cause: String,
    },
}

impl Error {
    /// A step that failed.
    pub(crate) fn step(what: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self::Step {
            what: what.into(),
            cause: cause.to_string(),
        }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |cause| match cause.kind() {
            io::ErrorKind::PermissionDenied => Self::NotPermitted {
                what,
                cause: cause.to_string(),
            },
            _ => Self::step(what, cause),
        }
    }

    /// A call to BPF that failed, other than loading a program: there, a lack of
    /// permission cannot be told from the verifier's refusal.
    pub(crate) fn bpf(what: impl Into<String>, error: &(dyn StdError + 'static)) -> Self {
        let (what, cause) = (what.into(), describe(error));
        let mut error = Some(error);
        while let Some(inner) = error {
            let os = inner.downcast_ref::<io::Error>();
            if os.is_some_and(|os| os.kind() == io::ErrorKind::PermissionDenied) {
                return Self::NotPermitted { what, cause };
            }
            error = inner.source();
        }
        Self::Step { what, cause }
    }
}

/// An error with its causes, in one line.
pub(super) fn describe(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Why a word was not stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Somebody else changed the word in between.
    #[error("the service changed meanwhile: it is at generation {}", .0.generation())]
    Conflict(CutoverWord),
    /// No such service.
    #[error("there is no service `{0}` in the packet path")]
    UnknownService(String),
}
