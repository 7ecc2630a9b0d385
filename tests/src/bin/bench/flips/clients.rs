//! What HTTP clients see of flips: of a hundred of ours, and of the peers'.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use bg_common::service::Colour;
use bg_tests::{
    flipper::Flipper,
    lab::{Place, listener},
    load::{Answer, Load, Reuse, now_ns},
};

use super::{
    everywhere,
    report::{By, Peer as Row, Quantiles, UnderLoad},
};
use crate::{
    Effort,
    gateway::{Gateway, PORT, Peer},
};

/// Connections at once, of ours.
const CONNECTIONS: usize = 1000;
/// Between two requests of one client, and so about 5 000 requests a second.
const PAUSE: Duration = Duration::from_millis(200);
/// A flip, seen from outside.
struct Flip {
    /// `CLOCK_MONOTONIC`, ns: when its command began, ...
    begun: u64,
    /// ... and when it had ended.
    done: u64,
    to: Colour,
}

/// A hundred flips in ten seconds, with 1 000 connections that are kept, or that are
/// made anew for each request, by the command; as many by the store alone; and as
/// long without flips, half before, half after.
pub fn ours(effort: &Effort, interrupted: &AtomicBool) -> Result<Vec<UnderLoad>> {
    let flips = if effort.quick { 20 } else { 100 };
    let every = Duration::from_millis(100);
    let mut lines = Vec::new();
    for reuse in [Reuse::KeepAlive, Reuse::Never] {
        eprintln!("bench: flips, {CONNECTIONS} connections, {reuse:?}");
        let gateway = Gateway::new(Peer::Bgswitch, &everywhere()?, &everywhere()?)?;
        let clients = vec![(listener(PORT), reuse); CONNECTIONS];
        let load = Load::start(gateway.lab().enter(Place::Client)?, clients, PAUSE);
        // Everybody has connected.
        load.advance(2 * CONNECTIONS);
        let half = every * flips / 2;
        let begun = now_ns();
        pause(half, interrupted)?;
        let commands = now_ns();
        let seen = flip(&gateway, flips, every, interrupted)?;
        let stores = now_ns();
        let (words, service) = gateway.lab().words()?;
        let flipper = Flipper::start(words, service, Some(every));
        pause(every * flips, interrupted)?;
        let story = flipper.finish();
        let end = now_ns();
        pause(half, interrupted)?;
        let answers = load.finish()?;
        let between = |from: u64, to: u64| -> Vec<&Answer> {
            let mut between = answers.iter().collect::<Vec<_>>();
            between.retain(|answer| (from..to).contains(&answer.done_ns));
            between
        };
        let mut calm = between(begun, commands);
        calm.extend(between(end, u64::MAX));
        let gone_wrong = answers.iter().filter(|answer| {
            let known = answer.first && answer.connected_ns >= stores;
            known
                && answer
                    .result
                    .as_ref()
                    .is_ok_and(|colour| !story.allows(colour, answer.connected_ns, answer.done_ns))
        });
        let (by_store, strays) = (gone_wrong.count(), strays(&answers, &seen, stores).len());
        for (by, from, to, flips, strays) in [
            (By::Command, commands, stores, seen.len(), strays),
            (By::Store, stores, end, story.flips(), by_store),
        ] {
            lines.push(UnderLoad::new(
                by,
                reuse == Reuse::KeepAlive,
                CONNECTIONS,
                flips,
                &between(from, to),
                &calm,
                strays,
            ));
        }
    }
    Ok(lines)
}

/// The same flips by every peer: half of the clients keep their connections.
pub fn peers(effort: &Effort, interrupted: &AtomicBool) -> Result<Vec<Row>> {
    const CLIENTS: usize = 100;
    const PAUSE: Duration = Duration::from_millis(20);
    let flips = if effort.quick { 5 } else { 20 };
    let every = Duration::from_millis(250);
    let mut rows = Vec::new();
    for peer in Peer::ALL {
        eprintln!("bench: flips, {}", peer.flip());
        let gateway = Gateway::new(peer, &everywhere()?, &everywhere()?)?;
        let clients = (0..CLIENTS)
            .map(|n| (listener(PORT), [Reuse::KeepAlive, Reuse::Never][n % 2]))
            .collect();
        let load = Load::start(gateway.lab().enter(Place::Client)?, clients, PAUSE);
        load.advance(2 * CLIENTS);
        let before = gateway.processes()?.len();
        let seen = flip(&gateway, flips, every, interrupted)?;
        let more = gateway.processes()?.len().saturating_sub(before);
        let answers = load.finish()?;
        let command: Vec<f64> = seen
            .iter()
            .map(|flip| (flip.done - flip.begun) as f64 / 1e6)
            .collect();
        let failed = answers.iter().filter(|answer| answer.result.is_err());
        let stray = strays(&answers, &seen, u64::MAX);
        rows.push(Row {
            of: peer,
            flips: seen.len(),
            command_ms: Quantiles::of(&command),
            requests: answers.len(),
            failed: failed.count(),
            why: answers
                .iter()
                .find_map(|answer| answer.result.as_ref().err().cloned()),
            strays: stray.len(),
            last_stray_ms: stray.iter().copied().fold(0.0, f64::max),
            kept: kept(&answers, &seen),
            processes_left: more,
        });
    }
    Ok(rows)
}

/// Flips, as regularly as it can.
fn flip(
    gateway: &Gateway,
    flips: u32,
    every: Duration,
    interrupted: &AtomicBool,
) -> Result<Vec<Flip>> {
    let mut seen = Vec::new();
    let mut to = Colour::Green;
    let start = Instant::now();
    for number in 0..flips {
        let due = every * number;
        pause(due.saturating_sub(start.elapsed()), interrupted)?;
        let begun = now_ns();
        gateway.flip(to)?;
        seen.push(Flip {
            begun,
            done: now_ns(),
            to,
        });
        to = to.other();
    }
    pause((every * flips).saturating_sub(start.elapsed()), interrupted)?;
    Ok(seen)
}

fn pause(length: Duration, interrupted: &AtomicBool) -> Result<()> {
    ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
    std::thread::sleep(length);
    Ok(())
}

/// New connections that were begun after a flip's command had ended, were answered
/// before the next began (or before `end`), and all the same by the colour that was
/// left: how long after the command, milliseconds.
fn strays(answers: &[Answer], flips: &[Flip], end: u64) -> Vec<f64> {
    let mut found = Vec::new();
    for (number, flip) in flips.iter().enumerate() {
        let next = flips.get(number + 1).map_or(end, |next| next.begun);
        let old = flip.to.other().as_str();
        found.extend(
            answers
                .iter()
                .filter(|answer| {
                    answer.first && answer.connected_ns > flip.done && answer.done_ns < next
                })
                .filter(|answer| answer.result.as_ref().is_ok_and(|colour| colour == old))
                .map(|answer| (answer.connected_ns - flip.done) as f64 / 1e6),
        );
    }
    found
}

/// Requests on kept connections after the first flip that the first colour answered,
/// in parts of all of them.
fn kept(answers: &[Answer], flips: &[Flip]) -> f64 {
    let after = flips.first().map_or(0, |flip| flip.done);
    let (mut old, mut all) = (0, 0);
    for answer in answers
        .iter()
        .filter(|answer| !answer.first && answer.done_ns > after && answer.connected_ns < after)
    {
        all += 1;
        old += u32::from(answer.result.as_ref().is_ok_and(|colour| colour == "blue"));
    }
    f64::from(old) / f64::from(all)
}
