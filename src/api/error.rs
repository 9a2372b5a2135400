//! The one error of the HTTP edge and its one form on the wire, problem+json (RFC 9457).
//!
//! A refusal says what to change. Of our own failures the client learns a fixed text and the request's
//! number; the cause is in the log under that number.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tower_http::request_id::RequestId;
use utoipa::ToSchema;

use crate::{
    domain::{job::JobState, problem::Problem, retention::Blocker},
    storage::StorageError,
};

pub type ApiResult<T> = Result<T, ApiError>;

/// Why a request was not served. Its text is the `detail` that the client reads.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the query string is not understood: {0}")]
    InvalidQuery(String),
    #[error("the header {name} is not understood: {reason}")]
    InvalidHeader { name: &'static str, reason: &'static str },
    #[error("the body is not JSON: {0}")]
    MalformedJson(String),
    #[error("the body is not multipart/form-data: {0}")]
    MalformedMultipart(String),
    #[error("the import took too long: at most 20 hours may pass until its last file is there")]
    ImportTooSlow,
    #[error("the body broke off after {received_bytes} bytes: {reason}")]
    UploadBroken { received_bytes: i64, reason: String },
    #[error("an API key is needed: send it as `Authorization: Bearer rl_…`")]
    Unauthenticated,
    #[error("the API key lacks the scope {0}")]
    MissingScope(&'static str),
    #[error("there is no such {0}")]
    NotFound(&'static str),
    #[error("there is no route for this path")]
    NoRoute,
    #[error("this path does not take this method")]
    MethodNotAllowed,
    #[error("the dataset has its content already; make another dataset for other content")]
    AlreadyUploaded,
    #[error("another upload to this dataset took over, or the dataset was deleted")]
    UploadSuperseded,
    #[error("the dataset has no content")]
    NoContent,
    #[error("the dataset is {0}, not ready; upload its content first")]
    DatasetNotReady(&'static str),
    #[error("it is used by {}; delete that first", .0.join(", "))]
    InUse(Vec<String>),
    #[error("nothing was deleted: {}", listed(.0))]
    Needed(Vec<Blocker>),
    #[error("the {0} was deleted")]
    Deleted(&'static str),
    #[error("a worker is busy with it; wait until it is done")]
    Busy,
    #[error("a later attempt on the job went on from before the restart, which is no part of the lineage any more")]
    Superseded,
    #[error("the job is {}, and goes on from what it has stored; cancel it first, or wait for its end", state_name(*.0))]
    JobNotFinished(JobState),
    #[error("the job is {} already", state_name(*.0))]
    JobFinished(JobState),
    #[error("the checkpoint that the job began with was deleted, and the job has no state to go on from")]
    NothingToGoOnFrom,
    #[error("the tokenization that the job trains on has failed; submit another job with other tokens")]
    TokensFailed,
    #[error("that cannot be asked of a job that is {}", state_name(*.0))]
    WrongJobState(JobState),
    #[error(
        "the checkpoint came from outside: there is no job whose spec could be changed; submit a whole spec that names it as init_checkpoint"
    )]
    NoJobToFork,
    #[error("the body is larger than the {limit_bytes} bytes that are taken")]
    TooLarge { limit_bytes: i64 },
    #[error("the Content-Type must be {0}")]
    UnsupportedMediaType(&'static str),
    #[error("the range lies outside of the {size_bytes} bytes of the file")]
    RangeNotSatisfiable { size_bytes: i64 },
    #[error("the body has mistakes; `errors` lists each")]
    InvalidBody(Vec<Problem>),
    #[error("the training spec has mistakes; `errors` lists each. Nothing was queued")]
    InvalidSpec(Vec<Problem>),
    #[error("the checkpoint cannot be taken; `errors` says of each file why. Nothing was kept")]
    InvalidCheckpoint(Vec<Problem>),
    #[error("the content is not UTF-8: the first bad byte is at offset {offset_bytes}")]
    NotUtf8 { offset_bytes: i64 },
    #[error("line {line}, which begins at byte {offset_bytes}: {reason}")]
    InvalidLine { line: i64, offset_bytes: i64, reason: String },
    #[error("the content is empty")]
    EmptyContent,
    #[error("the server is stopping; try again")]
    Stopping,
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("store: {0}")]
    Store(#[from] StorageError),
    #[error("internal: {0}")]
    Internal(String),
}

impl ApiError {
    /// The status and the code that programs branch on.
    fn status_and_code(&self) -> (StatusCode, &'static str) {
        use sqlx::Error::{Io, PoolClosed, PoolTimedOut};
        match self {
            Self::InvalidQuery(_) => (StatusCode::BAD_REQUEST, "invalid_query"),
            Self::InvalidHeader { .. } => (StatusCode::BAD_REQUEST, "invalid_header"),
            Self::MalformedJson(_) => (StatusCode::BAD_REQUEST, "malformed_json"),
            Self::MalformedMultipart(_) => (StatusCode::BAD_REQUEST, "malformed_multipart"),
            Self::ImportTooSlow => (StatusCode::BAD_REQUEST, "import_too_slow"),
            Self::UploadBroken { .. } => (StatusCode::BAD_REQUEST, "upload_broken"),
            Self::Unauthenticated => (StatusCode::UNAUTHORIZED, "unauthenticated"),
            Self::MissingScope(_) => (StatusCode::FORBIDDEN, "missing_scope"),
            Self::NotFound(_) | Self::NoRoute => (StatusCode::NOT_FOUND, "not_found"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::AlreadyUploaded => (StatusCode::CONFLICT, "already_uploaded"),
            Self::UploadSuperseded => (StatusCode::CONFLICT, "upload_superseded"),
            Self::NoContent => (StatusCode::CONFLICT, "no_content"),
            Self::DatasetNotReady(_) => (StatusCode::CONFLICT, "dataset_not_ready"),
            Self::InUse(_) => (StatusCode::CONFLICT, "in_use"),
            Self::Needed(_) => (StatusCode::CONFLICT, "in_use"),
            Self::Deleted(_) => (StatusCode::GONE, "deleted"),
            Self::JobNotFinished(_) => (StatusCode::CONFLICT, "job_not_finished"),
            Self::Busy => (StatusCode::CONFLICT, "busy"),
            Self::Superseded => (StatusCode::CONFLICT, "superseded"),
            Self::JobFinished(_) => (StatusCode::CONFLICT, "job_finished"),
            Self::WrongJobState(_) => (StatusCode::CONFLICT, "wrong_job_state"),
            Self::TokensFailed => (StatusCode::CONFLICT, "tokens_failed"),
            Self::NothingToGoOnFrom => (StatusCode::CONFLICT, "nothing_to_go_on_from"),
            Self::NoJobToFork => (StatusCode::CONFLICT, "no_job_to_fork"),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            Self::UnsupportedMediaType(_) => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Self::RangeNotSatisfiable { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "range_not_satisfiable"),
            Self::InvalidBody(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_body"),
            Self::InvalidSpec(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_spec"),
            Self::InvalidCheckpoint(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_checkpoint"),
            Self::NotUtf8 { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "not_utf8"),
            Self::InvalidLine { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_line"),
            Self::EmptyContent => (StatusCode::UNPROCESSABLE_ENTITY, "empty_content"),
            Self::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
            Self::Database(PoolTimedOut | PoolClosed | Io(_)) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Self::Store(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Self::Database(_) | Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        }
    }

    /// What the client may read.
    pub fn detail(&self) -> String {
        match self.status_and_code().1 {
            "unavailable" => "the database or the store does not answer; try again".into(),
            "internal" => "something failed on our side; its cause is in the server's log".into(),
            _ => self.to_string(),
        }
    }

    /// The header that belongs to the status.
    fn header(&self) -> Option<(header::HeaderName, String)> {
        match self {
            Self::Unauthenticated => Some((header::WWW_AUTHENTICATE, "Bearer realm=\"relora\"".into())),
            Self::RangeNotSatisfiable { size_bytes } => Some((header::CONTENT_RANGE, format!("bytes */{size_bytes}"))),
            _ if self.status_and_code().0 == StatusCode::SERVICE_UNAVAILABLE => Some((header::RETRY_AFTER, "1".into())),
            _ => None,
        }
    }
}

/// An error as it goes over the wire.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ProblemDetails {
    /// Always `about:blank`: the code says more.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    pub status: i64,
    /// What programs branch on.
    pub code: String,
    /// What happened and what to do.
    pub detail: String,
    /// Every mistake in the body, with a JSON pointer to each; empty for other errors.
    pub errors: Vec<Problem>,
    /// The number under which the server's log has this request; also in the header `x-request-id`.
    pub request_id: Option<String>,
}

impl IntoResponse for ApiError {
    /// The body is written by [`write_problems`], which knows the request.
    fn into_response(self) -> Response {
        let (status, code) = self.status_and_code();
        if status.is_server_error() {
            tracing::error!(error.code = code, error = %self, "request failed");
        }

        let mut response = status.into_response();
        if let Some((name, value)) = self.header()
            && let Ok(value) = HeaderValue::try_from(value)
        {
            response.headers_mut().insert(name, value);
        }
        response.extensions_mut().insert(ProblemDetails {
            kind: "about:blank".into(),
            title: status.canonical_reason().unwrap_or("Error").into(),
            status: i64::from(status.as_u16()),
            code: code.into(),
            detail: self.detail(),
            errors: match self {
                Self::InvalidBody(problems) | Self::InvalidSpec(problems) | Self::InvalidCheckpoint(problems) => {
                    problems
                }
                _ => Vec::new(),
            },
            request_id: None,
        });
        response
    }
}

/// Middleware: gives every error its body, with the number of the request.
pub async fn write_problems(request: Request, next: Next) -> Response {
    let request_id = request.extensions().get::<RequestId>().map(|id| id.header_value().clone());
    let mut response = next.run(request).await;
    let Some(mut problem) = response.extensions_mut().remove::<ProblemDetails>() else { return response };

    problem.request_id = request_id.and_then(|id| Some(id.to_str().ok()?.to_owned()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    headers.remove(header::CONTENT_LENGTH);
    // A struct of strings always serialises.
    *response.body_mut() = Body::from(serde_json::to_vec(&problem).unwrap_or_default());
    response
}

/// A lineage may have very many descendants.
fn listed(blockers: &[Blocker]) -> String {
    const MAX_LISTED: usize = 20;
    let mut listed: Vec<_> = blockers.iter().take(MAX_LISTED).map(Blocker::to_string).collect();
    if blockers.len() > MAX_LISTED {
        listed.push(format!("and {} more", blockers.len() - MAX_LISTED));
    }
    listed.join("; ")
}

fn state_name(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Pausing => "pausing",
        JobState::Paused => "paused",
        JobState::Cancelling => "cancelling",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}
