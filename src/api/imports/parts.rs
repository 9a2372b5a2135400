//! The parts of an import's body: files to the store as they come, everything else refused by name.

use std::collections::BTreeSet;

use async_stream::stream;
use bytes::Bytes;
use futures_util::Stream;
use multer::{Field, Multipart};

use super::{Import, check::problems_of_config};
use crate::{
    api::{
        AppState,
        body::IncomingBody,
        error::{ApiError, ApiResult},
    },
    db::nodes::StoredFile,
    domain::{
        checkpoint::{CONFIG_FILE, MAX_FILES, MAX_PROBLEMS, TAKEN_FILES, is_taken, is_weights, max_bytes, too_large},
        problem::Problem,
    },
    storage::Key,
};

/// Bytes that may come between two parts, the header of the next among them.
const MAX_HEADER_BYTES: i64 = 1 << 20;
/// The text part that is taken.
const NAME_PART: &str = "name";
const MAX_NAME_BYTES: usize = 1 << 10;
const MAX_NAME_CHARS: usize = 200;

/// What came of the parts so far.
#[derive(Default)]
pub struct Received {
    pub name: Option<String>,
    pub files: Vec<StoredFile>,
    /// Every object that may be in the store, also of a file that was not stored to its end.
    pub object_keys: Vec<String>,
    pub problems: Vec<Problem>,
    /// Those of a configuration that has come. Until weights come they wait for those of the other small files.
    config_problems: Vec<Problem>,
    names: BTreeSet<String>,
}

/// Reads the body to its end. Once something is wrong, nothing more is stored, and the rest only looked through for
/// what is wrong too; but weights of a model that is refused are not waited for.
pub async fn receive(
    state: &AppState,
    import: &Import,
    body: &mut IncomingBody,
    received: &mut Received,
) -> ApiResult<()> {
    let allowance = body.allowance();
    let mut parts = Multipart::new(body.stream(), &import.boundary);
    loop {
        allowance.limit(MAX_HEADER_BYTES);
        let Some(mut part) = parts.next_field().await.map_err(malformed)? else { return Ok(()) };
        allowance.lift();
        match (part.file_name().map(str::to_owned), part.name()) {
            (Some(file), _) => {
                if is_weights(&file) && received.has_refused_config() {
                    return Ok(());
                }
                received.check_file_name(&file);
                if received.problems.is_empty() {
                    received.store(state, import, file, &mut part).await?;
                }
            }
            (None, Some(NAME_PART)) => received.read_name(&mut part).await?,
            (None, other) => {
                let message = "is a part without a file name; of those only `name` is taken";
                received.problem(Problem::at(&[other.unwrap_or_default()], message));
            }
        }
        while part.chunk().await.map_err(malformed)?.is_some() {}
    }
}

fn malformed(error: multer::Error) -> ApiError {
    ApiError::MalformedMultipart(error.to_string())
}

impl Received {
    fn problem(&mut self, problem: Problem) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem.shortened());
        }
    }

    fn check_file_name(&mut self, file: &str) {
        if !is_taken(file) {
            self.problem(Problem::at(&[file], format!("is not taken; taken are {TAKEN_FILES}")));
        } else if !self.names.insert(file.to_owned()) {
            self.problem(Problem::at(&[file], "is there twice"));
        } else if self.names.len() > MAX_FILES {
            self.problem(Problem::at(&[file], format!("is one file too many; {MAX_FILES} are taken")));
        }
    }

    /// Whether the configuration was refused, which is then among the problems.
    fn has_refused_config(&mut self) -> bool {
        let problems = std::mem::take(&mut self.config_problems);
        let is_refused = !problems.is_empty();
        problems.into_iter().for_each(|problem| self.problem(problem));
        is_refused
    }

    /// Stores one file. One that is read whole later has a limit of its own.
    async fn store(&mut self, state: &AppState, import: &Import, file: String, part: &mut Field<'_>) -> ApiResult<()> {
        let key = Key::import(&import.id, &file);
        self.object_keys.push(key.to_string());
        let mut failure = None;
        let limit_bytes = max_bytes(&file).unwrap_or(u64::MAX);
        let stored = state.store.upload(&key, chunks(part, limit_bytes, &mut failure), import.len_bytes).await;
        match failure {
            Some(PartError::Malformed(error)) => return Err(malformed(error)),
            Some(PartError::TooLarge) => {
                self.problem(too_large(&file, limit_bytes));
                return Ok(());
            }
            None => {}
        }
        let stored = stored?;
        let file = StoredFile {
            name: file,
            object_key: key.to_string(),
            size_bytes: stored.bytes.cast_signed(),
            sha256: stored.sha256,
        };
        if file.name == CONFIG_FILE {
            self.config_problems = problems_of_config(&state.store, &file).await?;
        }
        self.files.push(file);
        Ok(())
    }

    async fn read_name(&mut self, part: &mut Field<'_>) -> ApiResult<()> {
        let mut bytes = Vec::new();
        while let Some(chunk) = part.chunk().await.map_err(malformed)? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_NAME_BYTES {
                break;
            }
        }
        let is_good = |name: &str| (1..=MAX_NAME_CHARS).contains(&name.chars().count()) && !name.contains('\0');
        match String::from_utf8(bytes).ok().filter(|name| is_good(name)) {
            Some(name) if self.name.is_none() => self.name = Some(name),
            Some(_) => self.problem(Problem::at(&[NAME_PART], "is there twice")),
            None => {
                let message = format!("must have 1 to {MAX_NAME_CHARS} characters of UTF-8, none of them NUL");
                self.problem(Problem::at(&[NAME_PART], message));
            }
        }
        Ok(())
    }
}

/// Why the stream of a part ended before the part.
enum PartError {
    Malformed(multer::Error),
    TooLarge,
}

/// The content of a part for the store, which learns that it ended badly, so that it keeps nothing of it.
fn chunks(
    part: &mut Field<'_>,
    limit_bytes: u64,
    failure: &mut Option<PartError>,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send {
    stream! {
        let mut left_bytes = limit_bytes;
        loop {
            let error = match part.chunk().await {
                Ok(None) => return,
                Ok(Some(chunk)) if chunk.len() as u64 <= left_bytes => {
                    left_bytes -= chunk.len() as u64;
                    yield Ok(chunk);
                    continue;
                }
                Ok(Some(_)) => PartError::TooLarge,
                Err(error) => PartError::Malformed(error),
            };
            *failure = Some(error);
            yield Err(std::io::Error::other("the upload ended badly"));
            return;
        }
    }
}
