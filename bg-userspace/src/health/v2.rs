//! The Open Inference Protocol over HTTP (KServe, Triton, MLServer, OpenVINO): the
//! server's readiness, and that of models.

use std::{fmt, net::SocketAddr};

use hyper::body::Bytes;
use serde_json::Value;

use super::{Outcome, http, tidy};
use crate::uri::escaped;

/// `kind = "v2"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct V2Probe {
    /// The models that must be ready.
    pub models: Vec<String>,
    /// The `Host` header; the endpoint if absent.
    pub host: Option<String>,
}

impl fmt::Display for V2Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "models [{}]", self.models.join(", "))?;
        match &self.host {
            Some(host) => write!(f, ", host {host}"),
            None => Ok(()),
        }
    }
}

/// Asks the server, then for each model.
pub async fn probe(endpoint: SocketAddr, probe: &V2Probe) -> Outcome {
    ready(endpoint, probe, "/v2/health/ready")
        .await
        .map_err(|trouble| trouble.told(|text| format!("the server is not ready: {text}")))?;
    for model in &probe.models {
        ready(
            endpoint,
            probe,
            &format!("/v2/models/{}/ready", escaped(model)),
        )
        .await
        .map_err(|trouble| trouble.told(|text| tidy(&format!("{model} is not ready: {text}"))))?;
    }
    Ok(())
}

/// Ready is 2xx; KServe also says `{"ready": false}` with 200.
async fn ready(endpoint: SocketAddr, probe: &V2Probe, path: &str) -> Outcome {
    let request = http::get(endpoint, probe.host.as_deref(), path);
    let answer = http::ask(endpoint, request, Bytes::new()).await?;
    http::status(&answer, None)?;
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    match body.get("ready") {
        None | Some(Value::Bool(true)) => Ok(()),
        Some(other) => Err(tidy(&format!("it says that \"ready\" is {other}")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::fake::{Does, answer, nobody, server, talking};

    fn of(models: &[&str]) -> V2Probe {
        V2Probe {
            models: models.iter().map(|model| (*model).to_owned()).collect(),
            host: None,
        }
    }

    /// A server that is ready, whose models are ready but for one.
    fn triton(request: &str) -> Does {
        match request.split(' ').nth(1) {
            Some("/v2/health/ready" | "/v2/models/llama/ready" | "/v2/models/a%2Fb/ready") => {
                answer(200, "")
            }
            _ => answer(400, ""),
        }
    }

    #[tokio::test]
    async fn server_and_models_must_be_ready() {
        let (address, mut requests) = talking(triton).await;
        assert_eq!(probe(address, &of(&["llama", "a/b"])).await, Ok(()));
        for path in [
            "/v2/health/ready",
            "/v2/models/llama/ready",
            "/v2/models/a%2Fb/ready",
        ] {
            let request = requests.recv().await.unwrap();
            assert!(
                request.starts_with(&format!("GET {path} HTTP/1.1\r\n")),
                "{request}"
            );
        }
        assert_eq!(
            probe(address, &of(&["llama", "embed"])).await,
            Err("embed is not ready: HTTP status 400".to_owned().into())
        );
    }

    #[tokio::test]
    async fn who_says_that_it_is_not_ready_is_believed() {
        for (body, expected) in [
            ("{\"ready\":true}", Ok(())),
            ("{\"live\":true}", Ok(())),
            ("", Ok(())),
            (
                "{\"ready\":false}",
                Err("the server is not ready: it says that \"ready\" is false"
                    .to_owned()
                    .into()),
            ),
        ] {
            let (address, _requests) = server(answer(200, body)).await;
            assert_eq!(probe(address, &of(&[])).await, expected, "{body}");
        }
    }

    #[tokio::test]
    async fn what_is_no_answer_is_bad() {
        let refused = probe(nobody().await, &of(&[]))
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("Connection refused"), "{refused}");
        let (address, _requests) = server(Does::Send(b"\0\0\0\0\r\n".into())).await;
        let garbage = probe(address, &of(&[])).await.unwrap_err().to_string();
        assert!(
            garbage.starts_with("the server is not ready: HTTP: "),
            "{garbage}"
        );
    }
}
