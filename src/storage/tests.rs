//! Against the embedded server, through the same client as against any other store.

mod faults;
mod faulty;

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use sha2::{Digest, Sha256};

use super::{Key, StorageError, Store, Uploaded};
use crate::{config::StoreConfig, embedded::S3};

const MB: usize = 1_000_000;

struct Fixture {
    folder: tempfile::TempDir,
    s3: S3,
    store: Store,
}

impl Fixture {
    async fn start() -> Self {
        Self::with_min_free(0).await
    }

    async fn with_min_free(min_free_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let s3 = S3::start(folder.path(), min_free_bytes).await.unwrap();
        let store = Store::connect(s3.store()).await.unwrap();
        Self { folder, s3, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Everything that an upload may leave in the store.
    fn left_overs(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("s3/objects")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|name| name != "relora").collect()
    }
}

fn key(text: &str) -> Key {
    Key::from(text.to_owned())
}

/// Bytes without a period that a part could hide.
fn noise(len: usize) -> Bytes {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn chunks(bytes: &Bytes, size: usize) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
    let bytes = bytes.clone();
    stream::iter(
        (0..bytes.len().div_ceil(size)).map(move |i| Ok(bytes.slice(i * size..bytes.len().min((i + 1) * size)))),
    )
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

async fn read(store: &Store, key: &Key, range: Option<std::ops::Range<u64>>) -> Vec<u8> {
    let object = store.get(key, range).await.unwrap();
    let len_bytes = object.len_bytes;
    let chunks: Vec<Bytes> = object.into_stream().map(Result::unwrap).collect().await;
    let bytes = chunks.concat();
    assert_eq!(bytes.len() as u64, len_bytes);
    bytes
}

#[tokio::test]
async fn forty_megabytes_come_back_as_they_went_in_ranges_and_as_a_file() {
    let f = Fixture::start().await;
    let (bytes, key) = (noise(40 * MB), key("j/job/1/model.safetensors"));
    for len_bytes in [None, Some(bytes.len() as u64)] {
        let uploaded = f.store.upload(&key, chunks(&bytes, 70_001), len_bytes).await.unwrap();
        assert_eq!(uploaded, Uploaded { bytes: bytes.len() as u64, sha256: sha256(&bytes) });
    }
    assert_eq!(f.store.head(&key).await.unwrap(), Some(bytes.len() as u64));
    assert!(read(&f.store, &key, None).await == bytes);
    for range in [0..1, 8_388_600..8_388_620, 39_999_999..40_000_000, 5..5] {
        assert_eq!(read(&f.store, &key, Some(range.clone())).await, bytes[range.start as usize..range.end as usize]);
    }

    assert_eq!(f.store.get_range_bytes(&key, 5..9).await.unwrap(), bytes[5..9]);
    let beyond_the_end = bytes.len() as u64 - 1..bytes.len() as u64 + 1;
    let error = f.store.get_range_bytes(&key, beyond_the_end).await.unwrap_err();
    assert!(matches!(error, StorageError::Damaged { .. }), "{error}");

    let uploaded = Uploaded { bytes: bytes.len() as u64, sha256: sha256(&bytes) };
    f.store.download_to(&key, &f.path("copy"), &uploaded).await.unwrap();
    assert!(std::fs::read(f.path("copy")).unwrap() == bytes);
    assert_eq!(f.store.upload_file(&key, &f.path("copy")).await.unwrap(), uploaded);

    f.store.delete(&[key.clone(), self::key("never/was")]).await.unwrap();
    assert_eq!(f.store.head(&key).await.unwrap(), None);
}

#[tokio::test]
async fn what_is_small_or_empty_is_stored_too() {
    let f = Fixture::start().await;
    for len in [0, 1, 8 << 20, (8 << 20) + 1] {
        let bytes = noise(len);
        let uploaded = f.store.put_bytes(&key("a"), bytes.clone()).await.unwrap();
        assert_eq!(uploaded.sha256, sha256(&bytes));
        assert!(f.store.get_bytes(&key("a"), 1 << 30).await.unwrap() == bytes);
    }
}

#[tokio::test]
async fn a_body_that_fails_leaves_nothing() {
    let f = Fixture::start().await;
    let bytes = noise(20 * MB);
    let broken = chunks(&bytes, MB).chain(stream::iter([Err(io::Error::other("the client went away"))]));
    let error = f.store.upload(&key("a/b"), broken, None).await.unwrap_err();
    assert!(matches!(error, StorageError::Local { .. }) && error.to_string().contains("the client went away"));
    assert_eq!(f.store.head(&key("a/b")).await.unwrap(), None);
    assert_eq!(f.left_overs(), [""; 0]);
}

#[tokio::test]
async fn an_upload_that_is_dropped_leaves_nothing() {
    let f = Fixture::start().await;
    let endless = chunks(&noise(20 * MB), MB).chain(stream::pending());
    let key = key("a");
    let upload = f.store.upload(&key, endless, None);
    assert!(tokio::time::timeout(Duration::from_secs(2), upload).await.is_err());
    let deadline = Instant::now() + Duration::from_secs(10);
    while !f.left_overs().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", f.left_overs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(f.store.head(&key).await.unwrap(), None);
}

#[tokio::test]
async fn a_file_whose_upload_the_store_has_lost_is_uploaded_again() {
    let f = Fixture::start().await;
    let bytes = noise(20 * MB);
    std::fs::write(f.path("file"), &bytes).unwrap();
    let root = f.path("s3/objects");
    let forget_one_upload = async {
        loop {
            let is_record = |name: &str| name.starts_with(".upload-");
            if let Some(record) = f.left_overs().into_iter().find(|name| is_record(name)) {
                return std::fs::remove_file(root.join(record)).unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    let (key, path) = (key("a"), f.path("file"));
    let ((), uploaded) = tokio::join!(forget_one_upload, f.store.upload_file(&key, &path));
    assert_eq!(uploaded.unwrap().sha256, sha256(&bytes));
    assert!(read(&f.store, &key, None).await == bytes);
}

#[tokio::test]
async fn what_is_missing_too_large_or_damaged_is_told_apart() {
    let f = Fixture::start().await;
    let missing = f.store.get(&key("no"), None).await.unwrap_err();
    assert!(matches!(missing, StorageError::NotFound { .. }), "{missing}");
    f.store.put_bytes(&key("a"), Bytes::from_static(b"12345")).await.unwrap();
    assert!(matches!(f.store.get_bytes(&key("a"), 4).await, Err(StorageError::Damaged { .. })));
    for expected in [
        Uploaded { bytes: 5, sha256: sha256(b"54321") },
        Uploaded { bytes: 6, sha256: sha256(b"12345") },
        Uploaded { bytes: 4, sha256: sha256(b"12345") },
    ] {
        let error = f.store.download_to(&key("a"), &f.path("copy"), &expected).await.unwrap_err();
        assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
    }
    assert!(!f.path("copy").exists() && !f.path("copy.part").exists());
}

#[tokio::test]
async fn a_key_that_is_too_long_is_refused_before_anything_is_sent() {
    let f = Fixture::start().await;
    let error = f.store.put_bytes(&key(&"k".repeat(121)), Bytes::new()).await.unwrap_err();
    assert!(matches!(error, StorageError::InvalidKey { .. }) && error.to_string().contains("121 bytes"), "{error}");
    let longest = key(&format!("{}/{}", "k".repeat(60), "k".repeat(59)));
    f.store.upload(&longest, chunks(&noise(9 * MB), MB), None).await.unwrap();
}

#[tokio::test]
async fn a_prefix_keeps_two_stores_in_one_bucket_apart() {
    let f = Fixture::start().await;
    let config = StoreConfig { prefix: "team/a".to_owned(), ..f.s3.store().clone() };
    let store = Store::connect(&config).await.unwrap();
    store.put_bytes(&key("k"), Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(f.store.head(&key("k")).await.unwrap(), None);
    assert_eq!(f.store.head(&key("team/a/k")).await.unwrap(), Some(1));
}

#[tokio::test]
async fn objects_are_listed_in_the_order_of_their_keys_below_the_prefix_of_the_store() {
    let f = Fixture::start().await;
    let config = StoreConfig { prefix: "team/a".to_owned(), ..f.s3.store().clone() };
    let store = Store::connect(&config).await.unwrap();
    let before = chrono::Utc::now() - Duration::from_secs(2);
    // A folder comes where its slash stands among the characters.
    let keys = ["a-b", "a.b/x", "a/b", "a/c/d", "a0", "b/1", "b/2"];
    for (len, text) in keys.iter().enumerate().rev() {
        store.put_bytes(&key(text), noise(len)).await.unwrap();
    }
    f.store.put_bytes(&key("team/b/other"), Bytes::new()).await.unwrap();

    let all = store.list("", None, 100).await.unwrap();
    assert_eq!(all.iter().map(|object| object.key.as_str()).collect::<Vec<_>>(), keys);
    assert_eq!(all.iter().map(|object| object.bytes).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);
    assert!(all.iter().all(|object| object.modified_at > before && object.modified_at <= chrono::Utc::now()));
    for limit in 1..keys.len() {
        let mut listed = Vec::new();
        loop {
            let last = listed.last().cloned();
            let page = store.list("", last.as_ref(), limit).await.unwrap();
            listed.extend(page.iter().map(|object| object.key.clone()));
            if page.len() < limit {
                break;
            }
        }
        assert_eq!(listed.iter().map(Key::as_str).collect::<Vec<_>>(), keys, "{limit} at a time");
    }
    let below = |prefix: &'static str, after: Option<&'static str>| {
        let store = store.clone();
        async move {
            let listed = store.list(prefix, after.map(key).as_ref(), 100).await.unwrap();
            listed.into_iter().map(|object| object.key.to_string()).collect::<Vec<_>>()
        }
    };
    assert_eq!(below("a/", None).await, ["a/b", "a/c/d"]);
    assert_eq!(below("a/c", None).await, ["a/c/d"]);
    assert_eq!(below("b/", Some("b/1")).await, ["b/2"]);
    assert_eq!(below("", Some("a/b/z")).await, ["a/c/d", "a0", "b/1", "b/2"]);
    assert_eq!(below("c", None).await, [""; 0]);
}

#[tokio::test]
async fn more_objects_are_listed_than_one_request_gives() {
    let f = Fixture::start().await;
    let folder = f.path("s3/objects/relora/many");
    std::fs::create_dir_all(&folder).unwrap();
    for number in 0..2345 {
        std::fs::write(folder.join(format!("{number:04}")), "x").unwrap();
    }
    assert_eq!(f.store.list("many/", None, 5000).await.unwrap().len(), 2345);
    let page = f.store.list("many/", Some(&key("many/0009")), 1500).await.unwrap();
    assert_eq!((page.len(), page[0].key.as_str(), page[1499].key.as_str()), (1500, "many/0010", "many/1509"));
}

#[tokio::test]
async fn only_old_uploads_of_the_own_prefix_are_aborted() {
    let f = Fixture::start().await;
    let config = StoreConfig { prefix: "team".to_owned(), ..f.s3.store().clone() };
    let store = Store::connect(&config).await.unwrap();
    let uploads =
        [(store.clone(), key("j/own")), (f.store.clone(), key("j/other")), (f.store.clone(), key("of/somebody/else"))];
    for (store, key) in uploads {
        // As a killed process leaves it: nobody ends it.
        let endless = chunks(&noise(20 * MB), MB).chain(stream::pending());
        tokio::spawn(async move { store.upload(&key, endless, None).await });
    }
    let parts = || f.left_overs().into_iter().filter(|name| name.contains(".part-")).count();
    while parts() < 6 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let open = || f.left_overs().into_iter().filter(|name| name.starts_with(".upload-")).count();
    assert_eq!(open(), 3);
    assert_eq!(store.abort_stale_uploads(Duration::from_secs(3600)).await.unwrap(), 0);
    assert_eq!(store.abort_stale_uploads(Duration::ZERO).await.unwrap(), 1);
    assert_eq!((open(), parts()), (2, 4));
    assert_eq!(f.store.abort_stale_uploads(Duration::ZERO).await.unwrap(), 1);
    assert_eq!((open(), parts()), (1, 2));
}

#[tokio::test]
async fn a_store_that_cannot_be_reached_is_named_soon() {
    let f = Fixture::start().await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    for scheme in ["http", "https"] {
        let begin = Instant::now();
        let endpoint = format!("{scheme}://{address}");
        let config = StoreConfig { endpoint: Some(endpoint.clone()), ..f.s3.store().clone() };
        let error = format!("{:#}", Store::connect(&config).await.unwrap_err());
        assert!(error.contains(&endpoint) && error.contains("S3_ENDPOINT"), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }
}

#[tokio::test]
async fn wrong_credentials_are_named() {
    let f = Fixture::start().await;
    let config = StoreConfig { access_key_id: "someone".to_owned(), ..f.s3.store().clone() };
    let error = format!("{:#}", Store::connect(&config).await.unwrap_err());
    assert!(error.contains("credentials") && error.contains("403"), "{error}");
}

#[tokio::test]
async fn a_disk_that_is_nearly_full_is_reported_and_files_wait() {
    let f = Fixture::with_min_free(u64::MAX / 2).await;
    for len in [1, 20 * MB] {
        let bytes = noise(len);
        let error = f.store.upload(&key("a"), chunks(&bytes, MB), None).await.unwrap_err();
        assert!(matches!(error, StorageError::LowDiskSpace { .. }), "{error}");
    }
    assert_eq!(f.left_overs(), [""; 0]);
    std::fs::write(f.path("file"), "x").unwrap();
    let (key, path) = (key("a"), f.path("file"));
    let upload = f.store.upload_file(&key, Path::new(&path));
    assert!(tokio::time::timeout(Duration::from_secs(1), upload).await.is_err());
}

#[tokio::test]
async fn a_signed_url_names_the_public_host_and_only_where_there_is_one() {
    let f = Fixture::start().await;
    f.store.put_bytes(&key("a/b"), Bytes::from_static(b"x")).await.unwrap();
    let ttl = Duration::from_secs(60);
    assert_eq!(f.store.presigned_get(&key("a/b"), ttl, "b").await.unwrap(), None);

    // The public name of the embedded server: what is signed is this name.
    let public_endpoint = f.s3.store().endpoint.as_ref().map(|endpoint| endpoint.replace("127.0.0.1", "localhost"));
    let config = StoreConfig { public_endpoint, ..f.s3.store().clone() };
    let store = Store::connect(&config).await.unwrap();
    let url = store.presigned_get(&key("a/b"), ttl, "b \"1\".bin").await.unwrap().unwrap();
    let url = reqwest::Url::parse(&url).unwrap();
    assert_eq!((url.host_str(), url.path()), (Some("localhost"), "/relora/a/b"));
    assert!(url.query_pairs().any(|(_, value)| value == "attachment; filename=\"b1.bin\""));
    assert!(url.query_pairs().any(|(name, _)| name == "X-Amz-Signature"));
}
