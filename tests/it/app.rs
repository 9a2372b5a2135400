//! A running server with a database, a store and one client method per endpoint.

use std::{
    net::SocketAddr,
    sync::{Arc, Once},
};

use relora::{
    api::{self, AppState, Limits},
    db::keys,
    embedded::S3,
    shutdown::Shutdown,
    storage::Store,
};
use reqwest::{
    Body, Method, RequestBuilder, StatusCode,
    header::{HeaderMap, HeaderName},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tempfile::TempDir;
use tokio::net::TcpListener;

pub const MAX_UPLOAD_BYTES: u64 = 32 << 20;

/// A server of its own for each test; dropping it ends it.
pub struct TestApp {
    pub address: SocketAddr,
    pub key: String,
    pub pool: PgPool,
    pub store: Store,
    pub shutdown: Shutdown,
    client: reqwest::Client,
    _folder: Arc<TempDir>,
    _s3: Arc<S3>,
}

/// What the server said, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub bytes: Vec<u8>,
}

impl TestApp {
    pub async fn start(pool: PgPool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let s3 = S3::start(folder.path(), 0).await.unwrap();
        let store = Store::connect(s3.store()).await.unwrap();
        Self::start_with(pool, store, Arc::new(folder), Arc::new(s3)).await
    }

    /// On a disk that is full.
    pub async fn start_without_space(pool: PgPool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let s3 = S3::start(folder.path(), u64::MAX / 2).await.unwrap();
        let store = Store::connect(s3.store()).await.unwrap();
        Self::start_with(pool, store, Arc::new(folder), Arc::new(s3)).await
    }

    /// Another server of the same service.
    pub async fn start_another(&self) -> Self {
        let store = self.store.clone();
        let mut app = Self::start_with(self.pool.clone(), store, self._folder.clone(), self._s3.clone()).await;
        app.key.clone_from(&self.key);
        app
    }

    /// The same service, whose downloads are redirected to the store.
    pub async fn start_with_public_store(pool: PgPool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let s3 = S3::start(folder.path(), 0).await.unwrap();
        let mut config = s3.store().clone();
        config.public_endpoint = config.endpoint.clone();
        let store = Store::connect(&config).await.unwrap();
        Self::start_with(pool, store, Arc::new(folder), Arc::new(s3)).await
    }

    async fn start_with(pool: PgPool, store: Store, folder: Arc<TempDir>, s3: Arc<S3>) -> Self {
        let key = keys::ensure_first_key(&pool).await.unwrap().unwrap_or_default();
        let shutdown = Shutdown::new();
        let limits = Limits { max_upload_bytes: MAX_UPLOAD_BYTES };
        let state = AppState::new(pool.clone(), store.clone(), shutdown.clone(), limits);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(api::serve(listener, state, shutdown.clone()));
        Self { address, key, pool, store, shutdown, client: client(), _folder: folder, _s3: s3 }
    }

    /// A key of another project, with these scopes.
    pub async fn insert_key(&self, project: &str, scopes: &[&str]) -> String {
        use sha2::Digest;
        let key = format!("rl_{project}_{}", scopes.join("_"));
        sqlx::query("insert into projects (id, name) values ($1, $1) on conflict do nothing")
            .bind(project)
            .execute(&self.pool)
            .await
            .unwrap();
        sqlx::query("insert into api_keys (id, project_id, name, key_sha256, scopes) values ($1, $2, 'test', $3, $4)")
            .bind(format!("key_{key}"))
            .bind(project)
            .bind(sha2::Sha256::digest(&key).to_vec())
            .bind(scopes.iter().map(|scope| (*scope).to_owned()).collect::<Vec<_>>())
            .execute(&self.pool)
            .await
            .unwrap();
        key
    }

    pub async fn project(&self) -> String {
        sqlx::query_scalar("select id from projects where name = 'default'").fetch_one(&self.pool).await.unwrap()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, self.url(path)).bearer_auth(&self.key)
    }

    /// Without a key.
    pub fn anonymous(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, self.url(path))
    }

    /// Every object in the store, by its path on the disk.
    pub fn stored_objects(&self) -> Vec<String> {
        self.stored_files().into_iter().filter(|path| path.contains("/i/") || path.contains("/d/")).collect()
    }

    /// What belongs to multipart uploads that are neither completed nor aborted.
    pub fn open_uploads(&self) -> Vec<String> {
        self.stored_files().into_iter().filter(|path| path.contains("/.upload")).collect()
    }

    fn stored_files(&self) -> Vec<String> {
        fn files(folder: &std::path::Path) -> Vec<String> {
            // A file may go while its folder is read.
            let entries = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
            entries
                .flat_map(|path| if path.is_dir() { files(&path) } else { vec![path.display().to_string()] })
                .collect()
        }
        files(self._folder.path())
    }

    pub async fn get(&self, path: &str) -> Answer {
        send(self.request(Method::GET, path)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        send(self.request(Method::DELETE, path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        send(self.request(Method::POST, path).json(body)).await
    }

    pub async fn create_dataset(&self, body: &Value) -> Answer {
        self.post("/v1/datasets", body).await
    }

    pub async fn upload_dataset_content(&self, id: &str, content_type: &str, body: impl Into<Body>) -> Answer {
        let request = self.request(Method::PUT, &format!("/v1/datasets/{id}/content"));
        send(request.header("content-type", content_type).body(body)).await
    }

    pub async fn find_dataset(&self, id: &str) -> Answer {
        self.get(&format!("/v1/datasets/{id}")).await
    }

    pub async fn create_tokenization(&self, body: &Value) -> Answer {
        self.post("/v1/tokenizations", body).await
    }

    pub async fn create_job(&self, spec: &Value) -> Answer {
        self.post("/v1/jobs", spec).await
    }

    pub async fn find_job(&self, id: &str) -> Answer {
        self.get(&format!("/v1/jobs/{id}")).await
    }

    pub async fn cancel_job(&self, id: &str) -> Answer {
        send(self.request(Method::POST, &format!("/v1/jobs/{id}/cancel"))).await
    }

    pub async fn list_job_events(&self, id: &str, query: &str) -> Answer {
        self.get(&format!("/v1/jobs/{id}/events{query}")).await
    }

    /// The identifier of a dataset without content.
    pub async fn given_empty_dataset(&self) -> String {
        let dataset = self.create_dataset(&json!({"name": "text"})).await;
        assert_eq!(dataset.status, 201, "{dataset:?}");
        dataset.id()
    }

    /// The identifier of a dataset that is ready.
    pub async fn given_dataset(&self, content: &str) -> String {
        let id = self.given_empty_dataset().await;
        let answer = self.upload_dataset_content(&id, "text/plain", content.to_owned()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        id
    }

    /// The identifiers of a dataset and of its tokenization, which a worker has made.
    pub async fn given_tokens(&self) -> (String, String) {
        let dataset = self.given_dataset("some text").await;
        let tokenization = self.create_tokenization(&json!({"dataset": dataset, "vocab_size": 300})).await.id();
        sqlx::query(
            "with done as (update work_items set state = 'done' where kind = 'ingest')
             update tokenizations set state = 'ready', tokenizer_vocab_size = 280, train_tokens = 1000,
                valid_tokens = 100, train_documents = 9, valid_documents = 1
             where id = $1",
        )
        .bind(&tokenization)
        .execute(&self.pool)
        .await
        .unwrap();
        (dataset, tokenization)
    }

    /// The identifier of a queued job.
    pub async fn given_job(&self) -> String {
        let (dataset, _) = self.given_tokens().await;
        let job = self.create_job(&spec(&dataset)).await;
        assert_eq!(job.status, 201, "{job:?}");
        job.id()
    }

    /// Puts a job where a worker would have put it.
    pub async fn set_job_state(&self, id: &str, state: &str) {
        sqlx::query(
            "with item as (
                update work_items set state = case when $2 in ('starting', 'running') then 'leased' else 'done' end
                where id = (select work_item_id from jobs where id = $1)
             )
             update jobs set state = $2, failure = $3,
                finished_at = case when $2 in ('succeeded', 'failed', 'cancelled') then now() end
             where id = $1",
        )
        .bind(id)
        .bind(state)
        .bind((state == "failed").then(|| json!({"kind": "data", "message": "m", "retryable": false, "log_tail": ""})))
        .execute(&self.pool)
        .await
        .unwrap();
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.bytes).unwrap()
    }

    pub fn id(&self) -> String {
        let json = self.json();
        json["id"].as_str().unwrap_or_else(|| panic!("no id: {json}")).to_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        let name: HeaderName = name.parse().unwrap();
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Checks that this is a well-formed refusal, and returns its code and detail.
    #[track_caller]
    pub fn problem(&self, status: u16) -> (String, String) {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.bytes));
        assert_eq!(self.header("content-type"), "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["type"], "about:blank");
        assert_eq!(problem["status"], status);
        assert!(problem["errors"].is_array() && problem["title"].is_string());
        assert_eq!(problem["request_id"], self.header("x-request-id"));
        assert!(!self.header("x-request-id").is_empty());
        (problem["code"].as_str().unwrap().to_owned(), problem["detail"].as_str().unwrap().to_owned())
    }

    /// The pointers of a refusal's errors, sorted.
    pub fn pointers(&self) -> Vec<String> {
        let problem = self.json();
        let errors = problem["errors"].as_array().unwrap();
        let mut pointers: Vec<_> = errors.iter().map(|e| e["pointer"].as_str().unwrap().to_owned()).collect();
        pointers.sort();
        pointers
    }
}

/// A small spec without mistakes.
pub fn spec(dataset: &str) -> Value {
    json!({
        "name": "small",
        "dataset": dataset,
        "model": {"preset": "llama-9m"},
        "method": {"type": "relora", "rank": 8, "restart_every_steps": 10, "warm_start_steps": 10},
        "schedule": {"num_steps": 40, "warmup_steps": 2},
        "batch": {"num_seqs": 4, "sequence_length": 32},
    })
}

pub async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    Answer { status, headers, bytes: response.bytes().await.unwrap().to_vec() }
}

fn client() -> reqwest::Client {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let builder = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none());
    builder.tls_certs_only([]).build().unwrap()
}
