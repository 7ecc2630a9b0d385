//! `/v1/services/{service}/release/...` and `/v1/services/{service}/standby/...`.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{ConnectInfo, Path, State},
    http::{HeaderMap, Uri},
    response::Response,
    routing::{get, post},
};

use super::{Peer, Route, answer, nothing_here, order};
use crate::{
    api::{Refusal, ReleaseRequest, ReleaseStatus},
    daemon::{
        Daemon,
        release::Decision,
        requests::{body, condition},
    },
};

type Answer = Result<Json<ReleaseStatus>, Refusal>;

pub(super) fn routes() -> [Route; 5] {
    [
        ("GET", "/v1/services/{service}/release", get(status)),
        ("POST", "/v1/services/{service}/release/start", post(start)),
        (
            "POST",
            "/v1/services/{service}/release/{decision}",
            post(decide),
        ),
        (
            "POST",
            "/v1/services/{service}/standby/extend",
            post(extend),
        ),
        (
            "POST",
            "/v1/services/{service}/standby/retire",
            post(retire),
        ),
    ]
}

async fn status(
    State(daemon): State<Arc<Daemon>>,
    Path(service): Path<String>,
) -> Result<Response, Refusal> {
    answer(false, daemon.release_status(&service), |now| now.generation)
}

async fn start(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path(service): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, Refusal> {
    let mut request: ReleaseRequest = body(&bytes)?;
    let condition = condition(&headers, &mut request.if_generation)?;
    let order = order(&actor, &service, &headers);
    let started = daemon.start_release(&order, request).await;
    answer(condition, started, |now| now.generation)
}

async fn decide(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path((service, decision)): Path<(String, String)>,
    uri: Uri,
    headers: HeaderMap,
    bytes: Bytes,
) -> Answer {
    let decision = match decision.as_str() {
        "approve" => Decision::Approve,
        "reject" => Decision::Reject,
        "abort" => Decision::Abort,
        "pause" => Decision::Pause,
        "resume" => Decision::Resume,
        _ => return Err(nothing_here(uri).await),
    };
    let request = body(&bytes)?;
    let order = order(&actor, &service, &headers);
    let decided = daemon.decide(&order, decision, request).await;
    decided.map(Json)
}

async fn extend(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path(service): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Answer {
    let order = order(&actor, &service, &headers);
    let extended = daemon.extend_standby(&order, body(&bytes)?).await;
    extended.map(Json)
}

async fn retire(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path(service): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Answer {
    let (decision, request) = (Decision::Retire, body(&bytes)?);
    let order = order(&actor, &service, &headers);
    let retired = daemon.decide(&order, decision, request).await;
    retired.map(Json)
}
