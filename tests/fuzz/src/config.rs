//! The configuration's parser.

mod gates;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::Path,
    time::Duration,
};

use bg_common::service::Colour;
use bg_userspace::config::{Config, GateKind, MAX_DURATION, ReleasePlan, Service};

const FILE: &str = "bgswitch.toml";

/// Parses a text; one that is accepted is written anew and parsed again.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match Config::parse(Path::new(FILE), text) {
        Ok(config) => {
            sane(&config);
            let text = written(&config);
            assert_eq!(Config::parse(Path::new(FILE), &text), Ok(config), "{text}");
        }
        Err(error) => {
            let said = error.to_string();
            let named = error.line.is_some() || !error.key.is_empty();
            assert!(
                said.starts_with(FILE) && named,
                "it does not say where: {said}"
            );
            assert!(
                !error.message.trim().is_empty(),
                "it does not say what: {said}"
            );
            let lines = text.lines().count() + 1;
            assert!(
                error.line.is_none_or(|line| (1..=lines).contains(&line)),
                "{said}"
            );
        }
    }
}

/// What the packet path takes for granted.
fn sane(config: &Config) {
    assert!(!config.gateway.interfaces.is_empty() && !config.services.is_empty());
    let mut listeners = BTreeSet::new();
    let mut ways_back = BTreeMap::new();
    for service in config.services.values() {
        let plan = &service.plan;
        assert!(!plan.listeners.is_empty());
        for listener in plan.endpoints() {
            let key = (
                listener.address.ip(),
                listener.address.port(),
                listener.protocol,
            );
            assert!(
                key.1 != 0 && listeners.insert(key),
                "two listeners at {listener}"
            );
        }
        for colour in Colour::ALL {
            for backend in plan.backends(colour) {
                assert!((1..=100).contains(&backend.weight) && backend.port != Some(0));
                for listener in plan.listeners.iter().filter(|l| backend.serves(l)) {
                    let from = backend.endpoint(listener);
                    let key = (from.ip(), from.port(), listener.protocol);
                    let to = ways_back.insert(key, *listener);
                    assert!(
                        to.is_none_or(|to| to == *listener),
                        "{from} answers for two"
                    );
                }
            }
        }
        assert!(service.drain.deadline <= MAX_DURATION && service.drain.reset_over <= MAX_DURATION);
    }
    let both = ways_back.keys().find(|key| listeners.contains(*key));
    assert!(both.is_none(), "a listener and a backend: {both:?}");
}

/// A configuration as a text that says all of it.
fn written(config: &Config) -> String {
    let gateway = &config.gateway;
    let names: Vec<_> = gateway.interfaces.iter().map(|name| quoted(name)).collect();
    let xdp = gateway.xdp.as_str();
    let paths = &gateway.paths;
    let path = |path: &Path| quoted(path.to_str().expect("a path out of a text"));
    let mut text = format!(
        "[gateway]\ninterfaces = [{}]\nxdp = \"{xdp}\"\nmax_flows = {}\nmax_services = {}\nsocket = {}\n\
         state_dir = {}\nbpffs = {}\n",
        names.join(", "),
        gateway.max_flows,
        gateway.max_services,
        path(&paths.socket),
        path(&paths.state_dir),
        path(&paths.bpffs)
    );
    for (name, service) in &config.services {
        write_service(&mut text, name, service);
    }
    text
}

fn write_service(text: &mut String, name: &str, service: &Service) {
    let (plan, drain) = (&service.plan, service.drain);
    let seconds = |time: Duration| format!("\"{}s\"", time.as_secs());
    let listeners: Vec<_> = plan
        .listeners
        .iter()
        .map(|l| quoted(&l.to_string()))
        .collect();
    let name = quoted(name);
    let _ = write!(
        text,
        "[service.{name}]\nlisten = [{}]\nforward = \"{}\"\nannounce = {}\non_flip = \"{}\"\ndrain = {}\ndrain_end = \"{}\"\n\
         reset_over = {}\nudp_idle = {}\n",
        listeners.join(", "),
        plan.forward.as_str(),
        plan.announce,
        service.on_flip.as_str(),
        seconds(drain.deadline),
        drain.end.as_str(),
        seconds(drain.reset_over),
        seconds(plan.udp_idle),
    );
    for colour in Colour::ALL {
        let backends: Vec<_> = plan
            .backends(colour)
            .iter()
            .map(|backend| {
                let address = match (backend.port, backend.address) {
                    (None, address) => address.to_string(),
                    (Some(port), address) => std::net::SocketAddr::new(address, port).to_string(),
                };
                format!("{{ address = \"{address}\", weight = {} }}", backend.weight)
            })
            .collect();
        let _ = writeln!(text, "[service.{name}.{}]", colour.as_str());
        let _ = writeln!(text, "backends = [{}]", backends.join(", "));
        let previews = plan.previews[colour as usize].iter();
        let previews: Vec<_> = previews.map(|p| quoted(&p.to_string())).collect();
        let _ = writeln!(text, "preview = [{}]", previews.join(", "));
        if let Some(version) = &service.versions[colour as usize] {
            let _ = writeln!(text, "version = {}", quoted(version));
        }
    }
    write_release(text, &name, &service.release);
}

fn write_release(text: &mut String, name: &str, plan: &ReleasePlan) {
    let seconds = |time: Duration| format!("\"{}s\"", time.as_secs());
    let (approval, bake) = (plan.approval, plan.bake);
    let _ = write!(
        text,
        "[service.{name}.approval]\nrequired = {}\n{}expires = {}\non_expiry = \"{}\"\n\
         [service.{name}.bake]\nduration = {}\nsettle = {}\non_fail = \"{}\"\non_inconclusive = \"{}\"\n\
         cooldown = {}\n{}[service.{name}.standby]\nhold = {}\n",
        approval.required,
        // Refused where nobody is asked.
        if approval.not_requester {
            "not_requester = true\n"
        } else {
            ""
        },
        seconds(approval.expires),
        approval.on_expiry.as_str(),
        seconds(bake.duration),
        seconds(bake.settle),
        bake.on_fail.as_str(),
        bake.on_inconclusive.as_str(),
        seconds(bake.cooldown),
        match bake.signals {
            None => "signals = false\n".to_owned(),
            Some(signals) => format!(
                "errors = {:?}\nslower = {:?}\n",
                signals.errors(),
                signals.slower()
            ),
        },
        seconds(plan.standby.hold),
    );
    for hook in &plan.hooks {
        let (when, kind) = (hook.when.as_str(), hook.run.kind.as_str());
        let _ = write!(
            text,
            "[[service.{name}.hook]]\nname = {}\nwhen = \"{when}\"\nkind = \"{kind}\"\ntimeout = {}\n",
            quoted(&hook.run.name),
            seconds(hook.run.timeout)
        );
        if hook.when.is_before() {
            let _ = writeln!(text, "on_failure = \"{}\"", hook.on_failure.as_str());
        }
        match &hook.run.kind {
            GateKind::Exec(command) => {
                let _ = writeln!(text, "command = {}", list(command));
            }
            GateKind::Webhook(webhook) => {
                let _ = writeln!(text, "url = {}", quoted(&webhook.url));
                if let Some(file) = &webhook.token_file {
                    let _ = writeln!(text, "token_file = {}", quoted(&file.to_string_lossy()));
                }
            }
            _ => unreachable!("no kind of a hook"),
        }
    }
    if let Some(prometheus) = &plan.prometheus {
        // The table of the bake is above.
        let bake = format!("[service.{name}.bake]\n");
        let key = format!("{bake}prometheus = {}\n", quoted(&prometheus.url));
        *text = text.replace(&bake, &key);
        for rule in &prometheus.rules {
            let _ = write!(
                text,
                "[[service.{name}.bake.rule]]\nname = {}\npromql = {}\nno_data = \"{}\"\ninterval = {}\n\
                 timeout = {}\nrise = {}\nfall = {}\n",
                quoted(&rule.name),
                quoted(&rule.promql),
                rule.no_data.as_str(),
                seconds(rule.interval),
                seconds(rule.timeout),
                rule.rise,
                rule.fall
            );
            for (key, figure) in [("max", rule.max), ("min", rule.min)] {
                if let Some(figure) = figure {
                    let _ = writeln!(text, "{key} = {:?}", figure.0);
                }
            }
        }
    }
    for step in &plan.canary {
        let (percent, time) = (step.percent.percent(), seconds(step.time));
        let _ = write!(
            text,
            "[[service.{name}.canary]]\npercent = {percent:?}\nfor = {time}\n"
        );
    }
    for gate in &plan.gates {
        let (kind, timeout) = (gate.kind.as_str(), seconds(gate.timeout));
        let _ = match gate.kind {
            GateKind::Parity(_) | GateKind::Warm(_) => {
                let table = kind;
                write!(text, "[service.{name}.{table}]\ntimeout = {timeout}\n")
            }
            _ => write!(
                text,
                "[[service.{name}.gate]]\nname = {}\nkind = \"{kind}\"\ntimeout = {timeout}\n",
                quoted(&gate.name)
            ),
        };
        gates::written(text, &gate.kind);
    }
}

/// An array of strings.
fn list(words: &[String]) -> String {
    let words: Vec<_> = words.iter().map(|word| quoted(word)).collect();
    format!("[{}]", words.join(", "))
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|c| match c {
        '"' | '\\' => format!("\\{c}"),
        c if c.is_control() => format!("\\U{:08X}", u32::from(c)),
        c => c.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

/// Configurations that are right, and some that are not.
pub fn seeds() -> Vec<Vec<u8>> {
    const SMALL: &str = r#"[gateway]
interfaces = ["eth0"]
[service.a]
listen = ["tcp://203.0.113.10:80"]
[service.a.blue]
backends = ["10.0.1.10"]
[service.a.green]
backends = ["10.0.2.10"]
"#;
    const LARGE: &str = r#"[gateway]
interfaces = ["eth0", "eth1"]
xdp = "generic"
max_flows = 100_000
max_services = 20_000
socket = "/run/a/sock"
state_dir = "/var/lib/a"
bpffs = "/sys/fs/bpf/a"
[service.llm]
listen = ["tcp://203.0.113.10:8000", "tcp://[2001:db8::10]:8000", "udp://203.0.113.10:4433"]
forward = "nat"
announce = true
on_flip = "cut"
drain = "20m"
drain_end = "keep"
reset_over = "30s"
udp_idle = "1m 30s"
blue = { version = "llama@6", backends = ["10.0.1.10", "fd00:1::10"] }
[service.llm.green]
version = "llama@\u00e97"
preview = ["203.0.113.11", "2001:db8::11"]
backends = [{ address = "10.0.2.10:9000", weight = 2 }, "[fd00:2::10]:9000"]
[service.health]
listen = ["tcp://203.0.113.10:9"]
blue.backends = ["10.0.1.12"]
green.backends = ["10.0.2.12:90"]
"#;
    const RELEASE: &str = r#"[[service.a.gate]]
name = "smoke"
kind = "http"
timeout = "5s"
path = "/v2/models?x=1"
port = 8002
status = 204
body = "ok"
json = "/models/0/state"
equals = "READY"
[[service.a.gate]]
name = "load"
kind = "exec"
command = ["/bin/true", "a b"]
[[service.a.gate]]
name = "much"
kind = "load"
method = "PUT"
path = "/v2"
port = 8000
headers = { content-type = "application/json" }
body = "{}"
rate = 50
duration = "60s"
timeout = "2m"
concurrency = 8
p99 = "1s 500us"
errors = 0.001
status = 201
[[service.a.gate]]
name = "golden"
kind = "prompts"
file = "/etc/golden.jsonl"
headers = { authorization = "Bearer a" }
max_ttft = "800ms"
max_total = "5s"
compare = ["/choices/0/text"]
noise_runs = 3
tolerance = 0.05
[[service.a.gate]]
name = "grpc"
kind = "grpc"
service = "llm"
[[service.a.gate]]
name = "hook"
kind = "webhook"
url = "http://ci.example.com:80/x"
token_file = "/etc/token"
[service.a.parity]
compare = ["/v2"]
headers = ["Server"]
command = ["/bin/true"]
allow = ["/models/*/at"]
timeout = "9s"
[service.a.warm]
file = "/etc/warm.jsonl"
concurrency = 8
repeat = 2
timeout = "1m"
[service.a.approval]
required = true
not_requester = true
expires = "1h"
on_expiry = "flip"
[[service.a.canary]]
percent = 0.5
for = "5m"
[[service.a.canary]]
percent = 25
for = "10m"
[service.a.bake]
duration = "10m"
settle = "0s"
on_fail = "pause"
on_inconclusive = "rollback"
cooldown = "1m"
errors = 0.02
slower = 3.0
prometheus = "http://prom.example.com:9090/p"
[[service.a.bake.rule]]
name = "errors"
promql = 'rate(x{c="{colour}"}[1m])'
max = 0.01
min = -1.0
no_data = "pass"
interval = "10s"
timeout = "2s"
rise = 1
fall = 5
[service.a.standby]
hold = "1h"
[[service.a.hook]]
name = "notice"
when = "before-canary"
kind = "webhook"
url = "http://ci.example.com:80/x"
token_file = "/etc/token"
on_failure = "go-on"
[[service.a.hook]]
name = "scale-down"
when = "after-standby"
kind = "exec"
command = ["/bin/true"]
timeout = "9s"
"#;
    let release = SMALL.to_owned() + RELEASE;
    let wrong = [
        LARGE.replace("udp://203", "tcp://203"),
        LARGE.replace("[service.health]", "[service.llm]"),
        LARGE.replace("8000", "80000"),
        SMALL.replace("10.0.2.10", "203.0.113.10"),
        SMALL.replace(":80", ":0"),
        SMALL.replace("listen", "metrics"),
        LARGE.replace(
            "\"udp://203",
            "\"tcp://[2001:db8::10%1]:8000\", \"udp://203",
        ),
        SMALL.replace("\"]", "\""),
        LARGE.replace("203.0.113.11", "203.0.113.10"),
        release.replace("exec", "http"),
        release.replace("load", "smoke"),
    ];
    let right = [SMALL.to_owned(), LARGE.to_owned(), release];
    right
        .into_iter()
        .chain(wrong)
        .map(String::into_bytes)
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::seeds::try_out;

    #[test]
    fn what_is_accepted_is_sane_and_what_is_refused_is_told_where() {
        try_out(super::run, &super::seeds(), 20_000);
    }
}
