//! The table of contents: every route of the API.

use std::any::Any;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::Request,
    middleware::from_fn,
    response::{IntoResponse, Response},
};
use tower_http::{
    catch_panic::CatchPanicLayer,
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
    trace::TraceLayer,
};
use utoipa::{OpenApi as _, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    AppState, bases, checkpoints, datasets, deletion,
    document::{self, Document},
    error::{ApiError, write_problems},
    events, extract, forks, health, imports, job_commands, jobs, lineage_tasks, metrics, restarts, tokenizations,
    usage,
};

fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(health::get_health))
        .routes(routes!(health::get_readiness))
        .routes(routes!(document::get_openapi))
        .routes(routes!(datasets::create_dataset, datasets::list_datasets))
        .routes(routes!(datasets::find_dataset, datasets::delete_dataset))
        .routes(routes!(datasets::upload_dataset_content, datasets::download_dataset_content))
        .routes(routes!(tokenizations::create_tokenization, tokenizations::list_tokenizations))
        .routes(routes!(tokenizations::find_tokenization, tokenizations::delete_tokenization))
        .routes(routes!(jobs::create_job, jobs::list_jobs))
        .routes(routes!(jobs::find_job))
        .routes(routes!(job_commands::cancel_job))
        .routes(routes!(job_commands::pause_job))
        .routes(routes!(job_commands::resume_job))
        .routes(routes!(job_commands::retry_job))
        .routes(routes!(jobs::find_job_logs))
        .routes(routes!(deletion::delete_job_lineage))
        .routes(routes!(events::list_job_events))
        .routes(routes!(events::stream_job_events))
        .routes(routes!(metrics::list_job_metrics))
        .routes(routes!(bases::list_bases))
        .routes(routes!(bases::find_base))
        .routes(routes!(bases::list_base_files))
        .routes(routes!(bases::download_base_file))
        .routes(routes!(restarts::list_restarts))
        .routes(routes!(restarts::find_restart))
        .routes(routes!(restarts::list_restart_files))
        .routes(routes!(restarts::download_restart_file))
        .routes(routes!(lineage_tasks::materialize_restart))
        .routes(routes!(lineage_tasks::verify_restart))
        .routes(routes!(lineage_tasks::list_lineage_tasks))
        .routes(routes!(lineage_tasks::find_lineage_task))
        .routes(routes!(checkpoints::list_checkpoints, imports::import_checkpoint))
        .routes(routes!(checkpoints::find_checkpoint, checkpoints::delete_checkpoint))
        .routes(routes!(checkpoints::pin_checkpoint, checkpoints::unpin_checkpoint))
        .routes(routes!(deletion::delete_checkpoints))
        .routes(routes!(checkpoints::list_checkpoint_files))
        .routes(routes!(forks::fork_checkpoint))
        .routes(routes!(checkpoints::download_checkpoint_file))
        .routes(routes!(usage::find_usage))
}

/// The OpenAPI document.
pub fn openapi() -> OpenApi {
    document::complete(routes().into_openapi())
}

/// The whole service, and its document.
pub fn router(state: AppState) -> (Router, OpenApi) {
    let (router, openapi) = routes().split_for_parts();
    let router = router
        .fallback(async || ApiError::NoRoute)
        .method_not_allowed_fallback(async || ApiError::MethodNotAllowed)
        .with_state(state)
        .layer(DefaultBodyLimit::max(extract::MAX_JSON_BYTES))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(write_problems))
        .layer(TraceLayer::new_for_http().make_span_with(span).on_failure(()))
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid));
    (router, document::complete(openapi))
}

fn span<B>(request: &Request<B>) -> tracing::Span {
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
    tracing::info_span!(
        "request",
        request.id = id.unwrap_or_default(),
        http.method = %request.method(),
        http.path = request.uri().path(),
    )
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    ApiError::Internal(format!("panic: {}", text.unwrap_or("without a text"))).into_response()
}
