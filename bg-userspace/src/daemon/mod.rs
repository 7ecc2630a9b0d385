//! The daemon: owns the word of every service, the checks around it, and the
//! story of each flip. When it stops, forwarding goes on as it is.

mod flip;
mod http;
mod report;

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bg_common::service::CutoverWord;
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};

use crate::{
    api::{Refusal, exit},
    config::Config,
    datapath::{self, Datapath, Settings},
    journal::{Entry, Journal},
    plan::Plan,
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
    started: Instant,
}

impl Daemon {
    /// Loads or adopts the packet path as the configuration says.
    pub fn start(file: &Path) -> Result<Arc<Self>> {
        let config = Config::load(file)?;
        let settings = Settings {
            interfaces: config.gateway.interfaces.clone(),
            mode: config.gateway.xdp,
            max_flows: config.gateway.max_flows,
            bpffs: config.gateway.bpffs.clone(),
        };
        let datapath = Datapath::start(&settings, &config.plan())?;
        let state = State::load(&config.gateway.state_dir);
        let journal = Journal::new(&config.gateway.state_dir);
        let daemon = Arc::new(Self {
            datapath,
            file: file.to_owned(),
            journal,
            state: Mutex::new(state),
            changing: tokio::sync::Mutex::new(()),
            started: Instant::now(),
            config: RwLock::new(config),
        });
        daemon.note(
            "start",
            "*",
            0,
            format!("version {}", env!("CARGO_PKG_VERSION")),
        );
        daemon.compare_words();
        Ok(daemon)
    }

    /// Serves until told to stop.
    pub async fn run(self: Arc<Self>) -> Result<()> {
        let resolver = self.datapath.resolver();
        resolver.resolve_now(FIRST_RESOLVE).await?;
        for (_, colour, address) in self.datapath.unresolved() {
            tracing::warn!(
                "no next hop is known for {address} ({}): the stack forwards to it",
                colour.as_str()
            );
        }
        let socket = self.config().gateway.socket.clone();
        let listener = listen(&socket)?;
        let mut stop = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;

        let watch = tokio::spawn(resolver.run());
        tokio::spawn(Arc::clone(&self).tick());
        tokio::spawn(Arc::clone(&self).sweep());
        let server = tokio::spawn(http::serve(listener, Arc::clone(&self)));
        // Without systemd there is nobody to tell.
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
        for interface in self.datapath.interfaces() {
            tracing::info!(
                "{} runs XDP in {} mode, program {}",
                interface.name,
                interface.mode,
                interface.program_id
            );
        }
        tracing::info!("ready on {}", socket.display());
        tokio::pin!(watch, server);
        loop {
            tokio::select! {
                _ = stop.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => match self.reload("SIGHUP", false).await {
                    Ok(changes) => tracing::info!("reloaded, {} changes", changes.len()),
                    Err(refusal) => tracing::error!("not reloaded: {refusal}"),
                },
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
        self.note("stop", "*", 0, "forwarding goes on as it is".to_owned());
        let _ = fs::remove_file(socket);
        tracing::info!("stopped; forwarding goes on as it is");
        Ok(())
    }

    fn config(&self) -> std::sync::RwLockReadGuard<'_, Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner)
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

    fn write(&self, entry: &Entry) {
        if let Err(error) = self.journal.append(entry) {
            tracing::error!("the journal was not written: {error}");
        }
    }

    fn save(&self) {
        if let Err(error) = self.state().save() {
            tracing::error!("the state file was not written: {error}");
        }
    }

    /// Applies the file: whole, or not at all (law 8).
    async fn reload(&self, actor: &str, dry_run: bool) -> Result<Vec<String>, Refusal> {
        let usage = |error: &dyn std::fmt::Display| Refusal::new(exit::USAGE, error.to_string());
        let new = Config::load(&self.file).map_err(|e| usage(&e))?;
        let old = self.config().clone();
        if new.gateway != old.gateway {
            let message = "[gateway] changed: those keys are read at the start only. Restart the daemon \
                           (forwarding goes on), or take the change back; nothing was applied";
            return Err(usage(&message));
        }
        let changes = difference(&old, &new);
        if dry_run || changes.is_empty() {
            return Ok(changes);
        }
        let plan: Plan = new.plan();
        let failed = |e: datapath::Error| Refusal::new(exit::DATAPATH, e.to_string());
        // The way to new backends first: no packet is sent there before, and no
        // flip waits for it.
        self.datapath.prepare(&plan).map_err(failed)?;
        if let Err(error) = self.datapath.resolver().resolve_now(FIRST_RESOLVE).await {
            tracing::error!("{error}");
        }
        let _changing = self.changing.lock().await;
        self.datapath.apply(&plan).map_err(failed)?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = new;
        self.write(&Entry::new(
            actor,
            "*",
            "reload",
            "result",
            0,
            changes.join("; "),
        ));
        Ok(changes)
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
            match tokio::task::spawn_blocking(move || daemon.datapath.sweep(FLOW_IDLE)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::error!("sweeping the flow tables: {error}"),
                Err(error) => tracing::error!("sweeping the flow tables: {error}"),
            }
        }
    }
}

/// The difference of two configurations, a line each.
fn difference(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    for name in old
        .services
        .keys()
        .filter(|name| !new.services.contains_key(*name))
    {
        lines.push(format!("- service {name}"));
    }
    for (name, service) in &new.services {
        let Some(before) = old.services.get(name) else {
            lines.push(format!("+ service {name}"));
            continue;
        };
        let texts = |service: &crate::config::Service| {
            let mut texts: Vec<String> = service
                .plan
                .listeners
                .iter()
                .map(|listener| format!("{name} listener {listener}"))
                .collect();
            for colour in bg_common::service::Colour::ALL {
                for backend in service.plan.backends(colour) {
                    texts.push(format!(
                        "{name} {} backend {backend} weight {}",
                        colour.as_str(),
                        backend.weight
                    ));
                }
                if let Some(version) = &service.versions[colour as usize] {
                    texts.push(format!("{name} {} version {version}", colour.as_str()));
                }
            }
            texts.push(format!("{name} on_flip {}", service.on_flip.as_str()));
            texts.push(format!(
                "{name} drain {}",
                humantime::format_duration(service.drain)
            ));
            texts.push(format!(
                "{name} udp_idle {}",
                humantime::format_duration(service.plan.udp_idle)
            ));
            texts
        };
        let (before, after) = (texts(before), texts(service));
        lines.extend(
            before
                .iter()
                .filter(|t| !after.contains(t))
                .map(|t| format!("- {t}")),
        );
        lines.extend(
            after
                .iter()
                .filter(|t| !before.contains(t))
                .map(|t| format!("+ {t}")),
        );
    }
    lines
}

/// Binds the control socket, for root and the group `bgswitch`.
fn listen(path: &Path) -> Result<UnixListener> {
    let context = || format!("listening on {}", path.display());
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(context)?;
    }
    // The lock on the pins says that no other daemon runs: the socket is stale.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(context);
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(context)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).with_context(context)?;
    if let Ok(Some(group)) = nix::unistd::Group::from_name("bgswitch") {
        nix::unistd::chown(path, None, Some(group.gid)).with_context(context)?;
    }
    Ok(listener)
}
