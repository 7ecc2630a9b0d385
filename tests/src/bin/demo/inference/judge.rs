//! What the clients of both protocols saw of the flip and of the rollback, against what
//! was promised.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use bg_tests::picture::{BLUE, GREEN, GREY, INK, LEFT, Panel, RED, Svg, Time, thousands};
use bg_userspace::api::MonitorEvent;
use serde::{Deserialize, Serialize};

/// Width of a bar.
const STEP_NS: u64 = 250_000_000;
/// Failures that are told one by one.
const TOLD: usize = 5;
/// The versions that the flip and the rollback lead to.
const LEADS_TO: [&str; 2] = ["2", "1"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Http,
    Grpc,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Http => "HTTP",
            Self::Grpc => "gRPC",
        })
    }
}

const PROTOCOLS: [Protocol; 2] = [Protocol::Http, Protocol::Grpc];

/// A request, as its client saw it. Times are of `CLOCK_MONOTONIC`.
#[derive(Clone, Debug, Deserialize)]
pub struct Asked {
    protocol: Protocol,
    /// Number of its connection.
    connection: u64,
    /// When that was begun.
    begun_ns: u64,
    done_ns: u64,
    /// Of the model that answered; `None`: it failed.
    version: Option<String>,
    error: Option<String>,
}

/// The demo's answer.
#[derive(Debug, Serialize)]
pub struct Summary {
    schema: u32,
    totals: Vec<Total>,
    switches: Vec<Switch>,
    picture: PathBuf,
    #[serde(skip)]
    failures: Vec<String>,
}

/// All requests of a protocol.
#[derive(Debug, Serialize)]
struct Total {
    protocol: Protocol,
    requests: usize,
    failed: usize,
}

/// What became of one protocol's connections at the store of a word.
#[derive(Debug, Serialize)]
struct Switch {
    /// `flip` or `rollback`.
    event: String,
    /// The version that it led to.
    to: &'static str,
    protocol: Protocol,
    /// Connections begun after it, and answered before the next one.
    new: usize,
    /// Those of them that the version which was left has answered.
    stale: usize,
    /// Connections of the version that was left, from before it, that were used after it.
    kept: usize,
    /// Their requests after it.
    kept_requests: usize,
    /// Connections from before it, of whichever version, that more than one has answered.
    moved: usize,
}

impl Summary {
    /// Holds what was seen against the stores; `picture` without its ending.
    pub fn new(answers: &[Asked], stores: &[MonitorEvent; 2], picture: &Path) -> Self {
        let failed = |answer: &&Asked| answer.version.is_none();
        let total = |protocol| {
            let of = answers.iter().filter(|answer| answer.protocol == protocol);
            Total {
                protocol,
                requests: of.clone().count(),
                failed: of.filter(failed).count(),
            }
        };
        let mut connections: BTreeMap<_, Vec<&Asked>> = BTreeMap::new();
        for answer in answers.iter().filter(|answer| answer.version.is_some()) {
            connections
                .entry((answer.protocol, answer.connection))
                .or_default()
                .push(answer);
        }
        let judged = |number: usize, protocol: Protocol| {
            let next_ns = stores.get(number + 1).map_or(u64::MAX, |next| next.at_ns);
            let of = connections.iter().filter(|((of, _), _)| *of == protocol);
            let mut switch = Switch::at(&stores[number], LEADS_TO[number], protocol);
            for (_, asked) in of {
                switch.add(asked, &stores[number], next_ns);
            }
            switch
        };
        let failure =
            |answer: &Asked| Some(format!("{}: {}", answer.protocol, answer.error.as_ref()?));
        Self {
            schema: 1,
            totals: PROTOCOLS.map(total).into(),
            switches: (0..stores.len())
                .flat_map(|number| PROTOCOLS.map(|protocol| judged(number, protocol)))
                .collect(),
            picture: picture.with_extension("svg"),
            failures: answers.iter().filter_map(failure).collect(),
        }
    }

    /// True when every promise was kept, and there was somebody to keep it to.
    pub fn is_clean(&self) -> bool {
        let kept = |s: &Switch| s.new > 0 && s.kept > 0 && s.stale == 0 && s.moved == 0;
        self.totals.iter().all(|total| total.failed == 0) && self.switches.iter().all(kept)
    }
}

impl Switch {
    fn at(store: &MonitorEvent, to: &'static str, protocol: Protocol) -> Self {
        Self {
            event: store.event.clone(),
            to,
            protocol,
            new: 0,
            stale: 0,
            kept: 0,
            kept_requests: 0,
            moved: 0,
        }
    }

    /// Adds a connection, by its answers in their order.
    fn add(&mut self, asked: &[&Asked], store: &MonitorEvent, next_ns: u64) {
        let (Some(first), Some(last)) = (asked.first(), asked.last()) else {
            return;
        };
        let (from_ns, until_ns) = (store.at_ns, store.at_ns + store.store_ns.unwrap_or(0));
        // One that was under way at a store may have gone either way.
        if first.begun_ns > until_ns && first.done_ns < next_ns {
            self.new += 1;
            self.stale += usize::from(first.version.as_deref() != Some(self.to));
        }
        if first.done_ns < from_ns && last.done_ns > until_ns {
            if first.version.as_deref() != Some(self.to) {
                let after = asked.iter().filter(|answer| answer.done_ns > until_ns);
                self.kept += 1;
                self.kept_requests += after.count();
            }
            let moved = asked.iter().any(|answer| answer.version != first.version);
            self.moved += usize::from(moved);
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n                            connections begun after it    those of the version that was left\n\
             switch          protocol   all   by the old version    go on   requests since   moved"
        )?;
        for switch in &self.switches {
            writeln!(
                f,
                "{:<15} {:<8} {:>5} {:>20} {:>8} {:>16} {:>7}",
                format!("{} to {}", switch.event, switch.to),
                switch.protocol,
                switch.new,
                switch.stale,
                switch.kept,
                switch.kept_requests,
                switch.moved
            )?;
        }
        writeln!(f)?;
        for total in &self.totals {
            let Total {
                protocol,
                requests,
                failed,
            } = total;
            writeln!(
                f,
                "{protocol} requests   {}, {failed} failed",
                thousands(*requests)
            )?;
        }
        writeln!(f, "picture         {}, .png", self.picture.display())?;
        for failure in self.failures.iter().take(TOLD) {
            writeln!(f, "a request failed: {failure}")?;
        }
        Ok(())
    }
}

/// Requests a second by protocol and by the version that answered: on new connections,
/// and on those that are kept.
pub fn draw(summary: &Summary, answers: &[Asked], stores: &[MonitorEvent], begun_ns: u64) -> Svg {
    let mut svg = Svg::new(800.0);
    let sum = |of: fn(&Total) -> usize| summary.totals.iter().map(of).sum::<usize>();
    let title = format!(
        "A release of a real inference server, and back: {} requests, {} failed",
        thousands(sum(|total| total.requests)),
        sum(|total| total.failed)
    );
    svg.text(48.0, 54.0, 26.0, INK, "start", 700, &title);
    let about = "MLServer with a scikit-learn model, requests a second by the version that answered; one word decides for HTTP and gRPC";
    svg.text(48.0, 80.0, 14.0, GREY, "start", 400, about);
    let done = answers.iter().map(|answer| answer.done_ns);
    let time = Time::new(begun_ns, STEP_NS, done);
    let mut first = BTreeMap::new();
    for answer in answers {
        let done = first
            .entry((answer.protocol, answer.connection))
            .or_insert(answer.done_ns);
        *done = answer.done_ns.min(*done);
    }
    let mut panels = Vec::new();
    for protocol in PROTOCOLS {
        for (new, what) in [
            (true, "the first on its connection"),
            (false, "on connections kept alive"),
        ] {
            let panel = Panel {
                top: 150.0 + 160.0 * panels.len() as f64,
                height: 100.0,
            };
            let title = format!("{protocol}: {what}");
            svg.text(LEFT, panel.top - 14.0, 14.0, INK, "start", 600, &title);
            let is_new = |answer: &&Asked| {
                first.get(&(protocol, answer.connection)) == Some(&answer.done_ns)
            };
            let of = answers.iter().filter(|answer| answer.protocol == protocol);
            let came = of.filter(|answer| is_new(answer) == new).map(|answer| {
                let who = match answer.version.as_deref() {
                    Some("1") => 0,
                    Some(_) => 1,
                    None => 2,
                };
                (answer.done_ns, who)
            });
            time.stacks(&mut svg, panel, came);
            panels.push(panel);
        }
    }
    for (store, to) in stores.iter().zip(LEADS_TO) {
        let x = time.x(store.at_ns);
        svg.dashes(x, 120.0, panels.last().map_or(0.0, |panel| panel.bottom()));
        let text = format!("{} to version {to}", store.event);
        svg.text(x, 114.0, 11.0, INK, "middle", 400, &text);
    }
    for (x, fill, what) in [
        (0.0, BLUE, "version 1"),
        (90.0, GREEN, "version 2"),
        (180.0, RED, "failed"),
    ] {
        let text = format!("\u{25a0} {what}");
        svg.text(LEFT + x, 770.0, 12.0, fill, "start", 600, &text);
    }
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(event: &str, at_ns: u64) -> MonitorEvent {
        serde_json::from_value(serde_json::json!({
            "schema": 1, "time": "", "at_ns": at_ns, "store_ns": 10, "event": event, "service": "llm",
            "generation": 1, "detail": "", "actor": null, "why": null
        }))
        .unwrap()
    }

    /// Answers of one connection, each when it was done and by which version.
    fn connection(
        protocol: Protocol,
        begun_ns: u64,
        answers: &[(u64, Option<&str>)],
    ) -> Vec<Asked> {
        let asked = |(done_ns, version): &(u64, Option<&str>)| Asked {
            protocol,
            connection: begun_ns,
            begun_ns,
            done_ns: *done_ns,
            version: version.map(str::to_owned),
            error: version.is_none().then(|| "reset".to_owned()),
        };
        answers.iter().map(asked).collect()
    }

    fn judged(more: &[Asked]) -> Summary {
        let (one, two) = (Some("1"), Some("2"));
        let mut answers = more.to_vec();
        for protocol in PROTOCOLS {
            answers.extend(connection(protocol, 1, &[(50, one), (3000, one)]));
            answers.extend(connection(protocol, 1100, &[(1200, two), (3000, two)]));
            answers.extend(connection(protocol, 2100, &[(2200, one)]));
        }
        let stores = [store("flip", 1000), store("rollback", 2000)];
        Summary::new(&answers, &stores, Path::new("x"))
    }

    #[test]
    fn what_is_kept_stays_and_what_is_new_goes_over() {
        let summary = judged(&[]);
        assert!(summary.is_clean());
        let seen: Vec<_> = summary.switches.iter().map(|s| (s.new, s.kept)).collect();
        assert_eq!(seen, [(1, 1); 4]);
    }

    #[test]
    fn every_promise_can_be_broken() {
        let failed = connection(Protocol::Http, 3, &[(60, None)]);
        let stale = connection(Protocol::Grpc, 1011, &[(1500, Some("1"))]);
        let moved = connection(Protocol::Grpc, 4, &[(60, Some("1")), (1200, Some("2"))]);
        for broken in [failed, stale, moved] {
            assert!(!judged(&broken).is_clean(), "{broken:?}");
        }
    }

    #[test]
    fn what_is_under_way_at_the_store_may_go_either_way() {
        for version in ["1", "2"] {
            let under_way = connection(Protocol::Http, 990, &[(1200, Some(version))]);
            assert!(judged(&under_way).is_clean());
        }
    }
}
