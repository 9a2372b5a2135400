//! Bodies: what is too much, what is no form, and what ends early.

use std::time::Duration;

use futures_util::stream;
use reqwest::{
    Body, Method,
    multipart::{Form, Part},
};
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{assert_refused, config, files, import, import_form, num_nodes};
use crate::app::{MAX_UPLOAD_BYTES, TestApp, send};

#[sqlx::test]
async fn what_is_too_large_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let large = |size_bytes: u64| {
        let chunks = (0..size_bytes / 65_536 + 1).map(|_| Ok::<_, std::io::Error>(vec![b' '; 65_536]));
        Part::stream(Body::wrap_stream(stream::iter(chunks)))
    };
    let form = |name: &'static str, size_bytes| Form::new().part("file", large(size_bytes).file_name(name));
    let answer = import_form(&app, form("model.safetensors", MAX_UPLOAD_BYTES)).await;
    assert_eq!(answer.problem(413).0, "too_large");
    assert_eq!(app.stored_objects(), [""; 0]);
    let answer = import_form(&app, form("config.json", 2 << 20)).await;
    assert_refused(&app, &answer, &["/config.json"]);
    assert!(answer.text().contains("65536 bytes"), "{}", answer.text());
}

#[sqlx::test]
async fn a_body_that_is_no_form_is_refused(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let post = |content_type: &'static str, body: Vec<u8>| {
        send(app.request(Method::POST, "/v1/checkpoints").header("content-type", content_type).body(body))
    };
    for content_type in ["application/json", "multipart/form-data", "text/plain"] {
        assert_eq!(post(content_type, b"{}".to_vec()).await.problem(415).0, "unsupported_media_type");
    }
    let form = "multipart/form-data; boundary=x";
    for body in
        ["", "--y\r\n\r\n", "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"config.json\"\r\n\r\n{"]
    {
        assert_eq!(post(form, body.into()).await.problem(400).0, "malformed_multipart", "{body:?}");
    }
    let header = [b"--x\r\nX-Long: ".to_vec(), vec![b'a'; 4 << 20]].concat();
    let (code, detail) = post(form, header).await.problem(400);
    assert_eq!(code, "malformed_multipart");
    assert!(detail.contains("header of a part is too long"), "{detail}");
    assert_eq!(app.stored_objects(), [""; 0]);
}

#[sqlx::test]
async fn an_import_that_breaks_off_leaves_nothing(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let mut connection = begin_import(&app, &config().to_string(), 10_000).await;
    connection.write_all(b"abc").await.unwrap();
    until(|| !app.stored_objects().is_empty()).await;
    drop(connection);
    until(|| app.stored_objects().is_empty()).await;
    assert_eq!(num_nodes(&app).await, 0);
}

#[sqlx::test]
async fn a_server_that_stops_or_has_no_space_takes_nothing(pool: PgPool) {
    let full = TestApp::start_without_space(pool).await;
    assert_eq!(import(&full, files()).await.problem(503).0, "unavailable");
    assert_eq!((num_nodes(&full).await, full.stored_objects().len()), (0, 0));

    let app = TestApp::start(full.pool.clone()).await;
    let mut connection = TcpStream::connect(app.address).await.unwrap();
    let head = format!(
        "POST /v1/checkpoints HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
         content-type: multipart/form-data; boundary=x\r\ncontent-length: 200\r\n\r\n\
         --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"config.json\"\r\n\r\n{{}}\r\n--x\r\n",
        full.key
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    until(|| !app.stored_objects().is_empty()).await;
    app.shutdown.trigger();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("stopping"), "{answer}");
    assert_eq!((num_nodes(&app).await, app.stored_objects().len()), (0, 0));
}

#[sqlx::test]
async fn an_import_that_breaks_off_in_a_large_file_leaves_no_part_of_it(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let mut connection = begin_import(&app, &config().to_string(), 30 << 20).await;
    connection.write_all(&vec![b'a'; 20 << 20]).await.unwrap();
    until(|| !app.open_uploads().is_empty()).await;
    drop(connection);
    until(|| app.open_uploads().is_empty() && app.stored_objects().is_empty()).await;
    assert_eq!(num_nodes(&app).await, 0);
}

#[sqlx::test]
async fn a_model_that_is_refused_is_refused_before_its_weights_have_come(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let config = config().to_string().replace("silu", "gelu");
    // Of the weights nothing comes but the head of their part.
    let mut connection = begin_import(&app, &config, 30 << 20).await;
    let mut answer = [0; 1 << 12];
    let len = timeout(Duration::from_secs(30), connection.read(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8_lossy(&answer[..len]);
    assert!(answer.starts_with("HTTP/1.1 422"), "{answer}");
    until(|| app.stored_objects().is_empty()).await;
}

/// Sends a configuration and the beginning of the weights, of a form that is said to have `len_bytes`.
async fn begin_import(app: &TestApp, config: &str, len_bytes: usize) -> TcpStream {
    let mut connection = TcpStream::connect(app.address).await.unwrap();
    let head = format!(
        "POST /v1/checkpoints HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         content-type: multipart/form-data; boundary=x\r\ncontent-length: {len_bytes}\r\n\r\n\
         --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"config.json\"\r\n\r\n{config}\r\n\
         --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"model.safetensors\"\r\n\r\n",
        app.key
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    connection
}

async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(60), wait).await.expect("the condition never held");
}
