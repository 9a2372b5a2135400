//! Training jobs: submitted and looked at.

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::Caller,
    error::{ApiError, ApiResult},
    extract::{JsonBody, Path, Query},
    page::{Cursor, Limit},
    responses::{BodyErrors, CallerErrors, NotFoundError, QueryErrors},
};
use crate::{
    db::{
        imports,
        jobs::{self, JobRow},
        tokenizations, workers,
    },
    domain::{
        ids::{JobId, ProjectId},
        job::{Failure, JobState, WaitReason},
        offer,
        problem::Problem,
        schedule::Schedule,
        spec::{Choices, DataFacts, InitFacts, TrainSpec, TrainSpecRequest},
    },
    storage::Key,
};

/// A training job.
#[derive(Debug, Serialize, ToSchema)]
pub struct Job {
    id: JobId,
    name: String,
    state: JobState,
    /// Why a queued or paused job is not running; null for others.
    wait_reason: Option<WaitReason>,
    /// 1 for the queued job that is next; null for others.
    queue_position: Option<i64>,
    /// As it was submitted, with every default filled in.
    spec: TrainSpec,
    /// What its first attempt chose where the spec says `auto`; null before that.
    choices: Option<Choices>,
    /// What the spec asks for that cannot gain, or is a likely mistake.
    warnings: Vec<String>,
    failure: Option<Failure>,
    progress: JobProgress,
    /// Bytes of everything that it has in the store: bases, restarts, checkpoints and states.
    stored_bytes: i64,
    /// How often the job was taken up.
    lease_epoch: i64,
    /// Whether the result is to the bit that of a run without interruption; false once an attempt went on where the same
    /// work gives other bits.
    exact: bool,
    /// Of a queued job, when it may start: later than now where an attempt has just failed.
    eligible_at: Option<DateTime<Utc>>,
    created_at: DateTime<Utc>,
    started_at: Option<DateTime<Utc>>,
    finished_at: Option<DateTime<Utc>>,
}

/// How far a job is.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct JobProgress {
    /// Updates done.
    step: i64,
    num_steps: i64,
    /// Of the last update.
    loss: Option<f64>,
    learning_rate: Option<f64>,
    tokens_per_s: Option<f64>,
    /// Tokens read since the start of the job.
    num_tokens: i64,
    num_restarts: i64,
    /// Restarts in the whole run.
    total_restarts: i64,
    /// Seconds left at the measured rate, while the job runs.
    eta_s: Option<f64>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct JobPage {
    data: Vec<Job>,
    /// To be given as `cursor` for the next page; null on the last one.
    next_cursor: Option<String>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListJobsQuery {
    /// Only those in this state.
    #[param(required = false)]
    state: Option<JobState>,
    /// How many to a page; 50 by default.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 500)]
    limit: Limit,
    /// The `next_cursor` of the page before.
    #[param(value_type = String, required = false)]
    cursor: Option<Cursor>,
}

impl JobProgress {
    pub fn of(row: &JobRow) -> Self {
        let spec = &row.spec.0;
        let (step, num_steps) = (row.step.unwrap_or(0), spec.schedule.num_steps);
        let left_tokens = (num_steps - step).max(0) * spec.batch.num_seqs * spec.batch.sequence_length;
        let rate = row.tokens_per_s.filter(|&rate| row.state == JobState::Running && rate > 0.0);
        Self {
            step,
            num_steps,
            loss: row.loss,
            learning_rate: row.learning_rate,
            tokens_per_s: row.tokens_per_s,
            num_tokens: row.num_tokens.unwrap_or(0),
            num_restarts: row.num_restarts.unwrap_or(0),
            total_restarts: Schedule::new(spec).num_restarts(),
            eta_s: rate.map(|rate| left_tokens as f64 / rate),
        }
    }
}

impl From<JobRow> for Job {
    fn from(row: JobRow) -> Self {
        Self {
            progress: JobProgress::of(&row),
            id: row.id,
            name: row.name,
            state: row.state,
            wait_reason: row.wait_reason,
            queue_position: row.queue_position,
            spec: row.spec.0,
            choices: row.choices.map(|choices| choices.0),
            warnings: row.warnings,
            failure: row.failure.map(|failure| failure.0),
            stored_bytes: row.stored_bytes,
            lease_epoch: row.lease_epoch,
            exact: row.is_exact,
            eligible_at: (row.state == JobState::Queued).then_some(row.eligible_at),
            created_at: row.created_at,
            started_at: row.started_at,
            finished_at: row.finished_at,
        }
    }
}

/// Submit a job
///
/// Every mistake in the spec is reported at once, and nothing is queued then.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", request_body = TrainSpecRequest,
    responses((status = 201, description = "The job, queued, with its spec as it will be run", body = Job),
        CallerErrors, BodyErrors))]
pub async fn create_job(
    caller: Caller,
    State(state): State<AppState>,
    body: JsonBody,
) -> ApiResult<(StatusCode, Json<Job>)> {
    let job = submit(&state, &caller, body.0).await?;
    Ok((StatusCode::CREATED, Json(job)))
}

/// Checks a spec and queues a job with it.
pub(super) async fn submit(state: &AppState, caller: &Caller, spec: Value) -> ApiResult<Job> {
    let (mut request, mut problems) = TrainSpecRequest::parse(spec);
    let mut tx = state.pool.begin().await?;
    let facts = find_facts(&mut tx, &caller.project, &request, &mut problems).await?;
    let init = find_init(&mut tx, &caller.project, &request, &mut problems).await?;
    if let Some(init) = &init {
        problems.extend(request.begin_with(init, facts.as_ref()));
    }

    let normalised = request.normalise(facts.as_ref());
    let (spec, mut warnings) = match normalised {
        Ok(normalised) if problems.is_empty() => normalised,
        Ok(_) => return Err(ApiError::InvalidSpec(problems)),
        Err(more) => return Err(ApiError::InvalidSpec(merge(problems, more))),
    };
    if let Some(init) = &init {
        let tokenizer = tokenizations::find_tokenizer_sha256(&mut tx, &caller.project, &spec.tokenization).await?;
        warnings.extend(init.tokenizer_warning(tokenizer.as_deref()));
    }
    let offers = workers::offers(&mut tx, &spec.resources).await?;
    if let Some(problem) = offer::memory_problem(&spec, &offers) {
        return Err(ApiError::InvalidSpec(vec![problem]));
    }
    warnings.extend(offer::bf16_warning(&spec, &offers).map(|warning| format!("/precision: {warning}")));

    let id = jobs::create(&mut tx, &caller.project, &spec, &warnings).await?;
    tx.commit().await?;
    tracing::info!(job.id = %id, project.id = %caller.project, "job queued");
    Ok(find(state, caller, &id).await?.into())
}

/// What is known of the data that a spec names. Data that does not exist is one of the spec's problems.
async fn find_facts(
    connection: &mut PgConnection,
    project: &ProjectId,
    request: &TrainSpecRequest,
    problems: &mut Vec<Problem>,
) -> ApiResult<Option<DataFacts>> {
    let Some(dataset) = &request.dataset else {
        if !is_reported(problems, "/dataset") {
            problems.push(Problem::new("/dataset", "is required"));
        }
        return Ok(None);
    };
    if !jobs::dataset_exists(connection, project, dataset).await? {
        problems.push(Problem::new("/dataset", format!("there is no dataset {dataset}")));
        return Ok(None);
    }

    let tokenization = request.tokenization.as_ref();
    let facts = tokenizations::find_for_job(connection, project, dataset, tokenization).await?;
    if facts.is_none() && !is_reported(problems, "/tokenization") {
        let message = match tokenization {
            Some(id) => format!("there is no tokenization {id} of dataset {dataset} that has not failed"),
            None => format!("dataset {dataset} has no tokenization that has not failed; make one first"),
        };
        problems.push(Problem::new("/tokenization", message));
    }
    Ok(facts)
}

/// What is known of the checkpoint that a spec names. One that does not exist is one of the spec's problems.
async fn find_init(
    connection: &mut PgConnection,
    project: &ProjectId,
    request: &TrainSpecRequest,
    problems: &mut Vec<Problem>,
) -> ApiResult<Option<InitFacts>> {
    let Some(id) = &request.init_checkpoint else { return Ok(None) };
    let init = imports::find_facts(connection, project, id).await?;
    if init.is_none() {
        problems.push(Problem::new("/init_checkpoint", format!("there is no checkpoint and no base {id}")));
    }
    Ok(init)
}

fn is_reported(problems: &[Problem], pointer: &str) -> bool {
    problems.iter().any(|problem| problem.pointer == pointer || problem.pointer.is_empty())
}

/// A value that could not be read was taken out, so that later checks may find it missing: that is
/// no news. Nor is a model that a checkpoint was to bring.
fn merge(mut problems: Vec<Problem>, more: Vec<Problem>) -> Vec<Problem> {
    let has_no_init = is_reported(&problems, "/init_checkpoint");
    let is_said = |new: &Problem| {
        let is_within =
            |old: &Problem| new.pointer == old.pointer || new.pointer.starts_with(&format!("{}/", old.pointer));
        problems.iter().any(is_within) || (has_no_init && new.pointer == "/model")
    };
    let more: Vec<_> = more.into_iter().filter(|new| !is_said(new)).collect();
    problems.extend(more);
    problems
}

/// List jobs
///
/// The newest first.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", params(ListJobsQuery),
    responses((status = 200, description = "A page of jobs", body = JobPage), CallerErrors, QueryErrors))]
pub async fn list_jobs(
    caller: Caller,
    State(state): State<AppState>,
    Query(query): Query<ListJobsQuery>,
) -> ApiResult<Json<JobPage>> {
    let cursor = query.cursor.as_ref().map(Cursor::as_str);
    let rows = jobs::list(&state.pool, &caller.project, query.state, cursor, query.limit.with_next()).await?;
    let (rows, next_cursor) = query.limit.cut(rows, |row| row.id.as_str());
    Ok(Json(JobPage { data: rows.into_iter().map(Job::from).collect(), next_cursor }))
}

/// Look at a job
#[utoipa::path(get, path = "/v1/jobs/{job_id}", tag = "jobs", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = Job), CallerErrors, NotFoundError))]
pub async fn find_job(caller: Caller, State(state): State<AppState>, Path(id): Path<JobId>) -> ApiResult<Json<Job>> {
    Ok(Json(find(&state, &caller, &id).await?.into()))
}

/// Read a job's logs
///
/// Those of all attempts, in order. That of an attempt which runs is some seconds behind.
#[utoipa::path(get, path = "/v1/jobs/{job_id}/logs", tag = "jobs", params(("job_id" = String, Path)),
    responses((status = 200, description = "The logs", content_type = "text/plain", body = String),
        CallerErrors, NotFoundError))]
pub async fn find_job_logs(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
) -> ApiResult<Response> {
    find(&state, &caller, &id).await?;
    let keys = jobs::find_log_keys(&state.pool, &caller.project, &id).await?;

    let store = state.store.clone();
    let logs = stream::iter(keys).then(move |key| {
        let store = store.clone();
        async move { store.get(&Key::from(key), None).await.map(|log| log.into_stream()).map_err(std::io::Error::other) }
    });
    let content_type = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    Ok((content_type, Body::from_stream(logs.try_flatten())).into_response())
}

/// A job of the caller's project.
pub async fn find(state: &AppState, caller: &Caller, id: &JobId) -> ApiResult<JobRow> {
    jobs::find(&state.pool, &caller.project, id).await?.ok_or(ApiError::NotFound("job"))
}
