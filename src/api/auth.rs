//! Who is calling: an API key names its project and what it may do there.

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};

use super::{AppState, error::ApiError};
use crate::{db::keys, domain::ids::ProjectId};

/// A caller whose key has the scope that the request's method needs: `read` to look, `write` to change.
#[derive(Debug)]
pub struct Caller {
    pub project: ProjectId,
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let key = bearer(&parts.headers).ok_or(ApiError::Unauthenticated)?;
        let grant = keys::find_grant(&state.pool, key).await?.ok_or(ApiError::Unauthenticated)?;

        let scope = if parts.method.is_safe() { "read" } else { "write" };
        if !grant.scopes.iter().any(|granted| granted == scope) {
            return Err(ApiError::MissingScope(scope));
        }
        Ok(Self { project: grant.project })
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}
