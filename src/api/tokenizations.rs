//! Tokenizations: datasets turned into tokens.

use axum::{Json, extract::State, http::StatusCode};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::Caller,
    datasets::finish_deletion,
    error::{ApiError, ApiResult},
    extract::{JsonBody, Path, Query},
    page::{Cursor, Limit},
    responses::{BodyErrors, CallerErrors, ConflictError, NotFoundError, QueryErrors},
};
use crate::{
    db::{
        self,
        datasets::DatasetState,
        imports,
        tokenizations::{self, Creation, NewTokenization, TokenizationFileRow, TokenizationRow, TokenizationState},
    },
    domain::{
        checkpoint::{END_OF_TEXT_FILES, EndOfText, end_of_text, max_bytes},
        ids::{DatasetId, NodeId, TokenizationId},
        job::Failure,
        problem::Problem,
    },
    storage::Key,
};

/// A tokenization to make.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTokenizationRequest {
    /// A dataset that is ready.
    #[schema(value_type = String, required)]
    dataset: Option<DatasetId>,
    /// The checkpoint or base whose tokenizer is used. By default one is learned from the text.
    #[schema(value_type = Option<String>)]
    tokenizer_checkpoint: Option<NodeId>,
    /// Size of the vocabulary that is learned; 8192 by default. Not with `tokenizer_checkpoint`.
    #[schema(minimum = 260, maximum = 65536)]
    vocab_size: Option<i64>,
    /// Share of the documents that is held out for evaluation, above 0; 0.05 by default.
    #[schema(exclusive_minimum = 0.0, maximum = 0.5)]
    validation_frac: Option<f64>,
}

/// A dataset turned into tokens by one tokenizer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tokenization {
    id: TokenizationId,
    dataset: DatasetId,
    state: TokenizationState,
    /// The checkpoint or base whose tokenizer is used; null for one that is learned from the text.
    tokenizer_checkpoint: Option<NodeId>,
    /// As it was asked for; that of the checkpoint's model where its tokenizer is used.
    vocab_size: i64,
    validation_frac: f64,
    /// Tokens that the tokenizer has: what the text had room for.
    tokenizer_vocab_size: Option<i64>,
    train_tokens: Option<i64>,
    valid_tokens: Option<i64>,
    train_documents: Option<i64>,
    valid_documents: Option<i64>,
    failure: Option<Failure>,
    files: Vec<TokenizationFile>,
    created_at: DateTime<Utc>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TokenizationFile {
    name: String,
    size_bytes: i64,
    sha256: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TokenizationPage {
    data: Vec<Tokenization>,
    /// To be given as `cursor` for the next page; null on the last one.
    next_cursor: Option<String>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListTokenizationsQuery {
    /// Only those of this dataset.
    #[param(value_type = String, required = false)]
    dataset: Option<DatasetId>,
    /// How many to a page; 50 by default.
    #[param(value_type = i64, required = false, minimum = 1, maximum = 500)]
    limit: Limit,
    /// The `next_cursor` of the page before.
    #[param(value_type = String, required = false)]
    cursor: Option<Cursor>,
}

/// Make a tokenization
///
/// It is queued; a worker trains the tokenizer, or takes that of a checkpoint, and encodes the text.
#[utoipa::path(post, path = "/v1/tokenizations", tag = "tokenizations", request_body = CreateTokenizationRequest,
    responses((status = 201, description = "The tokenization, queued", body = Tokenization),
        CallerErrors, BodyErrors, ConflictError))]
pub async fn create_tokenization(
    caller: Caller,
    State(state): State<AppState>,
    body: JsonBody,
) -> ApiResult<(StatusCode, Json<Tokenization>)> {
    let (request, mut problems) = body.parse::<CreateTokenizationRequest>();
    let validation_frac = request.validation_frac.unwrap_or(0.05);
    let vocab_size = match &request.tokenizer_checkpoint {
        Some(id) => checkpoint_vocab_size(&state, &caller, id, request.vocab_size, &mut problems).await?,
        None => learned_vocab_size(request.vocab_size, &mut problems),
    };
    if !(validation_frac > 0.0 && validation_frac <= 0.5) {
        let message = format!("{validation_frac} is out of range: above 0, at most 0.5");
        problems.push(Problem::new("/validation_frac", message));
    }
    if request.dataset.is_none() && !problems.iter().any(|problem| problem.pointer == "/dataset") {
        problems.push(Problem::new("/dataset", "is required"));
    }
    let Some(dataset) = request.dataset.filter(|_| problems.is_empty()) else {
        return Err(ApiError::InvalidBody(problems));
    };

    let new = NewTokenization { tokenizer_checkpoint: request.tokenizer_checkpoint, vocab_size, validation_frac };
    let creation = tokenizations::create(&state.pool, &caller.project, &dataset, &new).await?;
    let id = match creation {
        Creation::Done(id) => id,
        Creation::NoSuchDataset => {
            let problem = Problem::new("/dataset", format!("there is no dataset {dataset}"));
            return Err(ApiError::InvalidBody(vec![problem]));
        }
        Creation::CheckpointDeleted => {
            let problem = Problem::new("/tokenizer_checkpoint", "was deleted");
            return Err(ApiError::InvalidBody(vec![problem]));
        }
        Creation::DatasetNotReady(state) => return Err(ApiError::DatasetNotReady(state_name(state))),
    };
    tracing::info!(tokenization.id = %id, dataset.id = %dataset, "tokenization queued");
    Ok((StatusCode::CREATED, Json(find(&state, &caller, &id).await?)))
}

fn learned_vocab_size(asked: Option<i64>, problems: &mut Vec<Problem>) -> i64 {
    let vocab_size = asked.unwrap_or(8_192);
    if !(260..=65_536).contains(&vocab_size) {
        problems.push(Problem::new("/vocab_size", format!("{vocab_size} is out of range: from 260 to 65536")));
    }
    vocab_size
}

/// The vocabulary of the checkpoint's model, whose tokenizer must be one that can be used.
async fn checkpoint_vocab_size(
    state: &AppState,
    caller: &Caller,
    id: &NodeId,
    asked: Option<i64>,
    problems: &mut Vec<Problem>,
) -> ApiResult<i64> {
    const POINTER: &str = "/tokenizer_checkpoint";
    if asked.is_some() {
        problems.push(Problem::new("/vocab_size", "does not go with tokenizer_checkpoint, which has a vocabulary"));
    }
    let mut connection = state.pool.acquire().await?;
    let Some(facts) = imports::find_facts(&mut connection, &caller.project, id).await? else {
        problems.push(Problem::new(POINTER, format!("there is no checkpoint and no base {id}")));
        return Ok(0);
    };
    drop(connection);
    if facts.tokenizer_sha256.is_none() {
        problems.push(Problem::new(POINTER, format!("{id} has no tokenizer.json")));
    } else if find_end_of_text(state, caller, id).await?.is_none() {
        let message = format!(
            "{id} does not say which token ends a text: its tokenizer_config.json has no eos_token, its \
            config.json no eos_token_id"
        );
        problems.push(Problem::new(POINTER, message));
    }
    Ok(facts.model.vocab_size)
}

async fn find_end_of_text(state: &AppState, caller: &Caller, id: &NodeId) -> ApiResult<Option<EndOfText>> {
    let mut contents = Vec::new();
    for file in db::lineage::list_files(&state.pool, &caller.project, &[id.to_string()]).await? {
        if END_OF_TEXT_FILES.contains(&file.name.as_str()) {
            let limit_bytes = max_bytes(&file.name).unwrap_or_default();
            contents.push((file.name, state.store.get_bytes(&Key::from(file.object_key), limit_bytes).await?));
        }
    }
    Ok(end_of_text(|name| {
        let (_, content) = contents.iter().find(|(known, _)| known == name)?;
        serde_json::from_slice(content).ok()
    }))
}

/// List tokenizations
///
/// The newest first.
#[utoipa::path(get, path = "/v1/tokenizations", tag = "tokenizations", params(ListTokenizationsQuery),
    responses((status = 200, description = "A page of tokenizations", body = TokenizationPage), CallerErrors, QueryErrors))]
pub async fn list_tokenizations(
    caller: Caller,
    State(state): State<AppState>,
    Query(query): Query<ListTokenizationsQuery>,
) -> ApiResult<Json<TokenizationPage>> {
    let dataset = query.dataset.as_ref().map(DatasetId::as_str);
    let cursor = query.cursor.as_ref().map(Cursor::as_str);
    let rows = tokenizations::list(&state.pool, &caller.project, dataset, cursor, query.limit.with_next()).await?;
    let (rows, next_cursor) = query.limit.cut(rows, |row| row.id.as_str());
    Ok(Json(TokenizationPage { data: with_files(&state, &caller, rows).await?, next_cursor }))
}

/// Look at a tokenization
#[utoipa::path(get, path = "/v1/tokenizations/{tokenization_id}", tag = "tokenizations",
    params(("tokenization_id" = String, Path)),
    responses((status = 200, description = "The tokenization", body = Tokenization), CallerErrors, NotFoundError))]
pub async fn find_tokenization(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<TokenizationId>,
) -> ApiResult<Json<Tokenization>> {
    Ok(Json(find(&state, &caller, &id).await?))
}

/// Delete a tokenization
///
/// Refused while a job uses it or a worker is busy with it.
#[utoipa::path(delete, path = "/v1/tokenizations/{tokenization_id}", tag = "tokenizations",
    params(("tokenization_id" = String, Path)),
    responses((status = 204, description = "It is gone"), CallerErrors, NotFoundError, ConflictError))]
pub async fn delete_tokenization(
    caller: Caller,
    State(state): State<AppState>,
    Path(id): Path<TokenizationId>,
) -> ApiResult<StatusCode> {
    let deletion = tokenizations::delete(&state.pool, &caller.project, &id).await?;
    finish_deletion(&state, deletion, "tokenization").await
}

async fn find(state: &AppState, caller: &Caller, id: &TokenizationId) -> ApiResult<Tokenization> {
    let row = tokenizations::find(&state.pool, &caller.project, id).await?;
    let mut found = with_files(state, caller, row.into_iter().collect()).await?;
    found.pop().ok_or(ApiError::NotFound("tokenization"))
}

async fn with_files(state: &AppState, caller: &Caller, rows: Vec<TokenizationRow>) -> ApiResult<Vec<Tokenization>> {
    let ids: Vec<_> = rows.iter().map(|row| row.id.to_string()).collect();
    let files = tokenizations::list_files(&state.pool, &caller.project, &ids).await?;
    Ok(rows.into_iter().map(|row| response(row, &files)).collect())
}

fn response(row: TokenizationRow, files: &[TokenizationFileRow]) -> Tokenization {
    let files = files.iter().filter(|file| file.tokenization == row.id);
    Tokenization {
        files: files
            .map(|file| TokenizationFile {
                name: file.name.clone(),
                size_bytes: file.size_bytes,
                sha256: file.sha256.clone(),
            })
            .collect(),
        id: row.id,
        dataset: row.dataset,
        state: row.state,
        tokenizer_checkpoint: row.tokenizer_checkpoint,
        vocab_size: row.vocab_size,
        validation_frac: row.validation_frac,
        tokenizer_vocab_size: row.tokenizer_vocab_size,
        train_tokens: row.train_tokens,
        valid_tokens: row.valid_tokens,
        train_documents: row.train_documents,
        valid_documents: row.valid_documents,
        failure: row.failure.map(|failure| failure.0),
        created_at: row.created_at,
    }
}

fn state_name(state: DatasetState) -> &'static str {
    match state {
        DatasetState::Empty => "empty",
        DatasetState::Uploading => "uploading",
        DatasetState::Ready => "ready",
        DatasetState::Failed => "failed",
    }
}
