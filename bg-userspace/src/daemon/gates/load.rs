//! `kind = "load"`: requests at a rate that waits for nobody.
//!
//! The loop is open: each request has its time, whatever the servers do, and its
//! latency counts from there. A generator that waits for an answer before it asks
//! again would ask a slow server less, and show little of its slowness ("coordinated
//! omission").

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use hdrhistogram::{CreationError, Histogram};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    Progress, Target, no_port,
    wire::{Line, Question, Trouble},
};
use crate::{config::LoadGate, locked, release::Verdict};

/// Fewer answers say nothing of a 99th percentile.
const FEWEST: u64 = 20;
/// Of a hundred requests, so many must have been sent, or it was another load.
const SENT: u64 = 95;
/// Latencies are kept in microseconds, up to an hour.
const LONGEST_US: u64 = 3_600_000_000;
/// How often it says how far it is.
const SAY: Duration = Duration::from_secs(1);
/// Kinds of errors that are told apart.
const KINDS: usize = 8;

/// Sends the load, and judges by what came of it.
pub(super) async fn run(
    gate: &LoadGate,
    limit: Duration,
    target: &Target,
    progress: &Progress,
) -> (Verdict, String) {
    let Some(endpoints) = target.endpoints(gate.port) else {
        return no_port();
    };
    let lines: Vec<Arc<Line>> = endpoints
        .into_iter()
        .map(|to| Arc::new(Line::to(to)))
        .collect();
    let tally = match Tally::new() {
        Ok(tally) => Arc::new(Mutex::new(tally)),
        Err(error) => return (Verdict::Inconclusive, format!("nothing was sent: {error}")),
    };
    let mut requests = JoinSet::new();
    let began = Instant::now();
    send(gate, began, &lines, &tally, &mut requests, progress).await;
    let all = async { while requests.join_next().await.is_some() {} };
    // What has no answer by then, has none.
    let _ = timeout_at(began + limit, all).await;
    requests.shutdown().await;
    let mut tally = locked(&tally);
    tally.give_up(Instant::now());
    judge(gate, &tally)
}

/// Sends each request at its time, to one backend after the other; one that finds no
/// slot waits for it, and its latency counts from its time all the same. What was not
/// sent when the sending is over, was not sent.
async fn send(
    gate: &LoadGate,
    began: Instant,
    lines: &[Arc<Line>],
    tally: &Arc<Mutex<Tally>>,
    requests: &mut JoinSet<()>,
    progress: &Progress,
) {
    let question = Arc::new(Question::new(
        &gate.method,
        &gate.path,
        &gate.headers,
        gate.body.as_deref(),
    ));
    let slots = Arc::new(Semaphore::new(gate.concurrency as usize));
    let end = began + gate.duration;
    // When a slot was waited for last, and came.
    let mut freed = began;
    let mut say = began;
    for (number, line) in (0..gate.requests()).zip(lines.iter().cycle()) {
        let due = began + Duration::from_nanos(offset_ns(number, gate.rate));
        if Instant::now() < due {
            sleep_until(due).await;
        }
        if Instant::now() >= say {
            progress.say(locked(tally).so_far(gate.requests()));
            say += SAY;
        }
        let slot = if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
            slot
        } else {
            locked(tally).is_crowded = true;
            let free = timeout_at(end, Arc::clone(&slots).acquire_owned()).await;
            let Ok(Ok(slot)) = free else { return };
            freed = Instant::now();
            slot
        };
        let sent = Instant::now();
        if sent >= end {
            return;
        }
        let asked = Asked {
            due,
            able: due.max(freed),
            sent,
        };
        locked(tally).send(number, asked);
        while requests.try_join_next().is_some() {}
        let (line, question, tally) = (Arc::clone(line), Arc::clone(&question), Arc::clone(tally));
        let status = gate.status;
        requests.spawn(ask(number, slot, line, question, status, tally));
    }
}

async fn ask(
    number: u64,
    slot: OwnedSemaphorePermit,
    line: Arc<Line>,
    question: Arc<Question>,
    status: u16,
    tally: Arc<Mutex<Tally>>,
) {
    let answer = line.ask(&question, None).await;
    let came = match answer {
        Ok(answer) if answer.status.as_u16() == status => Came::Right,
        Ok(answer) => Came::Wrong(format!("status {}", answer.status.as_u16())),
        Err(Trouble::Own(error)) => Came::NotSent(error),
        Err(Trouble::Unreachable(_)) => Came::Wrong("not reached".to_owned()),
        Err(Trouble::Broken(_) | Trouble::TooLarge) => Came::Wrong("broken off".to_owned()),
    };
    let now = Instant::now();
    drop(slot);
    locked(&tally).end(number, came, now);
}

/// When a request is due, nanoseconds from the beginning.
fn offset_ns(number: u64, rate: u32) -> u64 {
    let ns = u128::from(number) * 1_000_000_000 / u128::from(rate.max(1));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// A request that is under way.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// When it was to be sent.
    due: Instant,
    /// When the servers let it be sent: then it was due, and a slot was free.
    able: Instant,
    /// When it was sent.
    sent: Instant,
}

impl Asked {
    /// How late it was sent by the gateway's own doing.
    fn lateness(&self) -> Duration {
        self.sent.saturating_duration_since(self.able)
    }
}

/// What came of a request.
#[derive(Debug)]
enum Came {
    /// The answer that was wanted.
    Right,
    /// Another one, or none.
    Wrong(String),
    /// The gateway could not send it.
    NotSent(String),
}

/// What came of a load so far.
#[derive(Debug)]
struct Tally {
    under_way: BTreeMap<u64, Asked>,
    /// Those that the gateway could not send are none of them.
    sent: u64,
    /// Sent after their time, because no slot was free.
    late: u64,
    /// A slot had to be waited for.
    is_crowded: bool,
    right: u64,
    wrong: BTreeMap<String, u64>,
    /// Why the gateway could not send.
    own: Option<String>,
    /// From the time when they were due.
    latency: Histogram<u64>,
    /// The same without the gateway's own lateness.
    theirs: Histogram<u64>,
    /// From the sending.
    served: Histogram<u64>,
}

impl Tally {
    fn new() -> Result<Self, CreationError> {
        // Three digits are 0.1 %.
        let histogram = || Histogram::new_with_bounds(1, LONGEST_US, 3);
        Ok(Self {
            under_way: BTreeMap::new(),
            sent: 0,
            late: 0,
            is_crowded: false,
            right: 0,
            wrong: BTreeMap::new(),
            own: None,
            latency: histogram()?,
            theirs: histogram()?,
            served: histogram()?,
        })
    }

    fn send(&mut self, number: u64, asked: Asked) {
        self.sent += 1;
        self.late += u64::from(asked.able > asked.due);
        self.under_way.insert(number, asked);
    }

    fn end(&mut self, number: u64, came: Came, now: Instant) {
        let Some(asked) = self.under_way.remove(&number) else {
            return;
        };
        match came {
            Came::Right => {
                self.right += 1;
                self.record(asked, now);
            }
            Came::Wrong(kind) => self.went_wrong(kind),
            Came::NotSent(error) => {
                self.sent -= 1;
                self.own.get_or_insert(error);
            }
        }
    }

    /// What has no answer now, has none; and it was waited for until now.
    fn give_up(&mut self, now: Instant) {
        for (_, asked) in std::mem::take(&mut self.under_way) {
            self.went_wrong("no answer".to_owned());
            self.record(asked, now);
        }
    }

    fn went_wrong(&mut self, kind: String) {
        let is_new = !self.wrong.contains_key(&kind);
        let kind = if is_new && self.wrong.len() >= KINDS {
            "others".to_owned()
        } else {
            kind
        };
        *self.wrong.entry(kind).or_default() += 1;
    }

    fn record(&mut self, asked: Asked, now: Instant) {
        for (histogram, from) in [
            (&mut self.latency, asked.due),
            (&mut self.theirs, asked.due + asked.lateness()),
            (&mut self.served, asked.sent),
        ] {
            let took = now.saturating_duration_since(from).as_micros();
            let took = u64::try_from(took).unwrap_or(LONGEST_US);
            histogram.saturating_record(took.clamp(1, LONGEST_US));
        }
    }

    fn errors(&self) -> u64 {
        self.wrong.values().sum()
    }

    fn so_far(&self, all: u64) -> String {
        let (sent, errors) = (self.sent, self.errors());
        format!("{sent} of {all} requests sent, {errors} errors")
    }
}

/// What the answers say. Not enough of them, or another load than was asked for, is
/// never a pass.
fn judge(gate: &LoadGate, tally: &Tally) -> (Verdict, String) {
    let (asked, sent, errors) = (gate.requests(), tally.sent, tally.errors());
    let seen = Seen { asked, tally };
    let p99 = |of: &Histogram<u64>| Duration::from_micros(of.value_at_quantile(0.99));
    let slower = |of| gate.p99.filter(|bound| p99(of) > *bound);
    let slow = |bound: Duration| {
        let bound = humantime::format_duration(bound);
        (Verdict::Fail, format!("p99 is above {bound}: {seen}"))
    };
    if gate.errors.is_exceeded(errors, sent) {
        let allowed = gate.errors;
        return (Verdict::Fail, format!("more errors than {allowed}: {seen}"));
    }
    if let Some(bound) = slower(&tally.served) {
        return slow(bound);
    }
    if sent * 100 < asked * SENT {
        let why = match &tally.own {
            Some(error) => format!("the gateway could not send ({error})"),
            None if tally.is_crowded => {
                "requests had to wait for others to end (concurrency)".to_owned()
            }
            None => "the gateway was too slow".to_owned(),
        };
        let evidence = format!("less was sent than asked for, {why}: {seen}");
        return (Verdict::Inconclusive, evidence);
    }
    if tally.right < FEWEST {
        return (Verdict::Inconclusive, format!("too few answers: {seen}"));
    }
    match (slower(&tally.latency), slower(&tally.theirs)) {
        (Some(bound), Some(_)) => slow(bound),
        (Some(_), None) => {
            let evidence = format!("the gateway itself was late, so nobody can say: {seen}");
            (Verdict::Inconclusive, evidence)
        }
        (None, _) => (Verdict::Pass, seen.to_string()),
    }
}

/// The figures, in a line.
struct Seen<'a> {
    asked: u64,
    tally: &'a Tally,
}

impl fmt::Display for Seen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally {
            sent, late, right, ..
        } = self.tally;
        write!(f, "sent {sent} of {}", self.asked)?;
        if *late > 0 {
            write!(f, " ({late} late)")?;
        }
        write!(f, ", answered {right}, errors {}", self.tally.errors())?;
        let kinds = self.tally.wrong.iter();
        let kinds: Vec<String> = kinds
            .map(|(kind, count)| format!("{count} {kind}"))
            .collect();
        if !kinds.is_empty() {
            write!(f, " ({})", kinds.join(", "))?;
        }
        let latency = &self.tally.latency;
        if latency.is_empty() {
            return Ok(());
        }
        let ms = |us: u64| us as f64 / 1000.0;
        write!(
            f,
            ", p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
            ms(latency.value_at_quantile(0.5)),
            ms(latency.value_at_quantile(0.99)),
            ms(latency.max())
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{super::tests::target, *};
    use crate::{
        config::Share,
        health::fake::{self, answer, nobody, server, talking},
    };

    fn gate() -> LoadGate {
        LoadGate {
            method: "GET".to_owned(),
            path: "/".to_owned(),
            port: None,
            headers: BTreeMap::new(),
            body: None,
            rate: 100,
            duration: Duration::from_secs(1),
            concurrency: 32,
            p99: Some(Duration::from_secs(10)),
            errors: Share(0),
            status: 200,
        }
    }

    async fn sent_to(address: std::net::SocketAddr, gate: &LoadGate) -> (Verdict, String) {
        let limit = gate.duration + Duration::from_secs(5);
        run(gate, limit, &target(address), &Progress::default()).await
    }

    #[tokio::test]
    async fn a_server_that_answers_passes_and_is_told_by_its_figures() {
        let (address, mut requests) = server(answer(200, "")).await;
        let progress = Progress::default();
        let gate = LoadGate {
            body: Some("{}".to_owned()),
            method: "POST".to_owned(),
            ..gate()
        };
        let limit = Duration::from_secs(10);
        let (verdict, seen) = run(&gate, limit, &target(address), &progress).await;
        assert_eq!(verdict, Verdict::Pass, "{seen}");
        assert!(seen.starts_with("sent 100 of 100"), "{seen}");
        assert!(seen.contains("answered 100, errors 0, p50 "), "{seen}");
        assert!(progress.said().contains(" of 100 requests sent"));
        let request = requests.recv().await.unwrap();
        assert!(request.starts_with("POST / HTTP/1.1\r\n"), "{request}");
    }

    #[tokio::test]
    async fn errors_are_counted_by_kind_and_bounded() {
        let (address, _requests) = server(answer(503, "")).await;
        let (verdict, seen) = sent_to(address, &gate()).await;
        assert_eq!(verdict, Verdict::Fail);
        assert!(seen.contains("more errors than 0 %"), "{seen}");
        assert!(seen.contains("errors 100 (100 status 503)"), "{seen}");
        let (verdict, seen) = sent_to(nobody().await, &gate()).await;
        assert_eq!(verdict, Verdict::Fail);
        assert!(seen.contains("(100 not reached)"), "{seen}");
        let all_may_fail = LoadGate {
            errors: Share(1_000_000),
            ..gate()
        };
        // No answer is no pass, whatever is allowed.
        let (verdict, seen) = sent_to(nobody().await, &all_may_fail).await;
        assert_eq!(verdict, Verdict::Inconclusive, "{seen}");
        assert!(seen.starts_with("too few answers"), "{seen}");
    }

    #[tokio::test]
    async fn who_hangs_has_not_answered() {
        let (address, _requests) = server(fake::Does::Hang).await;
        let limit = Duration::from_secs(2);
        let (verdict, seen) = run(&gate(), limit, &target(address), &Progress::default()).await;
        assert_eq!(verdict, Verdict::Fail);
        assert!(seen.contains("no answer)"), "{seen}");
    }

    /// One answer of 300 is slow. A generator that waits for it before it asks again
    /// would see one slow request, 0.3 %, and pass; a third of those that were due had
    /// to wait for it.
    #[tokio::test]
    async fn a_server_that_stalls_once_does_not_hide_who_had_to_wait() {
        let asked = Arc::new(AtomicUsize::new(0));
        let does = move |_: &str| {
            if asked.fetch_add(1, Ordering::Relaxed) == 50 {
                std::thread::sleep(Duration::from_secs(1));
            }
            answer(200, "")
        };
        let (address, _requests) = talking(does).await;
        let stalls = LoadGate {
            duration: Duration::from_secs(3),
            concurrency: 1,
            p99: Some(Duration::from_millis(300)),
            ..gate()
        };
        // On a thread of its own: the server stalls, not the generator.
        let (verdict, seen) = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(sent_to(address, &stalls))
        })
        .await
        .unwrap();
        assert_eq!(verdict, Verdict::Fail, "{seen}");
        assert!(seen.contains("p99 is above 300ms"), "{seen}");
        assert!(seen.contains(" late), answered 300, errors 0"), "{seen}");
    }

    /// So many right answers, each so long after it was due and was sent, and sent so
    /// late by the gateway's own doing (ms).
    fn tally(count: u64, [latency, served, lateness]: [u64; 3]) -> Tally {
        let mut tally = Tally::new().unwrap();
        let now = Instant::now() + Duration::from_hours(1);
        let ago = |ms| now - Duration::from_millis(ms);
        for number in 0..count {
            let asked = Asked {
                due: ago(latency),
                able: ago(served + lateness),
                sent: ago(served),
            };
            tally.send(number, asked);
            tally.end(number, Came::Right, now);
        }
        tally
    }

    fn judged(tally: &Tally) -> (Verdict, String) {
        let gate = LoadGate {
            p99: Some(Duration::from_millis(100)),
            ..gate()
        };
        judge(&gate, tally)
    }

    #[test]
    fn no_data_is_never_a_pass() {
        use Verdict::*;
        for (count, verdict) in [(0, Inconclusive), (19, Inconclusive), (94, Inconclusive)] {
            assert_eq!(judged(&tally(count, [1, 1, 0])).0, verdict, "{count}");
        }
        assert_eq!(judged(&tally(95, [1, 1, 0])).0, Pass);
        let mut own = Tally::new().unwrap();
        let now = Instant::now();
        for number in 0..100 {
            let asked = Asked {
                due: now,
                able: now,
                sent: now,
            };
            own.send(number, asked);
            own.end(number, Came::NotSent("no files left".to_owned()), now);
        }
        let (verdict, seen) = judged(&own);
        assert_eq!(verdict, Inconclusive);
        assert!(seen.contains("could not send (no files left)"), "{seen}");
    }

    #[test]
    fn slowness_is_blamed_on_whose_it_is() {
        use Verdict::*;
        for (times, verdict) in [
            ([90, 90, 0], Pass),
            // The servers are slow from the sending on ...
            ([200, 200, 0], Fail),
            // ... or let others wait.
            ([200, 1, 0], Fail),
            ([400, 1, 200], Fail),
            // The gateway was late.
            ([200, 1, 199], Inconclusive),
        ] {
            assert_eq!(judged(&tally(100, times)).0, verdict, "{times:?}");
        }
        // Half of the load is another load, unless even that is too much.
        assert_eq!(judged(&tally(50, [1, 1, 0])).0, Inconclusive);
        assert_eq!(judged(&tally(50, [200, 200, 0])).0, Fail);
    }
}
