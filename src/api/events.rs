//! What happens to a job: as a list that can wait for news, and as a stream.

use std::{convert::Infallible, time::Duration};

use axum::{
    Json,
    extract::State,
    http::HeaderMap,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use chrono::{DateTime, Utc};
use futures_util::Stream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::Caller,
    error::{ApiError, ApiResult},
    extract::{Path, Query},
    jobs::{self, JobProgress},
    page::Limit,
    responses::{CallerErrors, NotFoundError, QueryErrors},
};
use crate::{
    db::{
        events::{self, EventRow},
        jobs::JobRow,
    },
    domain::{ids::JobId, job::EventType},
};

/// How often a stream or a long poll looks for events that nobody told it of.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Events that are read from the database at once.
const BATCH: i64 = 200;
const MAX_WAIT_S: i64 = 30;

/// Something that happened to a job.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobEvent {
    /// From 1, without gaps.
    seq: i64,
    at: DateTime<Utc>,
    #[serde(rename = "type")]
    kind: EventType,
    /// The attempt that it happened in; null for what a user did.
    lease_epoch: Option<i64>,
    message: String,
    /// What belongs to this type of event.
    #[schema(value_type = Object)]
    data: Value,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct JobEventPage {
    data: Vec<JobEvent>,
    /// To be given as `after` for what comes next: the last `seq`, or what was given if there was nothing.
    next_cursor: i64,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListJobEventsQuery {
    /// Only events with a higher `seq`; 0 by default.
    #[param(minimum = 0, required = false)]
    after: i64,
    /// How many at most; 50 by default.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 500)]
    limit: Limit,
    /// How long to wait for an event if there is none; 0 by default.
    #[param(minimum = 0, maximum = 30, required = false)]
    wait_s: i64,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct StreamJobEventsQuery {
    /// Only events with a higher `seq`; the header `Last-Event-ID` counts before it.
    #[param(minimum = 0, required = false)]
    after: i64,
}

impl From<EventRow> for JobEvent {
    fn from(row: EventRow) -> Self {
        Self {
            seq: row.seq,
            at: row.at,
            kind: row.kind,
            lease_epoch: row.lease_epoch,
            message: row.message,
            data: row.data,
        }
    }
}

/// List a job's events
///
/// In order. With `wait_s` the answer waits for an event if there is none after `after` yet.
#[utoipa::path(get, path = "/v1/jobs/{job_id}/events", tag = "jobs",
    params(("job_id" = String, Path), ListJobEventsQuery),
    responses((status = 200, description = "Events", body = JobEventPage), CallerErrors, NotFoundError, QueryErrors))]
pub async fn list_job_events(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
    Query(query): Query<ListJobEventsQuery>,
) -> ApiResult<Json<JobEventPage>> {
    if query.after < 0 || !(0..=MAX_WAIT_S).contains(&query.wait_s) {
        return Err(ApiError::InvalidQuery(format!("after must be 0 or more, wait_s from 0 to {MAX_WAIT_S}")));
    }
    jobs::find(&state, &caller, &id).await?;

    let give_up = Instant::now() + Duration::from_secs(query.wait_s.unsigned_abs());
    let mut changes = state.changes.subscribe();
    loop {
        let rows = events::list(&state.pool, &caller.project, &id, query.after, query.limit.get()).await?;
        if !rows.is_empty() || Instant::now() >= give_up || state.shutdown.is_triggered() {
            let next_cursor = rows.last().map_or(query.after, |row| row.seq);
            return Ok(Json(JobEventPage { data: rows.into_iter().map(JobEvent::from).collect(), next_cursor }));
        }
        tokio::select! {
            () = changes.wait(id.as_str(), LOOK_EVERY) => {}
            () = tokio::time::sleep_until(give_up) => {}
            () = state.shutdown.wait() => {}
        }
    }
}

/// Stream a job's events
///
/// Server-sent events. Each event of the job has its `seq` as id, its type as name and a JobEvent as
/// data: first those after `Last-Event-ID`, then new ones as they happen. Between them come `progress`
/// events with a JobProgress and no id. After the last event of a finished job comes `end`.
#[utoipa::path(get, path = "/v1/jobs/{job_id}/events/stream", tag = "jobs",
    params(("job_id" = String, Path), StreamJobEventsQuery,
        ("Last-Event-ID" = Option<i64>, Header, description = "The id of the last event that was received")),
    responses((status = 200, description = "The stream", content_type = "text/event-stream"),
        CallerErrors, NotFoundError, QueryErrors))]
pub async fn stream_job_events(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
    Query(query): Query<StreamJobEventsQuery>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let after = match headers.get("last-event-id") {
        None => query.after,
        Some(value) => value
            .to_str()
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or(ApiError::InvalidHeader { name: "Last-Event-ID", reason: "it must be the id of an event" })?,
    };
    jobs::find(&state, &caller, &id).await?;

    let keep_alive = KeepAlive::new().interval(Duration::from_secs(10)).text("alive");
    Ok(Sse::new(follow(state, caller, id, after)).keep_alive(keep_alive).into_response())
}

/// Everything after `after`, until the job is over or the server stops. An error ends the stream: the
/// client comes back with the id of the last event that it has.
fn follow(
    state: AppState,
    caller: Caller,
    id: JobId,
    mut after: i64,
) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    async_stream::stream! {
        yield Ok(Event::default().retry(Duration::from_secs(1)));
        let mut changes = state.changes.subscribe();
        let mut progress = None;
        while let Ok((rows, job)) = look(&state, &caller, &id, after).await {
            for row in rows {
                after = row.seq;
                yield Ok(job_event(row));
            }
            if after < job.last_event_seq {
                continue;
            }
            let now = JobProgress::of(&job);
            if progress.as_ref() != Some(&now) {
                yield Ok(Event::default().event("progress").data(json!(now).to_string()));
                progress = Some(now);
            }
            if job.state.is_final() {
                yield Ok(Event::default().event("end").data(json!({"state": job.state}).to_string()));
                break;
            }
            if state.shutdown.run_until(changes.wait(id.as_str(), LOOK_EVERY)).await.is_none() {
                break;
            }
        }
    }
}

/// The job, and its events after `after`: all that it had then, or as many as are read at once.
async fn look(state: &AppState, caller: &Caller, id: &JobId, after: i64) -> ApiResult<(Vec<EventRow>, JobRow)> {
    let job = jobs::find(state, caller, id).await?;
    let rows = events::list(&state.pool, &caller.project, id, after, BATCH).await?;
    Ok((rows, job))
}

fn job_event(row: EventRow) -> Event {
    let event = Event::default().id(row.seq.to_string());
    let event_type = json!(row.kind);
    let event = event.event(event_type.as_str().unwrap_or_default());
    event.data(json!(JobEvent::from(row)).to_string())
}
