//! Every kind of probe, against servers that fall ill and get well.

use std::{
    convert::Infallible,
    fs::{self, File},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bg_tests::{
    lab::{Lab, Place, SERVICE},
    load::{in_place, until},
};
use http_body_util::{BodyExt as _, Collected, Full};
use hyper::{
    HeaderMap, Request, Response,
    body::{Bytes, Incoming},
    header::HeaderValue,
    rt::Executor,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

const SERVER: &str = "10.0.2.10";
/// Services by their kind of probe: port, keys of the probe, and what is said of a server
/// that is ill.
const KINDS: [(&str, u16, &str, &str); 5] = [
    ("tcp", 8101, "", "refused"),
    ("grpc", 8102, "service = \"llm\"", "NOT_SERVING"),
    ("v2", 8103, "models = [\"llama\"]", "llama"),
    ("openai", 8104, "model = \"llama\"", "CUDA error"),
    (
        "exec",
        8105,
        "command = [\"/bin/sh\", \"-c\", \"test -e DIR/well || { echo it is wedged; exit 1; }\"]",
        "it is wedged",
    ),
];

/// Servers of green of which all are well, or all are ill.
struct Servers {
    lab: Lab,
    ill: Arc<AtomicBool>,
}

impl Servers {
    fn start() -> Self {
        let mut lab = Lab::new().unwrap();
        let mut text = String::new();
        for (kind, port, keys, _) in KINDS {
            let keys = keys.replace("DIR", lab.directory().to_str().unwrap());
            text = format!(
                "{text}[service.{kind}]\nlisten = [\"tcp://{SERVICE}:{port}\"]\n\
                 [service.{kind}.blue]\nbackends = [\"10.0.1.10\"]\n\
                 [service.{kind}.green]\nbackends = [\"{SERVER}\"]\n\
                 [service.{kind}.health]\nkind = \"{kind}\"\ninterval = \"200ms\"\n\
                 timeout = \"5s\"\nrise = 2\nfall = 2\n{keys}\n"
            );
        }
        text += "[[service.grpc.gate]]\nname = \"serving\"\nkind = \"grpc\"\nservice = \"llm\"\n\
                 [service.grpc.bake]\nduration = \"0s\"\nsettle = \"0s\"\n";
        let ill = Arc::new(AtomicBool::new(false));
        fs::write(lab.directory().join("well"), "").unwrap();
        let green = || lab.enter(Place::Green).unwrap();
        accepts(green(), 8101, Arc::clone(&ill));
        serves(green(), Arc::clone(&ill));
        lab.configure(&text).unwrap();
        lab.start().unwrap();
        Self { lab, ill }
    }

    fn are_ill(&self, ill: bool) {
        self.ill.store(ill, Ordering::Relaxed);
        let well = self.lab.directory().join("well");
        if ill {
            fs::remove_file(well).unwrap();
        } else {
            fs::write(well, "").unwrap();
        }
    }

    /// The server of a service in `status`.
    fn server(&self, service: &str) -> Value {
        let status = self.lab.status().unwrap();
        let mut services = status["services"].as_array().unwrap().iter();
        let service = services.find(|one| one["name"] == service).unwrap();
        service["colours"]["green"]["backends"][0].clone()
    }
}

/// Takes connections at a port while it is well.
fn accepts(namespace: File, port: u16, ill: Arc<AtomicBool>) {
    let _until_the_process_ends = in_place::<(), _>(namespace, move || async move {
        let moment = Duration::from_millis(20);
        let at: SocketAddr = format!("{SERVER}:{port}").parse()?;
        loop {
            while ill.load(Ordering::Relaxed) {
                tokio::time::sleep(moment).await;
            }
            let listener = TcpListener::bind(at).await?;
            while !ill.load(Ordering::Relaxed) {
                let _ = tokio::time::timeout(moment, listener.accept()).await;
            }
        }
    });
}

/// Answers as gRPC's, the Open Inference Protocol's and OpenAI's servers do.
fn serves(namespace: File, ill: Arc<AtomicBool>) {
    let _until_the_process_ends = in_place::<(), _>(namespace, move || async move {
        let listen = async |port: u16| TcpListener::bind((SERVER, port)).await;
        let grpc = listen(8102).await?;
        let says = Arc::clone(&ill);
        tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = grpc.accept().await {
                let says = Arc::clone(&says);
                let service =
                    service_fn(move |request| check(request, says.load(Ordering::Relaxed)));
                let connection = http2::Builder::new(Local);
                tokio::task::spawn_local(
                    connection.serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        let (v2, openai) = (listen(8103).await?, listen(8104).await?);
        loop {
            let (stream, _) = tokio::select! {
                stream = v2.accept() => stream?,
                stream = openai.accept() => stream?,
            };
            let ill = Arc::clone(&ill);
            let service = service_fn(move |request| answer(request, ill.load(Ordering::Relaxed)));
            let connection = http1::Builder::new();
            tokio::task::spawn_local(connection.serve_connection(TokioIo::new(stream), service));
        }
    });
}

/// Runs what belongs to a connection beside it.
#[derive(Clone)]
struct Local;

impl<F: Future + 'static> Executor<F> for Local {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async {
            future.await;
        });
    }
}

async fn check(
    request: Request<Incoming>,
    is_ill: bool,
) -> Result<Response<impl hyper::body::Body<Data = Bytes, Error = Infallible>>, Infallible> {
    let path = request.uri().path().to_owned();
    let asked = request.into_body().collect().await;
    let asked = asked.map(Collected::to_bytes).unwrap_or_default();
    // Field 1 of the request is the service.
    let knows = path == "/grpc.health.v1.Health/Check" && asked.ends_with(b"\x0a\x03llm");
    let mut trailers = HeaderMap::new();
    let status = if knows { "0" } else { "5" };
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    let serving = if is_ill { 2 } else { 1 };
    let message = Full::from(vec![0, 0, 0, 0, 2, 1 << 3, serving]);
    let body = message.with_trailers(async { Some(Ok(trailers)) });
    Ok(Response::builder()
        .header("content-type", "application/grpc")
        .body(body)
        .unwrap())
}

async fn answer(
    request: Request<Incoming>,
    is_ill: bool,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await;
    let body = body.map(Collected::to_bytes).unwrap_or_default();
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let (status, said) = match path.as_str() {
        "/v2/health/ready" => (200, json!({})),
        "/v2/models/llama/ready" if is_ill => (400, json!({"error": "not ready"})),
        "/v2/models/llama/ready" => (200, json!({"name": "llama", "ready": true})),
        "/v1/completions" if is_ill => (500, json!({"error": {"message": "CUDA error"}})),
        "/v1/completions" if asked["max_tokens"] == 1 && asked["model"] == "llama" => (
            200,
            json!({"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}),
        ),
        _ => (404, json!({})),
    };
    let answer = Response::builder().status(status);
    Ok(answer.body(Full::from(said.to_string())).unwrap())
}

#[test]
fn every_kind_of_probe_sees_a_server_fall_and_get_well() {
    let servers = Servers::start();
    for is_ill in [false, true, false] {
        servers.are_ill(is_ill);
        for (kind, _, _, said) in KINDS {
            let mut last = Value::Null;
            let what = format!("{kind} with ill servers: {is_ill}");
            until(&what, || {
                last = servers.server(kind);
                last["healthy"] == !is_ill && last["in_pool"].is_boolean()
            });
            assert_eq!(last["health"]["kind"], kind);
            let why = last["health"]["why"].as_str().unwrap_or_default();
            assert_eq!(why.contains(said), is_ill, "{kind}: {last}");
        }
    }
}

#[test]
fn a_gate_asks_the_health_service_of_grpc() {
    let servers = Servers::start();
    let lab = &servers.lab;
    let start = ["release", "start", "grpc", "--wait"];
    servers.are_ill(true);
    let (code, out, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 6, "{out}{err}");
    assert!(err.contains("NOT_SERVING"), "{err}");
    servers.are_ill(false);
    until("it is well", || servers.server("grpc")["healthy"] == true);
    let (code, out, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 0, "{out}{err}");
}
