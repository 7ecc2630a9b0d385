//! The daemon: owns the word of every service, the checks around it, and the
//! story of each flip. When it stops, forwarding goes on as it is.

mod canary;
mod change;
mod drain;
mod events;
mod explain;
mod flip;
mod gates;
mod health;
mod http;
mod metrics;
mod monitor;
mod release;
mod reload;
mod report;
pub mod requests;
mod signals;
mod socket;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use self::{
    metrics::Metrics,
    monitor::{Hub, Told},
    socket::Socket,
};
use crate::{
    api::Refusal,
    config::Config,
    datapath::{self, Datapath, Noted, Settings},
    health::Prober,
    journal::{Entry, Journal},
    keeper::{Keeper, Pending, RESULT_WAIT},
    state::State,
};

const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// What all requests share.
pub struct Daemon {
    datapath: Datapath,
    file: PathBuf,
    config: RwLock<Config>,
    journal: Journal,
    keeper: Keeper,
    state: Mutex<State>,
    /// One change of a word at a time.
    changing: tokio::sync::Mutex<()>,
    /// One reload at a time.
    reloading: tokio::sync::Mutex<()>,
    socket: Socket,
    started: Instant,
    hub: Hub,
    metrics: Metrics,
    releases: release::Desks,
    health: Prober,
    heard: signals::Memory,
}

impl Daemon {
    /// Loads or adopts the packet path as the configuration says. What needs no
    /// packet path comes before it: a start that fails changes no forwarding.
    pub fn start(file: &Path) -> Result<Arc<Self>> {
        let config = Config::load(file)?;
        let paths = &config.gateway.paths;
        let lock = datapath::lock(&paths.bpffs)?;
        let state = State::load(&paths.state_dir);
        let journal = Journal::rotating(&paths.state_dir, config.gateway.journal_max);
        let while_away = journal.while_away();
        let entry = |phase, detail| Entry::new("bgswitch", "*", "start", phase, 0, detail);
        let version = concat!("version ", env!("CARGO_PKG_VERSION"));
        journal.append(&entry("intent", version.to_owned()))?;
        let settings = Settings {
            interfaces: config.gateway.interfaces.clone(),
            mode: config.gateway.xdp,
            max_flows: config.gateway.max_flows,
            max_services: config.gateway.max_services,
        };
        let keeper = Keeper::start(journal.clone())?;
        let started = Socket::bind(&paths.socket).and_then(|socket| {
            let metrics = Metrics::bind(config.gateway.metrics)?;
            let datapath = Datapath::start(
                lock,
                &settings,
                &config.plan(),
                &state.known(),
                &state.announced,
            )?;
            Ok((socket, metrics, datapath))
        });
        let result = match &started {
            Ok(_) => version.to_owned(),
            Err(error) => format!("failed: {error:#}"),
        };
        journal.append(&entry("result", result))?;
        let (socket, metrics, datapath) = started?;
        let daemon = Arc::new(Self {
            datapath,
            file: file.to_owned(),
            journal,
            keeper,
            state: Mutex::new(state),
            changing: tokio::sync::Mutex::new(()),
            reloading: tokio::sync::Mutex::new(()),
            socket,
            started: Instant::now(),
            hub: Hub::default(),
            metrics,
            releases: release::Desks::default(),
            health: Prober::default(),
            heard: signals::Memory::default(),
            config: RwLock::new(config),
        });
        daemon.remember_services(daemon.datapath.noted());
        daemon.compare_words();
        daemon.count_while_away(&while_away);
        daemon.adopt_drains();
        daemon.listen_to_servers();
        Ok(daemon)
    }

    /// Serves until told to stop.
    pub async fn run(self: Arc<Self>) -> Result<()> {
        self.save().within(RESULT_WAIT).await;
        for (_, colour, address) in self.datapath.unresolved() {
            tracing::warn!(
                "no next hop is known for {address} ({}): the stack forwards to it, nobody with snat or dsr",
                colour.as_str()
            );
        }
        let listener = self.socket.listener()?;
        let mut stop = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;

        tokio::spawn(self.datapath.resolver().run());
        self.health.follow(&self.config());
        tokio::spawn(Arc::clone(&self).watch_health());
        tokio::spawn(Arc::clone(&self).tick());
        tokio::spawn(Arc::clone(&self).sweep());
        tokio::spawn(Arc::clone(&self).pass_on());
        tokio::spawn(Arc::clone(&self).remember_signals());
        self.resume_releases();
        self.serve_metrics()?;
        let server = tokio::spawn(http::serve(listener, Arc::clone(&self)));
        tell_systemd(&[NotifyState::Ready]);
        for interface in self.datapath.interfaces() {
            tracing::info!(
                "{} runs XDP in {} mode, program {}",
                interface.name,
                interface.mode,
                interface.program_id
            );
        }
        tracing::info!("ready on {}", self.socket.path().display());
        tokio::pin!(server);
        loop {
            tokio::select! {
                _ = stop.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => self.reload_for_systemd().await,
                ended = &mut server => {
                    ended.context("the control socket")??;
                    anyhow::bail!("the control socket closed");
                }
            }
        }
        tell_systemd(&[NotifyState::Stopping]);
        self.stop_watching();
        let detail = "forwarding goes on as it is".to_owned();
        self.note("stop", "*", 0, detail).within(RESULT_WAIT).await;
        let _ = fs::remove_file(self.socket.path());
        tracing::info!("stopped; forwarding goes on as it is");
        Ok(())
    }

    /// SIGHUP, in the order of `Type=notify-reload`.
    async fn reload_for_systemd(self: &Arc<Self>) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            tell_systemd(&[NotifyState::Reloading, now]);
        }
        match self.reload("SIGHUP", false).await {
            Ok(changes) => tracing::info!("reloaded, {} changes", changes.len()),
            Err(refusal) => tracing::error!("not reloaded: {refusal}"),
        }
        tell_systemd(&[NotifyState::Ready]);
    }

    fn config(&self) -> RwLockReadGuard<'_, Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn config_mut(&self) -> RwLockWriteGuard<'_, Config> {
        self.config.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn unknown(&self, service: &str) -> Refusal {
        Refusal::unknown_service(service, self.config().services.keys().map(String::as_str))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Journals what the daemon itself did.
    fn note(&self, action: &str, service: &str, generation: u16, detail: String) -> Pending {
        self.keeper.entry(Entry::new(
            "bgswitch", service, action, "result", generation, detail,
        ))
    }

    fn save(&self) -> Pending {
        let state = self.state().clone();
        self.keeper.state(state)
    }

    /// Keeps the names, ids and listeners of the services, and the addresses that
    /// are ours.
    fn remember_services(&self, announced: Noted) {
        let now = self
            .config()
            .services
            .iter()
            .filter_map(|(name, service)| {
                let id = self.datapath.service_id(name)?;
                let word = self.datapath.word(name)?;
                Some((name.clone(), (id, word, service.plan.listeners.clone())))
            })
            .collect();
        let mut state = self.state();
        state.applied(now);
        state.announced = announced;
        drop(state);
        self.save().unattended();
    }

    /// Compares the kernel's words with the last ones seen, and believes the
    /// kernel (law 4).
    fn compare_words(&self) {
        let names: Vec<String> = self.config().services.keys().cloned().collect();
        let mut merged = false;
        for name in names {
            let Some(word) = self.datapath.word(&name) else {
                continue;
            };
            let mut state = self.state();
            let known = state.services.get(&name).map(|known| known.word);
            if known.is_some_and(|known| known != word.0) && !merged {
                merged = true;
                state.merge();
            }
            let Some(seen) = state.saw(&name, word) else {
                continue;
            };
            drop(state);
            let detail = format!(
                "{} generation {} -> {} generation {}: not by this daemon, believed",
                seen.active().as_str(),
                seen.generation(),
                word.active().as_str(),
                word.generation()
            );
            tracing::warn!("{name}: {detail}");
            self.count_outside(&name, seen, word);
            let told = Told {
                generation: Some(word.generation()),
                detail: detail.clone(),
                ..Told::default()
            };
            self.tell(datapath::now_ns(), "changed_outside", &name, told);
            self.note("changed_outside", &name, word.generation(), detail)
                .unattended();
            self.releases.word_changed(&name, None);
        }
        if merged {
            self.save().unattended();
        }
    }

    async fn sweep(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SWEEP_EVERY).await;
            let daemon = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || daemon.datapath.sweep()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!("sweeping the flow tables: {error}"),
                Err(error) => tracing::error!("sweeping the flow tables: {error}"),
            }
        }
    }
}

/// Without systemd there is nobody to tell.
fn tell_systemd(states: &[NotifyState]) {
    let _ = sd_notify::notify(false, states);
}
