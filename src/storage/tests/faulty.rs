//! Uploads to a store with faults, and what the check of a store finds of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    Fixture, MB,
    faults::{Fault, Proxy},
    key, noise, read, sha256,
};
use crate::{
    config::StoreConfig,
    storage::{Ability, Lack, Result, StorageError, Store, Uploaded, upload::Patience},
};

/// A store behind a proxy, with a file to upload in three parts.
struct Faulty {
    f: Fixture,
    store: Store,
    _proxy: Proxy,
    bytes: Bytes,
    /// Uploads that were begun.
    num_begun: Arc<AtomicUsize>,
}

const NO_SUCH_UPLOAD: Fault = Fault::Answered("404 Not Found", "<Error><Code>NoSuchUpload</Code></Error>");
const ERROR_INSIDE: &str = "<?xml version=\"1.0\"?>\n\n<Error><Code>InternalError</Code><Message>m</Message></Error>";

impl Faulty {
    /// `fault` is asked for each request that `is_meant` by its line, with how many of them came before.
    async fn start(
        patience: Patience,
        is_meant: impl Fn(&str) -> bool + Send + Sync + 'static,
        fault: impl Fn(usize) -> Fault + Send + Sync + 'static,
    ) -> Self {
        let f = Fixture::start().await;
        let bytes = noise(20 * MB);
        std::fs::write(f.path("file"), &bytes).unwrap();
        let (num_begun, num_meant) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
        let begun = num_begun.clone();
        let proxy = Proxy::start(f.s3.store().endpoint.as_ref().unwrap(), move |line| {
            if line.contains("?uploads") {
                begun.fetch_add(1, Ordering::SeqCst);
            }
            if is_meant(line) { fault(num_meant.fetch_add(1, Ordering::SeqCst)) } else { Fault::Pass }
        })
        .await;
        let config = StoreConfig { endpoint: Some(proxy.endpoint.clone()), ..f.s3.store().clone() };
        let store = Store::connect(&config).await.unwrap().with_patience(patience);
        Self { f, store, _proxy: proxy, bytes, num_begun }
    }

    async fn upload(&self) -> Result<Uploaded> {
        self.store.upload_file(&key("a"), &self.f.path("file")).await
    }

    /// Uploads, looks at what is in the store, and returns how many uploads that took.
    async fn upload_well(&self) -> usize {
        let uploaded = self.upload().await.unwrap();
        assert_eq!(uploaded, Uploaded { bytes: self.bytes.len() as u64, sha256: sha256(&self.bytes) });
        assert!(read(&self.f.store, &key("a"), None).await == self.bytes);
        assert_eq!(self.f.left_overs().into_iter().filter(|name| name.contains("upload")).count(), 0);
        self.num_begun.load(Ordering::SeqCst)
    }
}

fn is_second_part(line: &str) -> bool {
    line.contains("partNumber=2")
}

fn is_completion(line: &str) -> bool {
    line.starts_with("POST") && line.contains("uploadId=")
}

fn impatient() -> Patience {
    Patience { progress: Duration::from_secs(3), clean_up: Duration::from_millis(500), ..Patience::DEFAULT }
}

#[tokio::test]
async fn a_request_that_is_never_answered_is_tried_again_alone() {
    let patience = Patience { part: Duration::from_secs(3), ..Patience::DEFAULT };
    let faulty = Faulty::start(patience, is_second_part, |before| match before {
        0 => Fault::Silent,
        _ => Fault::Pass,
    });
    assert_eq!(faulty.await.upload_well().await, 1);
}

#[tokio::test]
async fn an_upload_without_progress_is_begun_again() {
    let faulty = Faulty::start(impatient(), is_second_part, |before| match before {
        0 => Fault::Silent,
        _ => Fault::Pass,
    });
    // A busy machine may be slow enough to be taken for another silence.
    assert!(faulty.await.upload_well().await >= 2);
}

#[tokio::test]
async fn a_store_that_makes_no_progress_is_given_up_with_a_reason() {
    let faulty = Faulty::start(impatient(), is_second_part, |_| Fault::Silent).await;
    let begin = Instant::now();
    let error = faulty.upload().await.unwrap_err();
    assert!(matches!(error, StorageError::Stalled { op: "upload a part of", limit_s: 3.0, .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(30));
    assert_eq!(faulty.num_begun.load(Ordering::SeqCst), 3);
    assert_eq!(faulty.f.left_overs(), [""; 0]);
}

#[tokio::test]
async fn a_store_that_is_too_slow_for_the_file_is_given_up_with_a_reason() {
    let patience = Patience { file: Duration::from_secs(1), ..impatient() };
    let late = |_| Fault::Late(Duration::from_secs(3));
    let faulty = Faulty::start(patience, |line| line.starts_with("PUT /relora/small"), late).await;
    std::fs::write(faulty.f.path("small"), "x").unwrap();
    let error = faulty.store.upload_file(&key("small"), &faulty.f.path("small")).await.unwrap_err();
    assert!(matches!(error, StorageError::Stalled { op: "upload", limit_s: 1.0, .. }), "{error}");
}

#[tokio::test]
async fn what_a_completion_has_done_counts_whatever_was_answered() {
    type Case = (&'static str, fn(usize) -> Fault);
    let cases: [Case; 6] = [
        ("the answer is lost", |before| if before == 0 { Fault::AnswerLost } else { NO_SUCH_UPLOAD }),
        ("the answer is cut", |before| if before == 0 { Fault::AnswerCut } else { NO_SUCH_UPLOAD }),
        ("an error comes after a status of 200", |before| match before {
            0 => Fault::DoneAndAnswered("200 OK", ERROR_INSIDE),
            _ => NO_SUCH_UPLOAD,
        }),
        ("an error comes although it is done", |before| match before {
            0 => Fault::DoneAndAnswered("500 Internal Server Error", ERROR_INSIDE),
            _ => Fault::Pass,
        }),
        ("the connection breaks before", |before| if before == 0 { Fault::Refused } else { Fault::Pass }),
        ("an error comes after a status of 200, and nothing is done", |before| match before {
            0 => Fault::Answered("200 OK", ERROR_INSIDE),
            _ => Fault::Pass,
        }),
    ];
    for (case, fault) in cases {
        let faulty = Faulty::start(Patience::DEFAULT, is_completion, fault).await;
        assert_eq!(faulty.upload_well().await, 1, "{case}");
    }
}

#[tokio::test]
async fn an_upload_that_the_store_does_not_know_any_more_is_begun_again() {
    let faulty = Faulty::start(Patience::DEFAULT, is_completion, |before| match before {
        0 => NO_SUCH_UPLOAD,
        _ => Fault::Pass,
    });
    assert_eq!(faulty.await.upload_well().await, 2);
}

#[tokio::test]
async fn broken_connections_in_the_middle_of_an_upload_are_made_again() {
    for fault in [Fault::Refused, Fault::AnswerLost, Fault::AnswerCut, Fault::Answered("503 Slow Down", "")] {
        let first = move |before| if before == 0 { fault } else { Fault::Pass };
        let faulty = Faulty::start(Patience::DEFAULT, is_second_part, first).await;
        assert_eq!(faulty.upload_well().await, 1, "{fault:?}");
    }
}

#[tokio::test]
async fn an_object_of_another_size_than_was_sent_is_damaged() {
    let other = Fault::Answered("200 OK", "<a body that HEAD does not have/>");
    let faulty = Faulty::start(Patience::DEFAULT, |line| line.starts_with("HEAD /relora/a"), move |_| other).await;
    let error = faulty.upload().await.unwrap_err();
    assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn a_store_without_a_listing_of_uploads_sweeps_none() {
    let not_known = Fault::Answered("501 Not Implemented", "<Error><Code>NotImplemented</Code></Error>");
    let faulty = Faulty::start(Patience::DEFAULT, |line| line.contains("?uploads"), move |_| not_known).await;
    assert_eq!(faulty.store.abort_stale_uploads(Duration::ZERO).await.unwrap(), 0);
}

/// The names of what a store lacks.
fn lacks(abilities: &[Ability]) -> Vec<&str> {
    abilities.iter().filter(|ability| ability.outcome.is_err()).map(|ability| ability.name).collect()
}

#[tokio::test]
async fn a_check_finds_what_the_embedded_store_can_do_and_leaves_nothing() {
    let f = Fixture::start().await;
    let abilities = f.store.check().await;
    assert_eq!(lacks(&abilities), ["SHA-256 of parts"], "{abilities:?}");
    assert_eq!(f.store.list("", None, 100).await.unwrap(), []);
    assert_eq!(f.left_overs().into_iter().filter(|name| name.contains("upload")).count(), 0);
}

#[tokio::test]
async fn a_check_finds_what_a_store_refuses_or_cannot_answer() {
    let is_meant = |line: &str| line.contains("partNumber=") || line.contains("?delete") || line.contains("?uploads&");
    let refuse = |_| Fault::Answered("501 Not Implemented", "<Error><Code>NotImplemented</Code></Error>");
    let faulty = Faulty::start(Patience::DEFAULT, is_meant, refuse).await;
    let abilities = faulty.store.check().await;
    let expected = ["multipart upload", "bulk delete", "list open uploads", "complete only if new", "SHA-256 of parts"];
    assert_eq!(lacks(&abilities), expected, "{abilities:?}");
    assert!(abilities.iter().filter_map(|ability| ability.outcome.as_ref().err()).all(|lack| match lack {
        Lack::No(reason) => reason.contains("NotImplemented"),
        Lack::Failed(_) => false,
    }));
    assert_eq!(faulty.f.store.list("", None, 100).await.unwrap(), []);

    let silent = |_| Fault::Answered("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>");
    let faulty = Faulty::start(Patience::DEFAULT, |line| line.starts_with("GET"), silent).await;
    let abilities = faulty.store.check().await;
    assert!(matches!(abilities[0].outcome, Err(Lack::Failed(_))), "{abilities:?}");
}

#[tokio::test]
async fn a_measurement_uploads_and_removes_a_file() {
    let f = Fixture::start().await;
    let folder = tempfile::tempdir().unwrap();
    let measured = f.store.measure_upload(9_000_000, folder.path()).await.unwrap();
    assert!(measured.file_mb_per_s() > 0.0 && measured.plain_mb_per_s() > 0.0 && measured.peak_bytes.is_some());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert_eq!(f.store.list("", None, 100).await.unwrap(), []);
}
