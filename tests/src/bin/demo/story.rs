//! Two releases under load: a good one, and one whose version fails a tenth of its
//! requests. Nobody tells the gateway which is which, and there are no health checks.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use bg_tests::{
    lab::{Lab, Place, default_service, listener},
    load::{self, Answer, Load, Mood, Reuse, now_ns},
    picture::{GREY, INK, Panel, Svg, Time, thousands},
};
use serde::Serialize;

use crate::wait;

/// The usual rules of a bake, but for the times of a good one.
const TABLES: &str = r#"
[[service.llm.gate]]
name = "smoke"
kind = "http"
path = "/ready"
[service.llm.bake]
settle = "2s"
duration = "6s"
[service.llm.standby]
hold = "1h"
"#;
const CLIENTS: usize = 50;
const PAUSE: Duration = Duration::from_millis(100);
/// So many of a thousand requests does the bad version fail.
const BAD: u32 = 100;
/// Nobody may be hurt for longer than this from the first bad answer on, milliseconds.
const HURT_FOR_MS: u64 = 5_000;
/// Width of a bar.
const STEP_NS: u64 = 100_000_000;

/// What became of a release.
#[derive(Debug, Serialize)]
struct Release {
    version: &'static str,
    /// Of `bgswitch release start --wait`.
    exit_code: i32,
    /// From its begin to its end.
    requests: usize,
    hurt: usize,
    #[serde(skip)]
    begun_ns: u64,
    #[serde(skip)]
    ended_ns: u64,
}

#[derive(Debug, Serialize)]
struct Story {
    good: Release,
    bad: Release,
    /// From the first bad answer to the last request that was hurt.
    hurt_for_ms: Option<u64>,
    /// What the release said of itself.
    why: String,
    /// Requests that failed otherwise.
    failed_otherwise: usize,
    requests: usize,
}

/// Tells the story; true when it ends well.
pub fn run(picture: &Path, json: bool, interrupted: &AtomicBool) -> Result<bool> {
    eprintln!(
        "demo: a gateway, {CLIENTS} clients, two servers a colour, in network namespaces; no health checks"
    );
    let moods: [Arc<Mood>; 2] = Default::default();
    let mut lab = Lab::new()?;
    lab.configure(&(default_service() + TABLES))?;
    for (place, colour, mood) in [
        (Place::Blue, "blue", &moods[0]),
        (Place::Green, "green", &moods[1]),
    ] {
        load::serve_in(lab.enter(place)?, colour, &[8000, 8001], &[], mood)?;
    }
    eprintln!("$ bgswitch run");
    lab.start()?;
    let clients = (0..CLIENTS).map(|n| (listener(8000), [Reuse::KeepAlive, Reuse::Never][n % 2]));
    let load = Load::start(lab.enter(Place::Client)?, clients.collect(), PAUSE);
    let begun_ns = now_ns();
    wait(Duration::from_secs(3), interrupted)?;
    let (good, _) = release(&lab, "model@2")?;

    wait(Duration::from_secs(2), interrupted)?;
    eprintln!(
        "\nblue's servers get model@3, which answers {} % of its requests with 500",
        BAD / 10
    );
    moods[0].fail(BAD);
    let newer = default_service().replace("model@1", "model@3");
    lab.configure(&(newer + TABLES))?;
    eprintln!("$ bgswitch reload");
    lab.ask(&["reload"])?;
    let (bad, why) = release(&lab, "model@3")?;
    wait(Duration::from_secs(3), interrupted)?;
    let answers = load.finish()?;
    drop(lab);

    let story = Story::of(good, bad, &why, &answers, &moods[0]);
    story
        .draw(&answers, begun_ns)
        .save(picture)
        .with_context(|| format!("drawing {}", picture.display()))?;
    if json {
        println!("{}", serde_json::to_string(&story)?);
    } else {
        story.print(picture);
    }
    Ok(story.is_good())
}

/// Runs a release to its end, and shows what it says.
fn release(lab: &Lab, version: &'static str) -> Result<(Release, String)> {
    eprintln!("$ bgswitch release start llm --version {version} --wait");
    let begun_ns = now_ns();
    let words = ["release", "start", "llm", "--version", version, "--wait"];
    let (exit_code, out, err) = lab.tell(&words)?;
    eprint!("{out}{err}");
    eprintln!("$ echo $?\n{exit_code}");
    let release = Release {
        version,
        exit_code,
        requests: 0,
        hurt: 0,
        begun_ns,
        ended_ns: now_ns(),
    };
    Ok((release, err))
}

impl Story {
    fn of(mut good: Release, mut bad: Release, why: &str, answers: &[Answer], mood: &Mood) -> Self {
        let failed: Vec<&Answer> = answers.iter().filter(|a| a.result.is_err()).collect();
        for release in [&mut good, &mut bad] {
            let during =
                |answer: &&Answer| (release.begun_ns..release.ended_ns).contains(&answer.done_ns);
            release.requests = answers.iter().filter(during).count();
            release.hurt = failed.iter().copied().filter(during).count();
        }
        let first = mood.failed_ns.load(Ordering::Relaxed);
        // With the rollback, connections to the bad version are reset: also behind its end.
        let by_bad = |answer: &&&Answer| first > 0 && answer.done_ns >= first;
        bad.hurt = failed.iter().filter(by_bad).count();
        let last = failed.iter().map(|answer| answer.done_ns).max();
        Self {
            hurt_for_ms: last
                .filter(|_| first > 0)
                .map(|last| last.saturating_sub(first) / 1_000_000),
            failed_otherwise: failed.len() - bad.hurt,
            requests: answers.len(),
            why: why.trim().to_owned(),
            good,
            bad,
        }
    }

    fn is_good(&self) -> bool {
        self.good.exit_code == 0
            && self.bad.exit_code == 10
            && self.failed_otherwise == 0
            && self.bad.hurt > 0
            && self.hurt_for_ms.is_some_and(|ms| ms <= HURT_FOR_MS)
    }

    fn print(&self, picture: &Path) {
        let Self { good, bad, .. } = self;
        println!(
            "\n{}: exit code {}, {} requests meanwhile, {} hurt",
            good.version,
            good.exit_code,
            thousands(good.requests),
            good.hurt
        );
        println!(
            "{}: exit code {}, {} requests meanwhile, {} hurt, all within {} ms of the first",
            bad.version,
            bad.exit_code,
            thousands(bad.requests),
            bad.hurt,
            self.hurt_for_ms.unwrap_or_default()
        );
        println!(
            "{} requests in all, {} failed otherwise",
            thousands(self.requests),
            self.failed_otherwise
        );
        println!("picture: {}", picture.with_extension("png").display());
    }

    /// Requests a second by who answered, and those that were hurt.
    fn draw(&self, answers: &[Answer], begun_ns: u64) -> Svg {
        let mut svg = Svg::new(420.0);
        let title = format!(
            "A bad release rolls back by itself: {} of {} requests were hurt",
            self.bad.hurt,
            thousands(self.requests)
        );
        svg.text(48.0, 54.0, 26.0, INK, "start", 700, &title);
        let about = "requests a second, by the colour that answered; red: failed. No health checks: the packet path heard it";
        svg.text(48.0, 80.0, 14.0, GREY, "start", 400, about);
        let panel = Panel {
            top: 140.0,
            height: 220.0,
        };
        let done = answers.iter().map(|answer| answer.done_ns);
        let time = Time::new(begun_ns, STEP_NS, done);
        let came = answers.iter().map(|answer| {
            let who = match answer.result.as_deref() {
                Ok("blue") => 0,
                Ok(_) => 1,
                Err(_) => 2,
            };
            (answer.done_ns, who)
        });
        time.stacks(&mut svg, panel, came);
        for release in [&self.good, &self.bad] {
            for (at, what) in [
                (release.begun_ns, "begins"),
                (
                    release.ended_ns,
                    if release.exit_code == 0 {
                        "is good"
                    } else {
                        "is back"
                    },
                ),
            ] {
                let x = time.x(at);
                svg.dashes(x, panel.top - 8.0, panel.bottom());
                let text = format!("{} {what}", release.version);
                svg.text(x, panel.top - 14.0, 11.0, INK, "middle", 400, &text);
            }
        }
        svg
    }
}
