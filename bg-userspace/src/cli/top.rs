//! `bgswitch top`: what the API tells, renewed each second, on a screen.

mod model;
#[cfg(test)]
mod tests;
mod view;

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, TryRecvError, channel},
    },
    thread,
    time::Duration,
};

use clap::Args;
use hyper::Method;
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
};
use serde::de::DeserializeOwned;
use tokio::signal::unix::{SignalKind, signal};

use self::model::{Sample, Screen, Sort};
use super::{Common, Output};
use crate::{
    api::{History, Kind, Refusal, ReleaseStatus, Status},
    client,
    release::State,
};

const NOTE: &str = "\
Keys: up and down (or k and j) choose a service, s sorts by the next column (name,
flows, new flows, packets), q or Ctrl-C ends it. Figures with /s are of the last second
or so. `refused`, `reset` and `5xx` are what the packet path hears of servers: only of
services whose releases have a bake with signals.

  bgswitch top --once        one frame, as text; also where stdout is no terminal";

/// How often it is renewed.
const EVERY: Duration = Duration::from_secs(1);
/// How soon a key is heard, at the latest.
const LOOK: Duration = Duration::from_millis(100);
/// Lines of the journal that are shown at most.
const ENTRIES: usize = 50;

/// `bgswitch top`.
#[derive(Debug, Args)]
#[command(after_help = NOTE)]
pub(super) struct Top {
    /// Choose this service first.
    service: Option<String>,
    /// Print one frame as text, and end.
    #[arg(long)]
    once: bool,
    /// Sort services by this, the largest first.
    #[arg(long, value_enum, default_value = "name")]
    sort: Sort,
}

impl Top {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        if common.output == Output::Json {
            let message = "top is for people: `bgswitch status --watch -o json` is for scripts";
            return Err(Refusal::new(Kind::Usage, message).into());
        }
        let mut asked = Asked {
            socket: PathBuf::new(),
            timeout: common.timeout,
        };
        let first = common.at_the_socket(|socket| {
            socket.clone_into(&mut asked.socket);
            asked.sample()
        })?;
        let mut screen = Screen::new(first, self.sort);
        if let Some(service) = &self.service {
            screen.choose(service)?;
        }
        if self.once || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
            // Rates want two looks.
            thread::sleep(EVERY);
            screen.take(asked.sample()?);
            return common.print(&(), |()| view::text(&screen));
        }
        let samples = keep_sampling(asked);
        let told_to_end = on_signals()?;
        // It restores the terminal before a panic is told, too.
        let mut terminal = ratatui::try_init().inspect_err(|_| {
            // It may be half done; why it failed is said below.
            let _ = ratatui::try_restore();
        })?;
        let shown = show(&mut terminal, &mut screen, &samples, &told_to_end);
        ratatui::try_restore()?;
        shown
    }
}

/// Draws until somebody wants it to end.
fn show(
    terminal: &mut DefaultTerminal,
    screen: &mut Screen,
    samples: &Receiver<Result<Sample, Refusal>>,
    told_to_end: &AtomicBool,
) -> anyhow::Result<()> {
    while !told_to_end.load(Ordering::Relaxed) {
        terminal.draw(|frame| view::draw(frame, screen))?;
        if event::poll(LOOK)?
            && let Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
            && !obey(screen, key)
        {
            return Ok(());
        }
        loop {
            match samples.try_recv() {
                Ok(Ok(sample)) => screen.take(sample),
                Ok(Err(refusal)) => screen.trouble = Some(refusal.error),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => anyhow::bail!("nobody asks the daemon any more"),
            }
        }
    }
    Ok(())
}

/// False when it is to end.
fn obey(screen: &mut Screen, key: KeyEvent) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('c' | 'd') if control => return false,
        KeyCode::Down | KeyCode::Char('j') => screen.down(),
        KeyCode::Up | KeyCode::Char('k') => screen.up(),
        KeyCode::Char('s') => screen.sort = screen.sort.next(),
        _ => {}
    }
    true
}

/// Where is asked, found once: the configuration is not read each second.
struct Asked {
    socket: PathBuf,
    timeout: Duration,
}

impl Asked {
    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Refusal> {
        client::call(&self.socket, self.timeout, Method::GET, path, &())
    }

    /// Asks for everything that is shown: of releases only where one is not at its good
    /// end, or none.
    fn sample(&self) -> Result<Sample, Refusal> {
        let status: Status = self.get("/v1/status")?;
        let mut releases = BTreeMap::new();
        let steady = State::Steady.as_str();
        for service in status.services.iter().filter(|s| s.state != steady) {
            let name = &service.name;
            let release: ReleaseStatus = self.get(&format!("/v1/services/{name}/release"))?;
            releases.extend(release.release.map(|release| (name.clone(), release)));
        }
        let history: History = self.get(&format!("/v1/history?limit={ENTRIES}"))?;
        Ok(Sample::new(status, releases, history.entries))
    }
}

/// Asks again and again, so that no key waits for an answer.
fn keep_sampling(asked: Asked) -> Receiver<Result<Sample, Refusal>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        loop {
            thread::sleep(EVERY);
            if sender.send(asked.sample()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Becomes true with a signal that ends a process: the terminal is restored first.
fn on_signals() -> io::Result<Arc<AtomicBool>> {
    let told = Arc::new(AtomicBool::new(false));
    let tell = Arc::clone(&told);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let guard = runtime.enter();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    drop(guard);
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        tell.store(true, Ordering::Relaxed);
    });
    Ok(told)
}
