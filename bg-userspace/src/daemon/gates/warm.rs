//! `[service.NAME.warm]`: what each backend of the standby is asked before the gates,
//! so that its caches know what is asked.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Progress, Target, no_port,
    prompts::{Asking, Came, read},
    wire::Line,
};
use crate::{config::WarmGate, release::Verdict};

/// Asks each backend everything. One that answers nothing fails.
pub(super) async fn run(
    gate: &WarmGate,
    limit: Duration,
    target: &Target,
    progress: &Progress,
) -> (Verdict, String) {
    let deadline = Instant::now() + limit;
    let questions = match read(&gate.file, &gate.headers).await {
        Ok((_, questions)) => questions,
        Err(error) => return (Verdict::Inconclusive, error),
    };
    let Some(endpoints) = target.endpoints(gate.port) else {
        return no_port();
    };
    let lines: Vec<Line> = endpoints.into_iter().map(Line::to).collect();
    let asking = Asking {
        questions: &questions,
        at_a_time: gate.concurrency as usize,
        deadline,
        progress,
    };
    let rounds = (0..gate.repeat).flat_map(|_| 0..questions.len());
    let turns = rounds.flat_map(|of| (0..lines.len()).map(move |at| (of, at)));
    let look = |_, _, came: Came| Answered::from(came);
    let answered = asking.ask(&lines, turns.collect(), look).await;
    judge(&lines, &answered)
}

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answered {
    /// An answer with a status of success, after so long.
    Well(Duration),
    /// Another one, or none.
    Badly(String),
    /// Nobody asked.
    NotAsked,
}

impl From<Came> for Answered {
    fn from(came: Came) -> Self {
        match came {
            None => Self::NotAsked,
            Some(Err(trouble)) => Self::Badly(trouble.to_string()),
            Some(Ok(answer)) if answer.status.is_success() => Self::Well(answer.took),
            Some(Ok(answer)) => Self::Badly(format!("answered {}", answer.status.as_u16())),
        }
    }
}

/// Looks at what came of each backend; they were asked in turn.
fn judge(lines: &[Line], answered: &[Answered]) -> (Verdict, String) {
    let backends = lines.len().max(1);
    let mut verdict = Verdict::Pass;
    let mut told = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let of: Vec<&Answered> = answered.iter().skip(at).step_by(backends).collect();
        let (is, said) = of_one(&of);
        if is == Verdict::Fail || verdict == Verdict::Pass {
            verdict = is;
        }
        told.push(format!("{} {said}", line.endpoint));
    }
    if told.is_empty() {
        return (Verdict::Inconclusive, "there is no backend".to_owned());
    }
    (verdict, told.join("; "))
}

/// How many answers one has given, and how its pace has changed: the medians of the
/// first half and of the last.
fn of_one(answered: &[&Answered]) -> (Verdict, String) {
    let times = answered.iter().filter_map(|answered| match answered {
        Answered::Well(took) => Some(*took),
        Answered::Badly(_) | Answered::NotAsked => None,
    });
    let times: Vec<Duration> = times.collect();
    let mut troubles = answered.iter().filter_map(|answered| match answered {
        Answered::Badly(trouble) => Some(trouble.as_str()),
        Answered::Well(_) | Answered::NotAsked => None,
    });
    let mut said = format!("answered {} of {}", times.len(), answered.len());
    let trouble = troubles.next();
    if let Some(trouble) = trouble {
        said = format!("{said} (first: {trouble})");
    }
    if times.is_empty() {
        let nobody_asked = trouble.is_none();
        let verdict = if nobody_asked {
            Verdict::Inconclusive
        } else {
            Verdict::Fail
        };
        return (verdict, said);
    }
    let (first, last) = times.split_at(times.len() / 2);
    let ms = |times: &[Duration]| median(times).as_secs_f64() * 1000.0;
    if !first.is_empty() {
        said = format!(
            "{said}, p50 {:.1} ms at first, {:.1} ms at last",
            ms(first),
            ms(last)
        );
    }
    (Verdict::Pass, said)
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_that_answers_nothing_fails_and_one_that_nobody_asked_is_not_known() {
        use Answered::*;
        let lines = [1, 2].map(|port| Line::to(([10, 0, 0, 1], port).into()));
        let well = |ms| Well(Duration::from_millis(ms));
        let badly = || Badly("answered 503".to_owned());
        let (verdict, said) = judge(&lines, &[well(30), well(8), well(10), badly()]);
        assert_eq!(verdict, Verdict::Pass);
        assert_eq!(
            said,
            "10.0.0.1:1 answered 2 of 2, p50 30.0 ms at first, 10.0 ms at last; \
             10.0.0.1:2 answered 1 of 2 (first: answered 503)"
        );
        let (verdict, said) = judge(&lines, &[badly(), well(1), badly(), NotAsked]);
        assert_eq!(verdict, Verdict::Fail, "{said}");
        let (verdict, _) = judge(&lines, &[NotAsked, well(1), NotAsked, well(1)]);
        assert_eq!(verdict, Verdict::Inconclusive);
        let (verdict, _) = judge(&lines, &[NotAsked, badly(), NotAsked, badly()]);
        assert_eq!(verdict, Verdict::Fail);
        assert_eq!(judge(&[], &[]).0, Verdict::Inconclusive);
    }
}
