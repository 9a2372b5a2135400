//! One connection to a server: its address, the key, and how its answers and refusals are read.

use std::{fmt, sync::Once, time::Duration};

use anyhow::{Context as _, ensure};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url, header};
use serde::Deserialize;
use serde_json::Value;

use super::resources::Page;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer that is no problem document is shown up to here.
const MAX_SHOWN_CHARS: usize = 300;

/// Why a request brought no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The server answered, and said no.
    #[error("{0}")]
    Refused(Box<Refusal>),
    #[error("cannot reach the server at {url}")]
    Unreachable { url: String, source: reqwest::Error },
    #[error("the answer to {request} was cut off or is not what this client expects")]
    BadAnswer { request: String, source: reqwest::Error },
}

impl HttpError {
    /// Whether asking again later may help, because it is not the request that is wrong.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Refused(refusal) => {
                refusal.status.is_server_error() || refusal.status == StatusCode::TOO_MANY_REQUESTS
            }
            Self::Unreachable { source, .. } => !source.is_builder(),
            Self::BadAnswer { source, .. } => !source.is_decode(),
        }
    }
}

/// The server's refusal: a problem document (RFC 9457), or whatever else it sent.
#[derive(Debug)]
pub struct Refusal {
    pub status: StatusCode,
    request: String,
    problem: ProblemDocument,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ProblemDocument {
    title: Option<String>,
    detail: Option<String>,
    code: Option<String>,
    errors: Vec<ProblemItem>,
    request_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ProblemItem {
    #[serde(default)]
    pointer: String,
    message: String,
}

impl Refusal {
    fn new(request: String, status: StatusCode, body: &str) -> Self {
        let problem = serde_json::from_str(body).unwrap_or_else(|_| ProblemDocument {
            detail: Some(body.trim().chars().take(MAX_SHOWN_CHARS).collect::<String>()).filter(|text| !text.is_empty()),
            ..ProblemDocument::default()
        });
        Self { status, request, problem }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = &self.problem;
        let code = problem.code.as_deref().or(self.status.canonical_reason()).unwrap_or("no reason given");
        write!(f, "{} was refused ({} {code})", self.request, self.status.as_u16())?;
        if let Some(text) = problem.detail.as_deref().or(problem.title.as_deref()) {
            write!(f, ": {text}")?;
        }
        for item in &problem.errors {
            let pointer = if item.pointer.is_empty() { "(document)" } else { &item.pointer };
            write!(f, "\n  {pointer}: {}", item.message)?;
        }
        if let Some(request_id) = &problem.request_id {
            write!(f, "\n  request {request_id}")?;
        }
        Ok(())
    }
}

/// A server and the key that it is asked with.
#[derive(Debug, Clone)]
pub struct Http {
    client: reqwest::Client,
    base: Url,
    api_key: String,
}

impl Http {
    pub fn new(url: &str, api_key: &str) -> anyhow::Result<Self> {
        let base = Url::parse(url).with_context(|| format!("{url:?} is not the URL of a server"))?;
        ensure!(matches!(base.scheme(), "http" | "https"), "{url:?} must begin with http:// or https://");
        let client = build_client(&base).context("set up the HTTP client")?;
        Ok(Self { client, base, api_key: api_key.to_owned() })
    }

    /// A request to `/segment/segment/…`; segments are escaped, so that no id can change the path.
    pub fn request(&self, method: Method, segments: &[&str]) -> RequestBuilder {
        let mut url = self.base.clone();
        url.path_segments_mut().expect("an http URL has a path").pop_if_empty().extend(segments);
        self.client.request(method, url).bearer_auth(&self.api_key)
    }

    /// Sends, and reads a status of 400 or above as an error.
    pub async fn send(&self, request: RequestBuilder) -> Result<Response, HttpError> {
        let unreachable = |source| HttpError::Unreachable { url: self.base.to_string(), source };
        let request = request.build().map_err(unreachable)?;
        let name = format!("{} {}", request.method(), request.url().path());
        let response = self.client.execute(request).await.map_err(unreachable)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.text().await.unwrap_or_default();
        Err(HttpError::Refused(Box::new(Refusal::new(name, status, &body))))
    }

    /// Sends, and reads the answer as JSON.
    pub async fn send_for_json(&self, request: RequestBuilder) -> Result<Value, HttpError> {
        let response = self.send(request).await?;
        let request = response.url().path().to_owned();
        response.json().await.map_err(|source| HttpError::BadAnswer { request, source })
    }

    pub async fn get(&self, segments: &[&str]) -> Result<Value, HttpError> {
        self.send_for_json(self.request(Method::GET, segments)).await
    }

    pub async fn post(&self, segments: &[&str], body: &Value) -> Result<Value, HttpError> {
        self.send_for_json(self.request(Method::POST, segments).json(body)).await
    }

    /// A POST without a body.
    pub async fn command(&self, segments: &[&str], query: &[(&str, &str)]) -> Result<Value, HttpError> {
        self.send_for_json(self.request(Method::POST, segments).query(query)).await
    }

    pub async fn delete(&self, segments: &[&str]) -> Result<(), HttpError> {
        self.send(self.request(Method::DELETE, segments)).await.map(drop)
    }

    /// Every item of a list, page after page.
    pub async fn list(&self, segments: &[&str], filter: &[(&str, &str)]) -> anyhow::Result<Vec<Value>> {
        self.list_after(segments, filter, "cursor").await
    }

    /// The same for a list that takes its cursor by another name.
    pub async fn list_after(
        &self,
        segments: &[&str],
        filter: &[(&str, &str)],
        cursor_name: &str,
    ) -> anyhow::Result<Vec<Value>> {
        let mut items = Vec::new();
        let mut cursor: Option<Value> = None;
        loop {
            let mut request = self.request(Method::GET, segments).query(filter);
            if let Some(cursor) = &cursor {
                request = request.query(&[(cursor_name, cursor)]);
            }
            let page: Page = parse(self.send_for_json(request).await?)?;
            items.extend(page.data);
            match page.next_cursor {
                Some(next) => cursor = Some(next),
                None => return Ok(items),
            }
        }
    }

    /// A text that the server may still be sending while it is read.
    pub async fn open(&self, segments: &[&str], accept: &str) -> Result<Response, HttpError> {
        self.send(self.request(Method::GET, segments).header(header::ACCEPT, accept)).await
    }
}

/// The server's answer as one of this client's types.
pub fn parse<T: serde::de::DeserializeOwned>(answer: Value) -> anyhow::Result<T> {
    serde_json::from_value(answer).context("read the server's answer: is it of another version than this client?")
}

fn build_client(base: &Url) -> reqwest::Result<reqwest::Client> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // An error means that a provider is there already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let builder = || reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
    match builder().build() {
        // A slim container has no root certificates, and needs none for http.
        Err(_) if base.scheme() == "http" => builder().tls_certs_only([]).build(),
        built => built,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_request_and_every_problem_with_its_pointer() {
        let body = r#"{"type":"about:blank","title":"Unprocessable","status":422,"detail":"the spec has 2 problems",
            "code":"invalid_spec","request_id":"req_1",
            "errors":[{"pointer":"/method/rank","message":"900 is above 688"},{"pointer":"","message":"is required"}]}"#;
        let refusal = Refusal::new("POST /v1/jobs".into(), StatusCode::UNPROCESSABLE_ENTITY, body);
        assert_eq!(
            refusal.to_string(),
            "POST /v1/jobs was refused (422 invalid_spec): the spec has 2 problems\n  \
             /method/rank: 900 is above 688\n  (document): is required\n  request req_1"
        );
    }

    #[test]
    fn a_refusal_that_is_no_problem_document_shows_what_was_sent() {
        let refusal = Refusal::new("GET /v1/jobs".into(), StatusCode::BAD_GATEWAY, "upstream is gone\n");
        assert_eq!(refusal.to_string(), "GET /v1/jobs was refused (502 Bad Gateway): upstream is gone");
    }

    #[test]
    fn an_id_cannot_change_the_path() {
        let http = Http::new("http://localhost:1/prefix/", "rl_key").expect("the URL is whole");
        let request = http.request(Method::GET, &["v1", "jobs", "../keys?x#y"]).build().expect("builds");
        assert_eq!(request.url().path(), "/prefix/v1/jobs/..%2Fkeys%3Fx%23y");
    }

    #[test]
    fn an_address_that_is_no_server_is_refused() {
        assert!(Http::new("localhost:8080", "rl_key").is_err());
        assert!(Http::new("postgres://localhost", "rl_key").is_err());
    }

    #[test]
    fn https_is_ready_to_be_used() {
        assert!(Http::new("https://relora.example", "rl_key").is_ok());
    }
}
