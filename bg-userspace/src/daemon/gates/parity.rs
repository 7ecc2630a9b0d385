//! `[service.NAME.parity]`: whether both colours are the same where they should be.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use bg_common::service::Colour;
use futures_util::{StreamExt as _, stream};
use serde_json::Value;
use similar::{ChangeTag, TextDiff};
use tokio::time::{Instant, timeout_at};

use super::{
    AT_ONCE, Target, exec, no_port,
    wire::{Line, Question, Trouble},
};
use crate::{config::ParityGate, health::tidy_to, release::Verdict};

/// A longer answer is not compared.
const MAX_ANSWER: usize = 1 << 20;
/// Differences that are told.
const TOLD: usize = 20;
/// Characters of one of them.
const LENGTH: usize = 160;
/// How long two texts are compared line by line, before it is done coarsely.
const COMPARING: Duration = Duration::from_secs(1);

/// Compares the colours: what their backends answer, and what a command says of them.
pub(super) async fn run(gate: &ParityGate, limit: Duration, target: &Target) -> (Verdict, String) {
    let deadline = Instant::now() + limit;
    let (old, new) = (target.colour.other(), target.colour);
    let mut found = Found::default();
    for path in &gate.compare {
        let (Some(theirs), Some(own)) = (
            target.endpoints_of(old, gate.port),
            target.endpoints_of(new, gate.port),
        ) else {
            return no_port();
        };
        let (theirs, own) = tokio::join!(
            said(gate, path, theirs, deadline),
            said(gate, path, own, deadline)
        );
        let (gate, path) = (gate.clone(), path.clone());
        found = apart(found, move |found| {
            found.answers(&gate, &path, &[(old, theirs), (new, own)]);
        })
        .await;
    }
    if let Some(command) = &gate.command {
        let mut texts = Vec::new();
        for colour in [old, new] {
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = exec::finish(command, left, &target.environment(colour), MAX_ANSWER).await;
            match ended {
                Ok(ended) if ended.status.success() => match ended.text() {
                    Some(text) => texts.push(text),
                    None => found.unknown.push(format!(
                        "the command for {}: it wrote nothing, more than 1 MiB, or left its output open",
                        colour.as_str()
                    )),
                },
                Ok(ended) => {
                    let status = ended.status;
                    found
                        .unknown
                        .push(format!("the command for {}: {status}", colour.as_str()));
                }
                Err(trouble) => found.unknown.push(format!("the command: {trouble}")),
            }
        }
        if let [theirs, own] = texts.as_slice() {
            let names = [old.as_str(), new.as_str()];
            let texts = [theirs.clone(), own.clone()];
            let allow = gate.allow.clone();
            found = apart(found, move |found| {
                found.compared += 1;
                found.texts("command", names, texts.each_ref(), &allow);
            })
            .await;
        }
    }
    found.verdict(old)
}

/// Compares beside the runtime: nobody who flips or rolls back waits for it.
async fn apart(mut found: Found, work: impl FnOnce(&mut Found) + Send + 'static) -> Found {
    let worked = tokio::task::spawn_blocking(move || {
        work(&mut found);
        found
    });
    worked.await.unwrap_or_else(|_| Found {
        unknown: vec!["it could not be compared".to_owned()],
        ..Found::default()
    })
}

/// What backends say of a path, in their order.
async fn said(
    gate: &ParityGate,
    path: &str,
    endpoints: Vec<SocketAddr>,
    deadline: Instant,
) -> Answers {
    let question = Question::new("GET", path, [], None);
    let question = &question;
    let ask = |endpoint| async move {
        let line = Line::to(endpoint);
        let asked = line.ask(question, Some(MAX_ANSWER));
        let none = || Err(Trouble::Broken("no answer in time".to_owned()));
        let answer = timeout_at(deadline, asked).await.unwrap_or_else(|_| none());
        let said = answer.and_then(|answer| {
            if !answer.status.is_success() {
                let status = answer.status.as_u16();
                return Err(Trouble::Broken(format!("status {status}")));
            }
            let header = |name: &String| {
                let values = answer.headers.get_all(name.as_str()).iter();
                let values: Vec<_> = values
                    .map(|v| String::from_utf8_lossy(v.as_bytes()))
                    .collect();
                (name.clone(), values.join(", "))
            };
            Ok(Said {
                headers: gate.headers.iter().map(header).collect(),
                body: String::from_utf8_lossy(&answer.body).into_owned(),
            })
        });
        (endpoint, said)
    };
    stream::iter(endpoints)
        .map(ask)
        .buffered(AT_ONCE)
        .collect()
        .await
}

/// What backends say.
type Answers = Vec<(SocketAddr, Result<Said, Trouble>)>;

/// What a backend says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    /// Of the headers that are compared.
    headers: BTreeMap<String, String>,
    body: String,
}

/// What was found.
#[derive(Default)]
struct Found {
    /// Pairs of answers that were compared.
    compared: usize,
    /// The first differences, two lines each at most, ...
    differences: Vec<String>,
    /// ... and how many there are.
    differ: usize,
    /// What the standby owes.
    wrong: Vec<String>,
    /// What nobody can say.
    unknown: Vec<String>,
}

impl Found {
    /// Compares what was answered: within each colour, then one of each.
    fn answers(&mut self, gate: &ParityGate, path: &str, colours: &[(Colour, Answers); 2]) {
        let mut firsts = Vec::new();
        for (index, (colour, answers)) in colours.iter().enumerate() {
            let mut first: Option<(&SocketAddr, &Said)> = None;
            for (endpoint, said) in answers {
                match (said, first) {
                    (Ok(said), None) => first = Some((endpoint, said)),
                    (Ok(said), Some((other, before))) => {
                        let names = [other.to_string(), endpoint.to_string()];
                        let names = [names[0].as_str(), names[1].as_str()];
                        self.said(gate, path, names, [before, said]);
                    }
                    (Err(trouble), _) => {
                        let told = format!("{path} at {endpoint}: {trouble}");
                        // Of the colour that serves, nothing is asked but its answer.
                        let is_own = matches!(trouble, Trouble::Own(_)) || index == 0;
                        let list = if is_own {
                            &mut self.unknown
                        } else {
                            &mut self.wrong
                        };
                        list.push(told);
                    }
                }
            }
            firsts.extend(first.map(|(_, said)| (colour.as_str(), said)));
        }
        if let [(old, theirs), (new, own)] = firsts.as_slice() {
            self.said(gate, path, [*old, *new], [*theirs, *own]);
        }
    }

    fn said(&mut self, gate: &ParityGate, path: &str, names: [&str; 2], of: [&Said; 2]) {
        self.compared += 1;
        for (name, value) in &of[0].headers {
            if let Some(other) = of[1].headers.get(name).filter(|other| *other != value) {
                let place = format!("{path} header {name}");
                self.differ(&place, names, [Some(value), Some(other)]);
            }
        }
        self.texts(path, names, of.map(|said| &said.body), &gate.allow);
    }

    /// Compares two texts: value by value where both are JSON's objects or arrays, but for
    /// what may differ; line by line where they are not, for 1.10 is another version than 1.1.
    fn texts(&mut self, of: &str, names: [&str; 2], texts: [&String; 2], allow: &[String]) {
        let json = texts.map(|text| {
            let value = serde_json::from_str::<Value>(text).ok();
            value.filter(|value| value.is_object() || value.is_array())
        });
        let [Some(one), Some(other)] = &json else {
            return self.lines(of, names, texts);
        };
        let [one, other] = [flat(one, allow), flat(other, allow)];
        let places: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
        for place in places {
            let values = [one.get(place), other.get(place)];
            if values[0] != values[1] {
                let place = format!("{of} {place}");
                self.differ(place.trim_end(), names, values);
            }
        }
    }

    /// Compares two texts, line by line.
    fn lines(&mut self, place: &str, names: [&str; 2], texts: [&String; 2]) {
        let diff = TextDiff::configure()
            .timeout(COMPARING)
            .diff_lines(texts[0].as_str(), texts[1].as_str());
        for change in diff.iter_all_changes() {
            let line = change.value().trim_end().to_owned();
            match change.tag() {
                ChangeTag::Equal => {}
                ChangeTag::Delete => self.differ(place, names, [Some(&line), None]),
                ChangeTag::Insert => self.differ(place, names, [None, Some(&line)]),
            }
        }
    }

    fn differ(&mut self, place: &str, names: [&str; 2], values: [Option<&String>; 2]) {
        self.differ += 1;
        if self.differences.len() == TOLD {
            return;
        }
        let line = |sign, name, value: Option<&String>| {
            let value = value?;
            Some(tidy_to(&format!("{sign} {name} {place}: {value}"), LENGTH))
        };
        let lines = [
            line('-', names[0], values[0]),
            line('+', names[1], values[1]),
        ];
        let lines: Vec<String> = lines.into_iter().flatten().collect();
        self.differences.push(lines.join(" | "));
    }

    fn verdict(&self, old: Colour) -> (Verdict, String) {
        let told = |list: &[String], all: usize| {
            let more = match all.saturating_sub(TOLD) {
                0 => String::new(),
                more => format!(" | {more} more"),
            };
            let told: Vec<&str> = list.iter().take(TOLD).map(String::as_str).collect();
            format!("{}{more}", told.join(" | "))
        };
        if self.differ > 0 {
            let count = self.differ;
            let evidence = format!("{count} differences: {}", told(&self.differences, count));
            return (Verdict::Fail, evidence);
        }
        if !self.wrong.is_empty() {
            return (Verdict::Fail, told(&self.wrong, self.wrong.len()));
        }
        if !self.unknown.is_empty() {
            return (
                Verdict::Inconclusive,
                told(&self.unknown, self.unknown.len()),
            );
        }
        if self.compared == 0 {
            return (Verdict::Inconclusive, "nothing was compared".to_owned());
        }
        let evidence = format!("the same as {}: {} compared", old.as_str(), self.compared);
        (Verdict::Pass, evidence)
    }
}

/// The values in a JSON text by their places, without those that may differ. What is
/// empty, is a value.
fn flat(json: &Value, allow: &[String]) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut left = vec![(String::new(), json)];
    while let Some((place, value)) = left.pop() {
        if allow.iter().any(|pattern| fits(pattern, &place)) {
            continue;
        }
        match value {
            Value::Object(map) if !map.is_empty() => {
                let step = |name: &String| name.replace('~', "~0").replace('/', "~1");
                left.extend(
                    map.iter()
                        .map(|(name, value)| (format!("{place}/{}", step(name)), value)),
                );
            }
            Value::Array(values) if !values.is_empty() => {
                let values = values.iter().enumerate();
                left.extend(values.map(|(index, value)| (format!("{place}/{index}"), value)));
            }
            other => {
                all.insert(place, other.to_string());
            }
        }
    }
    all
}

/// Whether a place is one that a pointer names, in which `*` is any one step.
fn fits(pattern: &str, place: &str) -> bool {
    let (pattern, place) = (pattern.split('/'), place.split('/'));
    let steps = pattern.clone().zip(place.clone());
    pattern.count() == place.count()
        && steps
            .into_iter()
            .all(|(pattern, step)| pattern == "*" || pattern == step)
}

#[cfg(test)]
mod tests {
    use super::{super::tests::target, *};
    use crate::health::fake::{self, answer, nobody, server};

    fn gate() -> ParityGate {
        ParityGate {
            compare: vec!["/v2".to_owned()],
            headers: Vec::new(),
            command: None,
            allow: Vec::new(),
            port: None,
        }
    }

    /// What is said of colours with these backends.
    async fn said_of(gate: &ParityGate, colours: [&[SocketAddr]; 2]) -> (Verdict, String) {
        let mut target = target(([192, 0, 2, 1], 1).into());
        let sample = target.plan.colours[1][0];
        target.plan.colours = colours.map(|endpoints| {
            let backends = endpoints.iter().map(|at| crate::plan::BackendPlan {
                address: at.ip(),
                port: Some(at.port()),
                ..sample
            });
            backends.collect()
        });
        run(gate, Duration::from_secs(20), &target).await
    }

    async fn says(body: &str) -> SocketAddr {
        server(answer(200, body)).await.0
    }

    #[tokio::test]
    async fn what_is_the_same_passes_and_a_difference_is_shown_unless_it_is_allowed() {
        let one = says(r#"{"version": "1", "models": [{"name": "a", "at": 1}, {"name": "b", "at": 2}], "x": {}}"#).await;
        let other = says(r#"{"x": {}, "models": [{"name": "a", "at": 3}, {"name": "b", "at": 4}], "version": "2"}"#).await;
        let (verdict, seen) = said_of(&gate(), [&[one], &[one]]).await;
        assert_eq!(
            (verdict, seen.as_str()),
            (Verdict::Pass, "the same as blue: 1 compared")
        );
        let (verdict, seen) = said_of(&gate(), [&[one], &[other]]).await;
        assert_eq!(verdict, Verdict::Fail);
        assert!(
            seen.starts_with(
                "3 differences: - blue /v2 /models/0/at: 1 | + green /v2 /models/0/at: 3 | "
            ),
            "{seen}"
        );
        assert!(
            seen.ends_with("- blue /v2 /version: \"1\" | + green /v2 /version: \"2\""),
            "{seen}"
        );
        let allowing = ParityGate {
            allow: vec!["/version".to_owned(), "/models/*/at".to_owned()],
            ..gate()
        };
        let (verdict, seen) = said_of(&allowing, [&[one], &[other]]).await;
        assert_eq!(verdict, Verdict::Pass, "{seen}");
        // All backends of a colour must agree, too.
        let (verdict, seen) = said_of(&gate(), [&[one], &[one, other]]).await;
        assert_eq!(verdict, Verdict::Fail);
        assert!(
            seen.contains(&format!("- {one} /v2 /version: \"1\" | + {other} ")),
            "{seen}"
        );
    }

    #[tokio::test]
    async fn texts_are_compared_by_line_headers_and_commands_too() {
        let (one, other) = (says("a\nb\nc\n").await, says("a\nx\nc\n").await);
        let (verdict, seen) = said_of(&gate(), [&[one], &[other]]).await;
        assert_eq!(verdict, Verdict::Fail);
        assert_eq!(seen, "2 differences: - blue /v2: b | + green /v2: x");
        let named = |name: &str| {
            let head = format!("HTTP/1.1 200 OK\r\nserver: {name}\r\ncontent-length: 0\r\n\r\n");
            fake::Does::Send(head.into_bytes())
        };
        let headers = ParityGate {
            headers: vec!["server".to_owned()],
            ..gate()
        };
        let [one, other] = [server(named("a/1")).await.0, server(named("a/2")).await.0];
        let (verdict, seen) = said_of(&headers, [&[one], &[other]]).await;
        assert_eq!(verdict, Verdict::Fail);
        assert_eq!(
            seen,
            "1 differences: - blue /v2 header server: a/1 | + green /v2 header server: a/2"
        );
        let command = |script: &str| ParityGate {
            compare: Vec::new(),
            command: Some(["/bin/sh", "-c", script].map(str::to_owned).to_vec()),
            ..gate()
        };
        let (verdict, seen) = said_of(&command("echo same"), [&[], &[]]).await;
        assert_eq!(verdict, Verdict::Pass, "{seen}");
        let (verdict, seen) =
            said_of(&command("echo same; echo $BGSWITCH_COLOUR"), [&[], &[]]).await;
        assert_eq!(verdict, Verdict::Fail);
        assert_eq!(
            seen,
            "2 differences: - blue command: blue | + green command: green"
        );
        let (verdict, seen) = said_of(&command("exit 1"), [&[], &[]]).await;
        assert_eq!(verdict, Verdict::Inconclusive, "{seen}");
    }

    #[tokio::test]
    async fn no_data_is_never_a_pass() {
        let (there, silent) = (says("{}").await, nobody().await);
        assert_eq!(
            said_of(&gate(), [&[silent], &[there]]).await.0,
            Verdict::Inconclusive
        );
        assert_eq!(
            said_of(&gate(), [&[there], &[silent]]).await.0,
            Verdict::Fail
        );
        assert_eq!(said_of(&gate(), [&[], &[]]).await.0, Verdict::Inconclusive);
        // That both lack it, makes them no equals.
        let lacks = server(answer(404, "{}")).await.0;
        let (verdict, seen) = said_of(&gate(), [&[lacks], &[lacks]]).await;
        assert_ne!(verdict, Verdict::Pass, "{seen}");
    }

    #[test]
    fn a_star_is_one_step() {
        for (pattern, place, expected) in [
            ("/a/*/c", "/a/b/c", true),
            ("/a/*/c", "/a/b/b/c", false),
            ("/a", "/a/b", false),
            ("/*", "/a", true),
            ("/a", "/a", true),
        ] {
            assert_eq!(fits(pattern, place), expected, "{pattern} {place}");
        }
    }
}
