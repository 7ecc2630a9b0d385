//! Flips without the daemon, as fast as they are asked for, and what the word
//! said when.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use bg_common::service::{Colour, CutoverWord};
use bg_userspace::datapath::PinnedWords;

/// Flips a service back and forth, all of it drain flips.
#[derive(Debug)]
pub struct Flipper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Story>,
}

impl Flipper {
    /// Starts, with a pause between flips.
    pub fn start(words: PinnedWords, service: u32, pause: Option<Duration>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut word = words.word(service);
            let mut story = Story::new(word);
            while !stopped.load(Ordering::Relaxed) {
                let next = word.flipped(word.active().other(), false);
                let stored = words
                    .store(service, word, next)
                    .expect("nobody else stores the word");
                story.add(next, stored.at_ns, stored.at_ns + stored.store_ns);
                word = next;
                if let Some(pause) = pause {
                    std::thread::sleep(pause);
                }
            }
            story
        });
        Self { stop, thread }
    }

    /// Stops, and tells what the word said.
    ///
    /// # Panics
    /// When somebody else stored the word.
    pub fn finish(self) -> Story {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// What the word said, from its first store to its last.
#[derive(Debug)]
pub struct Story {
    chapters: Vec<Chapter>,
}

#[derive(Debug)]
struct Chapter {
    colour: Colour,
    /// Nobody read it before this, `CLOCK_MONOTONIC` ns.
    from: u64,
    /// Nobody read it after this.
    until: u64,
}

impl Story {
    /// It said `word` ever since.
    pub fn new(word: CutoverWord) -> Self {
        let first = Chapter {
            colour: word.active(),
            from: 0,
            until: u64::MAX,
        };
        Self {
            chapters: vec![first],
        }
    }

    /// It was stored between two times.
    pub fn add(&mut self, word: CutoverWord, before: u64, after: u64) {
        if let Some(last) = self.chapters.last_mut() {
            last.until = after;
        }
        self.chapters.push(Chapter {
            colour: word.active(),
            from: before,
            until: u64::MAX,
        });
    }

    /// How often it was stored.
    pub fn flips(&self) -> usize {
        self.chapters.len() - 1
    }

    /// True when a packet between two times may have been sent to `colour`, by
    /// name.
    pub fn allows(&self, colour: &str, begun: u64, done: u64) -> bool {
        self.between(begun, done).any(|c| c.as_str() == colour)
    }

    /// The one colour that packets between two times were sent to, if it was one.
    pub fn only(&self, begun: u64, done: u64) -> Option<Colour> {
        let mut colours = self.between(begun, done);
        let first = colours.next()?;
        colours.all(|colour| colour == first).then_some(first)
    }

    fn between(&self, begun: u64, done: u64) -> impl Iterator<Item = Colour> {
        let first = self.chapters.partition_point(|c| c.until < begun);
        self.chapters[first..]
            .iter()
            .take_while(move |chapter| chapter.from <= done)
            .map(|chapter| chapter.colour)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_knows_what_it_does_not_know() {
        let blue = CutoverWord::new(Colour::Blue);
        let mut story = Story::new(blue);
        story.add(blue.flipped(Colour::Green, false), 100, 110);
        assert_eq!(story.only(0, 99), Some(Colour::Blue));
        assert_eq!(story.only(111, 200), Some(Colour::Green));
        for (begun, done) in [(90, 100), (105, 105), (110, 200)] {
            assert_eq!(story.only(begun, done), None);
            assert!(story.allows("blue", begun, done) && story.allows("green", begun, done));
        }
        assert!(!story.allows("green", 0, 99) && !story.allows("blue", 111, 112));
    }
}
