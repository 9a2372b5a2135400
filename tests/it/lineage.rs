use bytes::Bytes;
use relora::{domain::ids::NodeId, storage::Key};
use reqwest::Method;
use serde_json::json;
use sha2::{Digest, Sha256};
use sqlx::PgPool;

use crate::app::{Answer, TestApp, send};

const WEIGHTS: &[u8] = b"0123456789";

struct Lineage {
    job: String,
    base: String,
    restart: String,
    checkpoint: String,
    superseded: String,
}

/// A node of two files, 12 bytes, that are in the store.
pub async fn insert_node(app: &TestApp, job: &str, kind: &str, step: i64, parent: Option<&str>) -> String {
    let id = NodeId::new().to_string();
    sqlx::query(
        "insert into nodes (id, project_id, job_id, parent_id, kind, lease_epoch, step, restart)
         values ($1, $2, $3, $4, $5, 1, $6, 0)",
    )
    .bind(&id)
    .bind(app.project().await)
    .bind(job)
    .bind(parent)
    .bind(kind)
    .bind(step)
    .execute(&app.pool)
    .await
    .unwrap();
    for (name, content) in [("model.safetensors", WEIGHTS), ("config.json", b"{}")] {
        let key = format!("j/{job}/1/{kind}/{step}/{name}");
        let stored = app.store.put_bytes(&Key::from(key.clone()), Bytes::from_static(content)).await.unwrap();
        sqlx::query(
            "insert into node_files (node_id, name, object_key, size_bytes, sha256) values ($1, $2, $3, $4, $5)",
        )
        .bind(&id)
        .bind(name)
        .bind(key)
        .bind(stored.bytes as i64)
        .bind(stored.sha256)
        .execute(&app.pool)
        .await
        .unwrap();
    }
    id
}

async fn given_lineage(app: &TestApp) -> Lineage {
    let job = app.given_job().await;
    let base = insert_node(app, &job, "base", 10, None).await;
    let restart = insert_node(app, &job, "restart", 20, Some(&base)).await;
    let checkpoint = insert_node(app, &job, "checkpoint", 20, Some(&restart)).await;
    let superseded = insert_node(app, &job, "checkpoint", 30, Some(&restart)).await;
    insert_node(app, &job, "state", 25, Some(&restart)).await;
    sqlx::query("update nodes set superseded = true where id = $1").bind(&superseded).execute(&app.pool).await.unwrap();
    Lineage { job, base, restart, checkpoint, superseded }
}

fn ids(answer: &Answer) -> Vec<String> {
    answer.json()["data"].as_array().unwrap().iter().map(|node| node["id"].as_str().unwrap().to_owned()).collect()
}

#[sqlx::test]
async fn the_three_kinds_of_node_are_listed_apart(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let lineage = given_lineage(&app).await;
    let job = &lineage.job;
    assert_eq!(ids(&app.get(&format!("/v1/bases?job={job}")).await), std::slice::from_ref(&lineage.base));
    assert_eq!(ids(&app.get(&format!("/v1/restarts?job={job}")).await), std::slice::from_ref(&lineage.restart));
    assert_eq!(ids(&app.get(&format!("/v1/checkpoints?job={job}")).await), std::slice::from_ref(&lineage.checkpoint));
    let all = app.get(&format!("/v1/checkpoints?job={job}&include_superseded=true")).await;
    assert_eq!(ids(&all), [lineage.superseded.clone(), lineage.checkpoint.clone()]);
    let page = app.get("/v1/checkpoints?include_superseded=true&limit=1").await;
    assert_eq!(ids(&page), [lineage.superseded]);
    assert_eq!(page.json()["next_cursor"], page.json()["data"][0]["id"]);
    assert_eq!(ids(&app.get("/v1/checkpoints?job=job_other").await), [""; 0]);
}

#[sqlx::test]
async fn a_node_names_its_parent_and_its_files(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let lineage = given_lineage(&app).await;
    let path = format!("/v1/checkpoints/{}", lineage.checkpoint);
    let node = app.get(&path).await.json();
    assert_eq!(node["kind"], "checkpoint");
    assert_eq!(node["parent"], lineage.restart);
    assert_eq!((&node["step"], &node["size_bytes"]), (&json!(20), &json!(12)));
    let file = json!({
        "name": "model.safetensors",
        "size_bytes": 10,
        "sha256": hex::encode(Sha256::digest(WEIGHTS)),
        "url": format!("{path}/files/model.safetensors"),
    });
    assert_eq!(node["files"][1], file);
    assert_eq!(app.get(&format!("{path}/files")).await.json()["data"], node["files"]);
    assert_eq!(app.get(&format!("/v1/bases/{}", lineage.checkpoint)).await.status, 404, "of another kind");
    assert_eq!(app.get(&format!("/v1/checkpoints/{}", lineage.superseded)).await.json()["superseded"], true);
    for (collection, id) in [("bases", &lineage.base), ("restarts", &lineage.restart)] {
        let url = format!("/v1/{collection}/{id}/files/model.safetensors");
        assert_eq!(app.get(&format!("/v1/{collection}/{id}")).await.json()["files"][1]["url"], url);
        assert_eq!(app.get(&url).await.bytes, WEIGHTS);
    }
}

#[sqlx::test]
async fn a_file_is_downloaded_whole_or_in_ranges(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let lineage = given_lineage(&app).await;
    let path = format!("/v1/checkpoints/{}/files/model.safetensors", lineage.checkpoint);
    let get = |headers: &[(&str, &str)]| {
        let request = headers.iter().fold(app.request(Method::GET, &path), |r, (name, value)| r.header(*name, *value));
        send(request)
    };

    let whole = get(&[]).await;
    assert_eq!((whole.status.as_u16(), &whole.bytes[..]), (200, WEIGHTS));
    let etag = whole.header("etag").to_owned();
    assert_eq!(etag, format!("\"{}\"", hex::encode(Sha256::digest(WEIGHTS))));
    assert_eq!(whole.header("accept-ranges"), "bytes");
    assert_eq!(whole.header("content-length"), "10");
    assert_eq!(whole.header("repr-digest"), format!("sha-256=:{}:", digest()));

    for (range, bytes, content_range) in [
        ("bytes=2-4", &b"234"[..], "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-2", b"89", "bytes 8-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
    ] {
        let part = get(&[("range", range)]).await;
        assert_eq!((part.status.as_u16(), &part.bytes[..]), (206, bytes), "{range}");
        assert_eq!(part.header("content-range"), content_range);
        assert_eq!(part.header("etag"), etag);
    }
    let outside = get(&[("range", "bytes=10-")]).await;
    assert_eq!(outside.problem(416).0, "range_not_satisfiable");
    assert_eq!(outside.header("content-range"), "bytes */10");

    assert_eq!(get(&[("range", "bytes=2-4"), ("if-range", &etag)]).await.status, 206);
    assert_eq!(get(&[("range", "bytes=2-4"), ("if-range", "\"other\"")]).await.bytes, WEIGHTS);
    let known = get(&[("if-none-match", &format!("\"x\", W/{etag}"))]).await;
    assert_eq!((known.status.as_u16(), known.bytes.len()), (304, 0));

    let head = send(app.request(Method::HEAD, &path)).await;
    assert_eq!((head.status.as_u16(), head.header("content-length"), head.bytes.len()), (200, "10", 0));
    let missing = app.get(&format!("/v1/checkpoints/{}/files/other", lineage.checkpoint)).await;
    assert_eq!(missing.problem(404).0, "not_found");
}

fn digest() -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    STANDARD.encode(Sha256::digest(WEIGHTS))
}

#[sqlx::test]
async fn a_download_is_redirected_to_a_store_that_clients_reach(pool: PgPool) {
    let app = TestApp::start_with_public_store(pool).await;
    let lineage = given_lineage(&app).await;
    let path = format!("/v1/checkpoints/{}/files/model.safetensors", lineage.checkpoint);
    let redirect = app.get(&path).await;
    assert_eq!(redirect.status, 307);
    let location = redirect.header("location");
    let plain = location.strip_prefix("http://").unwrap();
    let (host, rest) = plain.split_once('/').unwrap();
    assert_ne!(host, app.address.to_string());
    assert_eq!(fetch(host, rest).await, WEIGHTS);

    assert_eq!(app.get(&format!("{path}?proxy=true")).await.bytes, WEIGHTS);
    assert_eq!(send(app.request(Method::HEAD, &path)).await.status, 200, "a presigned URL is good for GET alone");
}

/// As a client without our key would.
async fn fetch(host: &str, path: &str) -> Vec<u8> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let request = format!("GET /{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    answer[body..].to_vec()
}
