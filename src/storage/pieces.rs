//! A file on its way into requests: pieces of it, in memory that is used again.

use std::{
    fs::File,
    io::{self, Read},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures_util::{Stream, stream};
use tokio::task::spawn_blocking;

/// A file in pieces of `size_bytes`, each read at once and off the threads that must not block.
pub(super) fn file_pieces(
    file: File,
    size_bytes: u64,
    len_bytes: u64,
) -> impl Stream<Item = io::Result<Bytes>> + Send + use<> {
    let buffers = Buffers::default();
    stream::try_unfold(file, move |mut file| {
        let buffers = buffers.clone();
        let read = move || {
            let mut piece = buffers.take(usize::try_from(size_bytes.min(len_bytes)).map_err(io::Error::other)?);
            (&mut file).take(size_bytes).read_to_end(&mut piece.bytes)?;
            Ok((!piece.bytes.is_empty()).then(|| (Bytes::from_owner(piece), file)))
        };
        async { spawn_blocking(read).await.unwrap_or_else(|error| Err(io::Error::other(error))) }
    })
}

/// Memory for pieces, used again once nobody reads them: given back to the allocator on one thread and taken on another
/// each time, they come to twice what is there at once (docs/performance.md).
#[derive(Clone, Default)]
struct Buffers {
    unused: Arc<Mutex<Vec<Vec<u8>>>>,
}

struct Piece {
    bytes: Vec<u8>,
    buffers: Buffers,
}

impl Buffers {
    fn take(&self, capacity: usize) -> Piece {
        let unused = self.unused.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut bytes = unused.unwrap_or_else(|| Vec::with_capacity(capacity));
        bytes.clear();
        Piece { bytes, buffers: self.clone() }
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.buffers.unused.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use futures_util::TryStreamExt;

    use super::*;

    #[tokio::test]
    async fn a_file_is_read_into_as_many_buffers_as_there_are_pieces_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let written: Vec<u8> = (0..10_500u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
        std::fs::write(&path, &written).unwrap();
        let mut pieces = Box::pin(file_pieces(File::open(&path).unwrap(), 1_000, 10_500));
        let (mut read, mut held, mut addresses) = (Vec::new(), None, HashSet::new());
        while let Some(piece) = pieces.try_next().await.unwrap() {
            read.extend_from_slice(&piece);
            addresses.insert(piece.as_ptr());
            held = Some(piece);
        }
        assert!(read == written && held.unwrap().len() == 500);
        assert_eq!(addresses.len(), 2, "one is read while the one before is held");
    }
}
