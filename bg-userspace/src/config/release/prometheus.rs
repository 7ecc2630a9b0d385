//! What `[[service.NAME.bake.rule]]` may say: figures of a Prometheus server.

use std::{collections::BTreeSet, fmt, time::Duration};

use bg_common::service::Colour;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{
    super::{ConfigError, rules::duration, text::Text},
    WebhookGate,
    gates::is_url,
    keys::Keys,
};

/// More rules than this are no plan that anybody follows.
const MAX_RULES: usize = 32;
const SECOND: Duration = Duration::from_secs(1);
/// Samples in a row.
const IN_A_ROW: std::ops::RangeInclusive<i64> = 1..=100;

/// Where figures come from, and what they must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrometheusPlan {
    /// Where it is, like `http://prom.example.com:9090`.
    pub url: String,
    /// Each of them must hold.
    pub rules: Vec<RulePlan>,
}

impl PrometheusPlan {
    /// The host and port, and the path before `/api`.
    pub fn parts(&self) -> (String, String) {
        let url = WebhookGate {
            url: self.url.clone(),
            token_file: None,
        };
        let (authority, path) = url.parts();
        (authority, path.trim_end_matches('/').to_owned())
    }
}

/// A figure, and what it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RulePlan {
    /// What it is called.
    pub name: String,
    /// The query; `{service}`, `{colour}` and `{version}` are put in.
    pub promql: String,
    /// It must not be larger.
    pub max: Option<Figure>,
    /// Nor smaller.
    pub min: Option<Figure>,
    /// What an answer without a figure means.
    pub no_data: NoData,
    /// How often it is asked for.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// So many good samples in a row, and it holds.
    pub rise: u32,
    /// So many bad ones, and it does not.
    pub fall: u32,
}

impl RulePlan {
    /// The query for a colour. What is put in cannot end a string of `PromQL`.
    pub fn query(&self, service: &str, colour: Colour, version: &str) -> String {
        let escaped: String = version
            .chars()
            .flat_map(|c| {
                let escape = matches!(c, '\\' | '"' | '\'').then_some('\\');
                escape.into_iter().chain([c])
            })
            .collect();
        self.promql
            .replace("{service}", service)
            .replace("{colour}", colour.as_str())
            .replace("{version}", &escaped)
    }
}

impl fmt::Display for RulePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.promql)?;
        for (name, figure) in [("max", self.max), ("min", self.min)] {
            if let Some(Figure(figure)) = figure {
                write!(f, " {name} {figure}")?;
            }
        }
        let duration = humantime::format_duration;
        write!(
            f,
            " no_data {} interval {} timeout {} rise {} fall {}",
            self.no_data.as_str(),
            duration(self.interval),
            duration(self.timeout),
            self.rise,
            self.fall
        )
    }
}

/// A finite number.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure(pub f64);

/// It is never NaN.
impl Eq for Figure {}

/// What an answer without a figure means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoData {
    /// Nobody can say.
    #[default]
    Inconclusive,
    /// It is as good as a good one.
    Pass,
    /// It is as bad as a bad one.
    Fail,
}

impl NoData {
    /// `"inconclusive"`, `"pass"` or `"fail"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inconclusive => "inconclusive",
            Self::Pass => "pass",
            Self::Fail => "fail",
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawRule {
    name: Option<Spanned<String>>,
    promql: Option<Spanned<String>>,
    max: Option<Spanned<f64>>,
    min: Option<Spanned<f64>>,
    no_data: Option<NoData>,
    interval: Option<Spanned<String>>,
    timeout: Option<Spanned<String>>,
    rise: Option<Spanned<i64>>,
    fall: Option<Spanned<i64>>,
}

/// The rules of a service's bake; `table` is what the bake is called.
pub(super) fn prometheus(
    text: &Text<'_>,
    table: &str,
    url: Option<&Spanned<String>>,
    raw: Option<Spanned<Vec<Spanned<RawRule>>>>,
) -> Result<Option<PrometheusPlan>, ConfigError> {
    let (url, raw) = match (url, raw) {
        (None, None) => return Ok(None),
        (Some(url), None) => {
            let message = "is of no use without a rule: add [[service.NAME.bake.rule]]";
            return Err(text.wrong(url, format!("{table}.prometheus"), message));
        }
        (None, Some(raw)) => {
            let message = "needs prometheus = \"http://prom.example.com:9090\" in the bake";
            return Err(text.wrong(&raw, format!("{table}.rule"), message));
        }
        (Some(url), Some(raw)) => (url, raw),
    };
    if !is_url(url.get_ref()) || url.get_ref().contains('?') {
        let message = format!(
            "`{}` is no URL of plain HTTP, like \"http://prom.example.com:9090\"",
            url.get_ref().escape_debug()
        );
        return Err(text.wrong(url, format!("{table}.prometheus"), message));
    }
    let count = raw.get_ref().len();
    if count == 0 {
        let message = "is empty: add [[service.NAME.bake.rule]], or leave prometheus out";
        return Err(text.wrong(&raw, format!("{table}.rule"), message));
    }
    if count > MAX_RULES {
        let message = format!("there are {count} rules, {MAX_RULES} fit");
        return Err(text.wrong(&raw, format!("{table}.rule"), message));
    }
    let table = format!("{table}.rule");
    let mut names = BTreeSet::new();
    let rules = raw.into_inner().into_iter().map(|raw| {
        let start = raw.span().start;
        let keys = Keys {
            text,
            table: &table,
            start,
        };
        rule(keys, &raw.into_inner(), &mut names)
    });
    Ok(Some(PrometheusPlan {
        url: url.get_ref().clone(),
        rules: rules.collect::<Result<_, _>>()?,
    }))
}

fn rule(
    keys: Keys<'_>,
    raw: &RawRule,
    names: &mut BTreeSet<String>,
) -> Result<RulePlan, ConfigError> {
    let name = keys.own_name(raw.name.as_ref(), "errors", names)?;
    let Some(promql) = &raw.promql else {
        let message = "a query, like 'rate(errors_total{colour=\"{colour}\"}[1m])'";
        return Err(keys.missing("promql", message));
    };
    if promql.get_ref().trim().is_empty() {
        return Err(keys.wrong(promql, "promql", "is empty"));
    }
    if is_raw(promql.get_ref()) {
        let message =
            "{version} is in a string of backticks, where nothing can be escaped: use \"\" or ''";
        return Err(keys.wrong(promql, "promql", message));
    }
    let figure = |name: &str, given: Option<&Spanned<f64>>| match given {
        Some(given) if !given.get_ref().is_finite() => {
            let message = format!("{} is no number that a figure can reach", given.get_ref());
            Err(keys.wrong(given, name, message))
        }
        given => Ok(given.map(|given| Figure(*given.get_ref()))),
    };
    let (max, min) = (
        figure("max", raw.max.as_ref())?,
        figure("min", raw.min.as_ref())?,
    );
    match (max, min, &raw.min) {
        (None, None, _) => {
            return Err(keys.missing("max", "what it must not exceed, like 0.01, or add `min`"));
        }
        (Some(Figure(max)), Some(Figure(min)), Some(given)) if min > max => {
            return Err(keys.wrong(given, "min", format!("{min} is more than max")));
        }
        _ => {}
    }
    let length = |name: &str, given: Option<&Spanned<String>>, usual: u64| {
        let usual = Duration::from_secs(usual);
        duration(keys.text, given, &keys.key(name), usual, SECOND)
    };
    Ok(RulePlan {
        name,
        promql: promql.get_ref().clone(),
        max,
        min,
        no_data: raw.no_data.unwrap_or_default(),
        interval: length("interval", raw.interval.as_ref(), 15)?,
        timeout: length("timeout", raw.timeout.as_ref(), 5)?,
        rise: keys
            .number("rise", raw.rise.as_ref(), IN_A_ROW)?
            .unwrap_or(2),
        fall: keys
            .number("fall", raw.fall.as_ref(), IN_A_ROW)?
            .unwrap_or(3),
    })
}

/// Whether a version would come into a string of backticks: `PromQL` knows no escapes there.
fn is_raw(promql: &str) -> bool {
    // A comment is like a string that ends with its line.
    let (mut quote, mut is_escaped) = (None, false);
    for (at, c) in promql.char_indices() {
        match quote {
            None if matches!(c, '"' | '\'' | '`') => quote = Some(c),
            None if c == '#' => quote = Some('\n'),
            Some('`') if promql[at..].starts_with("{version}") => return true,
            Some(begun) if c == begun && !is_escaped => quote = None,
            _ => {}
        }
        is_escaped = c == '\\' && !is_escaped && matches!(quote, Some('"' | '\''));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_into_a_query_stays_in_its_string() {
        let rule = RulePlan {
            name: "errors".to_owned(),
            promql: r#"up{job="{service}",colour="{colour}",v="{version}",x="{x}"}"#.to_owned(),
            max: Some(Figure(0.01)),
            min: None,
            no_data: NoData::Pass,
            interval: SECOND,
            timeout: SECOND,
            rise: 1,
            fall: 1,
        };
        assert_eq!(
            rule.query("llm", Colour::Green, r#"a"b\c"#),
            r#"up{job="llm",colour="green",v="a\"b\\c",x="{x}"}"#
        );
    }

    #[test]
    fn a_string_of_backticks_is_told_from_backticks_in_a_string() {
        for (promql, wanted) in [
            ("up{v=`{version}`}", true),
            (r#"up{a=`\`,v="{version}"}"#, false),
            (r#"up{a="`",v="{version}"}"#, false),
            (r#"up{a="\"`",v="{version}",b=`x{version}`}"#, true),
            ("up{v='{version}',s=`{service}`}", false),
            ("# don't\nup{v=`{version}`}", true),
            ("# a ` alone\nup{v='{version}'}", false),
        ] {
            assert_eq!(is_raw(promql), wanted, "{promql}");
        }
    }
}
