//! Asks a Prometheus server, over HTTP without TLS.

use std::time::Duration;

use tokio::time::timeout;

use super::{webhook::ask_at, wire::Question};
use crate::{
    config::PrometheusPlan,
    figures::{Sample, read},
    health::tidy_to,
    uri::escaped,
};

/// A longer answer is none.
const MAX_ANSWER: usize = 1 << 20;
/// So much of what went wrong is told.
const MAX_TROUBLE: usize = 300;

/// Asks once.
pub(in crate::daemon) async fn ask(plan: &PrometheusPlan, query: &str, limit: Duration) -> Sample {
    let (authority, path) = plan.parts();
    let path = format!("{path}/api/v1/query?query={}", escaped(query));
    let question = Question::new("GET", &path, [], None);
    let trouble = |text: String| Sample::Trouble(tidy_to(&text, MAX_TROUBLE));
    let Ok(answer) = timeout(limit, ask_at(&authority, question, MAX_ANSWER)).await else {
        let limit = humantime::format_duration(limit);
        return Sample::Trouble(format!("{authority} did not answer within {limit}"));
    };
    match answer {
        Err(error) => trouble(format!("{authority} {error}")),
        // Errors are told in the body, too.
        Ok(answer) => match read(&answer.body) {
            Sample::Trouble(error) => {
                let status = answer.status.as_u16();
                trouble(format!("{authority} answered {status}: {error}"))
            }
            sample => sample,
        },
    }
}
