//! HTTP/JSON on the Unix socket.

use std::{io, sync::Arc};

use axum::{
    Json, Router,
    extract::{ConnectInfo, Path, Query, State, connect_info::Connected},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::IncomingStream,
};
use nix::unistd::{Uid, User};
use serde::Deserialize;
use tokio::net::UnixListener;

use super::Daemon;
use crate::{
    api::{FlipRequest, History, Refusal, Reloaded, RollbackRequest, SCHEMA, exit},
    switch,
};

/// The user at the other end of the socket: the actor of the journal.
#[derive(Clone, Debug)]
struct Peer(String);

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(stream.io().peer_cred().map_or_else(
            |error| format!("unknown ({error})"),
            |credentials| {
                let uid = Uid::from_raw(credentials.uid());
                let name = User::from_uid(uid)
                    .ok()
                    .flatten()
                    .map_or_else(|| "?".to_owned(), |user| user.name);
                format!("{name}({uid})")
            },
        ))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.code {
            exit::USAGE => StatusCode::BAD_REQUEST,
            exit::CONFLICT => StatusCode::CONFLICT,
            exit::UNHEALTHY => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self)).into_response()
    }
}

pub(super) async fn serve(listener: UnixListener, daemon: Arc<Daemon>) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services/{service}", get(service))
        .route("/v1/services/{service}/flip", post(flip))
        .route("/v1/services/{service}/rollback", post(rollback))
        .route("/v1/services/{service}/flows", get(flows))
        .route("/v1/history", get(history))
        .route("/v1/reload", post(reload))
        .with_state(daemon);
    axum::serve(
        listener,
        router.into_make_service_with_connect_info::<Peer>(),
    )
    .await
}

/// Runs what reads whole tables beside the runtime, so that it never delays a flip.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Refusal::new(exit::FAILED, error.to_string())))
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
    let status = beside(move || daemon.status()).await?;
    match status
        .services
        .into_iter()
        .find(|service| service.name == name)
    {
        Some(service) => Ok((etag(service.generation), Json(service)).into_response()),
        None => Ok(StatusCode::NOT_FOUND.into_response()),
    }
}

fn etag(generation: u16) -> [(header::HeaderName, String); 1] {
    [(header::ETAG, format!("\"{generation}\""))]
}

async fn flip(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path(service): Path<String>,
    headers: HeaderMap,
    Json(mut request): Json<FlipRequest>,
) -> Result<Response, Refusal> {
    // If-Match holds the generation that GET gave as ETag; a stale one is 412.
    let matching = headers.get(header::IF_MATCH).map(|value| {
        value
            .to_str()
            .ok()
            .and_then(|text| text.trim_matches('"').parse::<u16>().ok())
    });
    match matching {
        Some(None) => {
            return Err(Refusal::new(exit::USAGE, "If-Match is no generation"));
        }
        Some(Some(generation)) => {
            if daemon
                .datapath
                .word(&service)
                .is_some_and(|word| word.generation() != generation)
            {
                let refusal = Refusal::new(
                    exit::CONFLICT,
                    format!("{service} is not at generation {generation}"),
                );
                return Ok((StatusCode::PRECONDITION_FAILED, Json(refusal)).into_response());
            }
            request.if_generation = Some(generation);
        }
        None => {}
    }
    let flipped = daemon.flip(&actor, &service, request).await?;
    Ok((etag(flipped.generation), Json(flipped)).into_response())
}

async fn rollback(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Path(service): Path<String>,
    Json(request): Json<RollbackRequest>,
) -> Result<Response, Refusal> {
    let flipped = daemon.rollback(&actor, &service, request).await?;
    Ok((etag(flipped.generation), Json(flipped)).into_response())
}

#[derive(Deserialize)]
struct FlowsQuery {
    colour: Option<String>,
}

async fn flows(
    State(daemon): State<Arc<Daemon>>,
    Path(service): Path<String>,
    Query(query): Query<FlowsQuery>,
) -> Result<Response, Refusal> {
    let colour = query.colour.as_deref().map(switch::colour).transpose()?;
    beside(move || daemon.flow_lines(&service, colour))
        .await
        .map(|flows| Json(flows).into_response())
}

async fn history(State(daemon): State<Arc<Daemon>>) -> Result<Response, Refusal> {
    beside(move || {
        let entries = daemon.journal.read().map_err(|error| {
            Refusal::new(exit::FAILED, format!("the journal cannot be read: {error}"))
        })?;
        Ok(History {
            schema: SCHEMA,
            entries,
        })
    })
    .await
    .map(|history| Json(history).into_response())
}

#[derive(Deserialize)]
struct ReloadQuery {
    #[serde(default)]
    dry_run: bool,
}

async fn reload(
    State(daemon): State<Arc<Daemon>>,
    ConnectInfo(Peer(actor)): ConnectInfo<Peer>,
    Query(query): Query<ReloadQuery>,
) -> Result<Response, Refusal> {
    let changes = daemon.reload(&actor, query.dry_run).await?;
    Ok(Json(Reloaded {
        schema: SCHEMA,
        changes,
        dry_run: query.dry_run,
    })
    .into_response())
}
