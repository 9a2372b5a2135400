//! Extractors whose refusals are problem+json.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request, rejection::BytesRejection},
    http::{StatusCode, header, request::Parts},
    response::IntoResponse,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{AppState, error::ApiError};
use crate::domain::{json, problem::Problem};

/// Bodies of JSON are small; content is streamed and has a limit of its own.
pub const MAX_JSON_BYTES: usize = 2 << 20;

/// A JSON body, not yet read as anything.
pub struct JsonBody(pub Value);

impl JsonBody {
    /// The body as a `T`, whose fields may all be absent, and every mistake in it.
    pub fn parse<T: DeserializeOwned + Default>(self) -> (T, Vec<Problem>) {
        json::parse(self.0)
    }
}

impl FromRequest<AppState> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        if !is_json(request.headers().get(header::CONTENT_TYPE)) {
            return Err(ApiError::UnsupportedMediaType("application/json"));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(refused_body)?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| ApiError::MalformedJson(error.to_string()))
    }
}

fn is_json(content_type: Option<&header::HeaderValue>) -> bool {
    let media_type = content_type.and_then(|value| value.to_str().ok()).map(media_type);
    media_type.is_some_and(|t| t == "application/json" || (t.starts_with("application/") && t.ends_with("+json")))
}

/// A Content-Type without its parameters, in lower case.
pub fn media_type(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn refused_body(rejection: BytesRejection) -> ApiError {
    let reason = rejection.body_text();
    match rejection.into_response().status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::TooLarge { limit_bytes: MAX_JSON_BYTES as i64 },
        _ => ApiError::MalformedJson(reason),
    }
}

/// A query string; unknown and repeated parameters are refused.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<AppState> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        if parts.uri.query().is_some_and(|query| query.contains("%00")) {
            return Err(ApiError::InvalidQuery("it contains a NUL character".into()));
        }
        let query = axum::extract::Query::from_request_parts(parts, state).await;
        query.map(|axum::extract::Query(value)| Self(value)).map_err(|error| {
            let text = error.body_text();
            let reason = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
            ApiError::InvalidQuery(reason.to_owned())
        })
    }
}

/// Path parameters; a malformed one names nothing.
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<AppState> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        if parts.uri.path().contains("%00") {
            return Err(ApiError::NoRoute);
        }
        let path = axum::extract::Path::from_request_parts(parts, state).await;
        path.map(|axum::extract::Path(value)| Self(value)).map_err(|_| ApiError::NoRoute)
    }
}
