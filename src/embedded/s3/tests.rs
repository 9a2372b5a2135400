use std::{fs, path::Path};

use bytes::Bytes;

use super::{S3, durable::description_name};
use crate::storage::{Key, Store};

fn names(root: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn objects_port_and_credentials_outlive_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let key = Key::from("j/a/b".to_owned());
    let s3 = S3::start(folder.path(), 0).await.unwrap();
    let store = Store::connect(s3.store()).await.unwrap();
    store.put_bytes(&key, Bytes::from_static(b"kept")).await.unwrap();
    s3.stop().await.unwrap();
    assert!(store.head(&key).await.is_err());

    let s3 = S3::start(folder.path(), 0).await.unwrap();
    assert_eq!(store.get_bytes(&key, 10).await.unwrap(), "kept");
    s3.stop().await.unwrap();
}

#[tokio::test]
async fn a_second_server_on_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let _s3 = S3::start(folder.path(), 0).await.unwrap();
    let error = S3::start(folder.path(), 0).await.unwrap_err().to_string();
    assert!(error.contains("in use by another relora server"), "{error}");
}

#[tokio::test]
async fn nobody_reads_without_the_credentials() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start(folder.path(), 0).await.unwrap();
    let store = Store::connect(s3.store()).await.unwrap();
    store.put_bytes(&Key::from("a".to_owned()), Bytes::from_static(b"secret")).await.unwrap();
    let url = format!("{}/relora/a", s3.store().endpoint.as_ref().unwrap());
    assert_eq!(http_status(&url).await, 403);
}

/// By hand, because what is sent must be nothing but the request itself.
async fn http_status(url: &str) -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let request = format!("GET /{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_start_removes_exactly_what_belongs_to_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let s3 = S3::start(folder.path(), 0).await.unwrap();
    let store = Store::connect(s3.store()).await.unwrap();
    let [kept, deleted] = ["j/kept/x", "j/deleted/x"].map(|key| Key::from(key.to_owned()));
    for key in [&kept, &deleted] {
        store.put_bytes(key, Bytes::from_static(b"bytes")).await.unwrap();
    }
    store.delete(std::slice::from_ref(&deleted)).await.unwrap();
    s3.stop().await.unwrap();

    let root = folder.path().join("s3/objects");
    let upload = |name: &str| description_name("relora", "k", name).replace(".json", ".metadata.json");
    let open = [".upload-open.json".to_owned(), ".upload_id-open.part-1".to_owned(), upload("upload-open")];
    let orphans = [".upload_id-gone.part-1".to_owned(), upload("upload-gone"), ".tmp.3.internal.part".to_owned()];
    for name in open.iter().chain(&orphans) {
        fs::write(root.join(name), "\"x\"").unwrap();
    }
    assert!(names(&root).contains(&description_name("relora", "j/deleted/x", "internal")));
    assert!(root.join("relora/j/deleted").exists());

    let s3 = S3::start(folder.path(), 0).await.unwrap();
    let mut expected = Vec::from(open);
    expected.extend(["metadata", "internal"].map(|kind| description_name("relora", "j/kept/x", kind)));
    expected.push("relora".to_owned());
    expected.sort();
    assert_eq!(names(&root), expected);
    assert!(!root.join("relora/j/deleted").exists());
    assert_eq!(store.get_bytes(&kept, 10).await.unwrap(), "bytes");
    s3.stop().await.unwrap();
}
