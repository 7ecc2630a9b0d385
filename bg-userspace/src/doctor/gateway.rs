//! What the services need of the host and of the network, and the daemon.

use std::{collections::BTreeSet, fs, net::IpAddr, time::Duration};

use hyper::Method;

use super::Findings;
use crate::{
    api::{Kind, Status},
    client,
    config::{Config, Paths},
    datapath::inspect,
    plan::{Plan, ServicePlan},
};

pub(super) fn look(findings: &mut Findings, config: &Config) {
    let plan = config.plan();
    let interfaces = &config.gateway.interfaces;
    let before = findings.0.len();
    for setting in inspect::settings(interfaces, &plan) {
        findings.trouble("sysctl", setting.what, Some(setting.mends));
    }
    for name in interfaces {
        reverse_path(findings, name);
    }
    if findings.0.len() == before {
        findings.ok("sysctl", "the host forwards, and keeps its own ports apart");
    }
    addresses(findings, &plan);
    room(findings, config);
}

/// Whether the pinned tables are as large as the configuration wants them.
fn room(findings: &mut Findings, config: &Config) {
    let Some(room) = inspect::pinned_services(&config.gateway.paths.bpffs) else {
        return;
    };
    let (wanted, services) = (config.gateway.max_services, config.services.len());
    let mends = "systemctl stop bgswitch && bgswitch detach && systemctl start bgswitch";
    let mends = Some(mends.to_owned());
    if services > room as usize {
        let message = format!(
            "the pinned tables have room for {room} services, and {services} are configured. Made \
             again they are larger; that stops forwarding, and forgets all flows"
        );
        findings.trouble("pins", message, mends);
    } else if wanted != room {
        let message = format!(
            "the pinned tables have room for {room} services, not for {wanted} (gateway.max_services): \
             they keep their size until they are made again, which stops forwarding, and forgets all \
             flows"
        );
        findings.note("pins", message, mends);
    }
}

/// Strict reverse path filtering, which the stack goes by for what XDP leaves to it.
fn reverse_path(findings: &mut Findings, name: &str) {
    let read = |of: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{of}/rp_filter");
        let value = fs::read_to_string(path).ok()?;
        value.trim().parse::<u8>().ok()
    };
    let (Some(own), Some(all)) = (read(name), read("all")) else {
        return;
    };
    // The larger one counts (ip-sysctl.rst).
    if own.max(all) == 1 {
        let message = format!(
            "rp_filter of {name} is strict: what XDP leaves to the stack is dropped where its way back \
             is another interface"
        );
        let mends = format!("sysctl -w net.ipv4.conf.{name}.rp_filter=2");
        findings.note("sysctl", message, Some(mends));
    }
}

/// Addresses of listeners that somebody else answers for.
fn addresses(findings: &mut Findings, plan: &Plan) {
    let endpoints = plan.services.iter().flat_map(ServicePlan::endpoints);
    let wanted: BTreeSet<IpAddr> = endpoints.map(|endpoint| endpoint.address.ip()).collect();
    let wanted: Vec<IpAddr> = wanted.into_iter().collect();
    match inspect::held_by_others(&wanted) {
        Err(error) => findings.unseen("addresses", error.to_string()),
        Ok(held) if held.is_empty() => {
            findings.ok(
                "addresses",
                "no neighbour is known to have a listener's address",
            );
        }
        Ok(held) => {
            for one in held {
                let (address, interface) = (one.address, one.interface);
                let mends = Some(format!("ip neigh show {address} dev {interface}"));
                if one.reachable {
                    let message = format!(
                        "{address} is another host's on {interface}: clients there reach that one. Take it \
                         away there, or stop the other gateway"
                    );
                    findings.trouble("addresses", message, mends);
                } else {
                    let message = format!(
                        "{address} was another host's on {interface}; whether it still is, nobody has \
                         asked of late"
                    );
                    findings.note("addresses", message, mends);
                }
            }
        }
    }
}

/// Whether a daemon runs, and which.
pub(super) fn daemon(findings: &mut Findings, paths: &Paths, timeout: Duration) {
    let own = env!("CARGO_PKG_VERSION");
    match client::call::<Status>(&paths.socket, timeout, Method::GET, "/v1/status", &()) {
        Ok(status) => {
            let (version, pid) = (&status.daemon.version, status.daemon.pid);
            if version == own {
                findings.ok("daemon", format!("version {version} runs, process {pid}"));
            } else {
                let message = format!(
                    "version {version} runs, this is {own}: a restart puts this one in its place, and \
                     loses no packet"
                );
                let mends = Some("systemctl restart bgswitch".to_owned());
                findings.note("daemon", message, mends);
            }
            for interface in status.interfaces.iter().filter(|i| i.program_id == 0) {
                let message = "the daemon has no program there: nothing is forwarded";
                findings.trouble(&interface.name, message, None);
            }
        }
        Err(refusal) if refusal.kind == Kind::NoDaemon => {
            let mends = Some("bgswitch run   # or: systemctl start bgswitch".to_owned());
            findings.note("daemon", refusal.error, mends);
        }
        Err(refusal) if refusal.kind == Kind::NotPermitted => {
            findings.unseen("daemon", refusal.error);
        }
        Err(refusal) => findings.trouble("daemon", refusal.error, None),
    }
}
