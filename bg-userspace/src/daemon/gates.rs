//! Runs of gates, against the backends of a colour by their own addresses.

mod exec;
mod grpc;
mod http;
mod load;
mod parity;
pub(super) mod prometheus;
mod prompts;
mod warm;
mod webhook;
mod wire;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bg_common::service::Colour;
use futures_util::{StreamExt as _, stream};
use tokio::time::{Instant, timeout_at};

use crate::{
    config::{GateKind, GatePlan, When},
    health::tidy_to,
    plan::{BackendPlan, Protocol, ServicePlan},
    release::{Outcome, State, Verdict},
};

/// Characters of what a gate has seen, at most ...
const EVIDENCE: usize = 4000;
/// ... and of what it has seen of one backend.
const SAID: usize = 300;
/// Backends that are asked at a time.
const AT_ONCE: usize = 64;

/// What a gate is run against.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// The service, as it is configured now.
    pub(super) plan: ServicePlan,
    /// The colour that is looked at.
    pub(super) colour: Colour,
    /// The release, like `r-42`.
    pub(super) release: String,
    /// Versions by colour.
    pub(super) versions: [Option<String>; 2],
    /// What a hook is told beside it.
    pub(super) hook: Option<Moment>,
}

/// When a hook is run, and who is there.
#[derive(Clone, Debug)]
pub(super) struct Moment {
    /// Its time.
    pub(super) when: When,
    /// Where the release is.
    pub(super) state: State,
    /// The colour that new flows go to.
    pub(super) active: Colour,
    /// The share of them that goes to the other one, percent.
    pub(super) canary_percent: f64,
    /// Live flows by colour, as far as they can be counted.
    pub(super) flows: [Option<u64>; 2],
}

impl Target {
    /// Where each backend answers over TCP: at its own port, or that of the first
    /// listener that it serves; `None` when no listener is TCP.
    fn endpoints(&self, port: Option<u16>) -> Option<Vec<SocketAddr>> {
        self.endpoints_of(self.colour, port)
    }

    /// The same of a colour.
    fn endpoints_of(&self, colour: Colour, port: Option<u16>) -> Option<Vec<SocketAddr>> {
        let endpoint = |backend: &BackendPlan| {
            if let Some(port) = port {
                return Some(SocketAddr::new(backend.address, port));
            }
            let mut listeners = self.plan.listeners.iter();
            let listener = listeners
                .find(|listener| listener.protocol == Protocol::Tcp && backend.serves(listener))?;
            Some(backend.endpoint(listener))
        };
        self.plan.backends(colour).iter().map(endpoint).collect()
    }

    /// Where each server of a colour answers, over TCP if it does.
    fn servers_of(&self, colour: Colour) -> Vec<SocketAddr> {
        let endpoint = |backend: &BackendPlan| {
            let mut served = self.plan.listeners.iter().filter(|at| backend.serves(at));
            let tcp = served.clone().find(|at| at.protocol == Protocol::Tcp);
            let listener = tcp.or_else(|| served.next())?;
            Some(backend.endpoint(listener))
        };
        let backends = self.plan.backends(colour).iter();
        backends.filter_map(endpoint).collect()
    }

    /// Where clients always reach a colour over TCP.
    fn preview_of(&self, colour: Colour) -> Vec<SocketAddr> {
        let previews = self.plan.previews_of(colour);
        let tcp = previews.filter(|at| at.protocol == Protocol::Tcp);
        tcp.map(|at| at.address).collect()
    }

    /// What a command is told of a colour: names and values.
    fn environment(&self, colour: Colour) -> Vec<(&'static str, String)> {
        let backends = |colour| spaced(&self.servers_of(colour));
        let version = self.versions[colour as usize].clone();
        let mut told = vec![
            ("BGSWITCH_SERVICE", self.plan.name.clone()),
            ("BGSWITCH_RELEASE", self.release.clone()),
            ("BGSWITCH_COLOUR", colour.as_str().to_owned()),
            ("BGSWITCH_VERSION", version.unwrap_or_default()),
            ("BGSWITCH_BACKENDS", backends(colour)),
            ("BGSWITCH_PREVIEW", spaced(&self.preview_of(colour))),
        ];
        if let Some(moment) = &self.hook {
            let old = colour.other();
            let version = self.versions[old as usize].clone();
            let flows = |colour: Colour| {
                let count = moment.flows[colour as usize];
                count.map_or_else(String::new, |count| count.to_string())
            };
            told.extend([
                ("BGSWITCH_WHEN", moment.when.as_str().to_owned()),
                ("BGSWITCH_STATE", moment.state.as_str().to_owned()),
                ("BGSWITCH_ACTIVE", moment.active.as_str().to_owned()),
                ("BGSWITCH_CANARY_PERCENT", moment.canary_percent.to_string()),
                ("BGSWITCH_FLOWS", flows(colour)),
                ("BGSWITCH_OLD_COLOUR", old.as_str().to_owned()),
                ("BGSWITCH_OLD_VERSION", version.unwrap_or_default()),
                ("BGSWITCH_OLD_BACKENDS", backends(old)),
                ("BGSWITCH_OLD_PREVIEW", spaced(&self.preview_of(old))),
                ("BGSWITCH_OLD_FLOWS", flows(old)),
            ]);
        }
        told
    }
}

fn spaced(addresses: &[SocketAddr]) -> String {
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    addresses.join(" ")
}

/// How far the gate is that runs, in words; empty: it does not say.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Arc<Mutex<String>>);

impl Progress {
    pub(super) fn say(&self, text: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }

    pub(super) fn said(&self) -> String {
        let said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.clone()
    }
}

/// Runs a gate to its end.
pub(super) async fn run(gate: &GatePlan, target: &Target, progress: &Progress) -> Outcome {
    let began = Instant::now();
    let limit = gate.timeout;
    let (verdict, evidence) = match &gate.kind {
        GateKind::Exec(words) => exec::run(words, limit, &target.environment(target.colour)).await,
        GateKind::Http(of) => http::run(of, limit, target).await,
        GateKind::Load(of) => load::run(of, limit, target, progress).await,
        GateKind::Prompts(of) => prompts::run(of, limit, target, progress).await,
        GateKind::Grpc(of) => grpc::run(of, limit, target).await,
        GateKind::Webhook(of) => webhook::run(of, limit, target, progress).await,
        GateKind::Parity(of) => parity::run(of, limit, target).await,
        GateKind::Warm(of) => warm::run(of, limit, target, progress).await,
    };
    Outcome {
        verdict,
        evidence: tidy_to(&evidence, EVIDENCE),
        took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

/// Nobody can be asked.
fn no_port() -> (Verdict, String) {
    let evidence = "a backend serves no TCP listener: name a port";
    (Verdict::Inconclusive, evidence.to_owned())
}

/// Asks each backend, [`AT_ONCE`] at a time; all must pass within the time.
async fn of_all<F: Future<Output = (Verdict, String)>>(
    endpoints: Vec<SocketAddr>,
    limit: Duration,
    ask: impl Fn(SocketAddr) -> F,
) -> (Verdict, String) {
    let deadline = Instant::now() + limit;
    let asked = |endpoint| {
        let asking = ask(endpoint);
        async move {
            let began = Instant::now();
            if began >= deadline {
                let said = format!("{endpoint} was not asked: the time was over");
                return (Verdict::Inconclusive, said);
            }
            let (verdict, said) = timeout_at(deadline, asking).await.unwrap_or_else(|_| {
                let limit = humantime::format_duration(limit);
                (Verdict::Fail, format!("no answer within {limit}"))
            });
            let (said, took) = (tidy_to(&said, SAID), began.elapsed().as_millis());
            (verdict, format!("{endpoint} {said} ({took} ms)"))
        }
    };
    let asked = stream::iter(endpoints).map(asked).buffered(AT_ONCE);
    together(&asked.collect::<Vec<_>>().await)
}

/// One verdict of many: the worst. Of many, those are told that went wrong.
fn together(answers: &[(Verdict, String)]) -> (Verdict, String) {
    let is = |wanted| answers.iter().any(|(verdict, _)| *verdict == wanted);
    let verdict = match (is(Verdict::Fail), is(Verdict::Inconclusive)) {
        (true, _) => Verdict::Fail,
        (_, true) => Verdict::Inconclusive,
        _ if answers.is_empty() => Verdict::Inconclusive,
        _ => Verdict::Pass,
    };
    let telling = answers.iter().filter(|(of, _)| *of == verdict);
    let telling: Vec<&str> = telling.map(|(_, said)| said.as_str()).collect();
    (verdict, telling.join("; "))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A service whose green has one backend, at this address.
    pub(super) fn target(green: SocketAddr) -> Target {
        let backend = BackendPlan {
            address: green.ip(),
            port: Some(green.port()),
            weight: 1,
        };
        Target {
            plan: ServicePlan {
                name: "llm".to_owned(),
                listeners: vec!["tcp://192.0.2.1:80".parse().unwrap()],
                forward: crate::plan::ForwardMode::default(),
                announce: false,
                udp_idle: Duration::ZERO,
                colours: [Vec::new(), vec![backend]],
                previews: [Vec::new(), Vec::new()],
            },
            colour: Colour::Green,
            release: "r-1".to_owned(),
            versions: [None, None],
            hook: None,
        }
    }

    #[test]
    fn the_servers_of_a_colour_are_named_also_where_they_do_not_speak_tcp() {
        let at: SocketAddr = ([10, 0, 2, 10], 8000).into();
        let mut target = target(at);
        target.plan.listeners = vec!["udp://192.0.2.1:53".parse().unwrap()];
        assert_eq!(target.servers_of(Colour::Green), [at]);
        assert_eq!(target.endpoints(None), None);
    }

    #[tokio::test]
    async fn many_backends_are_all_asked_but_never_all_at_once() {
        let (now, most, asked) = <(AtomicUsize, AtomicUsize, AtomicUsize)>::default();
        let ask = |_| async {
            most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            now.fetch_sub(1, Ordering::Relaxed);
            asked.fetch_add(1, Ordering::Relaxed);
            (Verdict::Pass, String::new())
        };
        let endpoints: Vec<SocketAddr> = (1..=1000)
            .map(|port| ([10, 0, 0, 1], port).into())
            .collect();
        let (verdict, _) = of_all(endpoints, Duration::from_mins(1), ask).await;
        assert_eq!(verdict, Verdict::Pass);
        assert_eq!(asked.into_inner(), 1000);
        assert!(most.into_inner() <= AT_ONCE);
    }

    #[test]
    fn the_worst_counts_and_nobody_is_no_pass() {
        use Verdict::*;
        let of = |verdicts: &[Verdict]| {
            let said = verdicts.iter().enumerate();
            let answers: Vec<_> = said.map(|(n, of)| (*of, n.to_string())).collect();
            together(&answers)
        };
        assert_eq!(
            of(&[Pass, Fail, Inconclusive, Fail]),
            (Fail, "1; 3".to_owned())
        );
        assert_eq!(of(&[Pass, Inconclusive]), (Inconclusive, "1".to_owned()));
        assert_eq!(of(&[Pass, Pass]), (Pass, "0; 1".to_owned()));
        assert_eq!(of(&[]).0, Inconclusive);
    }
}
