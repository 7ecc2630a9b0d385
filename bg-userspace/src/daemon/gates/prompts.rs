//! `kind = "prompts"`: what the standby answers to known questions, beside what is
//! expected, and beside what the active colour answers.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use super::{
    Progress, Target, no_port,
    wire::{Answer, Line, Question, Trouble},
};
use crate::{
    config::PromptsGate,
    golden::{self, Prompt},
    release::Verdict,
};

/// A longer answer is none.
const MAX_ANSWER: usize = 4 << 20;
/// Prompts that went wrong, of those that are told.
const TOLD: usize = 5;

/// Asks everything, and judges.
pub(super) async fn run(
    gate: &PromptsGate,
    limit: Duration,
    target: &Target,
    progress: &Progress,
) -> (Verdict, String) {
    let deadline = Instant::now() + limit;
    let (prompts, questions) = match read(&gate.file, &gate.headers).await {
        Ok(read) => read,
        Err(error) => return (Verdict::Inconclusive, error),
    };
    let lines = |colour| {
        let endpoints = target.endpoints_of(colour, gate.port)?.into_iter();
        Some(endpoints.map(Line::to).collect::<Vec<Line>>())
    };
    let (Some(standby), Some(active)) = (lines(target.colour), lines(target.colour.other())) else {
        return no_port();
    };
    let asking = Asking {
        questions: &questions,
        at_a_time: gate.concurrency as usize,
        deadline,
        progress,
    };
    // Each prompt to each backend.
    let backends = standby.len();
    let everywhere = (0..prompts.len()).flat_map(|of| (0..backends).map(move |at| (of, at)));
    let look = |of: usize, at: SocketAddr, came: Came| {
        let seen = prompts.get(of).map(|prompt| see(gate, prompt, at, &came));
        (seen, values(&gate.compare, &came))
    };
    let answers = asking.ask(&standby, everywhere.collect(), look).await;
    let mut tally = Tally::default();
    for seen in answers.iter().filter_map(|(seen, _)| seen.as_ref()) {
        tally.add(seen);
    }
    let counts = format!("{} prompts on {} backends", prompts.len(), standby.len());
    if let Some(told) = tally.verdict(&counts) {
        return told;
    }
    let seen = format!("{counts}, all right, {}", tally.times());
    if gate.compare.is_empty() {
        return (Verdict::Pass, seen);
    }
    // Backends in turn: the active colour serves meanwhile.
    let runs = gate.noise_runs as usize + 1;
    let turns = (0..prompts.len()).zip((0..active.len()).cycle());
    let turns = turns
        .flat_map(|turn| std::iter::repeat_n(turn, runs))
        .collect();
    let look = |_, _, came: Came| values(&gate.compare, &came);
    let theirs = asking.ask(&active, turns, look).await;
    let own = |of: usize| {
        let (_, values) = answers.get(of * backends + of.checked_rem(backends)?)?;
        values.as_ref().ok()
    };
    let mut agreement = Agreement::default();
    for (of, theirs) in theirs.chunks(runs).enumerate() {
        match agrees(own(of), theirs) {
            Ok((agrees, is_noisy)) => agreement.add(of, agrees, is_noisy),
            Err(trouble) => {
                let name = prompts.get(of).map_or("", |prompt| &prompt.name);
                let evidence = format!("{seen}; the active colour, {name}: {trouble}");
                return (Verdict::Inconclusive, evidence);
            }
        }
    }
    let (verdict, said) = agreement.verdict(gate, &prompts);
    (verdict, format!("{seen}; {said}"))
}

/// Reads the prompts, away from where packets are looked after, and makes requests of
/// them.
pub(super) async fn read(
    file: &Path,
    headers: &BTreeMap<String, String>,
) -> Result<(Vec<Prompt>, Vec<Question>), String> {
    let file = file.to_owned();
    let read = tokio::task::spawn_blocking(move || golden::read(&file)).await;
    let read = read.map_err(|error| format!("the prompts were not read: {error}"))?;
    let prompts = read.map_err(|error| error.to_string())?;
    let questions = prompts.iter().map(|prompt| question(prompt, headers));
    let questions = questions.collect();
    Ok((prompts, questions))
}

/// The request of a prompt.
fn question(prompt: &Prompt, headers: &BTreeMap<String, String>) -> Question {
    let mut question = Question::new(
        &prompt.method,
        &prompt.path,
        headers,
        prompt.body.as_deref(),
    );
    if prompt.body.is_some() {
        let json = HeaderValue::from_static("application/json");
        question.headers.entry(CONTENT_TYPE).or_insert(json);
    }
    question
}

/// What came of a prompt; `None`: it was not asked in time.
pub(super) type Came = Option<Result<Answer, Trouble>>;

/// Prompts on their way.
pub(super) struct Asking<'a> {
    pub(super) questions: &'a [Question],
    pub(super) at_a_time: usize,
    pub(super) deadline: Instant,
    pub(super) progress: &'a Progress,
}

impl Asking<'_> {
    /// Asks each of these questions of that of `lines`, some at a time, and looks at what comes; what
    /// was seen, in the same order.
    pub(super) async fn ask<T>(
        &self,
        lines: &[Line],
        turns: Vec<(usize, usize)>,
        look: impl Fn(usize, SocketAddr, Came) -> T,
    ) -> Vec<T> {
        let (all, done) = (turns.len(), AtomicUsize::new(0));
        let (done, look) = (&done, &look);
        let asked = stream::iter(turns).map(|(of, at)| async move {
            let line = lines.get(at)?;
            let came = self.one(of, line).await;
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            self.progress.say(format!("{done} of {all} prompts asked"));
            Some(look(of, line.endpoint, came))
        });
        let asked = asked.buffered(self.at_a_time.max(1));
        asked.filter_map(std::future::ready).collect().await
    }

    async fn one(&self, of: usize, line: &Line) -> Came {
        let question = self.questions.get(of);
        let question = question.filter(|_| Instant::now() < self.deadline)?;
        let asked = line.ask(question, Some(MAX_ANSWER));
        let came = timeout_at(self.deadline, asked).await;
        let none = || Err(Trouble::Broken("no answer in time".to_owned()));
        Some(came.unwrap_or_else(|_| none()))
    }
}

/// What was seen of an answer of the standby.
struct Seen {
    verdict: Verdict,
    /// Why it is no pass.
    trouble: String,
    first_byte: Duration,
    total: Duration,
}

/// Looks at an answer of the standby.
fn see(gate: &PromptsGate, prompt: &Prompt, at: SocketAddr, came: &Came) -> Seen {
    let not = |verdict, trouble: &dyn fmt::Display| Seen {
        verdict,
        trouble: format!("{} on {at}: {trouble}", prompt.name),
        first_byte: Duration::ZERO,
        total: Duration::ZERO,
    };
    let answer = match came {
        None => return not(Verdict::Inconclusive, &"was not asked in time"),
        Some(Err(trouble @ Trouble::Own(_))) => return not(Verdict::Inconclusive, trouble),
        Some(Err(trouble)) => return not(Verdict::Fail, trouble),
        Some(Ok(answer)) => answer,
    };
    let late = |what: &str, took: Duration, bound: Option<Duration>| {
        let bound = bound.filter(|bound| took > *bound)?;
        let bound = humantime::format_duration(bound);
        Some(format!(
            "{what} took {} ms, more than {bound}",
            took.as_millis()
        ))
    };
    let first = prompt.max_first_byte.or(gate.max_ttft);
    let total = prompt.max_total.or(gate.max_total);
    let trouble = prompt
        .expect
        .trouble(answer.status.as_u16(), &answer.body)
        .or_else(|| late("the first byte", answer.first_byte, first))
        .or_else(|| late("the answer", answer.took, total));
    if let Some(trouble) = trouble {
        return not(Verdict::Fail, &trouble);
    }
    Seen {
        verdict: Verdict::Pass,
        trouble: String::new(),
        first_byte: answer.first_byte,
        total: answer.took,
    }
}

/// What the standby's answers were.
#[derive(Default)]
struct Tally {
    wrong: Vec<String>,
    unknown: Vec<String>,
    first_byte: Duration,
    total: Duration,
}

impl Tally {
    fn add(&mut self, seen: &Seen) {
        self.first_byte = self.first_byte.max(seen.first_byte);
        self.total = self.total.max(seen.total);
        match seen.verdict {
            Verdict::Pass => {}
            Verdict::Fail => self.wrong.push(seen.trouble.clone()),
            Verdict::Inconclusive => self.unknown.push(seen.trouble.clone()),
        }
    }

    /// What speaks against a pass.
    fn verdict(&self, counts: &str) -> Option<(Verdict, String)> {
        let (verdict, what, list) = if !self.wrong.is_empty() {
            (Verdict::Fail, "wrong", &self.wrong)
        } else if !self.unknown.is_empty() {
            (Verdict::Inconclusive, "not known", &self.unknown)
        } else {
            return None;
        };
        Some((
            verdict,
            format!("{counts}, {} {what}: {}", list.len(), some_of(list)),
        ))
    }

    fn times(&self) -> String {
        let ms = |time: Duration| time.as_millis();
        format!(
            "first byte within {} ms, all within {} ms",
            ms(self.first_byte),
            ms(self.total)
        )
    }
}

/// The first ones of a list.
fn some_of(list: &[String]) -> String {
    let told: Vec<&str> = list.iter().take(TOLD).map(String::as_str).collect();
    let more = if list.len() > TOLD { "; ..." } else { "" };
    format!("{}{more}", told.join("; "))
}

/// What an answer says at the places that are compared.
type Values = Result<Vec<Value>, String>;

fn values(pointers: &[String], came: &Came) -> Values {
    let answer = match came {
        _ if pointers.is_empty() => return Ok(Vec::new()),
        None => return Err("was not asked in time".to_owned()),
        Some(Err(trouble)) => return Err(trouble.to_string()),
        Some(Ok(answer)) => answer,
    };
    if !answer.status.is_success() {
        return Err(format!("answered {}", answer.status.as_u16()));
    }
    let json: Value =
        serde_json::from_slice(&answer.body).map_err(|_| "answered no JSON".to_owned())?;
    let value = |at: &String| {
        let value = json.pointer(at).cloned();
        value.ok_or_else(|| format!("answered without {at}"))
    };
    pointers.iter().map(value).collect()
}

/// Whether the standby says what the active colour says, in any of its runs, and whether
/// those differ among themselves; an error when the active colour does not answer. A
/// standby that says nothing, agrees with nobody.
fn agrees(own: Option<&Vec<Value>>, theirs: &[Values]) -> Result<(bool, bool), String> {
    let theirs: Vec<&Vec<Value>> = theirs
        .iter()
        .map(|values| values.as_ref().map_err(Clone::clone))
        .collect::<Result<_, _>>()?;
    let first = *theirs.first().ok_or("was not asked")?;
    let is_noisy = theirs.iter().any(|other| *other != first);
    Ok((own.is_some_and(|own| theirs.contains(&own)), is_noisy))
}

/// How the colours agree.
#[derive(Default)]
struct Agreement {
    prompts: u64,
    differ: Vec<usize>,
    noisy: u64,
}

impl Agreement {
    fn add(&mut self, prompt: usize, agrees: bool, is_noisy: bool) {
        self.prompts += 1;
        self.noisy += u64::from(is_noisy);
        if !agrees {
            self.differ.push(prompt);
        }
    }

    fn verdict(&self, gate: &PromptsGate, prompts: &[Prompt]) -> (Verdict, String) {
        let (all, noisy, differ) = (self.prompts, self.noisy, self.differ.len() as u64);
        let seen = format!(
            "{} of {all} agree with the active colour, which disagrees with itself on {noisy}",
            all - differ
        );
        if noisy >= all {
            let said = format!("{seen}: that says nothing");
            return (Verdict::Inconclusive, said);
        }
        if !gate
            .tolerance
            .is_exceeded(differ.saturating_sub(noisy), all)
        {
            return (Verdict::Pass, seen);
        }
        let names = self.differ.iter().filter_map(|of| prompts.get(*of));
        let names: Vec<String> = names.map(|prompt| prompt.name.clone()).collect();
        (
            Verdict::Fail,
            format!("{seen}: they differ on {}", some_of(&names)),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::tests::target, *};
    use crate::{
        config::Share,
        health::fake::{Does, answer, nobody, talking},
    };

    /// A gate with a file of these lines, and what it says of green, beside blue.
    async fn said_of(
        lines: &[&str],
        compare: &[&str],
        [blue, green]: [SocketAddr; 2],
    ) -> (Verdict, String) {
        let mut target = target(green);
        let mut backend = target.plan.colours[1][0];
        (backend.address, backend.port) = (blue.ip(), Some(blue.port()));
        target.plan.colours[0] = vec![backend];
        let name = format!("bgswitch-prompts-{}-{}", std::process::id(), green.port());
        let file = std::env::temp_dir().join(name);
        fs::write(&file, lines.join("\n")).unwrap();
        let gate = PromptsGate {
            file: file.clone(),
            port: None,
            headers: BTreeMap::new(),
            concurrency: 4,
            max_ttft: None,
            max_total: Some(Duration::from_mins(1)),
            compare: compare.iter().map(|at| (*at).to_owned()).collect(),
            noise_runs: 2,
            tolerance: Share(0),
        };
        let progress = Progress::default();
        let said = run(&gate, Duration::from_mins(1), &target, &progress).await;
        fs::remove_file(file).unwrap();
        said
    }

    /// A server that says what was asked for, and more where it is noisy.
    async fn server(more: impl Fn(&str) -> String + Clone + Send + 'static) -> SocketAddr {
        let does = move |request: &str| {
            let path = request.split(' ').nth(1).unwrap().to_owned();
            answer(200, &format!("{{\"text\":\"{path}{}\"}}", more(&path)))
        };
        talking(does).await.0
    }

    async fn steady() -> SocketAddr {
        server(|_| String::new()).await
    }

    #[tokio::test]
    async fn each_answer_must_be_as_expected() {
        let lines = [
            r#"{"path": "/a", "body": {"x": 1}, "expect": {"json": {"/text": "/a"}}}"#,
            r#"{"name": "b", "path": "/b", "expect": {"matches": ["/b"]}}"#,
        ];
        let both = [nobody().await, steady().await];
        let (verdict, seen) = said_of(&lines, &[], both).await;
        assert_eq!(verdict, Verdict::Pass, "{seen}");
        assert!(
            seen.starts_with("2 prompts on 1 backends, all right, first byte"),
            "{seen}"
        );
        let both = [nobody().await, server(|path| path.replace("/a", "")).await];
        let (verdict, seen) = said_of(&lines[..1], &[], both).await;
        assert_eq!(verdict, Verdict::Pass, "{seen}");
        let both = [nobody().await, server(|_| "!".to_owned()).await];
        let (verdict, seen) = said_of(&lines, &[], both).await;
        assert_eq!(verdict, Verdict::Fail);
        assert!(seen.contains("1 wrong: line 1 on "), "{seen}");
        assert!(seen.contains(": /text is \"/a!\", not \"/a\""), "{seen}");
        let hurried = r#"{"path": "/a", "max_total": "1ns"}"#;
        let (verdict, seen) = said_of(&[hurried], &[], [nobody().await, steady().await]).await;
        assert_eq!(verdict, Verdict::Fail);
        assert!(seen.contains("more than 1ns"), "{seen}");
        let (verdict, seen) = said_of(&["{}"], &[], [nobody().await, steady().await]).await;
        assert_eq!(verdict, Verdict::Inconclusive);
        assert!(seen.contains(":1: missing field `path`"), "{seen}");
    }

    #[tokio::test]
    async fn the_standby_may_disagree_no_more_than_the_active_colour_with_itself() {
        let lines = [
            r#"{"path": "/a"}"#,
            r#"{"path": "/b"}"#,
            r#"{"path": "/c"}"#,
        ];
        let compare = ["/text"];
        let (verdict, seen) = said_of(&lines, &compare, [steady().await, steady().await]).await;
        assert_eq!(verdict, Verdict::Pass, "{seen}");
        assert!(seen.contains("3 of 3 agree"), "{seen}");
        let other = |path: &str| {
            if path.contains('b') {
                "!".to_owned()
            } else {
                String::new()
            }
        };
        let both = [steady().await, server(other).await];
        let (verdict, seen) = said_of(&lines, &compare, both).await;
        assert_eq!(verdict, Verdict::Fail);
        assert!(seen.contains("2 of 3 agree"), "{seen}");
        assert!(seen.ends_with("they differ on line 2"), "{seen}");
        // As much noise as the difference.
        let counter = std::sync::Arc::new(AtomicUsize::new(0));
        let noisy = move |path: &str| {
            let count = counter.fetch_add(1, Ordering::Relaxed);
            if path.contains('b') {
                count.to_string()
            } else {
                String::new()
            }
        };
        let both = [server(noisy).await, server(other).await];
        let (verdict, seen) = said_of(&lines, &compare, both).await;
        assert_eq!(verdict, Verdict::Pass, "{seen}");
        assert!(seen.contains("disagrees with itself on 1"), "{seen}");
    }

    #[tokio::test]
    async fn no_data_is_never_a_pass() {
        let lines = [r#"{"path": "/a"}"#];
        let silent = nobody().await;
        let (verdict, seen) = said_of(&lines, &["/text"], [silent, steady().await]).await;
        assert_eq!(verdict, Verdict::Inconclusive);
        assert!(
            seen.contains("the active colour, line 1: cannot be reached"),
            "{seen}"
        );
        let (verdict, _) = said_of(&lines, &[], [steady().await, silent]).await;
        assert_eq!(verdict, Verdict::Fail);
        let (verdict, seen) = said_of(&lines, &["/no"], [steady().await, steady().await]).await;
        assert_eq!(verdict, Verdict::Inconclusive);
        assert!(seen.contains("answered without /no"), "{seen}");
        let torn = talking(|_: &str| Does::Send(Vec::new())).await.0;
        let (verdict, seen) = said_of(&lines, &[], [steady().await, torn]).await;
        assert_eq!(verdict, Verdict::Fail, "{seen}");
    }
}
