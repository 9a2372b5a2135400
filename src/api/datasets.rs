//! Datasets: made, filled once, downloaded, deleted.

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{HeaderMap, Method, StatusCode, header},
    response::Response,
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::Caller,
    body::check_length,
    download::{self, Download},
    error::{ApiError, ApiResult},
    extract::{JsonBody, Path, Query, media_type},
    page::{Cursor, Limit},
    responses::{BodyErrors, CallerErrors, ConflictError, ContentErrors, NotFoundError, QueryErrors, RangeError},
    upload::{self, Upload},
};
use crate::{
    db::datasets::{self, DatasetFormat, DatasetRow, DatasetState, Deletion},
    domain::{ids::DatasetId, problem::Problem},
};

/// A dataset to make. Its content follows in a request of its own.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateDatasetRequest {
    /// 1 to 200 characters.
    #[schema(value_type = String, required, min_length = 1, max_length = 200)]
    name: Option<String>,
}

/// Raw text to train on.
#[derive(Debug, Serialize, ToSchema)]
pub struct Dataset {
    id: DatasetId,
    name: String,
    state: DatasetState,
    format: Option<DatasetFormat>,
    size_bytes: Option<i64>,
    sha256: Option<String>,
    num_documents: Option<i64>,
    /// Why the last upload failed.
    error: Option<String>,
    created_at: DateTime<Utc>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct DatasetPage {
    data: Vec<Dataset>,
    /// To be given as `cursor` for the next page; null on the last one.
    next_cursor: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
#[derive(Default)]
pub struct ListDatasetsQuery {
    /// How many to a page; 50 by default.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 500)]
    limit: Limit,
    /// The `next_cursor` of the page before.
    #[param(value_type = String, required = false)]
    cursor: Option<Cursor>,
}

impl From<DatasetRow> for Dataset {
    fn from(row: DatasetRow) -> Self {
        Self {
            id: row.id,
            name: row.name,
            state: row.state,
            format: row.format,
            size_bytes: row.size_bytes,
            sha256: row.sha256,
            num_documents: row.num_documents,
            error: row.error,
            created_at: row.created_at,
        }
    }
}

/// Make a dataset
#[utoipa::path(post, path = "/v1/datasets", tag = "datasets", request_body = CreateDatasetRequest,
    responses((status = 201, description = "The dataset, empty", body = Dataset), CallerErrors, BodyErrors))]
pub async fn create_dataset(
    caller: Caller,
    State(state): State<AppState>,
    body: JsonBody,
) -> ApiResult<(StatusCode, Json<Dataset>)> {
    let (request, mut problems) = body.parse::<CreateDatasetRequest>();
    let name = request.name.unwrap_or_default();
    if problems.is_empty() && (name.is_empty() || name.chars().count() > 200) {
        problems.push(Problem::new("/name", "must have 1 to 200 characters"));
    }
    if !problems.is_empty() {
        return Err(ApiError::InvalidBody(problems));
    }

    let dataset = datasets::create(&state.pool, &caller.project, &name).await?;
    Ok((StatusCode::CREATED, Json(dataset.into())))
}

/// List datasets
///
/// The newest first.
#[utoipa::path(get, path = "/v1/datasets", tag = "datasets", params(ListDatasetsQuery),
    responses((status = 200, description = "A page of datasets", body = DatasetPage), CallerErrors, QueryErrors))]
pub async fn list_datasets(
    caller: Caller,
    State(state): State<AppState>,
    Query(query): Query<ListDatasetsQuery>,
) -> ApiResult<Json<DatasetPage>> {
    let cursor = query.cursor.as_ref().map(Cursor::as_str);
    let rows = datasets::list(&state.pool, &caller.project, cursor, query.limit.with_next()).await?;
    let (rows, next_cursor) = query.limit.cut(rows, |row| row.id.as_str());
    Ok(Json(DatasetPage { data: rows.into_iter().map(Dataset::from).collect(), next_cursor }))
}

/// Look at a dataset
#[utoipa::path(get, path = "/v1/datasets/{dataset_id}", tag = "datasets",
    params(("dataset_id" = String, Path)),
    responses((status = 200, description = "The dataset", body = Dataset), CallerErrors, NotFoundError))]
pub async fn find_dataset(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<DatasetId>,
) -> ApiResult<Json<Dataset>> {
    let dataset = find(&state, &caller, &id).await?;
    Ok(Json(dataset.into()))
}

/// Delete a dataset
///
/// Refused while a tokenization or a job uses it.
#[utoipa::path(delete, path = "/v1/datasets/{dataset_id}", tag = "datasets",
    params(("dataset_id" = String, Path)),
    responses((status = 204, description = "It is gone"), CallerErrors, NotFoundError, ConflictError))]
pub async fn delete_dataset(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<DatasetId>,
) -> ApiResult<StatusCode> {
    let deletion = datasets::delete(&state.pool, &caller.project, &id).await?;
    finish_deletion(&state, deletion, "dataset").await
}

/// The answer to a deletion; what it leaves in the store is removed.
pub async fn finish_deletion(state: &AppState, deletion: Deletion, what: &'static str) -> ApiResult<StatusCode> {
    match deletion {
        Deletion::Done { object_keys } => {
            state.delete_objects(&object_keys).await;
            Ok(StatusCode::NO_CONTENT)
        }
        Deletion::NotFound => Err(ApiError::NotFound(what)),
        Deletion::InUse { users } => Err(ApiError::InUse(users)),
        Deletion::Running => Err(ApiError::Busy),
    }
}

/// Upload a dataset's content
///
/// `text/plain` is one document. `application/jsonl` has a document per line: an object with a string
/// `text` and, if known, a string `source`. The content is checked while it arrives; nothing is kept of
/// an upload that fails, and another one may follow.
#[utoipa::path(put, path = "/v1/datasets/{dataset_id}/content", tag = "datasets",
    params(("dataset_id" = String, Path)),
    request_body(content(("text/plain"), ("application/jsonl")), description = "The content, of any length up to the server's limit"),
    responses((status = 200, description = "The dataset, ready", body = Dataset),
        CallerErrors, NotFoundError, ConflictError, ContentErrors))]
pub async fn upload_dataset_content(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<DatasetId>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Json<Dataset>> {
    let format = content_format(&headers).ok_or(ApiError::UnsupportedMediaType("text/plain or application/jsonl"))?;
    let expected_bytes = check_length(&state, &headers)?;
    let upload = Upload::new(caller.project.clone(), id.clone(), format, expected_bytes);
    if !datasets::begin_upload(&state.pool, &caller.project, &id, format, &upload.token).await? {
        find(&state, &caller, &id).await?;
        return Err(ApiError::AlreadyUploaded);
    }

    let dataset = upload::run(state, upload, body).await?;
    Ok(Json(dataset.into()))
}

/// Download a dataset's content
#[utoipa::path(get, path = "/v1/datasets/{dataset_id}/content", tag = "datasets",
    params(("dataset_id" = String, Path)),
    responses((status = 200, description = "The bytes as they were uploaded", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 206, description = "The range that was asked for", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 304, description = "The client has it already"),
        CallerErrors, NotFoundError, ConflictError, RangeError))]
pub async fn download_dataset_content(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<DatasetId>,
    method: Method,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let dataset = find(&state, &caller, &id).await?;
    let (Some(object_key), Some(size_bytes), Some(sha256), Some(format)) =
        (dataset.object_key, dataset.size_bytes, dataset.sha256, dataset.format)
    else {
        return Err(ApiError::NoContent);
    };

    let (extension, content_type) = match format {
        DatasetFormat::Text => ("txt", "text/plain; charset=utf-8"),
        DatasetFormat::Jsonl => ("jsonl", "application/jsonl"),
    };
    let name = format!("{}.{extension}", dataset.id);
    let file = Download { object_key, name, content_type, size_bytes, sha256 };
    download::answer(&state.store, file, &method, &headers).await
}

async fn find(state: &AppState, caller: &Caller, id: &DatasetId) -> ApiResult<DatasetRow> {
    datasets::find(&state.pool, &caller.project, id).await?.ok_or(ApiError::NotFound("dataset"))
}

fn content_format(headers: &HeaderMap) -> Option<DatasetFormat> {
    match media_type(headers.get(header::CONTENT_TYPE)?.to_str().ok()?).as_str() {
        "text/plain" => Some(DatasetFormat::Text),
        "application/jsonl" => Some(DatasetFormat::Jsonl),
        _ => None,
    }
}
