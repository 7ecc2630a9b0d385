//! Health of backends: probes that go straight to a backend's own address, and what
//! follows from them. It knows nothing of pools and of the packet path.

pub mod exec;
#[cfg(test)]
pub(crate) mod fake;
pub mod grpc;
pub mod http;
pub mod openai;
mod plan;
pub mod tcp;
pub mod v2;
pub mod verdict;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bg_common::{maglev::mix, service::Colour};
use tokio::{
    sync::{Notify, Semaphore},
    task::AbortHandle,
    time::{Instant, sleep_until, timeout},
};

pub use self::plan::{HealthPlan, Probe};
use self::verdict::{Judge, Outcome, Trouble, Verdict};
use crate::{config::Config, datapath::now_ns, locked, plan::BackendName};

/// Probes under way at once, over all backends.
const AT_ONCE: usize = 128;
/// Commands that run at once, over all backends.
const COMMANDS_AT_ONCE: usize = 16;
/// The first probes are spread over this, or over the interval if that is shorter.
const FIRST_WITHIN: Duration = Duration::from_secs(1);
/// What is told of a probe has at most so many characters.
const MAX_TEXT: usize = 160;

/// A backend to be probed, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    name: BackendName,
    plan: HealthPlan,
    endpoints: Vec<SocketAddr>,
}

impl Target {
    /// One probe; one that takes too long is a bad one.
    async fn sample(&self) -> Outcome {
        let limit = self.plan.timeout;
        timeout(limit, self.probe()).await.unwrap_or_else(|_| {
            let limit = humantime::format_duration(limit);
            Err(format!("no answer within {limit}").into())
        })
    }

    async fn probe(&self) -> Outcome {
        let first = self.endpoints.first().copied();
        let port = first.ok_or_else(|| Trouble::Theirs("it has no port to probe".to_owned()));
        match &self.plan.probe {
            Probe::Tcp => tcp::probe(&self.endpoints).await,
            Probe::Http(probe) => http::probe(port?, probe).await,
            Probe::Grpc(probe) => grpc::probe(port?, probe).await,
            Probe::V2(probe) => v2::probe(port?, probe).await,
            Probe::OpenAi(probe) => openai::probe(port?, probe).await,
            Probe::Exec(probe) => exec::probe(&self.name, first, probe).await,
        }
    }
}

/// All backends that a configuration wants probed.
fn targets(config: &Config) -> BTreeMap<BackendName, Target> {
    let mut targets = BTreeMap::new();
    for service in config.services.values() {
        let Some(plan) = &service.health else {
            continue;
        };
        for colour in Colour::ALL {
            for backend in service.plan.backends(colour) {
                let name = service.plan.name_of(colour, backend);
                let target = Target {
                    name: name.clone(),
                    plan: plan.clone(),
                    endpoints: plan.endpoints(&service.plan, backend),
                };
                targets.insert(name, target);
            }
        }
    }
    targets
}

/// What is known of a backend.
#[derive(Clone, Debug)]
pub struct Known {
    /// The `kind` of its probes.
    pub kind: &'static str,
    /// The verdict.
    pub verdict: Verdict,
    /// Since when, `CLOCK_MONOTONIC`, ns.
    pub since_ns: u64,
    /// Why, unless it is healthy and nothing else.
    pub why: Option<String>,
    /// False when the gateway could not ask of late: the verdict is an old one.
    pub asked: bool,
}

/// A verdict that was overturned.
#[derive(Clone, Debug)]
pub struct Change {
    /// Whose.
    pub name: BackendName,
    /// When, `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// What was known before.
    pub before: Verdict,
    /// How long that was so.
    pub lasted: Duration,
    /// What is known.
    pub now: Known,
}

/// Probes backends, each in a task of its own, for as long as the runtime lives.
#[derive(Debug)]
pub struct Prober {
    running: Mutex<BTreeMap<BackendName, Running>>,
    changes: Arc<Changes>,
    permits: Arc<Semaphore>,
    commands: Arc<Semaphore>,
    seed: AtomicU64,
}

impl Default for Prober {
    fn default() -> Self {
        Self {
            running: Mutex::default(),
            changes: Arc::default(),
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            commands: Arc::new(Semaphore::new(COMMANDS_AT_ONCE)),
            seed: AtomicU64::new(now_ns()),
        }
    }
}

#[derive(Debug)]
struct Running {
    target: Target,
    judge: Arc<Mutex<Judge>>,
    task: AbortHandle,
}

impl Running {
    fn known(&self) -> Known {
        known(&self.target, &locked(&self.judge))
    }
}

#[derive(Debug, Default)]
struct Changes {
    waiting: Mutex<Vec<Change>>,
    came: Notify,
}

impl Prober {
    /// Probes what a configuration wants probed, and nothing else. Who is probed as
    /// before goes on undisturbed. Runs in a runtime.
    pub fn follow(&self, config: &Config) {
        let wanted = targets(config);
        let mut running = locked(&self.running);
        running.retain(|name, running| {
            let stays = wanted.get(name) == Some(&running.target);
            if !stays {
                running.task.abort();
            }
            stays
        });
        for (name, target) in wanted {
            running.entry(name).or_insert_with(|| self.start(target));
        }
        drop(running);
        // Who is not probed any more is no longer out.
        self.changes.came.notify_one();
    }

    fn start(&self, target: Target) -> Running {
        let judge = Arc::new(Mutex::new(Judge::new(target.plan.rules, now_ns())));
        let permits = match target.plan.probe {
            Probe::Exec(_) => &self.commands,
            _ => &self.permits,
        };
        let task = tokio::spawn(watch(
            target.clone(),
            Arc::clone(&judge),
            Arc::clone(&self.changes),
            Arc::clone(permits),
            self.seed.fetch_add(1, Ordering::Relaxed),
        ));
        Running {
            target,
            judge,
            task: task.abort_handle(),
        }
    }

    /// Waits until there is something to settle: verdicts that were overturned since
    /// the last call, oldest first, or another configuration.
    pub async fn changes(&self) -> Vec<Change> {
        self.changes.came.notified().await;
        std::mem::take(&mut *locked(&self.changes.waiting))
    }

    /// What is known of all backends that are probed.
    pub fn known(&self) -> BTreeMap<BackendName, Known> {
        locked(&self.running)
            .iter()
            .map(|(name, running)| (name.clone(), running.known()))
            .collect()
    }

    /// The verdicts on those backends that another configuration wants probed in the
    /// same way.
    pub fn verdicts_under(&self, config: &Config) -> BTreeMap<BackendName, Verdict> {
        let running = locked(&self.running);
        let verdict = |(name, target): (BackendName, Target)| {
            let same = running.get(&name).filter(|one| one.target == target)?;
            let verdict = locked(&same.judge).verdict();
            Some((name, verdict))
        };
        targets(config).into_iter().filter_map(verdict).collect()
    }
}

/// Probes one backend for ever.
async fn watch(
    target: Target,
    judge: Arc<Mutex<Judge>>,
    changes: Arc<Changes>,
    permits: Arc<Semaphore>,
    mut seed: u64,
) {
    let plan = &target.plan;
    // From 0 to 1.
    let mut chance = || {
        seed = mix(seed.wrapping_add(1));
        (seed >> 32) as f64 / f64::from(u32::MAX)
    };
    let mut due = Instant::now() + plan.interval.min(FIRST_WITHIN).mul_f64(chance());
    loop {
        sleep_until(due).await;
        // Nobody closes the semaphore.
        let Ok(permit) = permits.acquire().await else {
            return;
        };
        let began = Instant::now();
        let outcome = target.sample().await;
        drop(permit);
        let at_ns = now_ns();
        let mut judge = locked(&judge);
        let was_asked = judge.is_asked();
        let overturned = judge.sample(at_ns, outcome);
        if was_asked != judge.is_asked() {
            let (name, why) = (&target.name, judge.why());
            if let Some(why) = why.filter(|_| was_asked) {
                tracing::warn!("{}: {name} {why}", name.service);
            } else {
                tracing::info!("{}: {name} is probed again", name.service);
            }
        }
        if let Some(overturned) = overturned {
            locked(&changes.waiting).push(Change {
                name: target.name.clone(),
                at_ns,
                before: overturned.from,
                lasted: Duration::from_nanos(at_ns.saturating_sub(overturned.from_ns)),
                now: known(&target, &judge),
            });
            changes.came.notify_one();
        }
        drop(judge);
        due = began + plan.interval.mul_f64(0.9 + chance() / 5.0);
    }
}

fn known(target: &Target, judge: &Judge) -> Known {
    Known {
        kind: target.plan.probe.kind(),
        verdict: judge.verdict(),
        since_ns: judge.since_ns(),
        why: judge.why(),
        asked: judge.is_asked(),
    }
}

/// What somebody else wrote, so that a line of it can be shown: not too long, and
/// without control characters.
fn tidy(text: &str) -> String {
    tidy_to(text, MAX_TEXT)
}

/// The same, with so many characters at most.
pub(crate) fn tidy_to(text: &str, most: usize) -> String {
    let is_odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut tidy: String = text
        .chars()
        .take(most)
        .map(|c| if is_odd(c) { ' ' } else { c })
        .collect();
    if text.chars().nth(most).is_some() {
        tidy.push_str("...");
    }
    tidy
}

#[cfg(test)]
mod tests {
    use super::{
        fake::{Does, answer, nobody, server},
        http::HttpProbe,
        verdict::Rules,
        *,
    };

    fn target(endpoints: &[SocketAddr], probe: Probe) -> Target {
        Target {
            name: BackendName {
                service: "llm".to_owned(),
                colour: Colour::Blue,
                address: endpoints[0].ip(),
                port: None,
            },
            plan: HealthPlan {
                probe,
                interval: Duration::from_millis(1),
                timeout: Duration::from_secs(20),
                rules: Rules { rise: 2, fall: 2 },
                port: None,
            },
            endpoints: endpoints.to_vec(),
        }
    }

    fn http() -> Probe {
        Probe::Http(HttpProbe {
            path: "/".to_owned(),
            host: None,
            status: None,
            body: None,
            json: None,
        })
    }

    #[tokio::test]
    async fn what_is_slower_than_its_limit_is_bad() {
        let (silent, _requests) = server(Does::Hang).await;
        let mut target = target(&[silent], http());
        target.plan.timeout = Duration::from_millis(20);
        assert_eq!(
            target.sample().await,
            Err("no answer within 20ms".to_owned().into())
        );
    }

    #[tokio::test]
    async fn a_connection_to_every_port_is_asked_for() {
        let (one, _requests) = server(Does::Hang).await;
        let (two, _requests) = server(Does::Hang).await;
        let none = nobody().await;
        let good = target(&[one, two], Probe::Tcp);
        assert_eq!(good.sample().await, Ok(()));
        let bad = target(&[one, none, two], Probe::Tcp).sample().await;
        let refused = format!("port {}: Connection refused (os error 111)", none.port());
        assert_eq!(bad, Err(refused.into()));
    }

    /// From probes to changes: a server that answers, and one that nobody is at.
    #[tokio::test]
    async fn verdicts_are_told_once() {
        let (address, _requests) = server(answer(200, "")).await;
        let prober = Prober::default();
        for endpoint in [address, nobody().await] {
            let mut target = target(&[endpoint], http());
            target.name.port = Some(endpoint.port());
            let name = target.name.clone();
            locked(&prober.running).insert(name, prober.start(target));
        }
        let mut changes = Vec::new();
        while changes.len() < 2 {
            changes.extend(prober.changes().await);
        }
        for change in changes {
            let is_there = change.name.port == Some(address.port());
            assert_eq!(change.before, Verdict::Unknown);
            assert_eq!(change.now.verdict.is_healthy(), Some(is_there));
            assert_eq!(change.now.why.is_none(), is_there);
        }
        let known = prober.known().into_values();
        let verdicts: Vec<_> = known.map(|known| known.verdict.is_healthy()).collect();
        assert!(verdicts.contains(&Some(true)) && verdicts.contains(&Some(false)));
    }

    /// A probe that hangs keeps its place, and nobody beyond the bound is asked.
    #[tokio::test]
    async fn many_are_probed_but_never_all_at_once() {
        let (silent, mut requests) = server(Does::Hang).await;
        let prober = Prober::default();
        for port in 0..2 * AT_ONCE {
            let mut target = target(&[silent], http());
            target.name.port = Some(port as u16);
            let name = target.name.clone();
            locked(&prober.running).insert(name, prober.start(target));
        }
        for _ in 0..AT_ONCE {
            requests.recv().await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(requests.try_recv().is_err());
        assert_eq!(prober.permits.available_permits(), 0);
    }

    #[test]
    fn what_others_wrote_is_shown_on_one_harmless_line() {
        assert_eq!(
            tidy("a\u{1b}[31m\nb\u{202e}c"),
            "a [31m bc".replace("bc", "b c")
        );
        let long = tidy(&"é".repeat(1000));
        assert_eq!(long.chars().count(), MAX_TEXT + 3);
    }
}
