//! HTTP/JSON on the Unix socket.

mod events;
#[cfg(test)]
mod openapi;
mod patience;
mod release;

use std::{convert::Infallible, io, sync::Arc};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{
        ConnectInfo, Path, Query, State, connect_info::Connected, rejection::QueryRejection,
    },
    http::{HeaderMap, HeaderName, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
    serve::IncomingStream,
};
use bg_common::monitor::EVERY_REASON;
use nix::unistd::Uid;
use serde::Serialize;
use tokio::net::UnixListener;

use self::patience::Patient;
use super::{
    Daemon,
    change::Order,
    explain as explaining,
    metrics::Trigger,
    monitor::Filter,
    requests::{
        ExplainQuery, FlowsQuery, HistoryQuery, MonitorQuery, ReloadQuery, body, condition,
        deadline, query, reasons,
    },
};
use crate::{
    api::{
        CanaryRequest, FlipRequest, History, Kind, OneService, Refusal, Reloaded, RollbackRequest,
        SCHEMA,
    },
    journal, switch,
};

/// Lines of `GET .../flows` without a `limit`.
const FLOW_LINES: usize = 1000;

/// The user at the other end of the socket: the actor of the journal.
#[derive(Clone, Debug)]
struct Peer(String);

impl Connected<IncomingStream<'_, Patient>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Patient>) -> Self {
        Self(stream.io().peer_cred().map_or_else(
            |error| format!("unknown ({error})"),
            |credentials| journal::actor(Uid::from_raw(credentials.uid())),
        ))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.kind {
            Kind::Usage => StatusCode::BAD_REQUEST,
            Kind::NotPermitted => StatusCode::FORBIDDEN,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Conflict | Kind::StaleGeneration | Kind::RolledBack => StatusCode::CONFLICT,
            Kind::Unhealthy | Kind::GateFailed | Kind::Inconclusive => {
                StatusCode::UNPROCESSABLE_ENTITY
            }
            Kind::TimedOut => StatusCode::REQUEST_TIMEOUT,
            Kind::Failed | Kind::NoDaemon | Kind::Datapath => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self)).into_response()
    }
}

pub(super) async fn serve(listener: UnixListener, daemon: Arc<Daemon>) -> io::Result<()> {
    let mut router = Router::new();
    for (_, path, handler) in routes() {
        router = router.route(path, handler);
    }
    let router = router
        .fallback(nothing_here)
        .method_not_allowed_fallback(other_method)
        .with_state(daemon);
    axum::serve(
        Patient(listener),
        router.into_make_service_with_connect_info::<Peer>(),
    )
    .await
}

/// A verb, a path, and who answers.
type Route = (&'static str, &'static str, MethodRouter<Arc<Daemon>>);

/// What there is: docs/openapi.json describes each.
fn routes() -> Vec<Route> {
    let mut routes = vec![
        ("GET", "/v1/status", get(status)),
        ("GET", "/v1/services/{service}", get(service)),
        ("POST", "/v1/services/{service}/flip", post(flip)),
        ("POST", "/v1/services/{service}/rollback", post(rollback)),
        ("POST", "/v1/services/{service}/canary", post(canary)),
        ("GET", "/v1/services/{service}/flows", get(flows)),
        ("GET", "/v1/history", get(history)),
        ("GET", "/v1/events", get(events::events)),
        ("POST", "/v1/reload", post(reload)),
        ("GET", "/v1/monitor", get(monitor)),
        ("GET", "/v1/explain", get(explain)),
    ];
    routes.extend(release::routes());
    routes
}

async fn nothing_here(uri: Uri) -> Refusal {
    Refusal::new(Kind::NotFound, format!("there is no {}", uri.path()))
}

async fn other_method(uri: Uri) -> Response {
    let message = format!("{} wants another method", uri.path());
    let refusal = Refusal::new(Kind::Usage, message);
    (StatusCode::METHOD_NOT_ALLOWED, Json(refusal)).into_response()
}

/// Runs what reads whole tables beside the runtime, so that it never delays a flip.
pub(super) async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Refusal::new(Kind::Failed, error.to_string())))
}

async fn status(State(daemon): State<Arc<Daemon>>) -> Result<Response, Refusal> {
    beside(move || daemon.status())
        .await
        .map(|status| Json(status).into_response())
}

async fn service(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    let unknown = daemon.unknown(&name);
    let service = beside(move || daemon.status_of(&name)).await?;
    let service = service.ok_or(unknown)?;
    let etag = etag(service.generation);
    let schema = SCHEMA;
    Ok((etag, Json(OneService { schema, service })).into_response())
}

/// The `ETag` is the generation: it says which colour is active, and of which flip;
/// a canary does not change it.
fn etag(generation: u16) -> [(HeaderName, String); 1] {
    [(header::ETAG, format!("\"{generation}\""))]
}

async fn flip(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path(service): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, Refusal> {
    let mut request: FlipRequest = body(&bytes)?;
    let condition = condition(&headers, &mut request.if_generation)?;
    let order = order(&actor, &service, &headers);
    let flipped = daemon.counted_flip(order, request).await;
    answer(condition, flipped, |flipped| flipped.generation)
}

async fn rollback(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path(service): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, Refusal> {
    let mut request: RollbackRequest = body(&bytes)?;
    let condition = condition(&headers, &mut request.if_generation)?;
    let order = order(&actor, &service, &headers);
    let flipped = daemon.counted_rollback(order, request).await;
    answer(condition, flipped, |flipped| flipped.generation)
}

async fn canary(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path(service): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response, Refusal> {
    let mut request: CanaryRequest = body(&bytes)?;
    let condition = condition(&headers, &mut request.if_generation)?;
    let order = order(&actor, &service, &headers);
    let canary = daemon.canary(order, request).await;
    answer(condition, canary, |canary| canary.generation)
}

fn order<'a>(actor: &'a str, service: &'a str, headers: &HeaderMap) -> Order<'a> {
    Order {
        actor,
        trigger: Trigger::Manual,
        service,
        deadline_ns: deadline(headers),
    }
}

/// A stale generation is 412 to who asked by `If-Match`, 409 to who asked by the
/// body.
fn answer<T: Serialize>(
    condition: bool,
    done: Result<T, Refusal>,
    generation: impl FnOnce(&T) -> u16,
) -> Result<Response, Refusal> {
    match done {
        Ok(done) => Ok((etag(generation(&done)), Json(done)).into_response()),
        Err(refusal) if condition && refusal.kind == Kind::StaleGeneration => {
            Ok((StatusCode::PRECONDITION_FAILED, Json(refusal)).into_response())
        }
        Err(refusal) => Err(refusal),
    }
}

async fn flows(
    State(daemon): State<Arc<Daemon>>,
    Path(service): Path<String>,
    asked: Result<Query<FlowsQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let asked = query(asked)?;
    let colour = asked.colour.as_deref().map(switch::colour).transpose()?;
    let limit = asked.limit.unwrap_or(FLOW_LINES);
    beside(move || daemon.flow_lines(&service, colour, limit, asked.all))
        .await
        .map(|flows| Json(flows).into_response())
}

async fn history(
    State(daemon): State<Arc<Daemon>>,
    asked: Result<Query<HistoryQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let wanted = query(asked)?.wanted()?;
    beside(move || {
        let last = daemon.journal.last(&wanted);
        last.map(History::from)
            .map_err(|error| Refusal::new(Kind::Failed, error.to_string()))
    })
    .await
    .map(|history| Json(history).into_response())
}

async fn reload(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    asked: Result<Query<ReloadQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let ReloadQuery { dry_run } = query(asked)?;
    let changes = daemon.reload(&actor, dry_run).await?;
    let warnings = if dry_run {
        Vec::new()
    } else {
        daemon.unreachable_backends()
    };
    Ok(Json(Reloaded {
        schema: SCHEMA,
        changes,
        warnings,
        dry_run,
    })
    .into_response())
}

/// JSON lines, for as long as somebody reads them.
async fn monitor(
    State(daemon): State<Arc<Daemon>>,
    asked: Result<Query<MonitorQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let asked = query(asked)?;
    let reasons = asked.reason.as_deref().map_or(Ok(EVERY_REASON), reasons)?;
    let sample = asked.sample.unwrap_or(1);
    if sample == 0 {
        let message = "sample: one packet of how many? 1 is every one";
        return Err(Refusal::new(Kind::Usage, message));
    }
    let service = match asked.service {
        None => None,
        Some(name) => {
            let id = daemon.datapath.service_id(&name);
            Some((id.ok_or_else(|| daemon.unknown(&name))?, name))
        }
    };
    let view = daemon.view(Filter {
        reasons,
        sample,
        service,
    })?;
    let lines = futures_util::stream::unfold(view, |mut view| async move {
        let lines = view.next().await?;
        Some((Ok::<_, Infallible>(lines), view))
    });
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((kind, Body::from_stream(lines)).into_response())
}

async fn explain(
    State(daemon): State<Arc<Daemon>>,
    asked: Result<Query<ExplainQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let asked = query(asked)?;
    let client = explaining::client(&asked.client)?;
    let listener = explaining::listener(&asked.protocol, &asked.listener)?;
    beside(move || daemon.explain(client, listener))
        .await
        .map(|explained| Json(explained).into_response())
}
