//! A reload: validate whole, journal the intent, apply, journal the result.

use bg_common::service::Colour;

use super::Daemon;
use crate::{
    api::{Kind, Refusal},
    config::{Config, Gateway, Service},
    datapath,
    journal::Entry,
};

impl Daemon {
    /// Applies the file: whole, or not at all (law 8). Returns the difference.
    pub(super) async fn reload(&self, actor: &str, dry_run: bool) -> Result<Vec<String>, Refusal> {
        let _tables = self.tables.lock().await;
        let old = self.config().clone();
        let new = self.read_file(&old)?;
        let changes = difference(&old, &new);
        let change = self.datapath.plan_change(&new.plan()).map_err(|error| {
            Refusal::new(Kind::Datapath, format!("{error}. Nothing was applied"))
        })?;
        if dry_run || changes.is_empty() {
            return Ok(changes);
        }
        let entry = |phase, detail| Entry::new(actor, "*", "reload", phase, 0, detail);
        self.journal
            .append(&entry("intent", changes.join("; ")))
            .map_err(|e| Refusal::new(Kind::Failed, format!("{e}. Nothing was applied")))?;
        // The way to new backends first: no packet is sent there before, and no
        // flip waits for it.
        self.datapath.enter_backends(&change);
        self.resolve_first().await;
        let applied = {
            let _changing = self.changing.lock().await;
            self.datapath.apply(change).map(|()| {
                *self.config_mut() = new;
                self.remember_services();
            })
        };
        let result = match &applied {
            Ok(()) => changes.join("; "),
            Err(error) => format!("failed: {error}"),
        };
        self.write(&entry("result", result));
        applied
            .map(|()| changes)
            .map_err(|error| Refusal::new(Kind::Datapath, error.to_string()))
    }

    /// Reads the file, and refuses what cannot be had without a restart.
    fn read_file(&self, old: &Config) -> Result<Config, Refusal> {
        let refused =
            |trouble: String| Refusal::new(Kind::Usage, format!("{trouble}. Nothing was applied"));
        let new = Config::load(&self.file).map_err(|e| refused(e.to_string()))?;
        if let Some(keys) = restart_keys(&old.gateway, &new.gateway) {
            return Err(refused(format!(
                "{}: {keys} changed, which is read at the start only: restart the daemon (forwarding goes \
                 on), or take the change back",
                self.file.display()
            )));
        }
        datapath::interfaces_exist(&new.gateway.interfaces).map_err(|e| refused(e.to_string()))?;
        Ok(new)
    }
}

/// The keys of `[gateway]` that differ, if any do.
fn restart_keys(old: &Gateway, new: &Gateway) -> Option<String> {
    let keys: Vec<&str> = [
        ("gateway.interfaces", old.interfaces != new.interfaces),
        ("gateway.xdp", old.xdp != new.xdp),
        ("gateway.max_flows", old.max_flows != new.max_flows),
        ("gateway.socket", old.paths.socket != new.paths.socket),
        (
            "gateway.state_dir",
            old.paths.state_dir != new.paths.state_dir,
        ),
        ("gateway.bpffs", old.paths.bpffs != new.paths.bpffs),
    ]
    .into_iter()
    .filter_map(|(key, differs)| differs.then_some(key))
    .collect();
    (!keys.is_empty()).then(|| keys.join(", "))
}

/// The difference of two configurations, a line each.
fn difference(old: &Config, new: &Config) -> Vec<String> {
    let gone = |name: &&String| !new.services.contains_key(*name);
    let mut lines: Vec<String> = old
        .services
        .keys()
        .filter(gone)
        .map(|name| format!("- service {name}"))
        .collect();
    for (name, service) in &new.services {
        let Some(before) = old.services.get(name) else {
            lines.push(format!("+ service {name}"));
            continue;
        };
        let (before, after) = (describe(name, before), describe(name, service));
        let left = before.iter().filter(|line| !after.contains(line));
        lines.extend(left.map(|line| format!("- {line}")));
        let came = after.iter().filter(|line| !before.contains(line));
        lines.extend(came.map(|line| format!("+ {line}")));
    }
    lines
}

/// All that a service's tables say, a line each.
fn describe(name: &str, service: &Service) -> Vec<String> {
    let mut lines: Vec<String> = service
        .plan
        .listeners
        .iter()
        .map(|listener| format!("{name} listener {listener}"))
        .collect();
    for colour in Colour::ALL {
        let label = colour.as_str();
        lines.extend(
            service
                .plan
                .backends(colour)
                .iter()
                .map(|b| format!("{name} {label} backend {b} weight {}", b.weight)),
        );
        if let Some(version) = &service.versions[colour as usize] {
            lines.push(format!("{name} {label} version {version}"));
        }
    }
    let duration = humantime::format_duration;
    lines.push(format!("{name} on_flip {}", service.on_flip.as_str()));
    lines.push(format!("{name} drain {}", duration(service.drain)));
    lines.push(format!(
        "{name} udp_idle {}",
        duration(service.plan.udp_idle)
    ));
    lines
}
