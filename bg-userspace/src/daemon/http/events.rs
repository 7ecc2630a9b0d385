//! `GET /v1/events`: server-sent events (WHATWG HTML, 9.2).

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::{Query, State, rejection::QueryRejection},
    http::HeaderMap,
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};

use crate::{
    api::{MonitorLine, Refusal},
    daemon::{
        Daemon,
        events::Heard,
        requests::{EventsQuery, query},
    },
};

/// How often a listener hears at least a comment.
const ALIVE: Duration = Duration::from_secs(15);

pub(super) async fn events(
    State(daemon): State<Arc<Daemon>>,
    headers: HeaderMap,
    asked: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let EventsQuery { service } = query(asked)?;
    if let Some(name) = &service
        && daemon.datapath.service_id(name).is_none()
    {
        return Err(daemon.unknown(name));
    }
    let last = headers.get("last-event-id");
    let last = last.map(|id| id.to_str().unwrap_or_default());
    let ear = daemon.listen(service, last)?;
    let events = futures_util::stream::unfold(ear, |mut ear| async move {
        let heard = ear.next().await?;
        Some((Ok::<_, Infallible>(told(heard)), ear))
    });
    let alive = KeepAlive::new().interval(ALIVE);
    Ok(Sse::new(events).keep_alive(alive).into_response())
}

/// An event as it is sent: its data is the line that `bgswitch monitor` has.
fn told(heard: Heard) -> Event {
    let (id, name, data) = match heard {
        Heard::Event(id, event) => {
            let line = MonitorLine::Event((*event).clone());
            (id, event.event.clone(), serde_json::to_string(&line))
        }
        Heard::Lost(id, lost) => (id, "lost".to_owned(), serde_json::to_string(&lost)),
    };
    let event = Event::default().id(id).event(name);
    event.data(data.unwrap_or_default())
}
