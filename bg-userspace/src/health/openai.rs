//! A real completion of one token from an OpenAI-compatible server: nothing less
//! proves that its model computes.

use std::{fmt, net::SocketAddr, path::PathBuf};

use hyper::{
    Method,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use serde_json::{Value, json};

use super::{Outcome, Trouble, http, tidy};
use crate::file;

/// `kind = "openai"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenAiProbe {
    /// The model.
    pub model: String,
    /// Where completions are; one that ends in `/chat/completions` gets a message, any
    /// other a prompt.
    pub path: String,
    /// The `Host` header; the endpoint if absent.
    pub host: Option<String>,
    /// A file with the bearer token, read for each probe.
    pub token_file: Option<PathBuf>,
}

impl fmt::Display for OpenAiProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "model {}, path {}", self.model, self.path)?;
        if let Some(host) = &self.host {
            write!(f, ", host {host}")?;
        }
        match &self.token_file {
            Some(file) => write!(f, ", token_file {}", file.display()),
            None => Ok(()),
        }
    }
}

/// Asks for one token, and checks that there is one.
pub async fn probe(endpoint: SocketAddr, probe: &OpenAiProbe) -> Outcome {
    let mut request = http::get(endpoint, probe.host.as_deref(), &probe.path)
        .method(Method::POST)
        .header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(file) = &probe.token_file {
        let bearer = file::bearer(file).await;
        let bearer = bearer.map_err(|error| Trouble::Ours(tidy(&error)))?;
        request = request.header(AUTHORIZATION, bearer);
    }
    let mut body =
        json!({"model": probe.model, "max_tokens": 1, "temperature": 0, "stream": false});
    if probe.path.ends_with("/chat/completions") {
        body["messages"] = json!([{"role": "user", "content": "1"}]);
    } else {
        body["prompt"] = json!("1");
    }
    let answer = http::ask(endpoint, request, body.to_string().into()).await?;
    http::status(&answer, None).map_err(|trouble| match said(&answer.body) {
        Some(message) => tidy(&format!("{trouble}: {message}")),
        None => trouble,
    })?;
    let body: Value =
        serde_json::from_slice(&answer.body).map_err(|_| "the answer is no JSON".to_owned())?;
    Ok(completed(&body)?)
}

/// Whether there is a completion. Its text may be empty: the one token may be the end.
fn completed(body: &Value) -> Result<(), String> {
    let choice = body.pointer("/choices/0").unwrap_or(&Value::Null);
    let is_there = choice["text"].is_string() || choice["message"].is_object();
    if !is_there {
        return Err("the answer has no completion".to_owned());
    }
    match body.pointer("/usage/completion_tokens") {
        Some(tokens) if tokens.as_u64() == Some(0) => Err("no token was made".to_owned()),
        _ => Ok(()),
    }
}

/// What an error's body says.
fn said(body: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let messages = ["/error/message", "/message"];
    let message = messages.iter().find_map(|at| body.pointer(at)?.as_str());
    message.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::fake::{Does, answer, nobody, server};

    fn of(path: &str) -> OpenAiProbe {
        OpenAiProbe {
            model: "llama".to_owned(),
            path: path.to_owned(),
            host: None,
            token_file: None,
        }
    }

    async fn outcome(does: Does) -> Outcome {
        let (address, _requests) = server(does).await;
        probe(address, &of("/v1/completions")).await
    }

    #[tokio::test]
    async fn one_token_is_asked_for() {
        let file = std::env::temp_dir().join(format!("bgswitch-token-{}", std::process::id()));
        std::fs::write(&file, "secret\n").unwrap();
        let good = answer(200, r#"{"choices":[{"text":" 2","message":{}}]}"#);
        let (address, mut requests) = server(good).await;
        let with_token = OpenAiProbe {
            token_file: Some(file.clone()),
            ..of("/v1/completions")
        };
        assert_eq!(probe(address, &with_token).await, Ok(()));
        assert_eq!(probe(address, &of("/v1/chat/completions")).await, Ok(()));
        std::fs::remove_file(&file).unwrap();
        let unread = probe(address, &with_token).await.unwrap_err().to_string();
        assert!(
            unread.ends_with("No such file or directory (os error 2)"),
            "{unread}"
        );

        let request = requests.recv().await.unwrap();
        assert!(
            request.starts_with("POST /v1/completions HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(
            request.contains("\r\nauthorization: Bearer secret\r\n"),
            "{request}"
        );
        let asked = json!({"model": "llama", "max_tokens": 1, "temperature": 0, "stream": false,
                           "prompt": "1"});
        assert_eq!(body_of(&request), asked);
        let request = requests.recv().await.unwrap();
        let messages = json!([{"role": "user", "content": "1"}]);
        assert_eq!(body_of(&request)["messages"], messages);
        assert!(!request.contains("authorization"), "{request}");
    }

    fn body_of(request: &str) -> Value {
        serde_json::from_str(request.split("\r\n\r\n").nth(1).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn only_a_completion_is_good() {
        for (status, body, expected) in [
            (200, r#"{"choices":[{"text":""}]}"#, Ok(())),
            (
                200,
                r#"{"choices":[{"message":{"content":"2"}}],"usage":{"completion_tokens":1}}"#,
                Ok(()),
            ),
            (
                200,
                r#"{"choices":[{"text":""}],"usage":{"completion_tokens":0}}"#,
                Err("no token was made"),
            ),
            (
                200,
                r#"{"choices":[]}"#,
                Err("the answer has no completion"),
            ),
            (200, "ok", Err("the answer is no JSON")),
            (503, "", Err("HTTP status 503")),
            (
                404,
                r#"{"error":{"message":"The model `llama` does not exist."}}"#,
                Err("HTTP status 404: The model `llama` does not exist."),
            ),
        ] {
            let found = outcome(answer(status, body)).await;
            assert_eq!(
                found,
                expected.map_err(|text| text.to_owned().into()),
                "{body}"
            );
        }
    }

    #[tokio::test]
    async fn what_is_no_answer_is_bad() {
        let none = probe(nobody().await, &of("/v1/completions")).await;
        assert!(none.unwrap_err().to_string().contains("Connection refused"));
        let garbage = outcome(Does::Send(b"220 smtp ready\r\n".into())).await;
        assert!(garbage.unwrap_err().to_string().starts_with("HTTP: "));
    }
}
