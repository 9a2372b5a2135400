//! The measured values of a job.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::Caller,
    error::{ApiError, ApiResult},
    extract::{Path, Query},
    jobs,
    responses::{CallerErrors, NotFoundError, QueryErrors},
};
use crate::{db::metrics, domain::ids::JobId};

const DEFAULT_STEPS: i64 = 1_000;
const MAX_STEPS: i64 = 10_000;

/// A value that is measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MetricName {
    Loss,
    GradNorm,
    LearningRate,
    TokensPerS,
    EvalLoss,
    EvalPerplexity,
    /// Frobenius norm of what a restart merged, over all matrices.
    UpdateNorm,
    /// Share of the moments of the factors that a reset left at zero.
    OptimizerClearedFrac,
    CheckpointStallMs,
    /// From a node's last byte on the worker's disk to its commit; of several nodes after one step, the first.
    CheckpointLagS,
}

impl MetricName {
    fn as_str(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::GradNorm => "grad_norm",
            Self::LearningRate => "learning_rate",
            Self::TokensPerS => "tokens_per_s",
            Self::EvalLoss => "eval_loss",
            Self::EvalPerplexity => "eval_perplexity",
            Self::UpdateNorm => "update_norm",
            Self::OptimizerClearedFrac => "optimizer_cleared_frac",
            Self::CheckpointStallMs => "checkpoint_stall_ms",
            Self::CheckpointLagS => "checkpoint_lag_s",
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct JobMetric {
    step: i64,
    #[schema(value_type = MetricName)]
    name: String,
    value: f64,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct JobMetricPage {
    data: Vec<JobMetric>,
    /// To be given as `cursor` for the next page; null if this one has all that there is yet.
    next_cursor: Option<String>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListJobMetricsQuery {
    /// Only values of this name; all by default.
    #[param(required = false)]
    name: Option<MetricName>,
    /// Only values of later steps.
    #[param(value_type = i64, required = false, minimum = -1)]
    after_step: Option<i64>,
    /// The `next_cursor` of the page before, which counts before `after_step`.
    #[param(value_type = String, required = false)]
    cursor: Option<i64>,
    /// How many steps at most, each with all its values; 1000 by default.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 10000)]
    limit: Option<i64>,
}

/// List a job's metrics
///
/// By step. Where attempts overlap, each step has the value of the attempt that the job went on with.
#[utoipa::path(get, path = "/v1/jobs/{job_id}/metrics", tag = "jobs",
    params(("job_id" = String, Path), ListJobMetricsQuery),
    responses((status = 200, description = "Values", body = JobMetricPage), CallerErrors, NotFoundError, QueryErrors))]
pub async fn list_job_metrics(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<JobId>,
    Query(query): Query<ListJobMetricsQuery>,
) -> ApiResult<Json<JobMetricPage>> {
    let limit = query.limit.unwrap_or(DEFAULT_STEPS);
    if !(1..=MAX_STEPS).contains(&limit) {
        return Err(ApiError::InvalidQuery(format!("limit must be from 1 to {MAX_STEPS}")));
    }
    jobs::find(&state, &caller, &id).await?;

    let name = query.name.map(MetricName::as_str);
    let after_step = query.cursor.or(query.after_step).unwrap_or(-1);
    let mut rows = metrics::list(&state.pool, &caller.project, &id, name, after_step, limit + 1).await?;

    let mut steps: Vec<_> = rows.iter().map(|row| row.step).collect();
    steps.dedup();
    let last_step = (steps.len() as i64 > limit).then(|| steps[limit as usize - 1]);
    rows.retain(|row| last_step.is_none_or(|last| row.step <= last));
    let values = rows.into_iter().map(|row| JobMetric { step: row.step, name: row.name, value: row.value });
    Ok(Json(JobMetricPage { data: values.collect(), next_cursor: last_step.map(|step| step.to_string()) }))
}
