//! `GET /metrics` over TCP: who may connect may read, and do nothing else.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, PoisonError},
    time::Duration,
};

use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    task::AbortHandle,
    time::{sleep, timeout},
};

use crate::daemon::{Daemon, http::beside};

/// Who is served at once; others wait to be accepted.
const AT_ONCE: usize = 8;
/// A request's head must be here in this time.
const HEAD_WITHIN: Duration = Duration::from_secs(2);
/// And everything be over in this one.
const ALL_WITHIN: Duration = Duration::from_secs(10);
/// A head has so many bytes at most (and no body that would be read).
const HEAD_BYTES: usize = 8192;
/// Nobody is accepted for so long after that failed, for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);
const KIND: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Binds an address. An error names it, and says what to do.
pub(in crate::daemon) fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    let bound = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::AddrInUse => ": stop what listens there, or name another port",
            io::ErrorKind::AddrNotAvailable => ": name an address that this host has",
            _ => "",
        };
        format!("gateway.metrics: listening on {address}: {error}{advice}")
    })
}

/// What a reload does with the listener.
pub(in crate::daemon) enum Rebinding {
    /// The address is the same.
    Keep,
    /// Nobody may ask any more.
    Close,
    /// Another one, bound already.
    To(TcpListener),
}

impl Rebinding {
    /// Binds the new address, if it is another one; the old one is kept meanwhile.
    pub(in crate::daemon) fn prepare(
        old: Option<SocketAddr>,
        new: Option<SocketAddr>,
    ) -> Result<Self, String> {
        match new {
            _ if old == new => Ok(Self::Keep),
            None => Ok(Self::Close),
            Some(address) => bind(address).map(Self::To),
        }
    }
}

/// The listener: bound, then served.
pub(super) struct Server {
    waiting: Option<TcpListener>,
    serving: Option<AbortHandle>,
}

impl Server {
    pub(super) const fn new(waiting: Option<TcpListener>) -> Self {
        Self {
            waiting,
            serving: None,
        }
    }

    /// Nobody else is accepted.
    fn close(&mut self) {
        self.waiting = None;
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
    }
}

impl Daemon {
    /// Serves the listener that waits for it, if there is one.
    pub(in crate::daemon) fn serve_metrics(self: &Arc<Self>) -> io::Result<()> {
        let server = self.metrics.server.lock();
        let mut server = server.unwrap_or_else(PoisonError::into_inner);
        let Some(listener) = server.waiting.take() else {
            return Ok(());
        };
        let listener = tokio::net::TcpListener::from_std(listener)?;
        if let Ok(address) = listener.local_addr() {
            tracing::info!("metrics on http://{address}/metrics, for whoever may connect");
        }
        let serving = tokio::spawn(Arc::clone(self).accept(listener));
        server.serving = Some(serving.abort_handle());
        Ok(())
    }

    /// Takes another listener, or none. Who is being served gets its answer.
    pub(in crate::daemon) fn rebind_metrics(self: &Arc<Self>, rebinding: Rebinding) {
        let listener = match rebinding {
            Rebinding::Keep => return,
            Rebinding::Close => None,
            Rebinding::To(listener) => Some(listener),
        };
        let server = self.metrics.server.lock();
        let mut server = server.unwrap_or_else(PoisonError::into_inner);
        server.close();
        server.waiting = listener;
        drop(server);
        if let Err(error) = self.serve_metrics() {
            tracing::error!("gateway.metrics: {error}");
        }
    }

    async fn accept(self: Arc<Self>, listener: tokio::net::TcpListener) {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let daemon = Arc::clone(&self);
                    tokio::spawn(async move {
                        daemon.serve_one(stream).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!("gateway.metrics: accepting: {error}");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// One request, one answer.
    async fn serve_one(self: Arc<Self>, stream: TcpStream) {
        let answer = service_fn(|request| {
            let daemon = Arc::clone(&self);
            async move { Ok::<_, Infallible>(daemon.answer(&request).await) }
        });
        let mut server = http1::Builder::new();
        server
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN)
            .max_buf_size(HEAD_BYTES)
            .keep_alive(false);
        let served = server.serve_connection(TokioIo::new(stream), answer);
        // Who goes away, or sends something else than HTTP, has nothing to be told.
        let _ = timeout(ALL_WITHIN, served).await;
    }

    async fn answer(self: Arc<Self>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let plain = "text/plain; charset=utf-8";
        let (status, kind, text) = match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/metrics") => {
                match beside(move || self.metrics_text()).await {
                    Ok(text) => (StatusCode::OK, KIND, text.to_string()),
                    Err(refusal) => {
                        let text = format!("{refusal}\n");
                        (StatusCode::INTERNAL_SERVER_ERROR, plain, text)
                    }
                }
            }
            (_, "/metrics") => {
                let text = "GET is right\n".to_owned();
                (StatusCode::METHOD_NOT_ALLOWED, plain, text)
            }
            _ => {
                let text = "there is only /metrics\n".to_owned();
                (StatusCode::NOT_FOUND, plain, text)
            }
        };
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        let kind = HeaderValue::from_static(kind);
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}
