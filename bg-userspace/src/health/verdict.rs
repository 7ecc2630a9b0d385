//! From single probes to a verdict: never by one sample. No clock, no socket: outcomes
//! and times come in, changes go out.

use std::fmt;

/// How many probes in a row it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Good ones, to be healthy; at least 1.
    pub rise: u32,
    /// Bad ones, to be unhealthy; at least 1.
    pub fall: u32,
}

/// What is known of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too few probes in a row agree since they began.
    Unknown,
    /// It answers as it should.
    Healthy,
    /// It does not.
    Unhealthy,
}

impl Verdict {
    /// `null`, `true` or `false` in JSON.
    pub const fn is_healthy(self) -> Option<bool> {
        match self {
            Self::Unknown => None,
            Self::Healthy => Some(true),
            Self::Unhealthy => Some(false),
        }
    }
}

/// What a probe found: nothing to complain of, or the trouble.
pub type Outcome = Result<(), Trouble>;

/// Why a probe is not good, in a few words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The backend's, or the way's to it.
    Theirs(String),
    /// The gateway's own: it could not ask, and knows nothing of the backend.
    Ours(String),
}

impl Trouble {
    /// The same trouble in other words.
    #[must_use]
    pub fn told(self, tell: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::Theirs(text) => Self::Theirs(tell(text)),
            Self::Ours(text) => Self::Ours(tell(text)),
        }
    }
}

impl From<String> for Trouble {
    fn from(text: String) -> Self {
        Self::Theirs(text)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Theirs(text) | Self::Ours(text)) = self;
        f.write_str(text)
    }
}

/// Weighs the probes of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judge {
    rules: Rules,
    verdict: Verdict,
    since_ns: u64,
    last: Option<Result<(), String>>,
    /// How many probes in a row were as good or bad as the last one.
    run: u32,
    /// Why it could not be asked, and how often in a row, if that is so.
    unasked: Option<(String, u32)>,
}

/// A verdict that was overturned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overturned {
    /// What it was.
    pub from: Verdict,
    /// Since when, as [`Judge::since_ns`].
    pub from_ns: u64,
    /// What it is.
    pub to: Verdict,
}

impl Judge {
    /// Nothing is known yet, from `now_ns` on.
    pub const fn new(rules: Rules, now_ns: u64) -> Self {
        Self {
            rules,
            verdict: Verdict::Unknown,
            since_ns: now_ns,
            last: None,
            run: 0,
            unasked: None,
        }
    }

    /// Takes a probe's outcome in, at `now_ns` of the same clock. The gateway's own trouble
    /// is no probe: it is told, and overturns nothing.
    pub fn sample(&mut self, now_ns: u64, outcome: Outcome) -> Option<Overturned> {
        let outcome = match outcome {
            Ok(()) => Ok(()),
            Err(Trouble::Theirs(text)) => Err(text),
            Err(Trouble::Ours(text)) => {
                let times = self.unasked.take().map_or(0, |(_, times)| times);
                self.unasked = Some((text, times.saturating_add(1)));
                return None;
            }
        };
        self.unasked = None;
        let good = outcome.is_ok();
        let goes_on = matches!(&self.last, Some(last) if last.is_ok() == good);
        self.run = if goes_on {
            self.run.saturating_add(1)
        } else {
            1
        };
        self.last = Some(outcome);
        let (to, needed) = if good {
            (Verdict::Healthy, self.rules.rise)
        } else {
            (Verdict::Unhealthy, self.rules.fall)
        };
        if self.verdict == to || self.run < needed {
            return None;
        }
        let overturned = Overturned {
            from: self.verdict,
            from_ns: self.since_ns,
            to,
        };
        (self.verdict, self.since_ns) = (to, now_ns);
        Some(overturned)
    }

    /// The verdict.
    pub const fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// False when so many probes in a row could not be made that the verdict says nothing
    /// of now.
    pub fn is_asked(&self) -> bool {
        let unasked = self.unasked.as_ref().map_or(0, |(_, times)| *times);
        unasked < self.rules.fall
    }

    /// When it was reached; for `Unknown`, when probes began.
    pub const fn since_ns(&self) -> u64 {
        self.since_ns
    }

    /// Why it is no other verdict than this, and how near the other one is; `None`
    /// when there is nothing to say but that it is healthy.
    pub fn why(&self) -> Option<String> {
        if let Some((trouble, _)) = &self.unasked {
            return Some(format!("cannot be probed: {trouble}"));
        }
        let Rules { rise, fall } = self.rules;
        let run = self.run;
        match (self.verdict, &self.last) {
            (Verdict::Healthy, Some(Ok(())) | None) => None,
            (Verdict::Unhealthy, Some(Err(trouble))) => Some(trouble.clone()),
            (_, Some(Err(trouble))) => Some(format!("{trouble} ({run} of {fall} probes)")),
            (Verdict::Unhealthy, Some(Ok(()))) => {
                Some(format!("answers again ({run} of {rise} probes)"))
            }
            (_, Some(Ok(()))) => Some(format!("answers ({run} of {rise} probes)")),
            (_, None) => Some("not probed yet".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { rise: 2, fall: 3 };

    /// Good and bad probes as `+` and `-`; the verdict after each as `?`, `h`, `u`.
    fn verdicts(probes: &str) -> String {
        let mut judge = Judge::new(RULES, 0);
        let verdict = |(at, probe): (usize, char)| {
            let outcome = match probe {
                '+' => Ok(()),
                'o' => Err(Trouble::Ours("no file descriptor".to_owned())),
                _ => Err("refused".to_owned().into()),
            };
            let before = judge.verdict();
            let overturned = judge.sample(at as u64, outcome);
            assert_eq!(overturned.is_some(), before != judge.verdict());
            match judge.verdict() {
                Verdict::Unknown => '?',
                Verdict::Healthy => 'h',
                Verdict::Unhealthy => 'u',
            }
        };
        probes.chars().enumerate().map(verdict).collect()
    }

    #[test]
    fn it_takes_several_probes_in_a_row() {
        for (probes, expected) in [
            ("+-+-+-", "??????"),
            ("++", "?h"),
            ("---", "??u"),
            ("++--+--+---", "?hhhhhhhhhu"),
            ("---+-+-++", "??uuuuuuh"),
            // The gateway's own trouble says nothing, and interrupts nothing.
            ("oooo", "????"),
            ("++ooooo-o-o-", "?hhhhhhhhhhu"),
            ("--o-o+o+", "???uuuuh"),
        ] {
            assert_eq!(verdicts(probes), expected, "{probes}");
        }
    }

    #[test]
    fn a_verdict_of_whom_nobody_could_ask_is_old() {
        let mut judge = Judge::new(RULES, 0);
        let unable = || Err(Trouble::Ours("too many open files".to_owned()));
        let _ = [Ok(()), Ok(()), unable(), unable()].map(|outcome| judge.sample(0, outcome));
        assert!(judge.is_asked());
        judge.sample(0, unable());
        assert_eq!(judge.verdict(), Verdict::Healthy);
        assert!(!judge.is_asked());
        let why = judge.why().unwrap();
        assert_eq!(why, "cannot be probed: too many open files");
        judge.sample(0, Ok(()));
        assert!(judge.is_asked() && judge.why().is_none());
    }

    #[test]
    fn it_says_why_and_since_when() {
        let bad = || Err("connection refused".to_owned().into());
        let mut judge = Judge::new(RULES, 5);
        let why = |judge: &Judge| judge.why().unwrap_or_default();
        assert_eq!(why(&judge), "not probed yet");
        judge.sample(10, Ok(()));
        assert_eq!(why(&judge), "answers (1 of 2 probes)");
        assert_eq!(
            judge.sample(20, Ok(())),
            Some(Overturned {
                from: Verdict::Unknown,
                from_ns: 5,
                to: Verdict::Healthy
            })
        );
        assert_eq!((judge.since_ns(), judge.why()), (20, None));
        judge.sample(30, bad());
        assert_eq!(why(&judge), "connection refused (1 of 3 probes)");
        judge.sample(40, bad());
        judge.sample(50, bad());
        assert_eq!(
            (judge.since_ns(), judge.verdict()),
            (50, Verdict::Unhealthy)
        );
        judge.sample(60, bad());
        assert_eq!(why(&judge), "connection refused");
        judge.sample(70, Ok(()));
        assert_eq!(why(&judge), "answers again (1 of 2 probes)");
        assert_eq!(judge.since_ns(), 50);
    }

    /// Whatever the probes: a verdict is overturned only by as many in a row as the
    /// rules say, and then it is.
    #[test]
    fn a_verdict_is_the_last_long_run() {
        for length in 1..=10 {
            for bits in 0..1u32 << length {
                let good = |at: usize| bits >> at & 1 == 1;
                let probes = (0..length).map(|at| if good(at) { '+' } else { '-' });
                let last = verdicts(&probes.collect::<String>()).chars().last();
                let run = |at: usize, count: usize| {
                    at + 1 >= count && (at + 1 - count..=at).all(|one| good(one) == good(at))
                };
                let decided = (0..length).rev().find(|at| {
                    let count = if good(*at) { RULES.rise } else { RULES.fall };
                    run(*at, count as usize)
                });
                let expected = decided.map_or('?', |at| if good(at) { 'h' } else { 'u' });
                assert_eq!(last, Some(expected), "{bits:b} of {length}");
            }
        }
    }
}
