//! Listings of the embedded store. Those of `s3s-fs` read the whole bucket for every page, and it has none of uploads.

use std::{
    fs::{self, Metadata},
    io,
    path::Path,
};

use s3s::dto::{MultipartUpload, Object, Timestamp};

use super::durable::described_upload;

/// The first objects, `max` at most, whose keys begin with `prefix` and come after `after`, in the order of their keys;
/// and whether there are more.
pub(super) fn objects(bucket: &Path, prefix: &str, after: &str, max: usize) -> io::Result<(Vec<Object>, bool)> {
    let mut walk = Walk { prefix, after, max, objects: Vec::new(), is_truncated: false };
    walk.enter(bucket, "")?;
    Ok((walk.objects, walk.is_truncated))
}

struct Walk<'a> {
    prefix: &'a str,
    after: &'a str,
    max: usize,
    objects: Vec<Object>,
    is_truncated: bool,
}

impl Walk<'_> {
    /// Visits a folder whose keys begin with `begin`. Its folders are sorted with a slash at their end, so that the
    /// keys come in order.
    fn enter(&mut self, folder: &Path, begin: &str) -> io::Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let slash = if entry.file_type()?.is_dir() { "/" } else { "" };
            // What is not UTF-8 is nothing that a request has stored.
            names.extend(entry.file_name().to_str().map(|name| format!("{begin}{name}{slash}")));
        }
        names.sort_unstable();
        for name in names.iter().filter(|name| self.may_hold(name)).collect::<Vec<_>>() {
            let path = folder.join(&name[begin.len()..]);
            match name.ends_with('/') {
                true => self.enter(&path, name)?,
                false => self.add(&path, name)?,
            }
            if self.is_truncated {
                break;
            }
        }
        Ok(())
    }

    /// Whether an object of this name, or one below a folder of this name, belongs to the answer.
    fn may_hold(&self, name: &str) -> bool {
        let is_folder = name.ends_with('/');
        let is_wanted = name.starts_with(self.prefix) || (is_folder && self.prefix.starts_with(name));
        is_wanted && (name > self.after || (is_folder && self.after.starts_with(name)))
    }

    fn add(&mut self, path: &Path, key: &str) -> io::Result<()> {
        // An object may be deleted while its folder is read.
        let Some(metadata) = found(path.metadata())? else { return Ok(()) };
        if self.objects.len() == self.max {
            self.is_truncated = true;
            return Ok(());
        }
        self.objects.push(Object {
            key: Some(key.to_owned()),
            size: Some(metadata.len().cast_signed()),
            last_modified: Some(metadata.modified()?.into()),
            ..Object::default()
        });
        Ok(())
    }
}

/// The open uploads of a bucket whose keys begin with `prefix`, in the order of their keys.
pub(super) fn uploads(root: &Path, bucket: &str, prefix: &str) -> io::Result<Vec<MultipartUpload>> {
    let mut uploads = Vec::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let Some((in_bucket, key, id)) = entry.file_name().to_str().and_then(described_upload) else { continue };
        // The description is written once, when the upload begins; without its record the upload has ended.
        let is_open = root.join(format!(".upload-{id}.json")).exists();
        let Some(metadata) = found(entry.metadata())? else { continue };
        if in_bucket == bucket && key.starts_with(prefix) && is_open {
            uploads.push(upload(key, id, &metadata)?);
        }
    }
    uploads.sort_by(|a, b| (&a.key, &a.upload_id).cmp(&(&b.key, &b.upload_id)));
    Ok(uploads)
}

fn upload(key: String, id: String, metadata: &Metadata) -> io::Result<MultipartUpload> {
    let initiated = Timestamp::from(metadata.modified()?);
    Ok(MultipartUpload {
        key: Some(key),
        upload_id: Some(id),
        initiated: Some(initiated),
        ..MultipartUpload::default()
    })
}

fn found(metadata: io::Result<Metadata>) -> io::Result<Option<Metadata>> {
    match metadata {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
