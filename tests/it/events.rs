use std::time::{Duration, Instant};

use futures_util::StreamExt;
use relora::{
    db::events::{self, NewEvent},
    domain::{ids::JobId, job::EventType},
};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::time::timeout;

use crate::app::TestApp;

async fn append(app: &TestApp, job: &str, kind: EventType) {
    let job = JobId::from(job.to_owned());
    let event = NewEvent { kind, lease_epoch: Some(1), message: "happened", data: json!({"step": 1}) };
    events::append(&mut app.pool.acquire().await.unwrap(), &job, event).await.unwrap();
}

/// One message of an event stream.
#[derive(Debug, Default, PartialEq)]
struct Message {
    id: Option<i64>,
    event: String,
    data: Value,
}

/// An open event stream.
struct Messages {
    chunks: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    text: String,
}

impl Messages {
    async fn open(app: &TestApp, job: &str, last_event_id: Option<i64>) -> Self {
        let mut request = app.request(Method::GET, &format!("/v1/jobs/{job}/events/stream"));
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
        Self { chunks: Box::pin(response.bytes_stream()), text: String::new() }
    }

    /// The next message; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let message = parse(block);
                self.text = rest.to_owned();
                match message {
                    Some(message) => return Some(message),
                    None => continue,
                }
            }
            let chunk = timeout(Duration::from_secs(20), self.chunks.next()).await.expect("the stream fell silent")?;
            self.text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
        }
    }
}

fn parse(block: &str) -> Option<Message> {
    let mut message = Message::default();
    for line in block.lines() {
        match line.split_once(": ") {
            Some(("id", id)) => message.id = Some(id.parse().unwrap()),
            Some(("event", event)) => message.event = event.to_owned(),
            Some(("data", data)) => message.data = serde_json::from_str(data).unwrap(),
            _ => {}
        }
    }
    (!message.event.is_empty()).then_some(message)
}

#[sqlx::test]
async fn events_are_listed_in_order_and_in_pages(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    for kind in [EventType::Claimed, EventType::Started, EventType::Checkpoint] {
        append(&app, &id, kind).await;
    }
    let page = app.list_job_events(&id, "?limit=3").await.json();
    let seqs: Vec<_> = page["data"].as_array().unwrap().iter().map(|e| e["seq"].as_i64().unwrap()).collect();
    assert_eq!(seqs, [1, 2, 3]);
    assert_eq!(page["next_cursor"], 3);
    assert_eq!(page["data"][0]["type"], "submitted");
    assert_eq!(page["data"][0]["lease_epoch"], json!(null));
    assert_eq!(page["data"][1]["lease_epoch"], 1);
    let rest = app.list_job_events(&id, "?after=3").await.json();
    assert_eq!((rest["data"][0]["type"].clone(), rest["next_cursor"].clone()), (json!("checkpoint"), json!(4)));
    let none = app.list_job_events(&id, "?after=4").await.json();
    assert_eq!(none, json!({"data": [], "next_cursor": 4}));
    for bad in ["?after=-1", "?wait_s=31", "?wait_s=-1", "?limit=0"] {
        assert_eq!(app.list_job_events(&id, bad).await.status, 400, "{bad}");
    }
}

#[sqlx::test]
async fn a_list_waits_for_news(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    let began = Instant::now();
    let (page, ()) = tokio::join!(app.list_job_events(&id, "?after=1&wait_s=20"), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        append(&app, &id, EventType::Claimed).await;
    });
    assert_eq!(page.json()["data"][0]["type"], "claimed");
    assert!(began.elapsed() < Duration::from_secs(10));

    let began = Instant::now();
    let empty = app.list_job_events(&id, "?after=2&wait_s=1").await.json();
    assert_eq!(empty["data"], json!([]));
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[sqlx::test]
async fn a_stream_replays_goes_on_live_and_ends_with_the_job(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    append(&app, &id, EventType::Claimed).await;
    let mut stream = Messages::open(&app, &id, None).await;
    for (seq, kind) in [(1, "submitted"), (2, "claimed")] {
        let message = stream.next().await.unwrap();
        assert_eq!((message.id, message.event.as_str()), (Some(seq), kind));
        assert_eq!(message.data["seq"], seq);
    }
    let progress = stream.next().await.unwrap();
    assert_eq!((progress.id, progress.event.as_str()), (None, "progress"));
    assert_eq!(progress.data["num_steps"], 40);

    append(&app, &id, EventType::Started).await;
    assert_eq!(stream.next().await.unwrap().event, "started");
    sqlx::query("insert into job_progress (job_id, lease_epoch, step, loss, num_tokens, num_restarts) values ($1, 1, 7, 3.5, 9, 0)")
        .bind(&id)
        .execute(&app.pool)
        .await
        .unwrap();
    let progress = stream.next().await.unwrap();
    assert_eq!((progress.event.as_str(), progress.data["step"].as_i64()), ("progress", Some(7)));

    app.cancel_job(&id).await;
    let cancelled = stream.next().await.unwrap();
    assert_eq!((cancelled.id, cancelled.event.as_str()), (Some(4), "cancelled"));
    let end = stream.next().await.unwrap();
    assert_eq!((end.event.as_str(), &end.data), ("end", &json!({"state": "cancelled"})));
    assert_eq!(stream.next().await, None);
}

#[sqlx::test]
async fn a_stream_goes_on_after_the_last_event_that_the_client_has(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    for _ in 0..450 {
        append(&app, &id, EventType::Eval).await;
    }
    app.cancel_job(&id).await;
    let mut stream = Messages::open(&app, &id, Some(2)).await;
    let mut seqs = Vec::new();
    while let Some(message) = stream.next().await {
        seqs.extend(message.id);
    }
    assert_eq!(seqs, (3..=452).collect::<Vec<_>>());

    let garbage = app.request(Method::GET, &format!("/v1/jobs/{id}/events/stream")).header("last-event-id", "x");
    assert_eq!(crate::app::send(garbage).await.problem(400).0, "invalid_header");
}

#[sqlx::test]
async fn a_stream_survives_the_loss_of_the_listening_connection(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    let mut stream = Messages::open(&app, &id, None).await;
    assert_eq!(stream.next().await.unwrap().event, "submitted");
    assert_eq!(stream.next().await.unwrap().event, "progress");
    sqlx::query(
        "select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid() and query like 'LISTEN%'",
    )
    .execute(&app.pool)
    .await
    .unwrap();
    append(&app, &id, EventType::Claimed).await;
    assert_eq!(stream.next().await.unwrap().event, "claimed");
}

#[sqlx::test]
async fn streams_and_waits_end_when_the_server_stops(pool: PgPool) {
    let app = TestApp::start(pool).await;
    let id = app.given_job().await;
    let mut stream = Messages::open(&app, &id, Some(1)).await;
    assert_eq!(stream.next().await.unwrap().event, "progress");
    let began = Instant::now();
    let (page, ()) = tokio::join!(app.list_job_events(&id, "?after=1&wait_s=30"), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        app.shutdown.trigger();
    });
    assert_eq!(page.json()["data"], json!([]));
    assert_eq!(stream.next().await, None);
    assert!(began.elapsed() < Duration::from_secs(10));
}
