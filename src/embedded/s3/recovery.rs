//! What is cleaned up before the embedded store takes requests, while nothing else touches its files.
//!
//! `s3s-fs` keeps everything about uploads and objects in files beside the bucket:
//! `.upload-{id}.json` (an upload is open), `.upload_id-{id}.part-{n}`, and descriptions of objects and of
//! uploads. A kill in the middle of a completion or of an abort leaves parts that no request can remove.

use std::{
    collections::HashSet,
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

use super::durable::described_object;

/// An upload that nobody has completed for so long is given up.
const MAX_UPLOAD_AGE: Duration = Duration::from_secs(2 * 24 * 3600);

/// Removes what belongs to no open upload and to no object, and folders that hold nothing.
pub(super) fn clean(root: &Path) -> io::Result<()> {
    let mut open_uploads = HashSet::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if let Some(upload) = entry.file_name().to_str().and_then(record_of_upload) {
            let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
            if age > MAX_UPLOAD_AGE {
                fs::remove_file(entry.path())?;
            } else {
                open_uploads.insert(upload.to_owned());
            }
        }
    }
    let mut num_removed = 0;
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type()?.is_dir() {
            remove_empty_folders(&entry.path())?;
        } else if name.to_str().is_some_and(|name| is_left_over(root, name, &open_uploads)) {
            fs::remove_file(entry.path())?;
            num_removed += 1;
        }
    }
    if num_removed > 0 {
        tracing::info!(num_files = num_removed, "removed what interrupted uploads and deletions left in the store");
    }
    Ok(())
}

fn is_left_over(root: &Path, name: &str, open_uploads: &HashSet<String>) -> bool {
    if let Some(upload) = part_of_upload(name).or_else(|| description_of_upload(name)) {
        return !open_uploads.contains(upload);
    }
    described_object(name).is_some_and(|(bucket, key)| !root.join(bucket).join(key).exists())
}

fn record_of_upload(name: &str) -> Option<&str> {
    name.strip_prefix(".upload-")?.strip_suffix(".json")
}

fn part_of_upload(name: &str) -> Option<&str> {
    Some(name.strip_prefix(".upload_id-")?.split_once(".part-")?.0)
}

fn description_of_upload(name: &str) -> Option<&str> {
    Some(name.strip_suffix(".metadata.json")?.split_once(".upload-")?.1)
}

/// Removes the empty folders below `folder`, which itself stays.
fn remove_empty_folders(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty_folders(&entry.path())?;
            match fs::remove_dir(entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}
