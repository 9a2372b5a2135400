//! Aborts uploads that nobody will end: a killed process cannot, and their parts fill the store unseen.

use std::time::Duration;

use crate::storage::Store;

const EVERY: Duration = Duration::from_secs(3600);

/// Sweeps at once, and again and again. Any number of workers may.
pub async fn sweep_uploads(store: &Store) {
    loop {
        match store.abort_stale_uploads(Store::STALE_UPLOAD).await {
            Ok(0) => {}
            Ok(num_uploads) => tracing::info!(num_uploads, "aborted uploads that nobody has ended"),
            Err(error) => tracing::warn!(%error, "could not look for uploads that nobody has ended"),
        }
        tokio::time::sleep(EVERY).await;
    }
}
