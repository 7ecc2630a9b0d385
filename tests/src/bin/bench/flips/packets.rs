//! Flips while the generator sends as fast as it can, each packet a new flow: when
//! the far ends see what the store has changed.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Result, ensure};
use bg_common::{reason::Reason, service::Colour};
use bg_tests::{
    generator,
    kernel::pin,
    lab::{Place, SERVERS},
};
use serde::Serialize;

use super::report::{Packets, Quantiles};
use crate::{
    Effort, MAX_FLOWS,
    arrivals::FarEnd,
    cases::{Kind, STRANGER_FLOWS, Side},
    gateway::PORT,
    packets::{INTENDED, STRANGERS_BEFORE},
    stand::Stand,
};

/// Between two stores.
const PAUSE: Duration = Duration::from_millis(2);
/// How far the magnifying glass sees, on each side of the store.
pub const GLASS_US: i64 = 100;

/// Packets per microsecond around the store, all flips together.
#[derive(Debug, Serialize)]
pub struct Glass {
    /// Flips that were looked at.
    pub flips: usize,
    /// From [`GLASS_US`] before the store on: packets that arrived at the colour that
    /// is left, and at the other one, in each microsecond.
    pub bins: Vec<[u32; 2]>,
}

/// A store, and who was asked for.
struct Store {
    /// `CLOCK_MONOTONIC`, ns, just before it.
    at: u64,
    to: Colour,
    /// How long after it the packet path stamped the first new flow, ns.
    stamped: Option<u64>,
}

/// Microseconds from stores to what came after them.
#[derive(Debug, Default)]
struct Seen {
    stamped: Vec<f64>,
    first: Vec<f64>,
    last: Vec<f64>,
}

/// Frames that the generator makes before the first of them leaves: all of them are
/// made, decided on and received one batch after the other, so that a batch is what
/// a packet waits for.
const BATCHES: [u32; 2] = [generator::BATCH, 8];

/// Flips as long as the generator sends, with batches of each size.
pub fn measure(effort: &Effort, interrupted: &AtomicBool) -> Result<Vec<Packets>> {
    let mut stand = Stand::usual(MAX_FLOWS)?;
    stand.free_far_ends();
    let end = |place| FarEnd::attach(&stand.lab().enter(place)?, "eth0", effort.frames);
    let mut ends = [end(Place::Blue)?, end(Place::Green)?];
    stand.feed(Kind::First, STRANGER_FLOWS)?;
    BATCHES
        .into_iter()
        .map(|batch| {
            eprintln!("bench: flips, under packet load, batches of {batch}");
            stand.set_batch(Side::Clients, batch);
            of_batch(batch, &stand, &mut ends, effort, interrupted)
        })
        .collect()
}

fn of_batch(
    batch: u32,
    stand: &Stand,
    ends: &mut [FarEnd; 2],
    effort: &Effort,
    interrupted: &AtomicBool,
) -> Result<Packets> {
    let mut seen = Seen::default();
    let mut glass = Glass {
        flips: 0,
        bins: vec![[0; 2]; 2 * GLASS_US as usize],
    };
    let mut rates = Vec::new();
    for _ in 0..effort.rounds.min(3) {
        ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
        stand.run(Side::Clients, STRANGERS_BEFORE)?;
        for (end, servers) in ends.iter_mut().zip(SERVERS) {
            end.expect(servers[0], PORT, true)?;
        }
        let before = stand.reasons()?;
        let (stores, took) = flip_under_load(stand, effort.frames)?;
        let new = Reason::ForwardedNew as usize;
        let new = stand.reasons()?[new] - before[new];
        let arrived = ends[0].arrived()? + ends[1].arrived()?;
        ensure!(
            new * 1000 >= arrived * INTENDED,
            "{new} of {arrived} packets were new flows"
        );
        rates.push(arrived as f64 / took.as_secs_f64() / 1e6);
        let times = [ends[0].times()?, ends[1].times()?];
        look(&stores, &times, &mut seen, &mut glass);
    }
    ensure!(!seen.first.is_empty(), "no flip was seen");
    Ok(Packets {
        batch,
        mpps: crate::report::Figure::of(&rates),
        flips: glass.flips,
        stamped_us: Quantiles::of(&seen.stamped),
        first_us: Quantiles::of(&seen.first),
        last_us: Quantiles::of(&seen.last),
        glass,
    })
}

/// Sends, and stores the word over and over meanwhile, from another CPU.
fn flip_under_load(stand: &Stand, frames: u32) -> Result<(Vec<Store>, Duration)> {
    let (words, service) = stand.lab().words()?;
    let sent = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flipper = scope.spawn(|| -> Result<Vec<Store>> {
            pin(0)?;
            let mut stores: Vec<Store> = Vec::new();
            let mut word = words.word(service);
            while !sent.load(Ordering::Relaxed) {
                std::thread::sleep(PAUSE);
                let stamp = words.first_flow(service);
                if let Some(last) = stores.last_mut()
                    && stamp.generation() == word.generation()
                {
                    last.stamped = Some(stamp.ns_since(last.at));
                }
                let next = word.flipped(word.active().other(), false);
                let stored = words.store(service, word, next)?;
                stores.push(Store {
                    at: stored.at_ns,
                    to: next.active(),
                    stamped: None,
                });
                word = next;
            }
            Ok(stores)
        });
        let took = stand.run(Side::Clients, frames);
        sent.store(true, Ordering::Relaxed);
        let stores = flipper
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((stores, took?))
    })
}

/// For each store: microseconds to the first packet at the new colour, and to the
/// last at the old one, before the next store.
fn look(stores: &[Store], times: &[Vec<u64>; 2], seen: &mut Seen, glass: &mut Glass) {
    let from = |colour: Colour, at: u64| {
        let times = &times[colour as usize];
        &times[times.partition_point(|time| *time < at)..]
    };
    for (store, next) in stores.iter().zip(stores.iter().skip(1)) {
        let Some(came) = from(store.to, store.at)
            .first()
            .filter(|time| **time < next.at)
        else {
            continue; // the generator had not begun, or was at its end
        };
        let strays = from(store.to.other(), store.at);
        let strays = &strays[..strays.partition_point(|time| *time < next.at)];
        seen.stamped.extend(store.stamped.map(|ns| ns as f64 / 1e3));
        seen.first.push((came - store.at) as f64 / 1e3);
        seen.last
            .push(strays.last().map_or(0, |time| time - store.at) as f64 / 1e3);
        glass.add(store.at, |at| {
            [from(store.to.other(), at), from(store.to, at)]
        });
    }
}

impl Glass {
    fn add<'a>(&mut self, store: u64, from: impl Fn(u64) -> [&'a [u64]; 2]) {
        let begin = store - GLASS_US as u64 * 1000;
        self.flips += 1;
        for (side, times) in from(begin).into_iter().enumerate() {
            for time in times {
                let Some(bin) = self.bins.get_mut(((time - begin) / 1000) as usize) else {
                    break;
                };
                bin[side] += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flip_is_seen_by_what_arrives_between_its_store_and_the_next() {
        let store = |at, to| Store {
            at,
            to,
            stamped: None,
        };
        let stores = [
            store(1_000_000, Colour::Green),
            store(2_000_000, Colour::Blue),
            store(3_000_000, Colour::Green),
        ];
        let blue = vec![999_000, 1_007_000, 2_004_000];
        let green = vec![1_005_000, 1_900_000];
        let mut seen = Seen::default();
        let mut glass = Glass {
            flips: 0,
            bins: vec![[0; 2]; 2 * GLASS_US as usize],
        };
        look(&stores, &[blue, green], &mut seen, &mut glass);
        assert_eq!(seen.first, [5.0, 4.0]);
        assert_eq!(seen.last, [7.0, 0.0]);
        let around: Vec<_> = (-2..8)
            .map(|us| glass.bins[(GLASS_US + us) as usize])
            .collect();
        assert_eq!(around[1], [1, 0]);
        assert_eq!(around[7], [0, 1]);
        assert_eq!(around[9], [1, 0]);
    }
}
