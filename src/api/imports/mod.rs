//! Checkpoints from outside: streamed to the store file by file, checked there, then made visible by one row.
//!
//! An import runs as a task of its own, because a handler is dropped when its client goes away, and a broken one must
//! leave nothing in the store.

mod check;
mod parts;

use std::{panic::AssertUnwindSafe, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode, header},
};
use bytes::Bytes;
use futures_util::FutureExt;
use tracing::Instrument;
use utoipa::{
    ToSchema,
    openapi::schema::{Array, ArrayBuilder, KnownFormat, ObjectBuilder, SchemaFormat, Type},
};

use super::{
    AppState,
    auth::Caller,
    body::{self, IncomingBody},
    error::{ApiError, ApiResult},
    lineage::{self, Node},
    responses::{CallerErrors, ImportErrors},
};
use crate::{
    db::{
        self,
        imports::{self, NewImport},
        nodes::StoredFile,
    },
    domain::{
        ids::{NodeId, ProjectId},
        lineage::{MANIFEST_FILE, NodeKind, manifest},
    },
    storage::Key,
};
use parts::Received;

/// A checkpoint to import: a part per file, under the file's name.
#[expect(dead_code, reason = "the parts are read one by one; this is their documentation")]
#[derive(ToSchema)]
pub struct ImportCheckpointRequest {
    /// What to call it: 1 to 200 characters.
    #[schema(min_length = 1, max_length = 200)]
    name: Option<String>,
    #[schema(schema_with = files_schema, required)]
    file: Vec<Bytes>,
}

/// Files as generators of clients know them; bytes by themselves would be lists of numbers.
fn files_schema() -> Array {
    let description = "Each part has a file name: `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on \
        with `model.safetensors.index.json`; `config.json`; and, where there are any, `generation_config.json`, \
        `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.";
    let file =
        ObjectBuilder::new().schema_type(Type::String).format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary)));
    ArrayBuilder::new().items(file).description(Some(description)).build()
}

/// Import a checkpoint
///
/// A LLaMA model in the `transformers` layout, as the root of a new lineage. Its files are checked before it is there:
/// that the configuration is one that is computed exactly, that every tensor is there with its shape, and that no file
/// is cut short. Every problem is reported at once, and nothing is kept then. Send `config.json` before the weights: when
/// its model cannot be taken, the weights are not waited for.
#[utoipa::path(post, path = "/v1/checkpoints", tag = "checkpoints",
    request_body(content = ImportCheckpointRequest, content_type = "multipart/form-data"),
    responses((status = 201, description = "The checkpoint, stored and checked", body = Node),
        CallerErrors, ImportErrors))]
pub async fn import_checkpoint(
    caller: Caller,
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<(StatusCode, Json<Node>)> {
    let boundary =
        boundary(&headers).ok_or(ApiError::UnsupportedMediaType("multipart/form-data, with its boundary"))?;
    let len_bytes = body::check_length(&state, &headers)?.map(i64::unsigned_abs);

    let import = Import { id: NodeId::new(), project: caller.project.clone(), boundary, len_bytes };
    let id = import.id.clone();
    let task = tokio::spawn(carry_out(state.clone(), import, body).in_current_span());
    task.await.map_err(|error| ApiError::Internal(format!("the import's task ended: {error}")))??;
    Ok((StatusCode::CREATED, Json(lineage::find(&state, &caller, NodeKind::Checkpoint, &id).await?)))
}

fn boundary(headers: &HeaderMap) -> Option<String> {
    multer::parse_boundary(headers.get(header::CONTENT_TYPE)?.to_str().ok()?).ok()
}

/// Objects that nothing names are swept after a day: by then an import is entered or over.
const MAX_IMPORT: Duration = Duration::from_secs(20 * 3_600);

struct Import {
    id: NodeId,
    project: ProjectId,
    boundary: String,
    /// Of the whole form, if the client says so: no file is longer.
    len_bytes: Option<u64>,
}

/// Receives, checks and enters a checkpoint; whatever fails, nothing of it stays.
async fn carry_out(state: AppState, import: Import, body: Body) -> ApiResult<()> {
    let mut body = IncomingBody::new(&state, body);
    let mut received = Received::default();
    // Even a defect of ours must leave nothing in the store.
    let receiving = AssertUnwindSafe(receive(&state, &import, &mut body, &mut received)).catch_unwind();
    let outcome = match tokio::time::timeout(MAX_IMPORT, receiving).await {
        Ok(outcome) => outcome.unwrap_or_else(|_| Err(ApiError::Internal("the import panicked".into()))),
        Err(_) => Err(ApiError::ImportTooSlow),
    };
    let outcome = match outcome {
        Ok(new) => enter(&state, &import, &new).await,
        Err(error) => Err(error),
    };
    let Err(error) = outcome else {
        tracing::info!(checkpoint.id = %import.id, "checkpoint imported");
        return Ok(());
    };

    tracing::warn!(checkpoint.id = %import.id, %error, "import failed");
    body.read_to_end().await;
    // If the database cannot say whether the checkpoint was entered after all, its objects stay.
    match db::lineage::find(&state.pool, &import.project, NodeKind::Checkpoint, &import.id).await {
        Ok(None) => state.delete_objects(&received.object_keys).await,
        Ok(Some(_)) => return Ok(()),
        Err(error) => tracing::warn!(%error, "objects of an import may be left behind"),
    }
    Err(error)
}

/// The checkpoint, stored and checked, and not yet visible.
async fn receive(
    state: &AppState,
    import: &Import,
    body: &mut IncomingBody,
    received: &mut Received,
) -> ApiResult<NewImport> {
    if let Err(error) = parts::receive(state, import, body, received).await {
        // When the client's side fails, whoever reads from it fails too: the cause counts.
        return Err(body.take_refusal().unwrap_or(error));
    }
    if !received.problems.is_empty() {
        return Err(ApiError::InvalidCheckpoint(std::mem::take(&mut received.problems)));
    }
    let model = check::check(&state.store, &received.files).await?;

    let content = manifest(NodeKind::Checkpoint, 0, 0, received.files.iter().map(StoredFile::facts));
    let content = serde_json::to_vec_pretty(&content).map_err(|error| ApiError::Internal(error.to_string()))?;
    let key = Key::import(&import.id, MANIFEST_FILE);
    received.object_keys.push(key.to_string());
    let stored = state.store.put_bytes(&key, content.into()).await?;
    let mut files = received.files.clone();
    files.push(StoredFile {
        name: MANIFEST_FILE.into(),
        object_key: key.to_string(),
        size_bytes: stored.bytes.cast_signed(),
        sha256: stored.sha256,
    });
    Ok(NewImport { id: import.id.clone(), name: received.name.clone(), model, files })
}

async fn enter(state: &AppState, import: &Import, new: &NewImport) -> ApiResult<()> {
    Ok(imports::create(&state.pool, &import.project, new).await?)
}
