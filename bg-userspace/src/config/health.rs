//! The `[service.NAME.health]` table.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper::{header::HeaderValue, http::uri::PathAndQuery};
use serde::Deserialize;
use serde_json::Value;
use toml::Spanned;

use super::{ConfigError, text::Text};
use crate::{
    health::{
        HealthPlan, Probe, exec::ExecProbe, grpc::GrpcProbe, http::HttpProbe, openai::OpenAiProbe,
        v2::V2Probe, verdict::Rules,
    },
    plan::ServicePlan,
};

const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_hours(1);
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_mins(5);
const PROBES: RangeInclusive<i64> = 1..=100;
const STATUS: RangeInclusive<i64> = 100..=599;
const PORT: RangeInclusive<i64> = 1..=65_535;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawHealth {
    kind: Option<Spanned<String>>,
    interval: Option<Spanned<String>>,
    timeout: Option<Spanned<String>>,
    rise: Option<Spanned<i64>>,
    fall: Option<Spanned<i64>>,
    port: Option<Spanned<i64>>,
    on_fail: Option<Spanned<String>>,
    path: Option<Spanned<String>>,
    host: Option<Spanned<String>>,
    status: Option<Spanned<i64>>,
    body: Option<Spanned<String>>,
    json: Option<Spanned<String>>,
    value: Option<Spanned<toml::Value>>,
    service: Option<Spanned<String>>,
    models: Option<Spanned<Vec<Spanned<String>>>>,
    model: Option<Spanned<String>>,
    token_file: Option<Spanned<PathBuf>>,
    command: Option<Spanned<Vec<String>>>,
}

/// What a service's table says; `table` is its key.
pub(super) fn plan(
    text: &Text<'_>,
    table: &str,
    raw: Spanned<RawHealth>,
    service: &ServicePlan,
) -> Result<HealthPlan, ConfigError> {
    let start = raw.span().start;
    let raw = raw.into_inner();
    let keys = Keys { text, table };
    let Some(kind) = &raw.kind else {
        let message = format!("is missing: {KINDS}");
        return Err(text.error(start, keys.key("kind"), message));
    };
    keys.fit(kind.get_ref(), &raw)?;
    let (probe, interval, limit) = match kind.get_ref().as_str() {
        "tcp" => (Probe::Tcp, SECOND, HALF),
        "http" => (Probe::Http(keys.http(&raw)?), SECOND, HALF),
        "grpc" => {
            let service = raw
                .service
                .as_ref()
                .map(|service| service.get_ref().clone());
            let probe = GrpcProbe {
                service: service.unwrap_or_default(),
            };
            (Probe::Grpc(probe), SECOND, HALF)
        }
        "v2" => (Probe::V2(keys.v2(&raw)?), SECOND, HALF),
        "openai" => {
            let probe = Probe::OpenAi(keys.openai(&raw, start)?);
            (probe, Duration::from_secs(15), Duration::from_secs(10))
        }
        "exec" => {
            let probe = Probe::Exec(keys.exec(&raw, start)?);
            (probe, Duration::from_secs(5), Duration::from_secs(3))
        }
        other => {
            let message = format!("`{other}` is unknown: {KINDS}");
            return Err(text.wrong(kind, keys.key("kind"), message));
        }
    };
    if let Some(on_fail) = raw.on_fail.filter(|policy| policy.get_ref() != "keep") {
        let message = format!(
            "`{}` is unknown: \"keep\", established flows stay with their backend; this version resets none",
            on_fail.get_ref()
        );
        return Err(text.wrong(&on_fail, keys.key("on_fail"), message));
    }
    let plan = HealthPlan {
        probe,
        interval: keys.span(raw.interval.as_ref(), "interval", interval, &INTERVAL)?,
        timeout: keys.span(raw.timeout.as_ref(), "timeout", limit, &TIMEOUT)?,
        rules: Rules {
            rise: keys
                .number(raw.rise.as_ref(), "rise", &PROBES)?
                .unwrap_or(3),
            fall: keys
                .number(raw.fall.as_ref(), "fall", &PROBES)?
                .unwrap_or(3),
        },
        port: keys.number(raw.port.as_ref(), "port", &PORT)?,
    };
    let backends = service.colours.iter().flatten();
    for backend in backends {
        let needs_none = matches!(plan.probe, Probe::Exec(_));
        if plan.endpoints(service, backend).is_empty() && !needs_none {
            let message = format!(
                "has no port to probe: `{backend}` serves no tcp:// listener. Name the port with `port`"
            );
            return Err(text.error(start, table, message));
        }
    }
    Ok(plan)
}

const KINDS: &str = "\"tcp\", \"http\", \"grpc\", \"v2\", \"openai\" or \"exec\"";
const SECOND: Duration = Duration::from_secs(1);
const HALF: Duration = Duration::from_millis(500);

/// Keys of the table, and what may be there.
struct Keys<'a> {
    text: &'a Text<'a>,
    table: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.table)
    }

    fn wrong<T>(&self, value: &Spanned<T>, name: &str, message: impl Into<String>) -> ConfigError {
        self.text.wrong(value, self.key(name), message)
    }

    /// Refuses keys of other kinds: they would promise what is not done.
    fn fit(&self, kind: &str, raw: &RawHealth) -> Result<(), ConfigError> {
        fn place<T>(value: Option<&Spanned<T>>) -> Option<usize> {
            value.map(|value| value.span().start)
        }
        for (name, place, kinds) in [
            (
                "path",
                place(raw.path.as_ref()),
                ["http", "openai"].as_slice(),
            ),
            ("host", place(raw.host.as_ref()), &["http", "v2", "openai"]),
            ("status", place(raw.status.as_ref()), &["http"]),
            ("body", place(raw.body.as_ref()), &["http"]),
            ("json", place(raw.json.as_ref()), &["http"]),
            ("value", place(raw.value.as_ref()), &["http"]),
            ("service", place(raw.service.as_ref()), &["grpc"]),
            ("models", place(raw.models.as_ref()), &["v2"]),
            ("model", place(raw.model.as_ref()), &["openai"]),
            ("token_file", place(raw.token_file.as_ref()), &["openai"]),
            ("command", place(raw.command.as_ref()), &["exec"]),
        ] {
            let Some(place) = place.filter(|_| !kinds.contains(&kind)) else {
                continue;
            };
            let message = format!(
                "is of no use with kind = \"{kind}\", only with \"{}\": remove it",
                kinds.join("\" or \"")
            );
            return Err(self.text.error(place, self.key(name), message));
        }
        Ok(())
    }

    fn http(&self, raw: &RawHealth) -> Result<HttpProbe, ConfigError> {
        let path = self.path(raw.path.as_ref(), "/")?;
        if let Some(body) = raw.body.as_ref().filter(|body| body.get_ref().is_empty()) {
            return Err(self.wrong(body, "body", "is empty: every body contains that"));
        }
        let json = match (&raw.json, &raw.value) {
            (None, None) => None,
            (None, Some(value)) => {
                let message = "needs `json`, the pointer to where it shall be, like \"/status\"";
                return Err(self.wrong(value, "value", message));
            }
            (Some(json), None) => {
                let message = "needs `value`, what shall be there, like true or \"ready\"";
                return Err(self.wrong(json, "json", message));
            }
            (Some(json), Some(value)) => {
                let pointer = json.get_ref();
                if !pointer.is_empty() && !pointer.starts_with('/') {
                    let message = format!("`{pointer}` is no JSON pointer, like \"/status/ready\"");
                    return Err(self.wrong(json, "json", message));
                }
                Some((pointer.clone(), self.scalar(value)?))
            }
        };
        let status = self.number(raw.status.as_ref(), "status", &STATUS)?;
        Ok(HttpProbe {
            path,
            host: self.host(raw)?,
            status,
            body: raw.body.as_ref().map(|body| body.get_ref().clone()),
            json,
        })
    }

    fn v2(&self, raw: &RawHealth) -> Result<V2Probe, ConfigError> {
        let mut models = Vec::new();
        for model in raw.models.iter().flat_map(Spanned::get_ref) {
            let name = model.get_ref();
            if name.is_empty() || name.contains(char::is_control) || models.contains(name) {
                let name = name.escape_debug();
                let message = format!("`{name}` is no model's name, or is given twice");
                return Err(self.wrong(model, "models", message));
            }
            models.push(name.clone());
        }
        Ok(V2Probe {
            models,
            host: self.host(raw)?,
        })
    }

    fn openai(&self, raw: &RawHealth, start: usize) -> Result<OpenAiProbe, ConfigError> {
        let Some(model) = &raw.model else {
            let message = "is missing: name the model that shall make a token";
            return Err(self.text.error(start, self.key("model"), message));
        };
        if model.get_ref().is_empty() {
            return Err(self.wrong(model, "model", "is empty"));
        }
        if let Some(file) = raw
            .token_file
            .as_ref()
            .filter(|f| !f.get_ref().is_absolute())
        {
            let message = format!("`{}` is no absolute path", file.get_ref().display());
            return Err(self.wrong(file, "token_file", message));
        }
        Ok(OpenAiProbe {
            model: model.get_ref().clone(),
            path: self.path(raw.path.as_ref(), "/v1/completions")?,
            host: self.host(raw)?,
            token_file: raw.token_file.as_ref().map(|file| file.get_ref().clone()),
        })
    }

    fn exec(&self, raw: &RawHealth, start: usize) -> Result<ExecProbe, ConfigError> {
        let example = "like [\"/etc/bgswitch/probe\", \"--deep\"]";
        let Some(command) = &raw.command else {
            let message = format!("is missing: a program and its arguments, {example}");
            return Err(self.text.error(start, self.key("command"), message));
        };
        let words = command.get_ref();
        let program = words.first().map_or("", String::as_str);
        if !Path::new(program).is_absolute() || words.iter().any(|word| word.contains('\0')) {
            let message = format!("must begin with the absolute path of a program, {example}");
            return Err(self.wrong(command, "command", message));
        }
        Ok(ExecProbe {
            command: words.clone(),
        })
    }

    fn path(&self, raw: Option<&Spanned<String>>, usual: &str) -> Result<String, ConfigError> {
        let Some(raw) = raw else {
            return Ok(usual.to_owned());
        };
        let path = raw.get_ref();
        if !path.starts_with('/') || path.contains('#') || path.parse::<PathAndQuery>().is_err() {
            let message = format!("`{}` is no path, like \"/health\"", path.escape_debug());
            return Err(self.wrong(raw, "path", message));
        }
        Ok(path.clone())
    }

    fn host(&self, raw: &RawHealth) -> Result<Option<String>, ConfigError> {
        let Some(raw) = &raw.host else {
            return Ok(None);
        };
        let host = raw.get_ref();
        let is_graphic = host.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || !is_graphic || HeaderValue::from_str(host).is_err() {
            let message = format!(
                "`{}` is no host, like \"llm.example.com\"",
                host.escape_debug()
            );
            return Err(self.wrong(raw, "host", message));
        }
        Ok(Some(host.clone()))
    }

    /// A text, a number or a truth value.
    fn scalar(&self, raw: &Spanned<toml::Value>) -> Result<Value, ConfigError> {
        let value = match raw.get_ref() {
            toml::Value::String(text) => Some(Value::from(text.as_str())),
            toml::Value::Integer(number) => Some(Value::from(*number)),
            toml::Value::Float(number) => serde_json::Number::from_f64(*number).map(Value::from),
            toml::Value::Boolean(truth) => Some(Value::from(*truth)),
            _ => None,
        };
        value.ok_or_else(|| {
            let message = "is neither a text nor a number nor true or false";
            self.wrong(raw, "value", message)
        })
    }

    /// A duration with parts of a second.
    fn span(
        &self,
        raw: Option<&Spanned<String>>,
        name: &str,
        usual: Duration,
        range: &RangeInclusive<Duration>,
    ) -> Result<Duration, ConfigError> {
        let Some(raw) = raw else {
            return Ok(usual);
        };
        let given = raw.get_ref();
        let show = |duration: &Duration| humantime::format_duration(*duration).to_string();
        let Ok(duration) = humantime::parse_duration(given) else {
            let message = format!("`{given}` is no duration, like \"1s\" or \"500ms\"");
            return Err(self.wrong(raw, name, message));
        };
        if !range.contains(&duration) {
            let message = format!(
                "`{given}` is not between {} and {}",
                show(range.start()),
                show(range.end())
            );
            return Err(self.wrong(raw, name, message));
        }
        Ok(duration)
    }

    fn number<T: TryFrom<i64>>(
        &self,
        raw: Option<&Spanned<i64>>,
        name: &str,
        range: &RangeInclusive<i64>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(raw) = raw else {
            return Ok(None);
        };
        let number = *raw.get_ref();
        let fits = range.contains(&number).then_some(number);
        fits.and_then(|number| T::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| {
                let message = format!(
                    "{number} is not between {} and {}",
                    range.start(),
                    range.end()
                );
                self.wrong(raw, name, message)
            })
    }
}
