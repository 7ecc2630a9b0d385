//! What a `[service.NAME.health]` table asks for.

use std::{fmt, net::SocketAddr, time::Duration};

use super::{
    exec::ExecProbe, grpc::GrpcProbe, http::HttpProbe, openai::OpenAiProbe, v2::V2Probe,
    verdict::Rules,
};
use crate::plan::{BackendPlan, Protocol, ServicePlan};

/// The `[service.NAME.health]` table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthPlan {
    /// What is tried.
    pub probe: Probe,
    /// From the beginning of a probe to the beginning of the next one, give or take a
    /// tenth.
    pub interval: Duration,
    /// A probe that takes longer is a bad one.
    pub timeout: Duration,
    /// How many of them it takes.
    pub rules: Rules,
    /// The port that is probed; that of the packets if absent.
    pub port: Option<u16>,
}

/// What is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A connection to every TCP port of the service.
    Tcp,
    /// An HTTP request.
    Http(HttpProbe),
    /// The health service of gRPC.
    Grpc(GrpcProbe),
    /// Readiness by the Open Inference Protocol.
    V2(V2Probe),
    /// A completion of one token.
    OpenAi(OpenAiProbe),
    /// A command.
    Exec(ExecProbe),
}

impl Probe {
    /// The `kind` in the configuration.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http(_) => "http",
            Self::Grpc(_) => "grpc",
            Self::V2(_) => "v2",
            Self::OpenAi(_) => "openai",
            Self::Exec(_) => "exec",
        }
    }
}

impl HealthPlan {
    /// The ports of a backend that are probed: none where the backend serves UDP only and
    /// no port is named.
    pub fn endpoints(&self, service: &ServicePlan, backend: &BackendPlan) -> Vec<SocketAddr> {
        if let Some(port) = self.port {
            return vec![SocketAddr::new(backend.address, port)];
        }
        let mut endpoints = Vec::new();
        for listener in &service.listeners {
            let endpoint = backend.endpoint(listener);
            let is_tcp = listener.protocol == Protocol::Tcp && backend.serves(listener);
            if is_tcp && !endpoints.contains(&endpoint) {
                endpoints.push(endpoint);
            }
        }
        if self.probe != Probe::Tcp {
            endpoints.truncate(1);
        }
        endpoints
    }
}

impl fmt::Display for HealthPlan {
    /// Everything that the table says, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let duration = humantime::format_duration;
        let (interval, timeout) = (duration(self.interval), duration(self.timeout));
        let Rules { rise, fall } = self.rules;
        let kind = self.probe.kind();
        write!(
            f,
            "{kind} each {interval}, timeout {timeout}, rise {rise}, fall {fall}"
        )?;
        if let Some(port) = self.port {
            write!(f, ", port {port}")?;
        }
        match &self.probe {
            Probe::Tcp => Ok(()),
            Probe::Http(probe) => write!(f, ", {probe}"),
            Probe::Grpc(probe) => write!(f, ", {probe}"),
            Probe::V2(probe) => write!(f, ", {probe}"),
            Probe::OpenAi(probe) => write!(f, ", {probe}"),
            Probe::Exec(probe) => write!(f, ", {probe}"),
        }
    }
}
