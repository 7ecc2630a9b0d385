//! Figures of a Prometheus server, judged: no single sample decides. No clock, no
//! socket: answers come in, a verdict with its figures goes out.

use serde::Deserialize;

use crate::config::{Figure, NoData, RulePlan};

/// What a query was answered with.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// One figure, or more: each must hold.
    Figures(Vec<f64>),
    /// No figure, or one that is no number.
    NoData,
    /// Nobody answered, or with an error.
    Trouble(String),
}

/// How a rule is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Nobody can say.
    #[default]
    Unknown,
    /// It holds.
    Holds,
    /// It does not, and why.
    Broken(String),
}

/// What speaks of a rule, sample by sample.
#[derive(Debug)]
pub struct Watch {
    plan: RulePlan,
    standing: Standing,
    /// Good ones in a row, ...
    good: u32,
    /// ... bad ones since the last good one, ...
    bad: u32,
    /// ... and all since then, also those that say nothing.
    since_good: u32,
    /// What the last one said.
    said: String,
}

impl Watch {
    /// Of which nothing is known yet.
    pub const fn new(plan: RulePlan) -> Self {
        Self {
            plan,
            standing: Standing::Unknown,
            good: 0,
            bad: 0,
            since_good: 0,
            said: String::new(),
        }
    }

    /// How it is.
    pub const fn standing(&self) -> &Standing {
        &self.standing
    }

    /// What the last sample said, for people.
    pub fn said(&self) -> String {
        format!("{}: {}", self.plan.name, self.said)
    }

    /// Takes a sample in.
    pub fn hear(&mut self, sample: &Sample) {
        let (is_good, said) = self.judge(sample);
        self.said = said;
        (self.good, self.bad, self.since_good) = match is_good {
            Some(true) => (self.good + 1, 0, 0),
            Some(false) => (0, self.bad + 1, self.since_good + 1),
            // A server that is too busy to answer has not become better.
            None => (0, self.bad, self.since_good + 1),
        };
        if self.good >= self.plan.rise {
            self.standing = Standing::Holds;
        } else if is_good == Some(false) && self.bad >= self.plan.fall {
            let (name, said, fall) = (&self.plan.name, &self.said, self.bad);
            let interval = humantime::format_duration(self.plan.interval);
            let why = format!("rule {name}: {said}, {fall} times in a row, one every {interval}");
            self.standing = Standing::Broken(why);
        } else if self.bad < self.plan.fall && self.since_good >= self.plan.fall {
            self.standing = Standing::Unknown;
        }
    }

    /// Whether a sample is good, if it says so, and what it says.
    fn judge(&self, sample: &Sample) -> (Option<bool>, String) {
        let figures = match sample {
            Sample::Trouble(trouble) => return (None, trouble.clone()),
            Sample::NoData => {
                let is_good = match self.plan.no_data {
                    NoData::Inconclusive => None,
                    NoData::Pass => Some(true),
                    NoData::Fail => Some(false),
                };
                return (is_good, "there is no data".to_owned());
            }
            Sample::Figures(figures) => figures,
        };
        let above = |figure: &f64| self.plan.max.filter(|Figure(max)| figure > max);
        let below = |figure: &f64| self.plan.min.filter(|Figure(min)| figure < min);
        for figure in figures {
            if let Some(Figure(max)) = above(figure) {
                return (Some(false), format!("{figure} is above {max}"));
            }
            if let Some(Figure(min)) = below(figure) {
                return (Some(false), format!("{figure} is below {min}"));
            }
        }
        let shown: Vec<String> = figures.iter().take(3).map(f64::to_string).collect();
        (Some(true), shown.join(", "))
    }
}

/// All rules together: one that is broken is enough, and all must be known to hold.
pub fn together<'a>(watches: impl Iterator<Item = &'a Watch>) -> Standing {
    let mut all = Standing::Holds;
    for watch in watches {
        match watch.standing() {
            Standing::Broken(why) => return Standing::Broken(why.clone()),
            Standing::Unknown => all = Standing::Unknown,
            Standing::Holds => {}
        }
    }
    all
}

#[derive(Deserialize)]
struct Answer {
    status: String,
    error: Option<String>,
    data: Option<Data>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    result_type: String,
    result: serde_json::Value,
}

#[derive(Deserialize)]
struct Series {
    value: (serde_json::Value, String),
}

/// Reads an answer of `/api/v1/query` (Prometheus' HTTP API): a vector, or a scalar.
pub fn read(body: &[u8]) -> Sample {
    let Ok(answer) = serde_json::from_slice::<Answer>(body) else {
        return Sample::Trouble("the answer is none of Prometheus'".to_owned());
    };
    let Some(data) = answer.data.filter(|_| answer.status == "success") else {
        let error = answer
            .error
            .unwrap_or_else(|| "without a reason".to_owned());
        return Sample::Trouble(format!("it answered with an error: {error}"));
    };
    let values: Option<Vec<String>> = match data.result_type.as_str() {
        "vector" => serde_json::from_value::<Vec<Series>>(data.result)
            .ok()
            .map(|series| series.into_iter().map(|one| one.value.1).collect()),
        "scalar" => serde_json::from_value::<(serde_json::Value, String)>(data.result)
            .ok()
            .map(|(_, value)| vec![value]),
        other => {
            let trouble = format!("the query makes a {other}, not a vector or a scalar");
            return Sample::Trouble(trouble);
        }
    };
    let figures = values.and_then(|values| {
        let figures = values.iter().map(|value| value.parse::<f64>());
        figures.collect::<Result<Vec<f64>, _>>().ok()
    });
    match figures {
        None => Sample::Trouble("the answer holds what is no figure".to_owned()),
        Some(figures) if figures.is_empty() || figures.iter().any(|one| one.is_nan()) => {
            Sample::NoData
        }
        Some(figures) => Sample::Figures(figures),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn watch(no_data: NoData) -> Watch {
        Watch::new(RulePlan {
            name: "errors".to_owned(),
            promql: "x".to_owned(),
            max: Some(Figure(0.01)),
            min: Some(Figure(-1.0)),
            no_data,
            interval: Duration::from_secs(15),
            timeout: Duration::from_secs(5),
            rise: 2,
            fall: 3,
        })
    }

    fn after(watch: &mut Watch, samples: &[Sample]) -> Standing {
        for sample in samples {
            watch.hear(sample);
        }
        watch.standing().clone()
    }

    fn figure(figure: f64) -> Sample {
        Sample::Figures(vec![0.0, figure])
    }

    #[test]
    fn no_single_sample_decides() {
        let (good, bad) = (figure(0.005), figure(0.034));
        let mut watch = watch(NoData::Inconclusive);
        assert_eq!(
            after(&mut watch, std::slice::from_ref(&good)),
            Standing::Unknown
        );
        assert_eq!(
            after(&mut watch, std::slice::from_ref(&good)),
            Standing::Holds
        );
        let flapping = [
            bad.clone(),
            bad.clone(),
            good.clone(),
            bad.clone(),
            bad.clone(),
        ];
        assert_eq!(after(&mut watch, &flapping), Standing::Holds);
        let why = "rule errors: 0.034 is above 0.01, 3 times in a row, one every 15s";
        assert_eq!(after(&mut watch, &[bad]), Standing::Broken(why.to_owned()));
        assert_eq!(after(&mut watch, &[good.clone(), good]), Standing::Holds);
        assert!(matches!(
            after(
                &mut watch,
                &[figure(-2.0), figure(-2.0), figure(f64::NEG_INFINITY)]
            ),
            Standing::Broken(_)
        ));
    }

    #[test]
    fn a_rule_does_not_hold_for_ever_by_a_good_sample_of_long_ago() {
        let (good, bad) = (figure(0.005), figure(0.034));
        let trouble = Sample::Trouble("it is too busy".to_owned());
        let mut watch = watch(NoData::Inconclusive);
        assert_eq!(
            after(&mut watch, &[good.clone(), good.clone()]),
            Standing::Holds
        );
        let flapping = [bad.clone(), trouble.clone(), bad.clone()];
        assert_eq!(after(&mut watch, &flapping), Standing::Unknown);
        let broken = after(&mut watch, &[trouble.clone(), bad]);
        assert!(matches!(broken, Standing::Broken(_)));
        // Why it is broken, stays said.
        assert_eq!(after(&mut watch, &[trouble]), broken);
    }

    #[test]
    fn no_data_is_what_it_is_said_to_be_and_trouble_is_never_a_pass() {
        let none = vec![Sample::NoData; 3];
        assert_eq!(
            after(&mut watch(NoData::Inconclusive), &none),
            Standing::Unknown
        );
        assert_eq!(after(&mut watch(NoData::Pass), &none), Standing::Holds);
        assert!(matches!(
            after(&mut watch(NoData::Fail), &none),
            Standing::Broken(_)
        ));
        let trouble = vec![Sample::Trouble("nobody is there".to_owned()); 3];
        for no_data in [NoData::Inconclusive, NoData::Pass, NoData::Fail] {
            let mut watch = watch(no_data);
            assert_eq!(
                after(&mut watch, &[figure(0.0), figure(0.0)]),
                Standing::Holds
            );
            assert_eq!(after(&mut watch, &trouble), Standing::Unknown);
        }
    }

    #[test]
    fn all_must_hold_and_one_that_is_broken_is_enough() {
        let (mut one, mut two) = (watch(NoData::Pass), watch(NoData::Pass));
        after(&mut one, &[figure(0.0), figure(0.0)]);
        assert_eq!(together([&one, &two].into_iter()), Standing::Unknown);
        after(&mut two, &[figure(0.0), figure(0.0)]);
        assert_eq!(together([&one, &two].into_iter()), Standing::Holds);
        after(&mut two, &[figure(1.0), figure(1.0), figure(1.0)]);
        assert!(matches!(
            together([&one, &two].into_iter()),
            Standing::Broken(_)
        ));
    }

    #[test]
    fn answers_are_read_as_prometheus_writes_them() {
        let vector = br#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{"a":"b"},"value":[1.5,"0.25"]},{"metric":{},"value":[1,"+Inf"]}]}}"#;
        assert_eq!(read(vector), Sample::Figures(vec![0.25, f64::INFINITY]));
        let scalar =
            br#"{"status":"success","data":{"resultType":"scalar","result":[1435781451.781,"1"]}}"#;
        assert_eq!(read(scalar), Sample::Figures(vec![1.0]));
        let empty = br#"{"status":"success","data":{"resultType":"vector","result":[]}}"#;
        assert_eq!(read(empty), Sample::NoData);
        let nan = br#"{"status":"success","data":{"resultType":"scalar","result":[1,"NaN"]}}"#;
        assert_eq!(read(nan), Sample::NoData);
        for (body, said) in [
            ("<html>", "none of Prometheus'"),
            (r#"{"status":"error","error":"parse error"}"#, "parse error"),
            (
                r#"{"status":"success","data":{"resultType":"matrix","result":[]}}"#,
                "makes a matrix",
            ),
            (
                r#"{"status":"success","data":{"resultType":"scalar","result":[1,"x"]}}"#,
                "no figure",
            ),
        ] {
            let Sample::Trouble(trouble) = read(body.as_bytes()) else {
                panic!("{body} is taken for a figure");
            };
            assert!(trouble.contains(said), "{trouble}");
        }
    }
}
