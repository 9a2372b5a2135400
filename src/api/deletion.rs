//! Deleting many nodes at once: checkpoints by what they have in common, and the lineage of a job.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::Caller,
    error::{ApiError, ApiResult},
    extract::{JsonBody, Path, Query},
    responses::{BodyErrors, CallerErrors, ConflictError, NotFoundError, QueryErrors},
};
use crate::{
    db::retention::{self, LineageDeletion, Selection},
    domain::{
        ids::{JobId, NodeId},
        problem::Problem,
        retention::{BlockReason, Blocker},
    },
};

/// Which checkpoints to delete: those to which all of this applies. One selection at least must be given.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeleteCheckpointsRequest {
    /// Only these, 1000 at most. A checkpoint from outside is deleted only if it is named here.
    #[schema(max_items = 1000)]
    ids: Option<Vec<NodeId>>,
    /// Only those of this job.
    job: Option<JobId>,
    /// Only those that are older.
    #[schema(minimum = 0)]
    older_than_s: Option<i64>,
    /// All but the newest so many of the lineage of each job.
    #[schema(minimum = 0)]
    keep_last: Option<i64>,
    /// Whether a later attempt went on from an earlier state; both by default.
    superseded: Option<bool>,
    /// Deletes nothing, and answers as if it had.
    dry_run: Option<bool>,
}

/// What was deleted, and what was not.
#[derive(Debug, Serialize, ToSchema)]
pub struct Deletion {
    /// Nothing was deleted: this is what it would have come to.
    dry_run: bool,
    num_deleted: i64,
    /// Of the objects that nothing names any more. The store frees them within minutes.
    freed_bytes: i64,
    deleted: Vec<NodeId>,
    refused: Vec<DeletionRefusal>,
}

/// Something that keeps a node from being deleted.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeletionRefusal {
    /// The node that was not deleted.
    id: NodeId,
    reason: BlockReason,
    /// The job, tokenization or node that needs it; null where it is nobody.
    user: Option<String>,
    message: String,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DeleteLineageQuery {
    /// Deletes nothing, and answers as if it had.
    #[param(required = false)]
    dry_run: bool,
}

impl Deletion {
    fn new(deletion: retention::Deletion, dry_run: bool) -> Self {
        Self {
            dry_run,
            num_deleted: deletion.deleted.len() as i64,
            freed_bytes: deletion.freed_bytes,
            deleted: deletion.deleted,
            refused: deletion.blockers.into_iter().map(DeletionRefusal::from).collect(),
        }
    }
}

impl From<Blocker> for DeletionRefusal {
    fn from(blocker: Blocker) -> Self {
        Self { message: blocker.to_string(), id: blocker.node, reason: blocker.reason, user: blocker.user }
    }
}

impl DeleteCheckpointsRequest {
    fn problems(&self) -> Vec<Problem> {
        const MAX_IDS: usize = 1000;
        let mut problems = Vec::new();
        let selects = self.ids.is_some() || self.job.is_some() || self.older_than_s.is_some();
        if !selects && self.keep_last.is_none() && self.superseded.is_none() {
            let message = "selects nothing: give ids, job, older_than_s, keep_last or superseded";
            problems.push(Problem::new("", message));
        }
        if self.ids.as_ref().is_some_and(|ids| ids.len() > MAX_IDS) {
            problems.push(Problem::new("/ids", format!("has more than {MAX_IDS} items")));
        }
        for (pointer, value) in [("/older_than_s", self.older_than_s), ("/keep_last", self.keep_last)] {
            if value.is_some_and(|value| value < 0) {
                problems.push(Problem::new(pointer, "must not be negative"));
            }
        }
        problems
    }

    fn into_selection(self) -> Selection {
        Selection {
            ids: self.ids.map(|ids| ids.iter().map(NodeId::to_string).collect()),
            job: self.job,
            older_than_s: self.older_than_s.map(|age_s| age_s as f64),
            keep_last: self.keep_last,
            superseded: self.superseded,
        }
    }
}

/// Delete many checkpoints
///
/// What something needs is left, and named with its reason. With `dry_run` nothing is deleted, and the answer is the same.
#[utoipa::path(post, path = "/v1/checkpoints/delete", tag = "checkpoints", request_body = DeleteCheckpointsRequest,
    responses((status = 200, description = "What was deleted, and what was not", body = Deletion), CallerErrors, BodyErrors))]
pub async fn delete_checkpoints(
    caller: Caller,
    State(state): State<AppState>,
    body: JsonBody,
) -> ApiResult<Json<Deletion>> {
    let (request, mut problems) = body.parse::<DeleteCheckpointsRequest>();
    if problems.is_empty() {
        problems = request.problems();
    }
    if !problems.is_empty() {
        return Err(ApiError::InvalidBody(problems));
    }
    let dry_run = request.dry_run.unwrap_or(false);
    let selection = request.into_selection();
    let deletion = retention::delete_checkpoints(&state.pool, &caller.project, &selection, dry_run).await?;
    let (num_deleted, freed_bytes) = (deletion.deleted.len(), deletion.freed_bytes);
    tracing::info!(num_deleted, freed_bytes, dry_run, "checkpoints deleted");
    Ok(Json(Deletion::new(deletion, dry_run)))
}

/// Delete a job's lineage
///
/// The bases, restarts and states of a job that is finished: all of them, or none where something needs one. Checkpoints
/// are whole by themselves, and stay.
#[utoipa::path(delete, path = "/v1/jobs/{job_id}/lineage", tag = "jobs",
    params(("job_id" = String, Path), DeleteLineageQuery),
    responses((status = 200, description = "What was deleted", body = Deletion),
        CallerErrors, NotFoundError, QueryErrors, ConflictError))]
pub async fn delete_job_lineage(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
    Query(query): Query<DeleteLineageQuery>,
) -> ApiResult<Json<Deletion>> {
    match retention::delete_lineage(&state.pool, &caller.project, &id, query.dry_run).await? {
        LineageDeletion::Done(deletion) => {
            tracing::info!(job.id = %id, num_deleted = deletion.deleted.len(), dry_run = query.dry_run, "lineage deleted");
            Ok(Json(Deletion::new(deletion, query.dry_run)))
        }
        LineageDeletion::NotFound => Err(ApiError::NotFound("job")),
        LineageDeletion::NotFinished(state) => Err(ApiError::JobNotFinished(state)),
        LineageDeletion::Needed(blockers) => Err(ApiError::Needed(blockers)),
    }
}
