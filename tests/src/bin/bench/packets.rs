//! What the packet path costs a packet, by kind; and frames per second that come out.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Result, ensure};
use aya::sys::{Stats, enable_stats};
use bg_common::reason::Reason;

use crate::{
    Arguments, Effort, MAX_FLOWS,
    cases::{self, Case, Kind, LEAST, Program, Side, Stage},
    report::{Delivered, Figure, Report},
    stand::Stand,
};

/// Frames before a measurement: every flow once, and at least so many.
pub const WARM_UP: u32 = 20_000;
/// Before SYNs are measured, so many of them have filled the half-open table.
pub const STRANGERS_BEFORE: u32 = 200_000;
/// Frames per second are measured over so many times more frames: a test run
/// takes tens of milliseconds to begin and end.
const RATE_FRAMES: u32 = 4;
/// Parts of a thousand of the packets that must count the intended reason:
/// what else comes in is the stacks' own.
pub const INTENDED: u64 = 999;

/// Measures what the packet path costs a packet.
pub fn measure(
    arguments: &Arguments,
    effort: &Effort,
    stages: &[Stage],
    interrupted: &AtomicBool,
    report: &mut Report,
) -> Result<()> {
    let mut bench = Bench::new(Stand::usual(MAX_FLOWS)?, effort, interrupted);
    report.memory_of_a_flow = Some(bench.stand.memory_of_a_flow()?);
    let mut drops = [Vec::new(), Vec::new()];
    let most = arguments.flows.unwrap_or(u32::MAX);
    for stage in stages.iter().filter(|stage| stage.0 <= most) {
        eprintln!("bench: {} flows", stage.0);
        bench.stand.remember(stage.0)?;
        let mut cases = cases::of_stage(*stage);
        match &arguments.only {
            Some(text) => cases.retain(|case| case.name.contains(text.as_str())),
            None => report.add_delivered(bench.delivered(stage.0)?),
        }
        for (case, net) in cases.iter().zip(bench.costs(&cases, &mut drops)?) {
            report.add(case, &net);
        }
    }
    for drops in &drops {
        report.add_drop(drops);
    }
    Ok(())
}

/// A stand, and how much is done for a figure.
pub struct Bench<'a> {
    pub stand: Stand,
    interrupted: &'a AtomicBool,
    rounds: u32,
    frames: u32,
}

impl<'a> Bench<'a> {
    pub const fn new(stand: Stand, effort: &Effort, interrupted: &'a AtomicBool) -> Self {
        Self {
            stand,
            interrupted,
            rounds: effort.rounds,
            frames: effort.frames,
        }
    }

    /// Measures cases side by side: nanoseconds a packet net of `XDP_DROP`, a value a
    /// round for each; what was subtracted goes to `drops`, by side.
    pub fn costs(&mut self, cases: &[Case], drops: &mut [Vec<f64>; 2]) -> Result<Vec<Vec<f64>>> {
        // The kernel's bookkeeping is on for as long as this lives, whatever
        // becomes of the process.
        let _statistics = enable_stats(Stats::RunTime)?;
        let mut net = vec![Vec::new(); cases.len()];
        for _ in 0..self.rounds {
            for side in Side::ALL {
                let of_side = || {
                    cases
                        .iter()
                        .enumerate()
                        .filter(move |(_, case)| case.kind.side() == side)
                };
                let Some((_, any)) = of_side().next() else {
                    continue;
                };
                let bare = self.cost(&Case {
                    program: Program::Drop,
                    ..any.clone()
                })?;
                drops[side as usize].push(bare);
                for (index, case) in of_side() {
                    net[index].push(self.cost(case)? - bare);
                }
            }
        }
        Ok(net)
    }

    /// Nanoseconds a packet, bookkeeping included.
    fn cost(&mut self, case: &Case) -> Result<f64> {
        let side = case.kind.side();
        self.stand.put(side, case.program)?;
        self.stand.feed(case.kind, case.flows)?;
        self.stand.mend(side, case.program == Program::Cut);
        if matches!(case.kind, Kind::ForwardUdp | Kind::ReturnUdp) {
            self.stand.remember_datagrams(case.flows)?;
        }
        let before = if case.kind.is_first() {
            STRANGERS_BEFORE
        } else {
            case.flows.max(WARM_UP)
        };
        self.send(side, before)?;
        let reasons = self.stand.reasons()?;
        let is_sent_on = case.program == Program::Part(LEAST);
        let arrived = is_sent_on.then(|| self.stand.received(Side::Servers, true));
        let arrived = arrived.transpose()?;
        let runs = self.stand.runs(case.program)?;
        self.send(side, self.frames)?;
        let after = self.stand.runs(case.program)?;
        let (ns, count) = (after.ns - runs.ns, after.count - runs.count);
        ensure!(
            count >= u64::from(self.frames) / 2,
            "{}: {count} of {} frames came in",
            case.name,
            self.frames
        );
        if let Some(before) = arrived {
            let arrived = self.stand.received(Side::Servers, true)? - before;
            ensure!(
                arrived * 1000 >= u64::from(self.frames) * INTENDED,
                "{}: {arrived} of {} frames arrived",
                case.name,
                self.frames
            );
        }
        if case.program.is_ours() {
            let after = self.stand.reasons()?;
            intended(case, count, &reasons, &after)?;
        }
        Ok(ns as f64 / count as f64)
    }

    /// Frames per second that come out, with the kernel's bookkeeping off: of one core,
    /// and of two at the same time, each with half of the flows.
    fn delivered(&mut self, flows: u32) -> Result<Delivered> {
        let programs = [
            Program::Drop,
            Program::Redirect,
            Program::Part(LEAST),
            Program::Ours,
        ];
        let mut rates = [const { [const { Vec::new() }; 4] }; 2];
        let mut ratios = [const { Vec::new() }; 2];
        let frames = self.frames * RATE_FRAMES;
        for _ in 0..self.rounds {
            for (cores, rates) in (1..).zip(&mut rates) {
                if cores == 1 {
                    self.stand.feed(Kind::Forward, flows)?;
                } else {
                    self.stand.feed_halves(Kind::Forward, flows)?;
                }
                for (program, rates) in programs.iter().zip(rates) {
                    self.stand.put(Side::Clients, *program)?;
                    self.send_on(cores, flows.max(WARM_UP))?;
                    let (side, far) = match program {
                        Program::Drop => (Side::Clients, false),
                        _ => (Side::Servers, true),
                    };
                    let before = self.stand.received(side, far)?;
                    let took = self.send_on(cores, frames)?;
                    let came = self.stand.received(side, far)? - before;
                    rates.push(came as f64 / took.as_secs_f64() / 1e6);
                }
            }
            let last = |index: usize| rates[0][index].last().copied().unwrap_or(f64::NAN);
            for (ratios, program) in ratios.iter_mut().zip([2, 3]) {
                ratios.push(last(program) / last(1));
            }
        }
        let times = |program: usize| {
            let [one, two] = [0, 1].map(|cores: usize| &rates[cores][program]);
            let times: Vec<f64> = one.iter().zip(two).map(|(one, two)| two / one).collect();
            Figure::of(&times)
        };
        let two_cores = [0, 1, 2, 3].map(times);
        let [[drop, redirect, least, forward], _] =
            rates.map(|rates| rates.map(|r| Figure::of(&r)));
        let [floor, ratio] = ratios.map(|ratios| Figure::of(&ratios));
        Ok(Delivered {
            flows,
            drop,
            redirect,
            least,
            forward,
            floor,
            ratio,
            two_cores,
        })
    }

    /// Sends frames in on the clients' side, so many on each of one or two cores.
    fn send_on(&self, cores: u32, frames: u32) -> Result<Duration> {
        if cores == 1 {
            return self.send(Side::Clients, frames);
        }
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        self.stand.run_both(frames)
    }

    fn send(&self, side: Side, frames: u32) -> Result<Duration> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        self.stand.run(side, frames)
    }
}

/// Refuses a figure unless nearly all packets took the intended way.
fn intended(case: &Case, count: u64, before: &[u64], after: &[u64]) -> Result<()> {
    let taken = |reason: Reason| after[reason as usize] - before[reason as usize];
    let wanted = case.reason();
    ensure!(
        taken(wanted) * 1000 >= count * INTENDED,
        "{}, {} flows: {} of {count} packets are {}; all: {}",
        case.name,
        case.flows,
        taken(wanted),
        wanted.as_str(),
        Reason::ALL
            .iter()
            .filter(|reason| taken(**reason) > 0)
            .map(|reason| format!("{} {}", reason.as_str(), taken(*reason)))
            .collect::<Vec<_>>()
            .join(", ")
    );
    Ok(())
}
