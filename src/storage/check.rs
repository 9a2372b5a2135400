//! What a store can do, found out by doing it. Everything is done below one folder of its own, which is empty again
//! afterwards.

use std::{error::Error, time::Duration};

use aws_sdk_s3::{
    error::{DisplayErrorContext, ProvideErrorMetadata, SdkError},
    operation::put_object::builders::PutObjectFluentBuilder,
    presigning::PresigningConfig,
    primitives::ByteStream,
    types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart},
};
use bytes::Bytes;
use uuid::Uuid;

use super::{Key, StorageError, Store};

/// The smallest part that a store takes, unless it is the last.
const SMALLEST_PART_BYTES: usize = 5 << 20;

/// Something that a store can do, or not.
#[derive(Debug)]
pub struct Ability {
    pub name: &'static str,
    pub is_needed: bool,
    pub outcome: Result<(), Lack>,
    /// What it means for relora if the store has it, and if not.
    pub meaning: &'static str,
}

/// Why an ability was not found.
#[derive(Debug)]
pub enum Lack {
    /// The store says no, or does something else.
    No(String),
    /// It could not be found out.
    Failed(String),
}

type Found = Result<(), Lack>;

impl Store {
    /// Tries everything that relora needs or could use.
    pub async fn check(&self) -> Vec<Ability> {
        let probe = Probe { store: self, folder: format!("check/{}", Uuid::new_v4().simple()) };
        let abilities = probe.all().await;
        if let Err(error) = probe.clean_up().await {
            tracing::warn!(%error, folder = probe.folder, "the check could not remove all of its objects");
        }
        abilities
    }

    /// How this store is used, as settings and their values.
    pub fn usage(&self) -> Vec<(&'static str, String)> {
        let is_aws = self.client().config().request_checksum_calculation()
            != Some(&aws_sdk_s3::config::RequestChecksumCalculation::WhenRequired);
        let checksums =
            if is_aws { "CRC32 of every request, as AWS expects" } else { "none that the store has to know" };
        let downloads = match self.inner.public_client {
            Some(_) => "redirected to S3_PUBLIC_ENDPOINT",
            None => "through the API (S3_PUBLIC_ENDPOINT is not set)",
        };
        let prefix = if self.inner.prefix.is_empty() { "(none)" } else { &self.inner.prefix };
        vec![
            ("store", self.inner.place.clone()),
            ("bucket", self.bucket().to_owned()),
            ("prefix", prefix.to_owned()),
            ("parts of an upload", super::upload::describe_parts()),
            ("checksums in requests", checksums.to_owned()),
            ("integrity", "SHA-256 of every file, computed here and kept in the database and the manifest".to_owned()),
            ("conditional writes", "not used: no key is written by two workers".to_owned()),
            ("downloads", downloads.to_owned()),
        ]
    }
}

struct Probe<'a> {
    store: &'a Store,
    folder: String,
}

impl Probe<'_> {
    async fn all(&self) -> Vec<Ability> {
        let needed = |name, outcome, meaning| Ability { name, is_needed: true, outcome, meaning };
        let useful = |name, outcome, meaning| Ability { name, is_needed: false, outcome, meaning };
        vec![
            needed("put and get an object", self.put_and_get().await, "nothing works without"),
            needed("head of an object", self.head().await, "every upload is confirmed by it"),
            needed("range of an object", self.range().await, "downloads that go on; headers of checkpoints"),
            needed("multipart upload", self.multipart("parts", None, false).await, "files above 8 MiB"),
            needed("delete an object", self.delete().await, "old states and checkpoints are removed"),
            useful("bulk delete", self.delete_many().await, "if not, objects are deleted one by one"),
            useful("list objects", self.list().await, "if not, objects that nothing names are not collected"),
            useful("list open uploads", self.list_uploads().await, "if not, set a rule that aborts old uploads"),
            Ability {
                name: "presigned GET",
                is_needed: self.store.inner.public_client.is_some(),
                outcome: self.presigned_get().await,
                meaning: "needed exactly with S3_PUBLIC_ENDPOINT",
            },
            useful("put only if new", self.put_if_new().await, "nothing depends on it: keys are never reused"),
            useful("complete only if new", self.multipart_if_new().await, "nothing depends on it, as above"),
            useful("CRC32", self.checksum("crc32", ChecksumAlgorithm::Crc32).await, "sent to AWS alone"),
            useful("CRC64NVME", self.checksum("crc64", ChecksumAlgorithm::Crc64Nvme).await, "not used"),
            useful(
                "SHA-256 of parts",
                self.multipart("sha256", Some(ChecksumAlgorithm::Sha256), false).await,
                "not used: relora hashes whole files itself",
            ),
        ]
    }

    fn key(&self, name: &str) -> Key {
        Key::from(format!("{}/{name}", self.folder))
    }

    fn object_key(&self, name: &str) -> Result<String, Lack> {
        self.store.object_key(&self.key(name)).map_err(failed)
    }

    async fn put_and_get(&self) -> Found {
        self.put("object", |request| request).await?;
        self.expect("object", &content()).await
    }

    async fn put(&self, name: &str, with: impl FnOnce(PutObjectFluentBuilder) -> PutObjectFluentBuilder) -> Found {
        let request = self.store.client().put_object().bucket(self.store.bucket()).key(self.object_key(name)?);
        let request = with(request.content_type(super::upload::CONTENT_TYPE).body(ByteStream::from(content())));
        request.send().await.map(|_| ()).map_err(lack)
    }

    /// A store that does not know a checksum may keep it inside the object.
    async fn expect(&self, name: &str, expected: &[u8]) -> Found {
        let found = self.store.get_bytes(&self.key(name), 1 << 30).await.map_err(failed)?;
        match found == expected {
            true => Ok(()),
            false => Err(Lack::No(format!("it gives back {} bytes that are not those that were put", found.len()))),
        }
    }

    async fn head(&self) -> Found {
        match self.store.head(&self.key("object")).await.map_err(failed)? {
            Some(len_bytes) if len_bytes == content().len() as u64 => Ok(()),
            found => Err(Lack::No(format!("it says {found:?} of an object of {} bytes", content().len()))),
        }
    }

    async fn range(&self) -> Found {
        match self.store.get_range_bytes(&self.key("object"), 10..20).await {
            Ok(found) if found == content()[10..20] => Ok(()),
            Ok(_) => Err(Lack::No("it gives another range".to_owned())),
            Err(error @ StorageError::Damaged { .. }) => Err(Lack::No(error.to_string())),
            Err(error) => Err(failed(error)),
        }
    }

    async fn delete(&self) -> Found {
        self.put("deleted", |request| request).await?;
        self.store.delete_one(&self.key("deleted")).await.map_err(failed)?;
        match self.store.head(&self.key("deleted")).await.map_err(failed)? {
            None => Ok(()),
            Some(_) => Err(Lack::No("the object is still there".to_owned())),
        }
    }

    async fn delete_many(&self) -> Found {
        self.put("deleted-1", |request| request).await?;
        self.put("deleted-2", |request| request).await?;
        let keys = ["deleted-1", "deleted-2"].map(|name| self.key(name));
        self.store.delete_many(&keys).await.map_err(|error| Lack::No(error.to_string()))?;
        match self.store.head(&keys[1]).await.map_err(failed)? {
            None => Ok(()),
            Some(_) => Err(Lack::No("an object is still there".to_owned())),
        }
    }

    async fn list(&self) -> Found {
        let listed = self.store.list(&format!("{}/", self.folder), None, 1000).await;
        let listed = listed.map_err(|error| Lack::No(error.to_string()))?;
        match listed.iter().any(|object| object.key == self.key("object")) {
            true => Ok(()),
            false => Err(Lack::No("an object that is there is not listed".to_owned())),
        }
    }

    async fn list_uploads(&self) -> Found {
        let upload = self.store.open_upload(&self.key("open")).await.map_err(failed)?;
        let request = self.store.client().list_multipart_uploads().bucket(self.store.bucket());
        let listed = request.prefix(self.object_key("open")?).send().await;
        upload.abort().await;
        match listed.map_err(lack)?.uploads().len() {
            1 => Ok(()),
            found => Err(Lack::No(format!("{found} uploads are listed where 1 is open"))),
        }
    }

    async fn presigned_get(&self) -> Found {
        let expires = PresigningConfig::expires_in(Duration::from_secs(60)).map_err(failed)?;
        let request = self.store.client().get_object().bucket(self.store.bucket()).key(self.object_key("object")?);
        let signed = request.presigned(expires).await.map_err(lack)?;
        let client = plain_client(signed.uri()).map_err(failed)?;
        let answer = client.get(signed.uri()).send().await.map_err(failed)?;
        match answer.status() {
            status if !status.is_success() => Err(Lack::No(format!("it answers {status}"))),
            _ if answer.bytes().await.map_err(failed)? == content() => Ok(()),
            _ => Err(Lack::No("it gives other bytes".to_owned())),
        }
    }

    async fn put_if_new(&self) -> Found {
        self.put("new", |request| request.if_none_match("*")).await?;
        refused(self.put("new", |request| request.if_none_match("*")).await)
    }

    async fn multipart_if_new(&self) -> Found {
        self.multipart("new-parts", None, true).await?;
        refused(self.multipart("new-parts", None, true).await)
    }

    async fn checksum(&self, name: &str, algorithm: ChecksumAlgorithm) -> Found {
        self.put(name, |request| request.checksum_algorithm(algorithm)).await?;
        self.expect(name, &content()).await
    }

    /// In two parts.
    async fn multipart(&self, name: &str, checksum: Option<ChecksumAlgorithm>, only_new: bool) -> Found {
        let (client, bucket, key) = (self.store.client(), self.store.bucket(), self.object_key(name)?);
        let begun = client.create_multipart_upload().bucket(bucket).key(&key).set_checksum_algorithm(checksum.clone());
        let begun = begun.send().await.map_err(lack)?;
        let id = begun.upload_id().ok_or_else(|| Lack::No("the answer names no upload".to_owned()))?;
        let outcome = self.parts(&key, id, checksum, only_new).await;
        if outcome.is_err() {
            // Whatever the store says to that, it is not what is looked for.
            let _ = client.abort_multipart_upload().bucket(bucket).key(&key).upload_id(id).send().await;
            return outcome;
        }
        self.expect(name, &[first_part(), content()].concat()).await
    }

    async fn parts(&self, key: &str, id: &str, checksum: Option<ChecksumAlgorithm>, only_new: bool) -> Found {
        let (client, bucket) = (self.store.client(), self.store.bucket());
        let mut parts = Vec::new();
        for (number, body) in [(1, first_part()), (2, content())] {
            let request = client.upload_part().bucket(bucket).key(key).upload_id(id).part_number(number);
            let request = request.set_checksum_algorithm(checksum.clone()).body(ByteStream::from(body));
            let sent = request.send().await.map_err(lack)?;
            if checksum == Some(ChecksumAlgorithm::Sha256) && sent.checksum_sha256().is_none() {
                return Err(Lack::No("it takes them and says nothing of them".to_owned()));
            }
            let part = CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag().map(str::to_owned));
            parts.push(part.set_checksum_sha256(sent.checksum_sha256().map(str::to_owned)).build());
        }
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let request = client.complete_multipart_upload().bucket(bucket).key(key).upload_id(id).multipart_upload(parts);
        let request = request.set_if_none_match(only_new.then(|| "*".to_owned()));
        request.send().await.map(|_| ()).map_err(lack)
    }

    async fn clean_up(&self) -> super::Result<()> {
        let names =
            ["object", "parts", "deleted", "deleted-1", "deleted-2", "new", "new-parts", "crc32", "crc64", "sha256"];
        self.store.delete(&names.map(|name| self.key(name))).await
    }
}

fn content() -> Bytes {
    Bytes::from_static(b"relora looks at what this store can do")
}

fn first_part() -> Bytes {
    Bytes::from(vec![b'-'; SMALLEST_PART_BYTES])
}

/// The second of two writes that are wanted only if the object is new.
fn refused(second: Found) -> Found {
    match second {
        Ok(()) => Err(Lack::No("the condition is ignored: the object is written again".to_owned())),
        Err(Lack::No(reason)) if reason.starts_with("412") || reason.starts_with("409") => Ok(()),
        Err(lack) => Err(lack),
    }
}

/// An answer that refuses the request is a no; a failure to answer, or to let us in, says nothing.
fn lack<E>(error: SdkError<E>) -> Lack
where
    E: Error + ProvideErrorMetadata + Send + Sync + 'static,
{
    match error.raw_response().map(|response| response.status().as_u16()) {
        Some(status @ (400 | 402 | 404..=499 | 501)) => {
            let code = error.code().unwrap_or_default();
            Lack::No(format!("{status} {code} {}", error.message().unwrap_or_default()).trim_end().to_owned())
        }
        _ => Lack::Failed(DisplayErrorContext(&error).to_string()),
    }
}

fn failed(error: impl std::fmt::Display) -> Lack {
    Lack::Failed(error.to_string())
}

/// A client that signs nothing. A machine without root certificates needs none for http.
fn plain_client(url: &str) -> reqwest::Result<reqwest::Client> {
    // It fails only where somebody has installed one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = reqwest::Client::builder().timeout(Duration::from_secs(60));
    if url.starts_with("http://") { builder.tls_certs_only([]).build() } else { builder.build() }
}
