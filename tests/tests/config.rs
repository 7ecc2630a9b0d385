//! `bgswitch check`: what a configuration may say, and what is said about one
//! that is wrong. Law 8, without root and without a daemon.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use bg_tests::lab::binary;
use serde_json::Value;

/// Everything this version knows, as the contract shows it.
const GOOD: &str = r#"[gateway]
interfaces = ["eth0", "eth1"]
xdp        = "native"
max_flows  = 1_000_000
socket     = "/run/bgswitch/bgswitch.sock"
state_dir  = "/var/lib/bgswitch"
bpffs      = "/sys/fs/bpf/bgswitch"

[service.llm]
listen     = ["tcp://203.0.113.10:8000", "tcp://[2001:db8::10]:8000", "udp://203.0.113.10:4433"]
forward    = "nat"
announce   = false
on_flip    = "drain"
drain      = "20m"
drain_end  = "reset"
udp_idle   = "30s"

[service.llm.blue]
version  = "llama@6"
backends = ["10.0.1.10", "10.0.1.11", "fd00:1::10"]
[service.llm.green]
version  = "llama@7"
backends = ["10.0.2.10", { address = "10.0.2.11", weight = 2 }, "fd00:2::10"]

[service.web]
listen = ["tcp://203.0.113.20:443"]
[service.web.blue]
backends = ["10.0.3.10:8443"]
[service.web.green]
backends = ["10.0.4.10:8443"]
"#;

/// One edit of [`GOOD`], and what is then wrong: `LINE: KEY: MESSAGE`.
const BAD: &[(&str, &str, &str)] = &[
    // ---- [gateway]
    (
        "[gateway]\n",
        "[gateway]\ninterface = [\"eth0\"]\n",
        "2: gateway.interface: unknown field `interface`, expected one of `interfaces`, `xdp`, `max_flows`, `max_services`, `socket`, `state_dir`, `bpffs`, `metrics`, `journal_max`",
    ),
    (
        "interfaces = [\"eth0\", \"eth1\"]\n",
        "",
        "1: gateway.interfaces: is missing: name the interfaces that XDP runs on, like [\"eth0\", \"eth1\"]",
    ),
    (
        "[\"eth0\", \"eth1\"]",
        "[]",
        "2: gateway.interfaces: is empty: name the interfaces that XDP runs on, like [\"eth0\", \"eth1\"]",
    ),
    (
        "[\"eth0\", \"eth1\"]",
        "[\"eth0\", \"eth0\"]",
        "2: gateway.interfaces: `eth0` is given twice",
    ),
    (
        "\"eth1\"]",
        "\"../maps\"]",
        "2: gateway.interfaces: `../maps` is no interface's name (1 to 15 bytes, no `/`, `:` or blank)",
    ),
    (
        "\"eth1\"]",
        "\"sixteen-letters-\"]",
        "2: gateway.interfaces: `sixteen-letters-` is no interface's name (1 to 15 bytes, no `/`, `:` or blank)",
    ),
    (
        "[\"eth0\", \"eth1\"]",
        "\"eth0\"",
        "2: gateway.interfaces: invalid type: string \"eth0\", expected a sequence",
    ),
    (
        "\"native\"",
        "\"offload\"",
        "3: gateway.xdp: `offload` is unknown: \"native\" or \"generic\"",
    ),
    (
        "1_000_000",
        "-5",
        "4: gateway.max_flows: -5 is not between 1024 and 100000000",
    ),
    (
        "1_000_000",
        "1000",
        "4: gateway.max_flows: 1000 is not between 1024 and 100000000",
    ),
    (
        "1_000_000",
        "\"many\"",
        "4: gateway.max_flows: invalid type: string \"many\", expected a whole number",
    ),
    (
        "1_000_000",
        "1_000_000\nmax_services = 20_001",
        "5: gateway.max_services: 20001 is not between 1024 and 20000",
    ),
    (
        "\"/run/bgswitch/bgswitch.sock\"",
        "\"bgswitch.sock\"",
        "5: gateway.socket: `bgswitch.sock` is no absolute path",
    ),
    (
        "\"/run/bgswitch/bgswitch.sock\"",
        "\"/run/a-hundred-and-one-bytes/ten-letter/ten-letter/ten-letter/ten-letter/ten-letter/ten-letter/bg-sock\"",
        "5: gateway.socket: is longer than 100 bytes, more than a socket's name may be",
    ),
    (
        "\"/var/lib/bgswitch\"",
        "\"\"",
        "6: gateway.state_dir: `` is no absolute path",
    ),
    (
        "/sys/fs/bpf/bgswitch",
        "/sys/fs/bpf/bg.switch",
        "7: gateway.bpffs: must end in a name without dots: the BPF file system allows none",
    ),
    (
        "[service.llm]",
        "metrics = \"127.0.0.1\"\n[service.llm]",
        "9: gateway.metrics: `127.0.0.1` is no address with a port, like \"127.0.0.1:9464\"",
    ),
    (
        "[service.llm]",
        "metrics = \"127.0.0.1:0\"\n[service.llm]",
        "9: gateway.metrics: `127.0.0.1:0` is no address with a port, like \"127.0.0.1:9464\"",
    ),
    (
        "[service.llm]",
        "journal_max = \"64\"\n[service.llm]",
        "9: gateway.journal_max: `64` is no size between \"1M\" and \"16G\"",
    ),
    (
        "[service.llm]",
        "journal_max = \"17G\"\n[service.llm]",
        "9: gateway.journal_max: `17G` is no size between \"1M\" and \"16G\"",
    ),
    (
        "[service.llm]",
        "journal_max = \"+1M\"\n[service.llm]",
        "9: gateway.journal_max: `+1M` is no size between \"1M\" and \"16G\"",
    ),
    (
        "[service.llm]",
        "journal_max = \"é\"\n[service.llm]",
        "9: gateway.journal_max: `é` is no size between \"1M\" and \"16G\"",
    ),
    (
        "[service.llm]",
        "metrics = 9464\n[service.llm]",
        "9: gateway.metrics: invalid type: integer `9464`, expected a string",
    ),
    (
        "[service.llm]",
        "metrics = \"203.0.113.20:443\"\n[service.llm]",
        "9: gateway.metrics: `203.0.113.20:443` is a listener of service.web: nobody would reach the metrics there",
    ),
    // ---- [service.*]
    (
        "[service.web]",
        "[service.\"a b\"]\nlisten = [\"tcp://203.0.113.30:80\"]\n[service.web]",
        "25: service.a b: a service's name has 1 to 63 letters, digits, `-` and `_`",
    ),
    (
        "[service.web]",
        "[service.\"\"]\nlisten = [\"tcp://203.0.113.30:80\"]\n[service.web]",
        "25: service.: a service's name has 1 to 63 letters, digits, `-` and `_`",
    ),
    (
        "[service.web]",
        "[service.\"../x\\n\"]\n[service.web]",
        "25: service.../x\\n: a service's name has 1 to 63 letters, digits, `-` and `_`",
    ),
    (
        "forward    =",
        "foward     =",
        "11: service.llm.foward: unknown field `foward`, expected one of `listen`, `forward`, `announce`, `on_flip`, `drain`, `drain_end`, `reset_over`, `udp_idle`, `blue`, `green`, `health`, `parity`, `warm`, `gate`, `approval`, `canary`, `bake`, `standby`, `hook`",
    ),
    (
        "\"nat\"",
        "\"dnat\"",
        "11: service.llm.forward: `dnat` is unknown: \"nat\", \"snat\" or \"dsr\"",
    ),
    (
        "listen = [\"tcp://203.0.113.20:443\"]\n",
        "listen = [\"tcp://203.0.113.20:443\"]\nforward = \"dsr\"\n",
        "29: service.web.blue.backends: `10.0.3.10:8443` has another port than tcp://203.0.113.20:443: \
         with forward = \"dsr\" nothing is rewritten, leave the port out",
    ),
    (
        "announce   = false",
        "announce   = \"eth0\"",
        "12: service.llm.announce: invalid type: string \"eth0\", expected a boolean",
    ),
    (
        "on_flip    = \"drain\"",
        "on_flip    = \"drop\"",
        "13: service.llm.on_flip: unknown variant `drop`, expected `drain` or `cut`",
    ),
    (
        "drain      = \"20m\"",
        "drain      = \"20\"",
        "14: service.llm.drain: `20` is no duration, like \"30s\" or \"20m\"",
    ),
    (
        "drain      = \"20m\"",
        "drain      = \"20m and a bit\"",
        "14: service.llm.drain: `20m and a bit` is no duration, like \"30s\" or \"20m\"",
    ),
    (
        "drain      = \"20m\"",
        "drain      = \"-20m\"",
        "14: service.llm.drain: `-20m` is no duration, like \"30s\" or \"20m\"",
    ),
    (
        "drain      = \"20m\"",
        "drain      = 20",
        "14: service.llm.drain: invalid type: integer `20`, expected a string",
    ),
    (
        "drain      = \"20m\"",
        "drain      = \"31days\"",
        "14: service.llm.drain: `31days` is longer than 30 days",
    ),
    (
        "drain      = \"20m\"",
        "drain      = \"1500ms\"",
        "14: service.llm.drain: `1500ms` is not in whole seconds, at least 0s",
    ),
    (
        "drain_end  = \"reset\"",
        "drain_end  = \"stay\"",
        "15: service.llm.drain_end: unknown variant `stay`, expected `reset` or `keep`",
    ),
    (
        "drain_end  = \"reset\"",
        "reset_over = \"30\"",
        "15: service.llm.reset_over: `30` is no duration, like \"30s\" or \"20m\"",
    ),
    (
        "udp_idle   = \"30s\"",
        "udp_idle   = \"0s\"",
        "16: service.llm.udp_idle: `0s` is not in whole seconds, at least 1s",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\ninterval = \"1s\"\n[service.llm.blue]",
        "18: service.llm.health.kind: is missing: \"tcp\", \"http\", \"grpc\", \"v2\", \"openai\" or \"exec\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"ping\"\n[service.llm.blue]",
        "19: service.llm.health.kind: `ping` is unknown: \"tcp\", \"http\", \"grpc\", \"v2\", \"openai\" or \"exec\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"tcp\"\npath = \"/up\"\n[service.llm.blue]",
        "20: service.llm.health.path: is of no use with kind = \"tcp\", only with \"http\" or \"openai\": remove it",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"tcp\"\ninterval = \"fast\"\n[service.llm.blue]",
        "20: service.llm.health.interval: `fast` is no duration, like \"1s\" or \"500ms\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"tcp\"\ninterval = \"10ms\"\n[service.llm.blue]",
        "20: service.llm.health.interval: `10ms` is not between 100ms and 1h",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"tcp\"\ntimeout = \"1h\"\n[service.llm.blue]",
        "20: service.llm.health.timeout: `1h` is not between 10ms and 5m",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"tcp\"\nrise = 0\n[service.llm.blue]",
        "20: service.llm.health.rise: 0 is not between 1 and 100",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"tcp\"\nfall = 101\n[service.llm.blue]",
        "20: service.llm.health.fall: 101 is not between 1 and 100",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"tcp\"\nport = 65536\n[service.llm.blue]",
        "20: service.llm.health.port: 65536 is not between 1 and 65535",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"tcp\"\non_fail = \"reset\"\n[service.llm.blue]",
        "20: service.llm.health.on_fail: `reset` is unknown: \"keep\", established flows stay with their backend; this version resets none",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\npath = \"health\"\n[service.llm.blue]",
        "20: service.llm.health.path: `health` is no path, like \"/health\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\nhost = \"a b\"\n[service.llm.blue]",
        "20: service.llm.health.host: `a b` is no host, like \"llm.example.com\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\nstatus = 99\n[service.llm.blue]",
        "20: service.llm.health.status: 99 is not between 100 and 599",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\nbody = \"\"\n[service.llm.blue]",
        "20: service.llm.health.body: is empty: every body contains that",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\njson = \"/ready\"\n[service.llm.blue]",
        "20: service.llm.health.json: needs `value`, what shall be there, like true or \"ready\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\nvalue = true\n[service.llm.blue]",
        "20: service.llm.health.value: needs `json`, the pointer to where it shall be, like \"/status\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\njson = \"ready\"\nvalue = true\n[service.llm.blue]",
        "20: service.llm.health.json: `ready` is no JSON pointer, like \"/status/ready\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\njson = \"/ready\"\nvalue = [1]\n[service.llm.blue]",
        "21: service.llm.health.value: is neither a text nor a number nor true or false",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\nservice = \"a\"\n[service.llm.blue]",
        "20: service.llm.health.service: is of no use with kind = \"http\", only with \"grpc\": remove it",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"http\"\nmodels = [\"a\"]\n[service.llm.blue]",
        "20: service.llm.health.models: is of no use with kind = \"http\", only with \"v2\": remove it",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"v2\"\nmodels = [\"a\", \"\"]\n[service.llm.blue]",
        "20: service.llm.health.models: `` is no model's name, or is given twice",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"openai\"\n[service.llm.blue]",
        "18: service.llm.health.model: is missing: name the model that shall make a token",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"openai\"\nmodel = \"a\"\ntoken_file = \"token\"\n[service.llm.blue]",
        "21: service.llm.health.token_file: `token` is no absolute path",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"exec\"\n[service.llm.blue]",
        "18: service.llm.health.command: is missing: a program and its arguments, like [\"/etc/bgswitch/probe\", \"--deep\"]",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.health]\nkind = \"exec\"\ncommand = [\"probe\"]\n[service.llm.blue]",
        "20: service.llm.health.command: must begin with the absolute path of a program, like [\"/etc/bgswitch/probe\", \"--deep\"]",
    ),
    (
        "listen = [\"tcp://203.0.113.20:443\"]\n",
        "listen = [\"udp://203.0.113.20:443\"]\nhealth = { kind = \"tcp\" }\n",
        "27: service.web.health: has no port to probe: `10.0.3.10:8443` serves no tcp:// listener. Name the port with `port`",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.parity]\ncompare = []\n[service.llm.blue]",
        "18: service.llm.parity.compare: is missing: paths whose answers must be the same, like [\"/v2\"], or add `command`",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.red]\n[service.llm.blue]",
        "18: service.llm.red: unknown field `red`, expected one of `listen`, `forward`, `announce`, `on_flip`, `drain`, `drain_end`, `reset_over`, `udp_idle`, `blue`, `green`, `health`, `parity`, `warm`, `gate`, `approval`, `canary`, `bake`, `standby`, `hook`",
    ),
    // ---- releases
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nkind = \"http\"\n[service.llm.blue]",
        "18: service.llm.gate.name: is missing: add name = \"smoke\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a b\"\n[service.llm.blue]",
        "19: service.llm.gate.name: a name has 1 to 63 letters, digits, `-` and `_`",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\npath = \"/\"\n[[service.llm.gate]]\nname = \"a\"\n[service.llm.blue]",
        "23: service.llm.gate.name: `a` is the name of another one",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\n[service.llm.blue]",
        "18: service.llm.gate.kind: is missing: \"http\", \"grpc\", \"load\", \"prompts\", \"webhook\" or \"exec\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"smoke\"\n[service.llm.blue]",
        "20: service.llm.gate.kind: `smoke` is unknown: \"http\", \"grpc\", \"load\", \"prompts\", \"webhook\" or \"exec\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\ntimeout = \"500ms\"\npath = \"/\"\n[service.llm.blue]",
        "21: service.llm.gate.timeout: `500ms` is not in whole seconds, at least 1s",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\n[service.llm.blue]",
        "18: service.llm.gate.path: is missing: what to ask for, like \"/v2/health/ready\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\npath = \"a b\"\n[service.llm.blue]",
        "21: service.llm.gate.path: `a b` is no path, like \"/v2/health/ready\" (escape other bytes as %20)",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\npath = \"/\"\nstatus = 1000\n[service.llm.blue]",
        "22: service.llm.gate.status: 1000 is not between 100 and 599",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\npath = \"/\"\njson = \"state\"\n[service.llm.blue]",
        "22: service.llm.gate.json: `state` is no JSON pointer, like \"/models/0/state\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\npath = \"/\"\nequals = 1\n[service.llm.blue]",
        "22: service.llm.gate.equals: is only of use with json: add json = \"/models/0/state\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\npath = \"/\"\njson = \"/a\"\nequals = [1]\n[service.llm.blue]",
        "23: service.llm.gate.equals: must be a string, a number or a boolean",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"http\"\npath = \"/\"\ncommand = [\"/bin/true\"]\n[service.llm.blue]",
        "22: service.llm.gate.command: belongs to kind = \"exec\": remove it",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"exec\"\npath = \"/\"\n[service.llm.blue]",
        "21: service.llm.gate.path: belongs to kind = \"http\" or \"load\": remove it",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"exec\"\n[service.llm.blue]",
        "18: service.llm.gate.command: is missing: a program and its arguments, like [\"/etc/bgswitch/smoke\"]",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"exec\"\ncommand = [\"smoke\"]\n[service.llm.blue]",
        "21: service.llm.gate.command: must begin with the absolute path of a program, like [\"/etc/bgswitch/smoke\"]",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\n[service.llm.blue]",
        "18: service.llm.gate.rate: is missing: requests a second, like 50",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\n[service.llm.blue]",
        "18: service.llm.gate.duration: is missing: how long requests are sent, like \"60s\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 0\n[service.llm.blue]",
        "22: service.llm.gate.rate: 0 is not between 1 and 10000",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 1\nduration = \"19s\"\n[service.llm.blue]",
        "23: service.llm.gate.duration: makes 19 requests with this rate, too few to judge by: at least 20",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"2h\"\n[service.llm.blue]",
        "23: service.llm.gate.duration: `2h` is longer than 1h",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\ntimeout = \"1m\"\n[service.llm.blue]",
        "24: service.llm.gate.timeout: must be longer than duration, or there is no time for the last answers",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\nconcurrency = 513\n[service.llm.blue]",
        "24: service.llm.gate.concurrency: 513 is not between 1 and 512",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\np99 = \"fast\"\n[service.llm.blue]",
        "24: service.llm.gate.p99: `fast` is no duration, like \"200ms\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\np99 = \"1us\"\n[service.llm.blue]",
        "24: service.llm.gate.p99: `1us` is not between 1ms and 1h",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\nerrors = 2\n[service.llm.blue]",
        "24: service.llm.gate.errors: 2 is no share: 0.01 is one of a hundred, 1 is all",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\nmethod = \"a b\"\n[service.llm.blue]",
        "24: service.llm.gate.method: `a b` is no method, like \"POST\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\nheaders = { \"a b\" = \"c\" }\n[service.llm.blue]",
        "24: service.llm.gate.headers: `a b` is no header, like authorization = \"Bearer token\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\nheaders = { Host = \"c\" }\n[service.llm.blue]",
        "24: service.llm.gate.headers: `Host` is set by the request itself: remove it",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"load\"\npath = \"/\"\nrate = 50\nduration = \"60s\"\njson = \"/a\"\n[service.llm.blue]",
        "24: service.llm.gate.json: belongs to kind = \"http\": remove it",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"prompts\"\n[service.llm.blue]",
        "18: service.llm.gate.file: is missing: a file, like \"/etc/bgswitch/golden.jsonl\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"prompts\"\nfile = \"golden.jsonl\"\n[service.llm.blue]",
        "21: service.llm.gate.file: `golden.jsonl` is no absolute path, like \"/etc/bgswitch/golden.jsonl\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"prompts\"\nfile = \"/etc/golden.jsonl\"\nnoise_runs = 1\n[service.llm.blue]",
        "22: service.llm.gate.noise_runs: is only of use with compare: add compare = [\"/choices/0/text\"]",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"prompts\"\nfile = \"/etc/golden.jsonl\"\ncompare = [\"text\"]\n[service.llm.blue]",
        "22: service.llm.gate.compare: `text` is no JSON pointer, like \"/choices/0/text\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"prompts\"\nfile = \"/etc/golden.jsonl\"\nmax_ttft = \"0s\"\n[service.llm.blue]",
        "22: service.llm.gate.max_ttft: `0s` is not between 1ms and 1h",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"prompts\"\nfile = \"/etc/golden.jsonl\"\nservice = \"a\"\n[service.llm.blue]",
        "22: service.llm.gate.service: belongs to kind = \"grpc\": remove it",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.parity]\n[service.llm.blue]",
        "18: service.llm.parity.compare: is missing: paths whose answers must be the same, like [\"/v2\"], or add `command`",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.parity]\ncompare = [\"v2\"]\n[service.llm.blue]",
        "19: service.llm.parity.compare: `v2` is no path, like \"/v2\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.parity]\ncompare = [\"/v2\"]\nheaders = [\"a b\"]\n[service.llm.blue]",
        "20: service.llm.parity.headers: `a b` is no header, like \"server\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.parity]\ncompare = [\"/v2\"]\nallow = [\"version\"]\n[service.llm.blue]",
        "20: service.llm.parity.allow: `version` is no JSON pointer, like \"/choices/0/text\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.parity]\ncompare = [\"/v2\"]\n[[service.llm.gate]]\nname = \"parity\"\n[service.llm.blue]",
        "21: service.llm.gate.name: `parity` is the name of another one",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.warm]\nrepeat = 2\n[service.llm.blue]",
        "18: service.llm.warm.file: is missing: a file, like \"/etc/bgswitch/warm.jsonl\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.warm]\nfile = \"/etc/warm.jsonl\"\nrepeat = 0\n[service.llm.blue]",
        "20: service.llm.warm.repeat: 0 is not between 1 and 100",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"webhook\"\n[service.llm.blue]",
        "18: service.llm.gate.url: is missing: where to ask, like \"http://ci.example.com:8080/gate\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"webhook\"\nurl = \"https://a/\"\n[service.llm.blue]",
        "21: service.llm.gate.url: `https://a/` is no URL of plain HTTP, like \"http://ci.example.com:8080/gate\"; for https use kind = \"exec\" with curl",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.gate]]\nname = \"a\"\nkind = \"webhook\"\nurl = \"http://a/\"\ntoken_file = \"token\"\n[service.llm.blue]",
        "22: service.llm.gate.token_file: `token` is no absolute path, like \"/etc/bgswitch/token\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.approval]\nnot_requester = true\n[service.llm.blue]",
        "19: service.llm.approval.not_requester: is only of use with required = true: nobody is asked",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.approval]\nrequired = true\nexpires = \"0s\"\n[service.llm.blue]",
        "20: service.llm.approval.expires: `0s` is not in whole seconds, at least 1s",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.approval]\non_expiry = \"approve\"\n[service.llm.blue]",
        "19: service.llm.approval.on_expiry: unknown variant `approve`, expected `abort` or `flip`",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\non_fail = \"ignore\"\n[service.llm.blue]",
        "19: service.llm.bake.on_fail: unknown variant `ignore`, expected `rollback` or `pause`",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\npromql = \"x\"\n[service.llm.blue]",
        "19: service.llm.bake.promql: unknown field `promql`, expected one of `duration`, `settle`, `on_fail`, `on_inconclusive`, `cooldown`, `signals`, `errors`, `slower`, `prometheus`, `rule`",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[service.llm.blue]",
        "19: service.llm.bake.prometheus: is of no use without a rule: add [[service.NAME.bake.rule]]",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"https://prom\"\n[[service.llm.bake.rule]]\n[service.llm.blue]",
        "19: service.llm.bake.prometheus: `https://prom` is no URL of plain HTTP, like \"http://prom.example.com:9090\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[[service.llm.bake.rule]]\n[service.llm.blue]",
        "20: service.llm.bake.rule.name: is missing: add name = \"errors\"",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[[service.llm.bake.rule]]\nname = \"a\"\n[service.llm.blue]",
        "20: service.llm.bake.rule.promql: is missing: a query, like 'rate(errors_total{colour=\"{colour}\"}[1m])'",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[[service.llm.bake.rule]]\nname = \"a\"\npromql = \"x{v=`{version}`}\"\nmax = 1\n[service.llm.blue]",
        "22: service.llm.bake.rule.promql: {version} is in a string of backticks, where nothing can be escaped: use \"\" or ''",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[[service.llm.bake.rule]]\nname = \"a\"\npromql = \"x\"\n[service.llm.blue]",
        "20: service.llm.bake.rule.max: is missing: what it must not exceed, like 0.01, or add `min`",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[[service.llm.bake.rule]]\nname = \"a\"\npromql = \"x\"\nmax = 1\nmin = 2\n[service.llm.blue]",
        "24: service.llm.bake.rule.min: 2 is more than max",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[[service.llm.bake.rule]]\nname = \"a\"\npromql = \"x\"\nmax = nan\n[service.llm.blue]",
        "23: service.llm.bake.rule.max: NaN is no number that a figure can reach",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[[service.llm.bake.rule]]\nname = \"a\"\npromql = \"x\"\nmax = 1\nfall = 0\n[service.llm.blue]",
        "24: service.llm.bake.rule.fall: 0 is not between 1 and 100",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nprometheus = \"http://prom:9090\"\n[[service.llm.bake.rule]]\nname = \"a\"\npromql = \"x\"\nmax = 1\nno_data = \"ok\"\n[service.llm.blue]",
        "24: service.llm.bake.rule.no_data: unknown variant `ok`, expected one of `inconclusive`, `pass`, `fail`",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.canary]]\npercent = 5\nfor = \"5m\"\n[service.llm.blue]",
        "18: service.llm.canary: rises unwatched: add [service.llm.health], or [service.llm.bake] with its signals or a rule",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.canary]]\nfor = \"5m\"\n[service.llm.blue]",
        "18: service.llm.canary.percent: is missing: which share of new flows, like 5",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.canary]]\npercent = 5\n[service.llm.blue]",
        "18: service.llm.canary.for: is missing: how long this share is watched, like \"5m\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.canary]]\npercent = 0\nfor = \"5m\"\n[service.llm.blue]",
        "19: service.llm.canary.percent: 0 is not from 0.01 to 100",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.canary]]\npercent = 5\nfor = \"500ms\"\n[service.llm.blue]",
        "20: service.llm.canary.for: `500ms` is not in whole seconds, at least 1s",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.canary]]\npercent = 5\nfor = \"5m\"\n[[service.llm.canary]]\npercent = 5.0\nfor = \"5m\"\n[service.llm.blue]",
        "22: service.llm.canary.percent: 5 % is not more than the 5 % before it",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nerrors = 1.5\n[service.llm.blue]",
        "19: service.llm.bake.errors: 1.5 is not from 0 to 1",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nslower = 0.5\n[service.llm.blue]",
        "19: service.llm.bake.slower: 0.5 is not from 1 to 1000",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.bake]\nsignals = false\nslower = 3.0\n[service.llm.blue]",
        "20: service.llm.bake.slower: is of no use with signals = false",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.standby]\nhold = \"31days\"\n[service.llm.blue]",
        "19: service.llm.standby.hold: `31days` is longer than 30 days",
    ),
    (
        "[service.llm.blue]",
        "[service.llm.standby]\nafter = [\"/bin/true\"]\n[service.llm.blue]",
        "19: service.llm.standby.after: unknown field `after`, expected `hold`",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.hook]]\nname = \"a\"\n[service.llm.blue]",
        "18: service.llm.hook.when: is missing: \"before-gates\", \"before-canary\", \"before-flip\", \"after-flip\", \"after-bake\", \"after-standby\", \"after-rollback\", \"ready\", \"paused\" or \"failed\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.hook]]\nwhen = \"later\"\n[service.llm.blue]",
        "19: service.llm.hook.when: `later` is unknown: \"before-gates\", \"before-canary\", \"before-flip\", \"after-flip\", \"after-bake\", \"after-standby\", \"after-rollback\", \"ready\", \"paused\" or \"failed\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.hook]]\nwhen = \"before-canary\"\n[service.llm.blue]",
        "19: service.llm.hook.when: there is no canary: add [[service.NAME.canary]], or say \"before-flip\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.hook]]\nwhen = \"ready\"\n[service.llm.blue]",
        "19: service.llm.hook.when: nobody is asked: add required = true to [service.NAME.approval]",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.hook]]\nwhen = \"after-flip\"\nkind = \"http\"\n[service.llm.blue]",
        "20: service.llm.hook.kind: `http` is no kind of a hook: \"exec\" or \"webhook\"",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.hook]]\nwhen = \"after-flip\"\nkind = \"exec\"\nname = \"a\"\n[service.llm.blue]",
        "18: service.llm.hook.command: is missing: a program and its arguments, like [\"/etc/bgswitch/smoke\"]",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.hook]]\nwhen = \"after-flip\"\nkind = \"exec\"\non_failure = \"stop\"\n[service.llm.blue]",
        "21: service.llm.hook.on_failure: is of use before a step only: nothing waits for this one",
    ),
    (
        "[service.llm.blue]",
        "[[service.llm.hook]]\nwhen = \"before-flip\"\nkind = \"webhook\"\nname = \"a\"\nurl = \"https://ci/\"\n[service.llm.blue]",
        "22: service.llm.hook.url: `https://ci/` is no URL of plain HTTP, like \"http://ci.example.com:8080/gate\"; for https use kind = \"exec\" with curl",
    ),
    // ---- listeners
    (
        "listen = [\"tcp://203.0.113.20:443\"]\n",
        "",
        "25: service.web.listen: is missing: add listen = [\"tcp://203.0.113.10:8000\"]",
    ),
    (
        "[\"tcp://203.0.113.20:443\"]",
        "[]",
        "26: service.web.listen: is empty: a service needs a listener, like \"tcp://203.0.113.10:8000\"",
    ),
    (
        "tcp://203.0.113.20:443",
        "203.0.113.20:443",
        "26: service.web.listen: `203.0.113.20:443` must begin with tcp:// or udp://",
    ),
    (
        "tcp://203.0.113.20:443",
        "http://203.0.113.20:443",
        "26: service.web.listen: `http://203.0.113.20:443` must begin with tcp:// or udp://",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://203.0.113.20",
        "26: service.web.listen: `tcp://203.0.113.20` is no address and port, like \"tcp://203.0.113.10:8000\" or \"tcp://[2001:db8::10]:8000\"",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://example.org:443",
        "26: service.web.listen: `tcp://example.org:443` is no address and port, like \"tcp://203.0.113.10:8000\" or \"tcp://[2001:db8::10]:8000\"",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://203.0.113.20:0",
        "26: service.web.listen: `tcp://203.0.113.20:0` has port 0: nobody can connect to it",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://203.0.113.20:70000",
        "26: service.web.listen: `tcp://203.0.113.20:70000` has port 70000: ports end at 65535",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://203.0.113.20:-1",
        "26: service.web.listen: `tcp://203.0.113.20:-1` is no address and port, like \"tcp://203.0.113.10:8000\" or \"tcp://[2001:db8::10]:8000\"",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://127.0.0.1:443",
        "26: service.web.listen: `tcp://127.0.0.1:443` is a loopback address, which no packet on the wire is for",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://0.0.0.0:443",
        "26: service.web.listen: `tcp://0.0.0.0:443` is the unspecified address, which names no host",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://[::]:443",
        "26: service.web.listen: `tcp://[::]:443` is the unspecified address, which names no host",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://[2001:db8::20%2]:443",
        "26: service.web.listen: `tcp://[2001:db8::20%2]:443` has a zone, which no packet carries: leave out `%` and the number",
    ),
    (
        "tcp://203.0.113.20:443",
        "udp://224.0.0.251:5353",
        "26: service.web.listen: `udp://224.0.0.251:5353` is a multicast or broadcast address, which cannot be switched",
    ),
    (
        "tcp://203.0.113.20:443",
        "udp://255.255.255.255:53",
        "26: service.web.listen: `udp://255.255.255.255:53` is a multicast or broadcast address, which cannot be switched",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://[::ffff:203.0.113.20]:443",
        "26: service.web.listen: `tcp://[::ffff:203.0.113.20]:443` is an IPv4 address in IPv6 form: write 203.0.113.20",
    ),
    (
        "tcp://203.0.113.20:443",
        "tcp://[fe80::1%2]:443",
        "26: service.web.listen: `tcp://[fe80::1%2]:443` is a link-local address, which is not routed",
    ),
    (
        "\"tcp://203.0.113.20:443\"",
        "\"tcp://203.0.113.20:443\",\n  \"tcp://203.0.113.20:443\"",
        "27: service.web.listen: `tcp://203.0.113.20:443` is given twice",
    ),
    (
        "\"tcp://203.0.113.20:443\"",
        "\"tcp://203.0.113.20:443\",\n  \"tcp://203.0.113.10:8000\"",
        "27: service.web.listen: `tcp://203.0.113.10:8000` is a listener of service.llm already",
    ),
    // ---- backends
    (
        "[service.web.green]\nbackends = [\"10.0.4.10:8443\"]\n",
        "",
        "25: service.web.green: is missing: a service has two colours, [service.web.blue] and [service.web.green]",
    ),
    (
        "backends = [\"10.0.4.10:8443\"]",
        "",
        "25: service.web.green.backends: is missing: a colour needs at least one backend, like [\"10.0.1.10\"]",
    ),
    (
        "[\"10.0.4.10:8443\"]",
        "[]",
        "30: service.web.green.backends: is empty: a colour needs at least one backend, like [\"10.0.1.10\"]",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"10.0.4.10:0\"",
        "30: service.web.green.backends: `10.0.4.10:0` has port 0: nobody can connect to it",
    ),
    (
        "backends = [\"10.0.4.10:8443\"]",
        "preview = [\"203.0.113.21:443\"]\nbackends = [\"10.0.4.10:8443\"]",
        "30: service.web.green.preview: `203.0.113.21:443` is no address, like \"203.0.113.11\": its ports are those of the listeners",
    ),
    (
        "backends = [\"10.0.4.10:8443\"]",
        "preview = [\"127.0.0.1\"]\nbackends = [\"10.0.4.10:8443\"]",
        "30: service.web.green.preview: `127.0.0.1` is a loopback address, which no packet on the wire is for",
    ),
    (
        "backends = [\"10.0.4.10:8443\"]",
        "preview = [\"2001:db8::21\"]\nbackends = [\"10.0.4.10:8443\"]",
        "30: service.web.green.preview: `2001:db8::21` serves no listener: none has its address family",
    ),
    (
        "backends = [\"10.0.4.10:8443\"]",
        "preview = [\"203.0.113.21\", \"203.0.113.21\"]\nbackends = [\"10.0.4.10:8443\"]",
        "30: service.web.green.preview: `203.0.113.21` is given twice",
    ),
    (
        "backends = [\"10.0.4.10:8443\"]",
        "preview = [\"203.0.113.20\"]\nbackends = [\"10.0.4.10:8443\"]",
        "30: service.web.green.preview: `tcp://203.0.113.20:443` is one of service.web already",
    ),
    (
        "backends = [\"10.0.4.10:8443\"]",
        "preview = [\"203.0.113.21\", \"203.0.113.22\"]\nbackends = [\"10.0.4.10:8443\"]",
        "30: service.web.green.preview: 10.0.4.10:8443 would serve both tcp://203.0.113.21:443 and tcp://203.0.113.22:443: its replies could not be told apart",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"[fd00:4::10%2]:8443\"",
        "30: service.web.green.backends: `[fd00:4::10%2]:8443` has a zone, which no packet carries: leave out `%` and the number",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"10.0.4.10:65536\"",
        "30: service.web.green.backends: `10.0.4.10:65536` has port 65536: ports end at 65535",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"10.0.4\"",
        "30: service.web.green.backends: `10.0.4` is no address, like \"10.0.1.10\", \"10.0.1.10:9000\" or \"[2001:db8::1]:9000\"",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"127.0.0.1:8443\"",
        "30: service.web.green.backends: `127.0.0.1:8443` is a loopback address, which no packet on the wire is for",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"10.0.4.10:8443\",\n  \"10.0.4.10:8443\"",
        "31: service.web.green.backends: `10.0.4.10:8443` is given twice: tcp://203.0.113.20:443 has 10.0.4.10:8443 already",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"10.0.4.10:443\",\n  \"10.0.4.10\"",
        "31: service.web.green.backends: `10.0.4.10` is given twice: tcp://203.0.113.20:443 has 10.0.4.10:443 already",
    ),
    (
        "weight = 2",
        "weight = 0",
        "23: service.llm.green.backends: `10.0.2.11` has weight 0: 1 to 100 is right",
    ),
    (
        "weight = 2",
        "weight = -1",
        "23: service.llm.green.backends: `10.0.2.11` has weight -1: 1 to 100 is right",
    ),
    (
        "weight = 2",
        "wieght = 2",
        "23: service.llm.green.backends.wieght: unknown field `wieght`, expected `address` or `weight`",
    ),
    (
        "{ address = \"10.0.2.11\", weight = 2 }",
        "7",
        "23: service.llm.green.backends: invalid type: integer `7`, expected \"10.0.1.10:9000\" or { address = \"10.0.1.10:9000\", weight = 2 }",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"[fd00:4::10]:8443\"",
        "30: service.web.green.backends: `[fd00:4::10]:8443` serves no listener: none has its address family",
    ),
    (
        ", \"fd00:2::10\"]",
        "]",
        "23: service.llm.green.backends: has no backend of the address family of tcp://[2001:db8::10]:8000",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"203.0.113.20\"",
        "30: service.web.green.backends: `203.0.113.20` is the service's own listener tcp://203.0.113.20:443: packets would go round in circles",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"203.0.113.10:8000\"",
        "30: service.web.green.backends: `203.0.113.10:8000` is the listener tcp://203.0.113.10:8000 of service.llm: a packet is switched once",
    ),
    (
        "\"10.0.4.10:8443\"",
        "\"10.0.1.10:8000\"",
        "30: service.web.green.backends: `10.0.1.10:8000` would serve both tcp://203.0.113.10:8000 and tcp://203.0.113.20:443 from 10.0.1.10:8000: its replies could not be told apart. Give it another port or address for one of them",
    ),
    // ---- the text itself
    (
        "xdp        = \"native\"",
        "xdp        = driver",
        "3: string values must be quoted, expected literal string",
    ),
    (
        "drain      = \"20m\"",
        "drain      = 20m",
        "14: string values must be quoted, expected literal string",
    ),
    (
        "[\"eth0\", \"eth1\"]",
        "[\"eth0\", \"eth1\"",
        "3: missing comma between array elements, expected `,`",
    ),
    (
        "[service.web]",
        "[service.web",
        "25: unclosed table, expected `]`",
    ),
    ("[service.web]", "[service.llm]", "25: `llm` is given twice"),
    ("state_dir  =", "socket     =", "6: `socket` is given twice"),
];

/// Whole texts that are wrong.
const BAD_TEXTS: &[(&str, &str)] = &[
    (
        "",
        "1: gateway: is missing: add a [gateway] table with interfaces = [\"eth0\", \"eth1\"]",
    ),
    (
        "# nothing but this\n",
        "1: gateway: is missing: add a [gateway] table with interfaces = [\"eth0\", \"eth1\"]",
    ),
    (
        "[gateway]\ninterfaces = [\"eth0\"]\n",
        "1: service: there is none: add a [service.NAME] table",
    ),
    (
        "service = 5\n",
        "1: service: invalid type: integer `5`, expected a map",
    ),
    (
        "[gatway]\n",
        "1: gatway: unknown field `gatway`, expected `gateway` or `service`",
    ),
];

#[test]
fn a_wrong_configuration_is_refused_by_line_key_and_cure() {
    for (from, to, expected) in BAD {
        assert!(GOOD.contains(from), "no such text: {from}");
        let file = TempFile::new(GOOD.replacen(from, to, 1));
        refused(&file, &format!(":{expected}"));
    }
    for (text, expected) in BAD_TEXTS {
        refused(&TempFile::new(text), &format!(":{expected}"));
    }
}

#[test]
fn what_is_no_configuration_at_all_is_refused() {
    refused(
        &TempFile::new(b"interfaces = \"\xff\""),
        ": is not UTF-8 text",
    );
    let huge = vec![b'#'; (16 << 20) + 1];
    refused(
        &TempFile::new(huge),
        ": is larger than 16 MiB: no configuration",
    );
    let output = check(&["/does/not/exist.toml"]);
    assert_eq!(
        said(&output),
        (
            2,
            String::new(),
            "bgswitch: /does/not/exist.toml: there is no such file: name one with --config\n"
                .to_owned()
        )
    );
    let output = check(&["/"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).2.starts_with("bgswitch: /: cannot be read: "));
}

#[test]
fn more_than_the_tables_hold_is_refused() {
    let service = |name: &str, listeners: &str, last: u32| {
        format!(
            "[service.{name}]\nlisten = [{listeners}]\n[service.{name}.blue]\nbackends = [\"10.0.{}.{}\"]\n\
             [service.{name}.green]\nbackends = [\"10.1.{}.{}\"]\n",
            last / 256,
            last % 256,
            last / 256,
            last % 256
        )
    };
    let mut many = "[gateway]\ninterfaces = [\"eth0\"]\n".to_owned();
    let listeners: Vec<String> = (1..=21_846)
        .map(|port| format!("\"tcp://203.0.113.1:{port}\""))
        .collect();
    many += &service("s", &listeners.join(", "), 1);
    refused(
        &TempFile::new(many),
        ":4: service.s: makes 65538 endpoints of listeners and of their backends, 65536 fit",
    );
    let mut many = "[gateway]\ninterfaces = [\"eth0\"]\n".to_owned();
    for n in 0..1025 {
        let listener = format!("\"tcp://203.0.113.1:{}\"", n + 1);
        many += &service(&format!("s{n:04}"), &listener, n + 1);
    }
    refused(
        &TempFile::new(many.clone()),
        ":6148: service.s1024: makes 1025 services (gateway.max_services), 1024 fit",
    );
    let room = many.replacen("[gateway]", "[gateway]\nmax_services = 1025", 1);
    let (code, out, err) = said(&check(&[TempFile::new(room).path()]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("s0019 and 1005 more\n"), "{out}");
}

#[test]
fn a_good_configuration_passes_and_absent_interfaces_are_only_noted() {
    let file = TempFile::new(GOOD.replace("eth0", "lo").replace("eth1", "absent0"));
    let (code, out, err) = said(&check(&[file.path()]));
    let name = file.path();
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        format!(
            "{name} is valid: services llm, web\n\
             note: there is no interface absent0 on this host; `run` needs it\n"
        )
    );
    let (code, out, err) = said(&check(&["-o", "json", file.path()]));
    assert_eq!((code, err.as_str()), (0, ""));
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["schema"], 1);
    assert_eq!(json["services"], serde_json::json!(["llm", "web"]));
    assert_eq!(json["missing_interfaces"], serde_json::json!(["absent0"]));
}

#[test]
fn what_looks_odd_and_is_right_passes() {
    for (from, to) in [
        // Tables in one line, quoted names, names with digits and dashes.
        ("[service.web]", "[ service . \"web\" ]"),
        ("[\"eth0\", \"eth1\"]", "[\"eth0.100\"]"),
        ("drain      = \"20m\"", "drain      = \"1h 30m\""),
        ("drain      = \"20m\"", "drain      = \"0s\""),
        ("announce   = false", "announce   = true"),
        ("drain_end  = \"reset\"", "drain_end  = \"keep\""),
        ("drain_end  = \"reset\"", "reset_over = \"0s\""),
        ("on_flip    = \"drain\"", "on_flip    = \"cut\""),
        ("xdp        = \"native\"", "xdp        = \"generic\""),
        // What a release goes through.
        (
            "[service.llm.blue]",
            "[[service.llm.gate]]\nname = \"smoke\"\nkind = \"http\"\npath = \"/v2/health/ready\"\nport = 8002\njson = \"/a\"\nequals = 1.5\n\
             [[service.llm.gate]]\nname = \"load\"\nkind = \"exec\"\ncommand = [\"/bin/true\"]\ntimeout = \"3m\"\n\
             [service.llm.approval]\nrequired = true\nnot_requester = true\n\
             [service.llm.bake]\nsettle = \"0s\"\non_fail = \"pause\"\nerrors = 0.05\nslower = 1.5\n[service.llm.standby]\nhold = \"1h\"\n[service.llm.blue]",
        ),
        (
            "[service.web.blue]",
            "health = { kind = \"tcp\", interval = \"100ms\", timeout = \"5m\", on_fail = \"keep\" }\n\
             [service.web.blue]",
        ),
        (
            "[service.web.blue]",
            "[service.web.health]\nkind = \"http\"\npath = \"/v1/up?deep=1\"\nhost = \"web:443\"\n\
             status = 204\njson = \"/a~1b/0\"\nvalue = 1.5\nport = 9000\n[service.web.blue]",
        ),
        (
            "[service.web.blue]",
            "health = { kind = \"grpc\", service = \"inference.GRPCInferenceService\", port = 8001 }\n\
             [service.web.blue]",
        ),
        (
            "[service.web.blue]",
            "health = { kind = \"v2\", models = [\"llama\", \"embed\"], host = \"llama.example\" }\n\
             [service.web.blue]",
        ),
        (
            "[service.web.blue]",
            "health = { kind = \"openai\", model = \"a/b\", path = \"/v1/chat/completions\", \
             token_file = \"/etc/token\" }\n[service.web.blue]",
        ),
        (
            "listen = [\"tcp://203.0.113.20:443\"]\n",
            "listen = [\"udp://203.0.113.20:443\"]\n\
             health = { kind = \"exec\", command = [\"/bin/true\"] }\n",
        ),
        // One server for both colours: a flip changes nothing for it, that is all.
        ("10.0.4.10:8443", "10.0.3.10:8443"),
        // The same port over another protocol is another listener.
        (
            "tcp://203.0.113.20:443\"",
            "tcp://203.0.113.20:443\", \"udp://203.0.113.20:443\"",
        ),
        // Other endpoints of one server, for other services.
        ("10.0.4.10:8443", "10.0.1.10:8443"),
    ] {
        assert!(GOOD.contains(from), "no such text: {from}");
        let file = TempFile::new(GOOD.replacen(from, to, 1));
        let (code, _, err) = said(&check(&[file.path()]));
        assert_eq!((code, err.as_str()), (0, ""), "{to}");
    }
}

#[test]
fn it_needs_no_root() {
    let file = TempFile::new(GOOD);
    let mut command = Command::new(binary().unwrap());
    command.args(["check", file.path()]).uid(65534).gid(65534);
    let (code, _, err) = said(&command.output().unwrap());
    assert_eq!((code, err.as_str()), (0, ""));
}

fn refused(file: &TempFile, expected: &str) {
    let expected = format!("{}{expected}", file.path());
    let text = said(&check(&[file.path()]));
    assert_eq!(text, (2, String::new(), format!("bgswitch: {expected}\n")));
    let (code, out, err) = said(&check(&["-o", "json", file.path()]));
    assert_eq!((code, out.as_str()), (2, ""));
    let error: Value = serde_json::from_str(&err).unwrap();
    let trouble = serde_json::json!({"kind": "usage", "message": expected, "exit_code": 2});
    assert_eq!(error, serde_json::json!({"schema": 1, "error": trouble}));
}

fn check(words: &[&str]) -> Output {
    Command::new(binary().unwrap())
        .arg("check")
        .args(words)
        .output()
        .unwrap()
}

fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code().unwrap_or(-1),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// A file that is gone with its owner.
struct TempFile(PathBuf);

impl TempFile {
    fn new(text: impl AsRef<[u8]>) -> Self {
        static FILES: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "bgswitch-check-{}-{}.toml",
            std::process::id(),
            FILES.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
