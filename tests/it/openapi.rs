use std::{collections::BTreeSet, fs, path::Path};

use relora::api;
use reqwest::Method;
use serde_json::Value;
use sqlx::PgPool;

use crate::app::{TestApp, send};

fn document() -> Value {
    serde_json::to_value(api::openapi()).unwrap()
}

#[test]
fn the_committed_document_is_in_step_with_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.json");
    let committed: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(committed == document(), "out of step; regenerate it with: relora openapi > openapi/openapi.json");
}

#[sqlx::test]
async fn the_document_is_served_to_whoever_has_a_key(pool: PgPool) {
    let app = TestApp::start(pool).await;
    assert_eq!(app.get("/openapi.json").await.json(), document());
    assert_eq!(send(app.anonymous(Method::GET, "/openapi.json")).await.status, 401);
}

#[test]
fn every_operation_has_a_name_of_its_own_a_tag_and_its_errors() {
    let document = document();
    let mut names = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let name = operation["operationId"].as_str().unwrap();
            assert!(names.insert(name.to_owned()), "{name} twice");
            assert!(name.contains('_'), "{name} says verb and noun");
            assert_eq!(operation["tags"].as_array().unwrap().len(), 1, "{name}");
            let statuses: Vec<_> = operation["responses"].as_object().unwrap().keys().cloned().collect();
            let has = |status: &str| statuses.iter().any(|s| s == status);
            if path.starts_with("/v1") {
                assert!(has("401") && has("403") && has("500") && has("503"), "{name}: {statuses:?}");
            }
            assert_eq!(path.contains('{'), has("404"), "{name}: {statuses:?}");
            if method == "post" && operation["requestBody"].is_object() {
                assert!(has("400") && has("413") && has("415") && has("422"), "{name}: {statuses:?}");
            }
        }
    }
    assert_eq!(names.len(), 48, "{names:?}");
}

#[test]
fn every_schema_that_is_referred_to_exists() {
    let document = document();
    let text = document.to_string();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(schemas.contains_key(name), "{name}");
    }
    for name in ["Job", "TrainSpecRequest", "Dataset", "Tokenization", "Node", "ProblemDetails", "JobState"] {
        assert!(schemas.contains_key(name), "{name}");
    }
    assert_eq!(document["info"]["license"]["identifier"], "MIT OR Apache-2.0");
}

#[test]
fn responses_have_every_field_and_requests_may_leave_some_out() {
    let document = document();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let required = |name: &str| schemas[name]["required"].as_array().unwrap().len();
    for name in ["Job", "JobEvent", "JobProgress", "Dataset", "Node", "ProblemDetails", "ModelSpec"] {
        assert_eq!(required(name), schemas[name]["properties"].as_object().unwrap().len(), "{name}");
    }
    assert_eq!(schemas["TrainSpecRequest"]["required"], serde_json::json!(["dataset", "method", "schedule", "batch"]));
    assert_eq!(schemas["TrainSpecRequest"]["additionalProperties"], false);
    assert!(!document.to_string().contains("\"default\":null"));
}

#[test]
fn the_event_stream_is_documented_without_a_schema() {
    let document = document();
    let stream = &document["paths"]["/v1/jobs/{job_id}/events/stream"]["get"]["responses"]["200"]["content"];
    assert_eq!(stream, &serde_json::json!({"text/event-stream": {}}));
}
