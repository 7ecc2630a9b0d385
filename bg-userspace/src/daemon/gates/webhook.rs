//! `kind = "webhook"`: a service of the operator's is asked, over HTTP without TLS.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    sync::{Arc, LazyLock},
    time::Duration,
};

use bg_common::service::Colour;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER};
use serde::Deserialize;
use serde_json::json;
use tokio::{
    sync::Semaphore,
    task::spawn_blocking,
    time::{Instant, sleep, timeout_at},
};

use super::{
    Progress, Target,
    wire::{Answer, Line, Question, Trouble},
};
use crate::{
    config::WebhookGate,
    file,
    health::tidy_to,
    release::{State, Verdict},
};

/// A longer answer is none.
const MAX_ANSWER: usize = 64 << 10;
/// When it is asked again, unless it says so itself.
const AGAIN: Duration = Duration::from_secs(5);
/// How often in a row it may be unreachable, or in trouble.
const TRIES: u32 = 3;
/// How long a connection may take, where there is another address.
const CONNECTED_WITHIN: Duration = Duration::from_secs(1);
/// Characters of what it says.
const SAID: usize = 1000;

/// Asks until there is an answer, or the time is over.
pub(super) async fn run(
    gate: &WebhookGate,
    limit: Duration,
    target: &Target,
    progress: &Progress,
) -> (Verdict, String) {
    let deadline = Instant::now() + limit;
    let mut failures = 0;
    loop {
        let asked = timeout_at(deadline, ask(gate, target)).await;
        let answer = asked.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        let heard = answer.map_or_else(Heard::Trouble, |answer| heard(&answer));
        let (again, said) = match heard {
            Heard::Said(verdict, why) => return (verdict, why),
            Heard::Later(again) => {
                failures = 0;
                (again, "it is in progress".to_owned())
            }
            Heard::Trouble(said) => {
                failures += 1;
                (AGAIN, said)
            }
        };
        if failures >= TRIES || Instant::now() + again >= deadline {
            // A query may hold a secret.
            let url = gate.url.split('?').next().unwrap_or_default();
            let said = format!("{url} has not said it: {said}");
            return (Verdict::Inconclusive, said);
        }
        progress.say(said);
        sleep(again).await;
    }
}

/// Asks once.
async fn ask(gate: &WebhookGate, target: &Target) -> Result<Answer, String> {
    let (authority, path) = gate.parts();
    let mut question = Question::new("POST", path, [], Some(&body(target)));
    let json = HeaderValue::from_static("application/json");
    question.headers.insert(CONTENT_TYPE, json);
    if let Some(file) = &gate.token_file {
        let bearer = file::bearer(file).await?;
        question.headers.insert(AUTHORIZATION, bearer);
    }
    ask_at(&authority, question, MAX_ANSWER).await
}

/// Asks a host and port, by the first of its addresses that can be reached; keeps `most`
/// bytes of the answer.
pub(super) async fn ask_at(
    authority: &str,
    mut question: Question,
    most: usize,
) -> Result<Answer, String> {
    let addresses = look_up(authority.to_owned()).await?;
    let host = HeaderValue::from_str(authority).map_err(|error| error.to_string())?;
    question.headers.insert(HOST, host);
    ask_any(&addresses, &question, most).await
}

/// Asks the first of some addresses that can be reached.
async fn ask_any(
    addresses: &[SocketAddr],
    question: &Question,
    most: usize,
) -> Result<Answer, String> {
    let mut said = Vec::new();
    for (number, address) in (1..).zip(addresses) {
        // One that swallows what it is sent leaves time for those behind it.
        let within = (number < addresses.len()).then_some(CONNECTED_WITHIN);
        let line = Line::within(*address, within);
        match line.ask(question, Some(most)).await {
            Err(trouble @ (Trouble::Unreachable(_) | Trouble::Own(_))) => {
                said.push(trouble.to_string());
            }
            answer => return answer.map_err(|trouble| trouble.to_string()),
        }
    }
    if said.is_empty() {
        return Err("has no address".to_owned());
    }
    said.dedup();
    Err(said.join(", "))
}

/// Names that are looked up at one time. Each look-up has a thread until it ends, and
/// nobody can end it: with a dead name server the daemon would have no threads left.
static LOOK_UPS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(16)));

/// The addresses of a host and port.
async fn look_up(authority: String) -> Result<Vec<SocketAddr>, String> {
    let permit = Arc::clone(&LOOK_UPS).acquire_owned().await;
    let permit = permit.map_err(|error| error.to_string())?;
    let looked = spawn_blocking(move || {
        let _permit = permit;
        Ok::<_, io::Error>(authority.to_socket_addrs()?.collect())
    });
    let found = looked.await.map_err(|error| error.to_string())?;
    found.map_err(|error| format!("is not known: {error}"))
}

/// What it is told.
fn body(target: &Target) -> String {
    let of = |colour: Colour| {
        let backends = target.servers_of(colour);
        json!({
            "colour": colour.as_str(),
            "version": target.versions[colour as usize],
            "backends": backends,
            "preview": target.preview_of(colour),
        })
    };
    let state = target
        .hook
        .as_ref()
        .map_or(State::Validating, |of| of.state);
    let mut told = of(target.colour);
    told["service"] = json!(target.plan.name);
    told["release"] = json!(target.release);
    told["state"] = json!(state.as_str());
    if let Some(moment) = &target.hook {
        let old = target.colour.other();
        told["when"] = json!(moment.when.as_str());
        told["active"] = json!(moment.active.as_str());
        told["canary_percent"] = json!(moment.canary_percent);
        told["flows"] = json!(moment.flows[target.colour as usize]);
        told["old"] = of(old);
        told["old"]["flows"] = json!(moment.flows[old as usize]);
    }
    told.to_string()
}

/// What an answer means.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// The verdict, and why.
    Said(Verdict, String),
    /// It does not know yet: it is asked again after so long.
    Later(Duration),
    /// Nothing of use.
    Trouble(String),
}

#[derive(Deserialize)]
struct Said {
    result: Verdict,
    why: Option<String>,
}

/// 2xx without a body passes, with one it says so itself; 202 is not the end, and 4xx
/// fails, but for those that ask for another try.
fn heard(answer: &Answer) -> Heard {
    let status = answer.status.as_u16();
    let text = String::from_utf8_lossy(&answer.body);
    let text = tidy_to(text.trim(), SAID);
    let told = match text.as_str() {
        "" => format!("answered {status}"),
        text => format!("answered {status}: {text}"),
    };
    match status {
        202 => {
            let after = answer.headers.get(RETRY_AFTER);
            let seconds = after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
            Heard::Later(seconds.map_or(AGAIN, |s: u64| Duration::from_secs(s.clamp(1, 3600))))
        }
        200..=299 if answer.body.iter().all(u8::is_ascii_whitespace) => {
            Heard::Said(Verdict::Pass, told)
        }
        200..=299 => said_in(&answer.body, &told),
        // Not now, is no answer (RFC 9110, RFC 8470, RFC 6585).
        408 | 425 | 429 => Heard::Trouble(told),
        400..=499 => Heard::Said(Verdict::Fail, told),
        _ => Heard::Trouble(told),
    }
}

/// What a body says; another one says something, but not that all is well.
fn said_in(body: &[u8], told: &str) -> Heard {
    if let Ok(said) = serde_json::from_slice::<Said>(body) {
        let why = said.why.unwrap_or_else(|| "without a reason".to_owned());
        return Heard::Said(said.result, tidy_to(&why, SAID));
    }
    let told = format!("{told}, which is no {{\"result\": \"pass\"}}");
    Heard::Said(Verdict::Inconclusive, told)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::{super::tests::target, *};
    use crate::health::fake::{Does, answer, nobody, talking};

    /// Statuses and bodies.
    type Answers = &'static [(u16, &'static str)];

    /// What comes of it when these are the answers, the last one for ever.
    async fn said_of(
        answers: &'static [(u16, &'static str)],
        limit: u64,
    ) -> (Verdict, String, String) {
        let asked = Arc::new(AtomicUsize::new(0));
        let does = move |_: &str| {
            let number = asked.fetch_add(1, Ordering::Relaxed).min(answers.len() - 1);
            let (status, body) = answers[number];
            if status == 202 {
                let head = "HTTP/1.1 202 Accepted\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n";
                return Does::Send(head.as_bytes().to_vec());
            }
            answer(status, body)
        };
        let (address, mut requests) = talking(does).await;
        let gate = WebhookGate {
            url: format!("http://{address}/hook?x=1"),
            token_file: None,
        };
        let target = target(([10, 0, 2, 10], 8000).into());
        let limit = Duration::from_secs(limit);
        let (verdict, said) = run(&gate, limit, &target, &Progress::default()).await;
        (verdict, said, requests.recv().await.unwrap_or_default())
    }

    #[tokio::test]
    async fn of_many_addresses_the_first_that_can_be_reached_is_asked() {
        let (address, mut requests) = talking(|_| answer(204, "")).await;
        let (other, mut unasked) = talking(|_| answer(500, "")).await;
        let question = Question::new("GET", "/", [], None);
        let (first, second) = (nobody().await, nobody().await);
        let answered = ask_any(&[first, second, address, other], &question, 10).await;
        assert_eq!(answered.unwrap().status.as_u16(), 204);
        assert!(requests.recv().await.is_some());
        assert!(unasked.try_recv().is_err());
        let said = ask_any(&[first, second], &question, 10).await.unwrap_err();
        assert!(said.starts_with("cannot be reached: "), "{said}");
        // And by a name.
        let named = format!("localhost:{}", address.port());
        let answered = ask_at(&named, question, 10).await;
        assert_eq!(answered.unwrap().status.as_u16(), 204);
    }

    #[tokio::test]
    async fn it_says_it_itself_and_no_answer_is_no_pass() {
        use Verdict::*;
        let all: [(Answers, Verdict, &str); 9] = [
            (&[(200, "")], Pass, "answered 200"),
            (&[(204, "")], Pass, "answered 204"),
            (
                &[(200, r#"{"result": "pass", "why": "all is well"}"#)],
                Pass,
                "all is well",
            ),
            (&[(200, r#"{"result": "fail", "why": "p99"}"#)], Fail, "p99"),
            (
                &[(200, r#"{"result": "inconclusive"}"#)],
                Inconclusive,
                "without a reason",
            ),
            (
                &[(200, "ok")],
                Inconclusive,
                "answered 200: ok, which is no",
            ),
            (&[(403, "no")], Fail, "answered 403: no"),
            (&[(202, ""), (202, ""), (200, "")], Pass, "answered 200"),
            (&[(500, "")], Inconclusive, " has not said it: answered 500"),
        ];
        for (answers, verdict, evidence) in all {
            let limit = if answers[0].0 == 500 { 1 } else { 60 };
            let (is, said, request) = said_of(answers, limit).await;
            assert_eq!(is, verdict, "{said}");
            assert!(said.contains(evidence), "{said}");
            assert!(
                request.starts_with("POST /hook?x=1 HTTP/1.1\r\n"),
                "{request}"
            );
            assert!(request.ends_with(
                r#"{"backends":["10.0.2.10:8000"],"colour":"green","preview":[],"release":"r-1","service":"llm","state":"VALIDATING","version":null}"#
            ), "{request}");
        }
        let gate = WebhookGate {
            url: format!("http://{}/", nobody().await),
            token_file: None,
        };
        let target = target(([10, 0, 2, 10], 8000).into());
        let limit = Duration::from_secs(1);
        let (is, said) = run(&gate, limit, &target, &Progress::default()).await;
        assert_eq!(is, Inconclusive);
        assert!(said.contains("cannot be reached"), "{said}");
    }
}
