//! The OpenAPI document, apart from its operations.

use std::sync::LazyLock;

use axum::Json;
use utoipa::{
    Modify,
    openapi::{
        OpenApi, RefOr, Schema,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::{auth::Caller, error::ProblemDetails, responses::CallerErrors, router};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "relora",
        description = "Pretrain language models with ReLoRA: upload text, submit a job, watch it, download weights.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    components(schemas(ProblemDetails)),
    modifiers(&BearerKey),
    security(("api_key" = [])),
    tags(
        (name = "datasets", description = "Raw text"),
        (name = "tokenizations", description = "Datasets turned into tokens"),
        (name = "jobs", description = "Training jobs"),
        (name = "bases", description = "Full weights where the low-rank training began"),
        (name = "restarts", description = "The LoRA delta of each cycle"),
        (name = "lineage tasks", description = "Restarts that are checked, and weights that are rebuilt"),
        (name = "checkpoints", description = "Full weights: merged by jobs, or from outside"),
        (name = "usage", description = "What is stored"),
        (name = "health", description = "Probes"),
        (name = "document", description = "This document"),
    )
)]
pub struct Document;

struct BearerKey;

impl Modify for BearerKey {
    fn modify(&self, openapi: &mut OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("An API key, `rl_…`"));
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme("api_key", SecurityScheme::Http(scheme.build()));
    }
}

/// Get this document
#[utoipa::path(get, path = "/openapi.json", tag = "document",
    responses((status = 200, description = "The OpenAPI document", body = serde_json::Value), CallerErrors))]
pub async fn get_openapi(_: Caller) -> Json<&'static OpenApi> {
    static DOCUMENT: LazyLock<OpenApi> = LazyLock::new(router::openapi);
    Json(&DOCUMENT)
}

/// Says of responses that every field is there: a value that is missing is null, and never left out.
pub fn complete(mut openapi: OpenApi) -> OpenApi {
    let schemas = openapi.components.iter_mut().flat_map(|components| components.schemas.iter_mut());
    for (_, schema) in schemas.filter(|(name, _)| !name.ends_with("Request")) {
        require_all(schema);
    }
    openapi
}

fn require_all(schema: &mut RefOr<Schema>) {
    match schema {
        RefOr::T(Schema::Object(object)) => object.required = object.properties.keys().cloned().collect(),
        RefOr::T(Schema::AllOf(parts)) => parts.items.iter_mut().for_each(require_all),
        RefOr::T(Schema::OneOf(choices)) => choices.items.iter_mut().for_each(require_all),
        _ => {}
    }
}
