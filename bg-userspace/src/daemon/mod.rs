//! The daemon: owns the word of every service, the checks around it, and the
//! story of each flip. When it stops, forwarding goes on as it is.

mod flip;
mod http;
mod reload;
mod report;
mod socket;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bg_common::service::CutoverWord;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use self::socket::Socket;
use crate::{
    api::Refusal,
    config::Config,
    datapath::{self, Datapath, Settings},
    journal::{Entry, Journal},
    state::State,
};

/// How long `run` waits for the backends' next hops before it says it is ready.
const FIRST_RESOLVE: Duration = Duration::from_secs(2);
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// An established flow that was silent for longer is forgotten.
const FLOW_IDLE: Duration = Duration::from_hours(2);

/// What all requests share.
pub struct Daemon {
    datapath: Datapath,
    file: PathBuf,
    config: RwLock<Config>,
    journal: Journal,
    state: Mutex<State>,
    /// One change of a word or of the tables at a time.
    changing: tokio::sync::Mutex<()>,
    /// One change of the tables at a time: a reload, or a sweep.
    tables: Arc<tokio::sync::Mutex<()>>,
    socket: Socket,
    started: Instant,
}

impl Daemon {
    /// Loads or adopts the packet path as the configuration says. What needs no
    /// packet path comes before it: a start that fails changes no forwarding.
    pub fn start(file: &Path) -> Result<Arc<Self>> {
        let config = Config::load(file)?;
        let paths = &config.gateway.paths;
        let lock = datapath::lock(&paths.bpffs)?;
        let state = State::load(&paths.state_dir);
        let journal = Journal::new(&paths.state_dir);
        let entry = |phase, detail| Entry::new("bgswitch", "*", "start", phase, 0, detail);
        let version = concat!("version ", env!("CARGO_PKG_VERSION"));
        journal.append(&entry("intent", version.to_owned()))?;
        let settings = Settings {
            interfaces: config.gateway.interfaces.clone(),
            mode: config.gateway.xdp,
            max_flows: config.gateway.max_flows,
        };
        let started = Socket::bind(&paths.socket)
            .and_then(|socket| Ok((socket, Datapath::start(lock, &settings, &config.plan())?)));
        let result = match &started {
            Ok(_) => version.to_owned(),
            Err(error) => format!("failed: {error:#}"),
        };
        journal.append(&entry("result", result))?;
        let (socket, datapath) = started?;
        let daemon = Arc::new(Self {
            datapath,
            file: file.to_owned(),
            journal,
            state: Mutex::new(state),
            changing: tokio::sync::Mutex::default(),
            tables: Arc::default(),
            socket,
            started: Instant::now(),
            config: RwLock::new(config),
        });
        daemon.remember_services();
        daemon.compare_words();
        Ok(daemon)
    }

    /// Serves until told to stop.
    pub async fn run(self: Arc<Self>) -> Result<()> {
        self.resolve_first().await;
        for (_, colour, address) in self.datapath.unresolved() {
            tracing::warn!(
                "no next hop is known for {address} ({}): the stack forwards to it",
                colour.as_str()
            );
        }
        let listener = self.socket.listener()?;
        let mut stop = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;

        let watch = tokio::spawn(self.datapath.resolver().run());
        tokio::spawn(Arc::clone(&self).tick());
        tokio::spawn(Arc::clone(&self).sweep());
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
        tokio::pin!(watch, server);
        loop {
            tokio::select! {
                _ = stop.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => self.reload_for_systemd().await,
                ended = &mut watch => {
                    ended.context("the watch of routes and neighbours")??;
                    anyhow::bail!("the watch of routes and neighbours ended");
                }
                ended = &mut server => {
                    ended.context("the control socket")??;
                    anyhow::bail!("the control socket closed");
                }
            }
        }
        tell_systemd(&[NotifyState::Stopping]);
        self.note("stop", "*", 0, "forwarding goes on as it is".to_owned());
        let _ = fs::remove_file(self.socket.path());
        tracing::info!("stopped; forwarding goes on as it is");
        Ok(())
    }

    /// SIGHUP, in the order of `Type=notify-reload`.
    async fn reload_for_systemd(&self) {
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
    fn note(&self, action: &str, service: &str, generation: u16, detail: String) {
        self.write(&Entry::new(
            "bgswitch", service, action, "result", generation, detail,
        ));
    }

    /// Writes an entry; when that fails, the warning goes to the log and back.
    fn write(&self, entry: &Entry) -> Option<String> {
        let error = self.journal.append(entry).err()?;
        tracing::error!("{error}");
        Some(error.to_string())
    }

    fn save(&self) -> Option<String> {
        let error = self.state().save().err()?;
        let warning = format!("the state file was not written: {error}");
        tracing::error!("{warning}");
        Some(warning)
    }

    /// Keeps the names and ids of the services, and forgets others.
    fn remember_services(&self) {
        let ids = self
            .config()
            .services
            .keys()
            .filter_map(|name| Some((name.clone(), self.datapath.service_id(name)?)))
            .collect();
        self.state().keep(ids);
        self.save();
    }

    /// Finds the way to new backends at once.
    async fn resolve_first(&self) {
        if let Err(error) = self.datapath.resolver().resolve_now(FIRST_RESOLVE).await {
            tracing::error!("{error}");
        }
    }

    /// Once a second: ends drains, and notices words that somebody else stored.
    async fn tick(self: Arc<Self>) {
        let mut every = tokio::time::interval(Duration::from_secs(1));
        loop {
            every.tick().await;
            let _changing = self.changing.lock().await;
            self.compare_words();
            self.end_drains();
        }
    }

    /// Compares the kernel's words with the last ones seen, and believes the
    /// kernel (law 4).
    fn compare_words(&self) {
        let names: Vec<String> = self.config().services.keys().cloned().collect();
        let mut changed = false;
        for name in names {
            let Some(word) = self.datapath.word(&name) else {
                continue;
            };
            let seen = self.state().words.insert(name.clone(), word.0);
            if seen == Some(word.0) {
                continue;
            }
            changed = true;
            if let Some(seen) = seen.map(CutoverWord) {
                let detail = format!(
                    "{} generation {} -> {} generation {}: not by this daemon, believed",
                    seen.active().as_str(),
                    seen.generation(),
                    word.active().as_str(),
                    word.generation()
                );
                tracing::warn!("{name}: {detail}");
                self.note("changed_outside", &name, word.generation(), detail);
            }
        }
        if changed {
            self.save();
        }
    }

    fn end_drains(&self) {
        let drains: BTreeMap<_, _> = self.state().drains.clone();
        for (name, drain) in drains.into_iter().filter(|(_, drain)| drain.is_over()) {
            if let Some(word) = self
                .datapath
                .word(&name)
                .filter(|word| word.generation() == drain.generation)
            {
                match self.datapath.store(&name, word, word.drained()) {
                    Ok(_) => {
                        let detail =
                            format!("{}'s old flows are reset", word.active().other().as_str());
                        self.state().words.insert(name.clone(), word.drained().0);
                        self.note("drain_end", &name, word.generation(), detail);
                    }
                    // Somebody flipped in this moment: the drain is void.
                    Err(error) => tracing::info!("{name}: {error}"),
                }
            }
            self.state().drains.remove(&name);
            self.save();
        }
    }

    async fn sweep(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SWEEP_EVERY).await;
            let daemon = Arc::clone(&self);
            let tables = Arc::clone(&self.tables).lock_owned().await;
            let sweep = move || {
                let swept = daemon.datapath.sweep(FLOW_IDLE);
                drop(tables);
                swept
            };
            match tokio::task::spawn_blocking(sweep).await {
                Ok(Ok(_)) => {}
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
