//! Checks a dataset's content while it streams by, in bounded memory: UTF-8 throughout, and of JSON
//! lines that each is a document. What passed is what the tokenizer can read.

use serde::Deserialize;

use super::error::ApiError;
use crate::db::datasets::DatasetFormat;

/// Longest line of JSON lines.
const MAX_LINE_BYTES: usize = 64 << 20;

/// Looks at the content chunk by chunk.
#[derive(Debug)]
pub enum ContentCheck {
    Text(Utf8Check),
    Jsonl(LineCheck),
}

impl ContentCheck {
    pub fn new(format: DatasetFormat) -> Self {
        match format {
            DatasetFormat::Text => Self::Text(Utf8Check::default()),
            DatasetFormat::Jsonl => Self::Jsonl(LineCheck::default()),
        }
    }

    pub fn push(&mut self, chunk: &[u8]) -> Result<(), ApiError> {
        match self {
            Self::Text(check) => check.push(chunk),
            Self::Jsonl(check) => check.push(chunk),
        }
    }

    /// The content is over: how many documents it has.
    pub fn finish(self) -> Result<i64, ApiError> {
        match self {
            Self::Text(check) => check.finish(),
            Self::Jsonl(check) => check.finish(),
        }
    }
}

/// UTF-8 whose characters may be cut anywhere between chunks.
#[derive(Debug, Default)]
pub struct Utf8Check {
    checked_bytes: i64,
    /// The beginning of a character whose end is in the next chunk: three bytes at most.
    cut: Vec<u8>,
}

impl Utf8Check {
    fn push(&mut self, mut chunk: &[u8]) -> Result<(), ApiError> {
        while !self.cut.is_empty() {
            let Some((&byte, rest)) = chunk.split_first() else { return Ok(()) };
            self.cut.push(byte);
            chunk = rest;
            match std::str::from_utf8(&self.cut) {
                Ok(_) => {
                    self.checked_bytes += self.cut.len() as i64;
                    self.cut.clear();
                }
                Err(error) if error.error_len().is_some() => return Err(self.bad_byte()),
                Err(_) => {}
            }
        }

        let checked = match std::str::from_utf8(chunk) {
            Ok(_) => chunk.len(),
            Err(error) => error.valid_up_to(),
        };
        self.checked_bytes += checked as i64;
        self.cut.extend_from_slice(&chunk[checked..chunk.len().min(checked + 4)]);
        match std::str::from_utf8(&self.cut) {
            Err(error) if error.error_len().is_some() => Err(self.bad_byte()),
            _ => Ok(()),
        }
    }

    fn finish(self) -> Result<i64, ApiError> {
        if !self.cut.is_empty() {
            return Err(self.bad_byte());
        }
        if self.checked_bytes == 0 {
            return Err(ApiError::EmptyContent);
        }
        Ok(1)
    }

    fn bad_byte(&self) -> ApiError {
        ApiError::NotUtf8 { offset_bytes: self.checked_bytes }
    }
}

/// Lines that may be cut anywhere between chunks.
#[derive(Debug, Default)]
pub struct LineCheck {
    num_lines: i64,
    /// Where the line begins that is being read.
    line_start_bytes: i64,
    /// Its part in earlier chunks.
    cut: Vec<u8>,
}

/// A document. Other fields are left alone.
#[derive(Deserialize)]
#[serde(expecting = "an object with a string `text`")]
struct Document {
    #[serde(rename = "text")]
    _text: String,
    #[serde(rename = "source")]
    _source: Option<String>,
}

impl LineCheck {
    fn push(&mut self, chunk: &[u8]) -> Result<(), ApiError> {
        let mut pieces = chunk.split(|&byte| byte == b'\n');
        // The piece after the last line break, possibly empty, is the beginning of the next line.
        let unfinished = pieces.next_back().unwrap_or_default();
        for end_of_line in pieces {
            if self.cut.is_empty() {
                self.line(end_of_line)?;
            } else {
                self.keep(end_of_line)?;
                let line = std::mem::take(&mut self.cut);
                self.line(&line)?;
            }
        }
        self.keep(unfinished)
    }

    fn finish(mut self) -> Result<i64, ApiError> {
        if !self.cut.is_empty() {
            let line = std::mem::take(&mut self.cut);
            self.line(&line)?;
        }
        if self.num_lines == 0 {
            return Err(ApiError::EmptyContent);
        }
        Ok(self.num_lines)
    }

    fn keep(&mut self, piece: &[u8]) -> Result<(), ApiError> {
        if self.cut.len() + piece.len() > MAX_LINE_BYTES {
            return Err(self.bad_line(format!("is longer than {MAX_LINE_BYTES} bytes")));
        }
        self.cut.extend_from_slice(piece);
        Ok(())
    }

    fn line(&mut self, line: &[u8]) -> Result<(), ApiError> {
        if let Err(error) = std::str::from_utf8(line) {
            return Err(ApiError::NotUtf8 { offset_bytes: self.line_start_bytes + error.valid_up_to() as i64 });
        }
        // serde reads a struct from a list too, element by element.
        if line.trim_ascii_start().first() != Some(&b'{') {
            return Err(self.bad_line("is not a JSON object; each line must be one, with a string `text`".into()));
        }
        if let Err(error) = serde_json::from_slice::<Document>(line) {
            return Err(self.bad_line(format!("is not a document: {error}")));
        }
        self.num_lines += 1;
        self.line_start_bytes += line.len() as i64 + 1;
        Ok(())
    }

    fn bad_line(&self, reason: String) -> ApiError {
        ApiError::InvalidLine { line: self.num_lines + 1, offset_bytes: self.line_start_bytes, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outcome of the same content in chunks of every size.
    fn check(format: DatasetFormat, content: &[u8]) -> Result<i64, String> {
        let outcomes: Vec<_> = (1..=content.len().max(1))
            .map(|chunk_bytes| {
                let mut check = ContentCheck::new(format);
                content.chunks(chunk_bytes).try_for_each(|chunk| check.push(chunk))?;
                check.finish()
            })
            .map(|outcome| outcome.map_err(|error| error.to_string()))
            .collect();
        assert!(outcomes.iter().all(|outcome| outcome == &outcomes[0]), "depends on the chunks: {outcomes:?}");
        outcomes[0].clone()
    }

    fn text(content: &[u8]) -> Result<i64, String> {
        check(DatasetFormat::Text, content)
    }

    fn jsonl(content: &[u8]) -> Result<i64, String> {
        check(DatasetFormat::Jsonl, content)
    }

    #[test]
    fn a_text_is_one_document_however_its_characters_are_cut() {
        assert_eq!(text("naïve — 漢字 🦀".as_bytes()), Ok(1));
        assert!(text(b"").is_err_and(|error| error.contains("empty")));
    }

    #[test]
    fn the_first_byte_that_is_not_utf8_is_named() {
        for (content, offset) in [
            (&b"abc\xff"[..], 3),
            (b"\xc3\xa9\xc3", 2),
            (b"\xe6\xbc", 0),
            (b"a\xf0\x9f\xa6", 1),
            (b"ab\xe6\xbcz", 2),
            (b"a\xed\xa0\x80b", 1),
        ] {
            let error = text(content).expect_err("is not UTF-8");
            assert!(error.ends_with(&format!("offset {offset}")), "{content:?}: {error}");
        }
    }

    #[test]
    fn json_lines_are_counted_with_and_without_a_last_line_break() {
        assert_eq!(jsonl(b"{\"text\":\"a\"}\n{\"text\":\"b\",\"source\":\"s\",\"n\":1}\n"), Ok(2));
        assert_eq!(jsonl(b"{\"text\":\"a\"}\r\n{\"text\":\"b\"}"), Ok(2));
    }

    #[test]
    fn a_line_that_is_no_document_is_named_by_number_and_offset() {
        for bad in ["[\"a\"]", "{\"text\":1}", "{}", "nonsense", "", "{\"text\":\"a\",\"source\":2}"] {
            let error = jsonl(format!("{{\"text\":\"é\"}}\n{bad}\n{{\"text\":\"b\"}}\n").as_bytes()).expect_err(bad);
            assert!(error.starts_with("line 2, which begins at byte 14: "), "{bad}: {error}");
        }
    }

    #[test]
    fn a_bad_byte_within_a_line_is_named_by_its_offset() {
        let error = jsonl(b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n").expect_err("is not UTF-8");
        assert!(error.ends_with("offset 22"), "{error}");
    }
}
