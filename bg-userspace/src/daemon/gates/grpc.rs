//! `kind = "grpc"`: the standard health service of each backend.

use std::time::Duration;

use super::{Target, no_port, of_all};
use crate::{
    config::GrpcGate,
    health::{
        grpc::{GrpcProbe, probe},
        verdict::Trouble,
    },
    release::Verdict,
};

/// Asks each backend; all must say `SERVING`.
pub(super) async fn run(gate: &GrpcGate, limit: Duration, target: &Target) -> (Verdict, String) {
    let Some(endpoints) = target.endpoints(gate.port) else {
        return no_port();
    };
    let asked = GrpcProbe {
        service: gate.service.clone(),
    };
    let asked = &asked;
    let ask = |endpoint| async move {
        match probe(endpoint, asked).await {
            Ok(()) => (Verdict::Pass, "is SERVING".to_owned()),
            Err(Trouble::Theirs(trouble)) => (Verdict::Fail, trouble),
            Err(Trouble::Ours(trouble)) => (Verdict::Inconclusive, trouble),
        }
    };
    of_all(endpoints, limit, ask).await
}
