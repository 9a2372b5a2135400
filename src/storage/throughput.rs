//! How fast a store takes an upload of a file, and how fast it takes the same bytes from memory.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::{
    Key, Store,
    upload::{PART_BYTES, max_in_flight, send_part},
};

/// Two rounds of both ways.
#[derive(Debug, Default)]
pub struct Throughput {
    pub num_bytes: u64,
    /// Uploads of the file, as checkpoints are uploaded.
    pub file: Vec<Duration>,
    /// Uploads of parts from memory, as many at once, without a file and without a hash.
    pub plain: Vec<Duration>,
    /// What the process needed beyond what it had before the first upload of the file.
    pub peak_bytes: Option<u64>,
}

impl Throughput {
    pub fn file_mb_per_s(&self) -> f64 {
        self.mb_per_s(&self.file)
    }

    pub fn plain_mb_per_s(&self) -> f64 {
        self.mb_per_s(&self.plain)
    }

    fn mb_per_s(&self, rounds: &[Duration]) -> f64 {
        let total_s: f64 = rounds.iter().map(Duration::as_secs_f64).sum();
        self.num_bytes as f64 * rounds.len() as f64 / total_s / 1e6
    }
}

impl Store {
    /// Uploads a file of `num_bytes` that is made in `folder`, and the same from memory: file, memory, memory, file, so
    /// that a disk that gets slower is unfair to neither.
    pub async fn measure_upload(&self, num_bytes: u64, folder: &Path) -> Result<Throughput> {
        let key = Key::from(format!("check/{}", Uuid::new_v4().simple()));
        let file = TemporaryFile { path: folder.join(format!("relora-s3-check-{}", Uuid::new_v4().simple())) };
        let path = file.path.clone();
        let made = tokio::task::spawn_blocking(move || write_noise(&path, num_bytes)).await?;
        made.with_context(|| format!("make a file of {num_bytes} bytes: {}", file.path.display()))?;

        let mut throughput = Throughput { num_bytes, ..Throughput::default() };
        let before_bytes = reset_peak_bytes();
        throughput.file.push(self.upload_timed(&key, &file.path).await?);
        throughput.peak_bytes = peak_bytes().zip(before_bytes).map(|(peak, before)| peak.saturating_sub(before));
        for _ in 0..2 {
            throughput.plain.push(self.upload_plain(&key, num_bytes).await?);
        }
        throughput.file.push(self.upload_timed(&key, &file.path).await?);
        Ok(throughput)
    }

    async fn upload_timed(&self, key: &Key, path: &Path) -> Result<Duration> {
        let begin = Instant::now();
        self.upload_file(key, path).await?;
        let took = begin.elapsed();
        self.delete(std::slice::from_ref(key)).await?;
        Ok(took)
    }

    async fn upload_plain(&self, key: &Key, num_bytes: u64) -> Result<Duration> {
        let body = Bytes::from(noise(0));
        let begin = Instant::now();
        let upload = self.open_upload(key).await?;
        let (mut sending, mut parts) = (JoinSet::new(), Vec::new());
        for number in 1..=num_bytes.div_ceil(PART_BYTES) {
            if sending.len() == max_in_flight(body.len()) {
                parts.extend(sending.join_next().await.transpose()?.transpose()?);
            }
            let len_bytes = PART_BYTES.min(num_bytes - (number - 1) * PART_BYTES);
            let body = body.slice(..usize::try_from(len_bytes)?);
            sending.spawn(send_part(self.clone(), key.clone(), upload.id().to_owned(), number, body));
        }
        while let Some(sent) = sending.join_next().await {
            parts.push(sent??);
        }
        parts.sort_by_key(|part| part.part_number());
        self.complete(upload, parts, num_bytes).await?;
        let took = begin.elapsed();
        self.delete(std::slice::from_ref(key)).await?;
        Ok(took)
    }
}

/// Removed when dropped.
struct TemporaryFile {
    path: PathBuf,
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "could not remove the file of a measurement");
        }
    }
}

/// On the disk when it returns, so that the upload does not wait for that.
fn write_noise(path: &Path, num_bytes: u64) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    let mut left_bytes = num_bytes;
    while left_bytes > 0 {
        let piece = noise(left_bytes);
        let len_bytes = left_bytes.min(PART_BYTES);
        file.write_all(&piece[..usize::try_from(len_bytes).map_err(io::Error::other)?])?;
        left_bytes -= len_bytes;
    }
    file.sync_all()
}

/// A part that no store can make smaller.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    std::iter::repeat_with(next).take((PART_BYTES / 4) as usize).flat_map(u32::to_ne_bytes).collect()
}

/// Makes the kernel forget the peak, and returns what is held now.
fn reset_peak_bytes() -> Option<u64> {
    fs::write("/proc/self/clear_refs", "5").ok()?;
    peak_bytes()
}

/// The most memory that was held at once.
fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}
