//! Scrapes metrics, and reads them as strictly as the text of OpenMetrics 1.0 asks for.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    kernel::in_namespace,
    lab::{Lab, Place},
    load::PATIENCE,
};

/// Labels of a sample, in the order in which they were written.
pub type Labels = Vec<(String, String)>;

/// A family of samples.
#[derive(Clone, Debug, Default)]
pub struct Family {
    /// `counter`, `gauge`, `histogram`, `info`.
    pub kind: String,
    /// What it is.
    pub help: String,
    /// Its unit, if it has one.
    pub unit: Option<String>,
    /// Samples by name and labels.
    pub samples: BTreeMap<(String, Labels), f64>,
}

/// A scrape: families by name.
pub type Families = BTreeMap<String, Family>;

/// The value of a sample; its labels are given in order.
///
/// # Panics
/// When there is none.
pub fn sample(families: &Families, name: &str, labels: &[(&str, &str)]) -> f64 {
    find(families, name, labels).unwrap_or_else(|| panic!("no sample {name} {labels:?}"))
}

/// The same, where there may be none.
pub fn find(families: &Families, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let key = (name.to_owned(), labels.iter().map(own).collect());
    let mut of_all = families.values();
    of_all.find_map(|family| family.samples.get(&key)).copied()
}

/// Connects to an address on the gateway.
pub fn connect(lab: &Lab, address: SocketAddr) -> Result<TcpStream> {
    let namespace = lab.enter(Place::Gateway)?;
    let stream = in_namespace(&namespace, || TcpStream::connect(address))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One request to an address on the gateway: the answer's head and body.
pub fn request(lab: &Lab, address: SocketAddr, head: &str) -> Result<(String, String)> {
    let mut stream = connect(lab, address)?;
    write!(stream, "{head} HTTP/1.1\r\nHost: gateway\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("an answer")?;
    Ok((head.to_owned(), body.to_owned()))
}

/// What the gateway's daemon tells at an address.
pub fn scrape(lab: &Lab, address: SocketAddr) -> Result<Families> {
    let (head, body) = request(lab, address, "GET /metrics")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let kind = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
    ensure!(head.to_lowercase().contains(kind), "{head}");
    parse(&body)
}

/// Reads the text; anything that is not as it should be is an error.
pub fn parse(text: &str) -> Result<Families> {
    let body = text
        .strip_suffix("# EOF\n")
        .context("no # EOF at the end")?;
    let mut families = Families::new();
    let mut current = String::new();
    for line in body.lines() {
        let read = if let Some(comment) = line.strip_prefix("# ") {
            metadata(comment, &mut families, &mut current)
        } else {
            let family = families.get_mut(&current);
            let family = family.context("a sample without a family");
            family.and_then(|family| read_sample(line, &current, family))
        };
        read.with_context(|| format!("in the line `{line}`"))?;
    }
    for (name, family) in &families {
        family.check(name).with_context(|| name.clone())?;
    }
    Ok(families)
}

fn metadata(comment: &str, families: &mut Families, current: &mut String) -> Result<()> {
    let mut words = comment.splitn(3, ' ');
    let [Some(what), Some(name), Some(text)] = [words.next(), words.next(), words.next()] else {
        bail!("no metadata");
    };
    ensure!(is_name(name), "no name of a metric");
    if current != name {
        ensure!(!families.contains_key(name), "two families of one name");
        name.clone_into(current);
    }
    let family = families.entry(name.to_owned()).or_default();
    ensure!(family.samples.is_empty(), "metadata behind samples");
    match what {
        "TYPE" if family.kind.is_empty() => text.clone_into(&mut family.kind),
        "HELP" if family.help.is_empty() => text.clone_into(&mut family.help),
        "UNIT" if family.unit.is_none() => family.unit = Some(text.to_owned()),
        _ => bail!("unknown metadata, or twice"),
    }
    Ok(())
}

fn read_sample(line: &str, of: &str, family: &mut Family) -> Result<()> {
    let end = line.find(['{', ' ']).context("no sample")?;
    let (name, rest) = line.split_at(end);
    let suffixes: &[&str] = match family.kind.as_str() {
        "counter" => &["_total"],
        "gauge" => &[""],
        "info" => &["_info"],
        "histogram" => &["_bucket", "_sum", "_count"],
        other => bail!("a family of the type `{other}`"),
    };
    let suffix = name
        .strip_prefix(of)
        .context("a sample of another family")?;
    ensure!(suffixes.contains(&suffix), "a sample of another name");
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => read_labels(rest)?,
        None => (Labels::new(), rest),
    };
    let value = value.strip_prefix(' ').context("no value")?;
    ensure!(!value.contains(' '), "more than a value");
    let value: f64 = value.parse()?;
    ensure!(value.is_finite() && value >= 0.0, "a value that cannot be");
    let key = (name.to_owned(), labels);
    ensure!(
        family.samples.insert(key, value).is_none(),
        "a sample twice"
    );
    Ok(())
}

/// The labels behind `{`, and what follows their `}`.
fn read_labels(mut rest: &str) -> Result<(Labels, &str)> {
    let mut labels = Labels::new();
    loop {
        let (name, value) = rest.split_once("=\"").context("no label")?;
        ensure!(is_name(name) && !name.contains(':'), "no name of a label");
        ensure!(labels.iter().all(|(key, _)| key != name), "a label twice");
        let mut text = String::new();
        let mut characters = value.char_indices();
        let end = loop {
            match characters.next().context("a value without an end")? {
                (at, '"') => break at + 1,
                (_, '\\') => text.push(match characters.next().context("no escape")?.1 {
                    'n' => '\n',
                    same @ ('\\' | '"') => same,
                    _ => bail!("an unknown escape"),
                }),
                (_, other) => text.push(other),
            }
        };
        labels.push((name.to_owned(), text));
        rest = &value[end..];
        match rest.split_at_checked(1).context("labels without an end")? {
            (",", next) => rest = next,
            ("}", next) => return Ok((labels, next)),
            _ => bail!("neither , nor }}"),
        }
    }
}

fn is_name(name: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    name.starts_with(first) && name.chars().all(|c| first(c) || c.is_ascii_digit())
}

impl Family {
    fn check(&self, name: &str) -> Result<()> {
        ensure!(
            !self.kind.is_empty() && !self.help.is_empty(),
            "no TYPE, or no HELP"
        );
        if let Some(unit) = &self.unit {
            ensure!(
                name.ends_with(&format!("_{unit}")),
                "a name without its unit"
            );
            let dimensionless = matches!(self.kind.as_str(), "info");
            ensure!(!dimensionless, "a unit of what has none");
        }
        ensure!(
            self.kind != "counter" || !name.ends_with("_total"),
            "_total is the samples' suffix"
        );
        let names = |labels: &Labels| -> Vec<String> {
            let names = labels.iter().map(|(name, _)| name.clone());
            names.filter(|name| name != "le").collect()
        };
        let sets: BTreeSet<_> = self
            .samples
            .keys()
            .map(|(_, labels)| names(labels))
            .collect();
        ensure!(sets.len() <= 1, "samples with different labels: {sets:?}");
        if self.kind == "histogram" {
            self.check_histogram(name)?;
        }
        Ok(())
    }

    /// Buckets grow, the last one is for all, and has as many as were counted.
    fn check_histogram(&self, name: &str) -> Result<()> {
        let mut buckets: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
        let of = |suffix| format!("{name}{suffix}");
        for ((sample, labels), value) in &self.samples {
            if *sample == of("_bucket") {
                let (le, rest): (Labels, Labels) =
                    labels.iter().cloned().partition(|(name, _)| name == "le");
                let [(_, le)] = le.as_slice() else {
                    bail!("a bucket without le");
                };
                buckets.entry(rest).or_default().push((le.parse()?, *value));
            }
        }
        for (labels, mut buckets) in buckets {
            buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
            ensure!(
                buckets.is_sorted_by_key(|(_, count)| *count),
                "not cumulative"
            );
            let last = buckets.last().context("no bucket")?;
            let count = self.samples.get(&(of("_count"), labels.clone()));
            ensure!(last.0.is_infinite() && count == Some(&last.1), "no +Inf");
            ensure!(self.samples.contains_key(&(of("_sum"), labels)), "no sum");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_refused() {
        let good = "# HELP a_bytes A.\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\n\
                    a_bytes_total{b=\"c\\\"\\\\\\n\",d=\"\"} 1\n# EOF\n";
        let read = parse(good).unwrap();
        let labels = [("b", "c\"\\\n"), ("d", "")];
        assert!((sample(&read, "a_bytes_total", &labels) - 1.0).abs() < f64::EPSILON);
        for (from, to) in [
            ("# EOF\n", ""),
            ("# EOF\n", "# EOF\n\n"),
            ("_total{", "{"),
            ("# UNIT a_bytes bytes", "# UNIT a_bytes seconds"),
            ("# HELP a_bytes A.\n", ""),
            ("} 1\n", "} -1\n"),
            ("} 1\n", "} 1 2\n"),
            ("} 1\n", "} 1\na_bytes_total{b=\"e\"} 1\n"),
            ("d=\"\"", "b=\"\""),
            ("\\n", "\\t"),
        ] {
            assert!(good.contains(from), "{from}");
            assert!(parse(&good.replacen(from, to, 1)).is_err(), "{from} {to}");
        }
    }
}
