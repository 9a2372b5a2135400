//! Downloads of stored files: whole or a range, with validators (RFC 9110, sections 13 and 14).

use std::ops::Range;

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};

use super::error::{ApiError, ApiResult};
use crate::storage::{Key, Store};

const REPR_DIGEST: HeaderName = HeaderName::from_static("repr-digest");

/// A file that a client may download.
#[derive(Debug)]
pub struct Download {
    pub object_key: String,
    /// Under which a client saves it.
    pub name: String,
    pub content_type: &'static str,
    pub size_bytes: i64,
    /// In hexadecimal; the strong validator of the file.
    pub sha256: String,
}

impl Download {
    fn etag(&self) -> String {
        format!("\"{}\"", self.sha256)
    }

    /// Whether the client says that it has the file already.
    pub fn is_known(&self, headers: &HeaderMap) -> bool {
        let etag = self.etag();
        let tags = headers.get_all(header::IF_NONE_MATCH).into_iter().filter_map(|value| value.to_str().ok());
        tags.flat_map(|list| list.split(','))
            .map(|tag| tag.trim().trim_start_matches("W/"))
            .any(|tag| tag == "*" || tag == etag)
    }

    fn describe(&self, response: &mut Response) {
        let digest = hex::decode(&self.sha256).map(|bytes| format!("sha-256=:{}:", STANDARD.encode(bytes)));
        let described = [
            (header::CONTENT_TYPE, self.content_type.to_owned()),
            (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{}\"", self.name)),
            (header::ACCEPT_RANGES, "bytes".to_owned()),
            (header::ETAG, self.etag()),
            (header::CACHE_CONTROL, "private, no-cache".to_owned()),
        ];
        for (name, value) in described.into_iter().chain(digest.ok().map(|digest| (REPR_DIGEST, digest))) {
            if let Ok(value) = HeaderValue::try_from(value) {
                response.headers_mut().insert(name, value);
            }
        }
    }
}

/// Answers GET and HEAD: 200, 206, 304 or 416.
pub async fn answer(store: &Store, file: Download, method: &Method, headers: &HeaderMap) -> ApiResult<Response> {
    if file.is_known(headers) {
        let mut response = StatusCode::NOT_MODIFIED.into_response();
        file.describe(&mut response);
        return Ok(response);
    }

    let range = wanted_range(&file, method, headers)?;
    let (first, end) = range.as_ref().map_or((0, file.size_bytes), |range| (range.start, range.end));
    let body = if *method == Method::HEAD {
        Body::empty()
    } else {
        let range = range.as_ref().map(|range| range.start.unsigned_abs()..range.end.unsigned_abs());
        let object = store.get(&Key::from(file.object_key.clone()), range).await?;
        Body::from_stream(object.into_stream())
    };

    let mut response = body.into_response();
    file.describe(&mut response);
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(end - first));
    if range.is_some() {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let content_range = format!("bytes {first}-{}/{}", end - 1, file.size_bytes);
        if let Ok(value) = HeaderValue::try_from(content_range) {
            response.headers_mut().insert(header::CONTENT_RANGE, value);
        }
    }
    Ok(response)
}

/// The one range that the client asks for. A Range header that is malformed, names several ranges or
/// belongs to another version of the file is as good as none.
fn wanted_range(file: &Download, method: &Method, headers: &HeaderMap) -> ApiResult<Option<Range<i64>>> {
    let Some(range) = headers.get(header::RANGE).and_then(|value| value.to_str().ok()) else { return Ok(None) };
    let is_same_file = headers.get(header::IF_RANGE).is_none_or(|tag| tag.as_bytes() == file.etag().as_bytes());
    if *method != Method::GET || !is_same_file {
        return Ok(None);
    }
    match parse_range(range, file.size_bytes) {
        Some(range) if range.is_empty() => Err(ApiError::RangeNotSatisfiable { size_bytes: file.size_bytes }),
        range => Ok(range),
    }
}

/// Reads `bytes=first-last`, `bytes=first-` or `bytes=-last_n`. Empty if nothing of it lies in the file.
fn parse_range(range: &str, size_bytes: i64) -> Option<Range<i64>> {
    let (unit, range) = range.split_once('=')?;
    let (first, last) = range.trim().split_once('-')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let number = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // A number beyond all files is one that lies behind this one.
        is_number.then(|| text.parse().unwrap_or(i64::MAX - 1))
    };
    match (first, last) {
        ("", last_n) => {
            let last_n = number(last_n)?;
            Some((size_bytes - last_n).max(0)..if last_n == 0 { 0 } else { size_bytes })
        }
        (first, "") => Some(number(first)?..size_bytes),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then(|| first..(last + 1).min(size_bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::parse_range;

    #[test]
    fn the_three_forms_of_a_range_are_understood() {
        assert_eq!(parse_range("bytes=0-4", 10), Some(0..5));
        assert_eq!(parse_range("bytes=4-", 10), Some(4..10));
        assert_eq!(parse_range("bytes=-3", 10), Some(7..10));
        assert_eq!(parse_range("Bytes=8-99", 10), Some(8..10));
        assert_eq!(parse_range("bytes=-99", 10), Some(0..10));
        assert_eq!(parse_range("bytes=3-99999999999999999999", 10), Some(3..10));
    }

    #[test]
    fn a_range_outside_of_the_file_is_empty() {
        for range in ["bytes=10-", "bytes=10-12", "bytes=-0", "bytes=99999999999999999999-"] {
            assert!(parse_range(range, 10).is_some_and(|range| range.is_empty()), "{range}");
        }
        assert!(parse_range("bytes=-5", 0).is_some_and(|range| range.is_empty()));
    }

    #[test]
    fn what_is_no_single_range_of_bytes_is_ignored() {
        for range in ["bytes=5-4", "bytes=a-", "bytes=-", "lines=0-1", "bytes=0-1,3-4", "bytes 0-1", "bytes=+1-2"] {
            assert_eq!(parse_range(range, 10), None, "{range}");
        }
    }
}
