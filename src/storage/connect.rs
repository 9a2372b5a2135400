//! How the client is set up. The defaults of the library fit AWS alone; what differs is said at each setting.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use anyhow::{Context, bail};
use aws_sdk_s3::{
    Client,
    config::{
        BehaviorVersion, Config, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
        SharedHttpClient, StalledStreamProtectionConfig, retry::RetryConfig, timeout::TimeoutConfig,
    },
    error::{DisplayErrorContext, ProvideErrorMetadata},
    types::{BucketLocationConstraint, CreateBucketConfiguration},
};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, rustls_provider::CryptoMode},
};

use super::{Inner, Store, upload::Patience};
use crate::config::StoreConfig;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// One try of a request until its answer begins. Uploads have limits of their own.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a download may deliver nothing.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_ATTEMPTS: u32 = 4;

impl Store {
    /// Connects, and creates the bucket where the store is not AWS.
    pub async fn connect(config: &StoreConfig) -> anyhow::Result<Self> {
        let place = config.endpoint.clone().unwrap_or_else(|| format!("AWS {}", config.region));
        let client = client(config, config.endpoint.as_deref());
        ensure_bucket(&client, config).await.with_context(|| {
            format!(
                "open bucket {} of the store {place}: check S3_ENDPOINT, S3_BUCKET, AWS_REGION and the credentials",
                config.bucket
            )
        })?;
        let inner = Inner {
            client,
            public_client: config.public_endpoint.as_deref().map(|endpoint| self::client(config, Some(endpoint))),
            bucket: config.bucket.clone(),
            prefix: config.prefix.clone(),
            place,
            patience: Patience::DEFAULT,
            cannot_list_uploads: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The same store, for tests of what it takes too long for.
    #[cfg(test)]
    pub(super) fn with_patience(self, patience: Patience) -> Self {
        let mut inner = Arc::into_inner(self.inner).expect("nobody shares a store that is being made");
        inner.patience = patience;
        Self { inner: Arc::new(inner) }
    }
}

fn client(config: &StoreConfig, endpoint: Option<&str>) -> Client {
    let credentials = Credentials::new(
        &config.access_key_id,
        config.secret_access_key.expose(),
        config.session_token.as_ref().map(|token| token.expose().to_owned()),
        None,
        "relora",
    );
    let timeouts =
        TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).operation_attempt_timeout(REQUEST_TIMEOUT).build();
    // Uploads are guarded by the timeout of each part: a store that syncs its disk is silent for a while.
    let stalls = StalledStreamProtectionConfig::enabled().upload_enabled(false).grace_period(STALL_TIMEOUT).build();
    let mut settings = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .credentials_provider(credentials)
        .region(Region::new(config.region.clone()))
        .force_path_style(config.force_path_style)
        .http_client(http_client(endpoint))
        .retry_config(RetryConfig::standard().with_max_attempts(MAX_ATTEMPTS))
        .timeout_config(timeouts)
        .stalled_stream_protection(stalls);
    if let Some(endpoint) = endpoint {
        // Stores other than AWS refuse the library's checksums, or take them for a part of the object.
        settings = settings
            .endpoint_url(endpoint)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    }
    Client::from_conf(settings.build())
}

/// Without TLS where there is none: a machine without root certificates can still use its own store.
fn http_client(endpoint: Option<&str>) -> SharedHttpClient {
    match endpoint {
        Some(endpoint) if endpoint.starts_with("http://") => Builder::new().build_http(),
        _ => Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https(),
    }
}

async fn ensure_bucket(client: &Client, config: &StoreConfig) -> anyhow::Result<()> {
    let Err(error) = client.head_bucket().bucket(&config.bucket).send().await else { return Ok(()) };
    let is_missing = error.raw_response().is_some_and(|response| response.status().as_u16() == 404);
    if !is_missing {
        bail!("{}", DisplayErrorContext(&error));
    }
    if config.endpoint.is_none() {
        bail!("there is no such bucket: create it, with the region and the access rules that you want");
    }
    let mut request = client.create_bucket().bucket(&config.bucket);
    if config.region != "us-east-1" {
        let region = BucketLocationConstraint::from(config.region.as_str());
        request = request
            .create_bucket_configuration(CreateBucketConfiguration::builder().location_constraint(region).build());
    }
    match request.send().await {
        Ok(_) => Ok(()),
        // Another process was faster.
        Err(error) if error.code() == Some("BucketAlreadyOwnedByYou") => Ok(()),
        Err(error) => bail!("create it: {}", DisplayErrorContext(&error)),
    }
}
