//! What came out, as a table and as JSON.

use std::fmt;

use serde::Serialize;

use super::{Measured, Way};
use crate::{
    cases::Program,
    report::{Figure, spread, verdict},
};

/// At least so much of bare `XDP_REDIRECT`, ...
const OF_REDIRECT: f64 = 0.88;
/// ... and at least so many times nftables.
const TIMES_NFTABLES: f64 = 2.5;

/// Frames that arrived, by way and flows.
#[derive(Debug, Serialize)]
pub struct Peers {
    /// Millions of frames per second, one core.
    rates: Vec<Rate>,
    /// Ours in parts of others, round by round.
    ratios: Vec<Ratio>,
}

/// One way with so many flows.
#[derive(Debug, Serialize)]
pub struct Rate {
    #[serde(skip)]
    way: Way,
    name: &'static str,
    flows: u32,
    /// Millions of frames per second that arrived.
    mpps: Figure,
    /// Which part of the frames sent did not arrive.
    lost: Figure,
    #[serde(skip)]
    values: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Ratio {
    name: &'static str,
    flows: u32,
    goal: f64,
    times: Figure,
    met: bool,
}

impl Rate {
    /// Out of one measurement a round.
    pub fn new(way: Way, name: &'static str, flows: u32, values: &[Measured]) -> Self {
        let rates: Vec<f64> = values.iter().map(|value| value.rate).collect();
        let lost: Vec<f64> = values.iter().map(|value| value.lost).collect();
        Self {
            way,
            name,
            flows,
            mpps: Figure::of(&rates),
            lost: Figure::of(&lost),
            values: rates,
        }
    }
}

impl Peers {
    /// Adds the ratios.
    pub fn new(rates: Vec<Rate>) -> Self {
        let mut ratios = Vec::new();
        for ours in rates
            .iter()
            .filter(|rate| rate.way == Way::Xdp(Program::Ours))
        {
            for (way, name, goal) in [
                (
                    Way::Xdp(Program::Redirect),
                    "bgswitch : XDP_REDIRECT",
                    OF_REDIRECT,
                ),
                (Way::Nftables, "bgswitch : nftables", TIMES_NFTABLES),
            ] {
                let theirs = rates.iter().filter(|rate| rate.flows == ours.flows);
                for theirs in theirs.filter(|rate| rate.way == way) {
                    let pairs = ours.values.iter().zip(&theirs.values);
                    let times = Figure::of(&pairs.map(|(a, b)| a / b).collect::<Vec<_>>());
                    ratios.push(Ratio {
                        name,
                        flows: ours.flows,
                        goal,
                        times,
                        met: times.median >= goal,
                    });
                }
            }
        }
        Self { rates, ratios }
    }

    /// Name, flows and millions of frames per second of each way.
    pub fn rates(&self) -> impl Iterator<Item = (&'static str, u32, Figure)> {
        self.rates
            .iter()
            .map(|rate| (rate.name, rate.flows, rate.mpps))
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nmillions of frames per second that arrive, one core, 64-byte TCP\n"
        )?;
        for rate in &self.rates {
            write!(
                f,
                "{:<34} {:>9}  {:>6}  {:>7.2}  {:>15}",
                rate.name,
                rate.flows,
                "",
                rate.mpps.median,
                spread(rate.mpps, 2)
            )?;
            if rate.lost.median > 0.001 {
                write!(f, "  {:.1} % lost", rate.lost.median * 100.0)?;
            }
            writeln!(f)?;
        }
        for ratio in &self.ratios {
            writeln!(
                f,
                "{:<34} {:>9}  {:>6}  {:>7.2}  {:>15}  {}",
                ratio.name,
                ratio.flows,
                ratio.goal,
                ratio.times.median,
                spread(ratio.times, 2),
                verdict(Some(ratio.met))
            )?;
        }
        Ok(())
    }
}
