use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use relora::storage::Key;
use reqwest::{Body, Method};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::app::{MAX_UPLOAD_BYTES, TestApp, send, spec};

/// Waits until the dataset is in the state, and returns it.
async fn wait_for_state(app: &TestApp, id: &str, state: &str) -> Value {
    for _ in 0..200 {
        let dataset = app.find_dataset(id).await.json();
        if dataset["state"] == state {
            return dataset;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never {state}: {}", app.find_dataset(id).await.text());
}

async fn object_key(app: &TestApp, id: &str) -> String {
    sqlx::query_scalar("select 'd/' || id || '/' || upload_token from datasets where id = $1")
        .bind(id)
        .fetch_one(&app.pool)
        .await
        .unwrap()
}

async fn is_stored(app: &TestApp, id: &str) -> bool {
    app.store.head(&Key::from(object_key(app, id).await)).await.unwrap().is_some()
}

#[sqlx::test]
async fn a_text_is_uploaded_and_downloaded_as_it_was(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_empty_dataset().await;
    let empty = app.find_dataset(&id).await.json();
    assert_eq!((&empty["state"], &empty["size_bytes"]), (&json!("empty"), &json!(null)));
    assert_eq!(app.get(&format!("/v1/datasets/{id}/content")).await.problem(409).0, "no_content");

    let answer = app.upload_dataset_content(&id, "text/plain; charset=utf-8", "naïve — 漢字").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let dataset = answer.json();
    assert_eq!(dataset["state"], "ready");
    assert_eq!(dataset["format"], "text");
    assert_eq!(dataset["num_documents"], 1);
    assert_eq!(dataset["size_bytes"], "naïve — 漢字".len());
    assert_eq!(dataset["sha256"], hex::encode(Sha256::digest("naïve — 漢字")));
    assert_eq!(dataset, app.find_dataset(&id).await.json());

    let content = app.get(&format!("/v1/datasets/{id}/content")).await;
    assert_eq!(content.text(), "naïve — 漢字");
    assert_eq!(content.header("etag"), format!("\"{}\"", dataset["sha256"].as_str().unwrap()));
}

#[sqlx::test]
async fn json_lines_in_many_chunks_are_counted(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_empty_dataset().await;
    let line = format!("{{\"text\":\"{}\",\"source\":\"a.py\"}}\n", "é".repeat(5_000));
    let content = line.repeat(1_800);
    assert!(content.len() > 16 << 20, "more than one part");
    let chunks: Vec<_> =
        content.as_bytes().chunks(65_537).map(|c| Ok::<_, std::io::Error>(Bytes::copy_from_slice(c))).collect();

    let answer = app.upload_dataset_content(&id, "application/jsonl", Body::wrap_stream(stream::iter(chunks))).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["num_documents"], 1_800);
    assert_eq!(answer.json()["sha256"], hex::encode(Sha256::digest(&content)));
    let range =
        app.request(Method::GET, &format!("/v1/datasets/{id}/content")).header("range", "bytes=17000000-17000099");
    assert_eq!(send(range).await.bytes, &content.as_bytes()[17_000_000..17_000_100]);
}

#[sqlx::test]
async fn content_that_is_not_utf8_is_refused_with_the_offset(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_empty_dataset().await;
    let mut content = "é".repeat(500_000).into_bytes();
    content.push(0xff);
    content.extend_from_slice(&[b'a'; 100_000]);

    let answer = app.upload_dataset_content(&id, "text/plain", content).await;
    let (code, detail) = answer.problem(422);
    assert_eq!(code, "not_utf8");
    assert!(detail.contains("offset 1000000"), "{detail}");
    let dataset = app.find_dataset(&id).await.json();
    assert_eq!(dataset["state"], "failed");
    assert_eq!(dataset["error"], detail);
    assert!(!is_stored(&app, &id).await);

    let cut = app.upload_dataset_content(&id, "text/plain", &b"ab\xe6\xbc"[..]).await;
    assert!(cut.problem(422).1.contains("offset 2"));
}

#[sqlx::test]
async fn a_line_that_is_no_document_is_refused_with_its_number_and_offset(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_empty_dataset().await;
    let content = "{\"text\":\"a\"}\n{\"text\":\"b\"}\n{\"body\":\"c\"}\n";
    let answer = app.upload_dataset_content(&id, "application/jsonl", content).await;
    let (code, detail) = answer.problem(422);
    assert_eq!(code, "invalid_line");
    assert!(detail.starts_with("line 3, which begins at byte 26: "), "{detail}");

    let again = app.upload_dataset_content(&id, "application/jsonl", "{\"text\":\"a\"}").await;
    assert_eq!(again.status, 200, "a failed upload may be followed by another one");
    assert_eq!(again.json()["error"], json!(null));
}

#[sqlx::test]
async fn an_upload_that_breaks_off_leaves_the_dataset_failed_and_nothing_in_the_store(pool: PgPool) {
    let app = TestApp::start(pool).await;
    for head in ["content-length: 1000000", "transfer-encoding: chunked"] {
        let id = app.given_empty_dataset().await;
        let mut connection = TcpStream::connect(app.address).await.unwrap();
        let request = format!(
            "PUT /v1/datasets/{id}/content HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
             content-type: text/plain\r\n{head}\r\n\r\n186a0\r\n",
            app.key
        );
        connection.write_all(request.as_bytes()).await.unwrap();
        connection.write_all(&[b'a'; 99_000]).await.unwrap();
        wait_for_state(&app, &id, "uploading").await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        drop(connection);

        let dataset = wait_for_state(&app, &id, "failed").await;
        let error = dataset["error"].as_str().unwrap();
        assert!(error.contains("broke off after 99"), "{head}: {error}");
        assert!(!is_stored(&app, &id).await);
    }
}

#[sqlx::test]
async fn a_stop_of_the_server_ends_an_upload_as_failed(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let other = app.start_another().await;
    let id = app.given_empty_dataset().await;
    let mut connection = TcpStream::connect(other.address).await.unwrap();
    let head = format!(
        "PUT /v1/datasets/{id}/content HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         content-type: text/plain\r\ncontent-length: 1000\r\n\r\nabc",
        app.key
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    wait_for_state(&app, &id, "uploading").await;
    other.shutdown.trigger();
    let dataset = wait_for_state(&app, &id, "failed").await;
    assert!(dataset["error"].as_str().unwrap().contains("stopping"), "{dataset}");
    drop(connection);
}

#[sqlx::test]
async fn the_later_of_two_uploads_wins(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_empty_dataset().await;
    let mut slow = TcpStream::connect(app.address).await.unwrap();
    let head = format!(
        "PUT /v1/datasets/{id}/content HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
         content-type: text/plain\r\ncontent-length: 4\r\n\r\nslo",
        app.key
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    wait_for_state(&app, &id, "uploading").await;
    let slow_key = object_key(&app, &id).await;

    assert_eq!(app.upload_dataset_content(&id, "text/plain", "fast").await.status, 200);
    slow.write_all(b"w").await.unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 409") && answer.contains("upload_superseded"), "{answer}");
    assert_eq!(app.get(&format!("/v1/datasets/{id}/content")).await.text(), "fast");
    assert!(app.store.head(&Key::from(slow_key)).await.unwrap().is_none());
}

#[sqlx::test]
async fn content_is_refused_that_is_empty_too_large_of_another_type_or_there_already(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_empty_dataset().await;
    assert_eq!(app.upload_dataset_content(&id, "text/plain", "").await.problem(422).0, "empty_content");
    assert_eq!(app.upload_dataset_content(&id, "application/jsonl", "").await.problem(422).0, "empty_content");
    let typeless = send(app.request(Method::PUT, &format!("/v1/datasets/{id}/content")).body("x")).await;
    assert_eq!(typeless.problem(415).0, "unsupported_media_type");
    let zip = app.upload_dataset_content(&id, "application/zip", "x").await;
    assert_eq!(zip.problem(415).0, "unsupported_media_type");

    // Of unknown length, so that only counting finds it out.
    let chunks =
        (0..MAX_UPLOAD_BYTES / 65_536 + 1).map(|_| Ok::<_, std::io::Error>(Bytes::from_static(&[b'a'; 65_536])));
    let large = app.upload_dataset_content(&id, "text/plain", Body::wrap_stream(stream::iter(chunks))).await;
    assert_eq!(large.problem(413).0, "too_large");

    assert_eq!(app.upload_dataset_content(&id, "text/plain", "x").await.status, 200);
    assert_eq!(app.upload_dataset_content(&id, "text/plain", "y").await.problem(409).0, "already_uploaded");
    assert_eq!(app.get(&format!("/v1/datasets/{id}/content")).await.text(), "x");
}

#[sqlx::test]
async fn a_body_announced_as_too_large_is_refused_unread(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_empty_dataset().await;
    let mut connection = TcpStream::connect(app.address).await.unwrap();
    let head = format!(
        "PUT /v1/datasets/{id}/content HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         content-type: text/plain\r\ncontent-length: 999999999999\r\n\r\n",
        app.key
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    connection.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    assert_eq!(app.find_dataset(&id).await.json()["state"], "empty");
}

#[sqlx::test]
async fn a_dataset_in_use_is_not_deleted_and_its_users_are_named(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let (dataset, tokenization) = app.given_tokens().await;
    let job = app.create_job(&spec(&dataset)).await.id();
    let (code, detail) = app.delete(&format!("/v1/datasets/{dataset}")).await.problem(409);
    assert_eq!(code, "in_use");
    assert!(detail.contains(&tokenization) && detail.contains(&job), "{detail}");
    assert_eq!(app.find_dataset(&dataset).await.status, 200);
}

#[sqlx::test]
async fn a_deleted_dataset_is_gone_with_its_object(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_dataset("some text").await;
    let key = Key::from(object_key(&app, &id).await);
    assert!(app.store.head(&key).await.unwrap().is_some());
    let answer = app.delete(&format!("/v1/datasets/{id}")).await;
    assert_eq!((answer.status.as_u16(), answer.bytes.len()), (204, 0));
    assert_eq!(app.find_dataset(&id).await.status, 404);
    assert_eq!(app.delete(&format!("/v1/datasets/{id}")).await.status, 404);
    assert!(app.store.head(&key).await.unwrap().is_none());
}

#[sqlx::test]
async fn a_list_pages_from_the_newest_to_the_oldest_without_gap_or_repeat(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(app.given_empty_dataset().await);
    }
    made.reverse();

    let mut seen = Vec::new();
    let mut path = "/v1/datasets?limit=2".to_owned();
    loop {
        let page = app.get(&path).await.json();
        seen.extend(page["data"].as_array().unwrap().iter().map(|d| d["id"].as_str().unwrap().to_owned()));
        // What is made meanwhile is newer than any page that is still to come.
        app.given_empty_dataset().await;
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/v1/datasets?limit=2&cursor={cursor}");
    }
    assert_eq!(seen, made);
}
