//! Lists: how many to a page and where the next page begins.

use serde::Deserialize;

/// How many to a page: 1 to 500, 50 by default.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "i64")]
pub struct Limit(i64);

impl Default for Limit {
    fn default() -> Self {
        Self(50)
    }
}

impl TryFrom<i64> for Limit {
    type Error = &'static str;

    fn try_from(limit: i64) -> Result<Self, Self::Error> {
        if (1..=500).contains(&limit) { Ok(Self(limit)) } else { Err("limit must be from 1 to 500") }
    }
}

impl Limit {
    pub fn get(self) -> i64 {
        self.0
    }

    /// One more than fits on a page, which tells whether there is a next one.
    pub fn with_next(self) -> i64 {
        self.0 + 1
    }

    /// The page, and where the next one begins, out of what [`Limit::with_next`] asked for.
    pub fn cut<T>(self, mut rows: Vec<T>, id: impl Fn(&T) -> &str) -> (Vec<T>, Option<String>) {
        let has_next = rows.len() as i64 > self.0;
        rows.truncate(self.0 as usize);
        let next_cursor = rows.last().filter(|_| has_next).map(|row| id(row).to_owned());
        (rows, next_cursor)
    }
}

/// The identifier of the last object of the page before. Clients pass it on as they got it.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Cursor(String);

impl TryFrom<String> for Cursor {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_id = text.split_once('_').is_some_and(|(prefix, number)| {
            !prefix.is_empty()
                && prefix.bytes().all(|b| b.is_ascii_lowercase())
                && number.len() == 32
                && number.bytes().all(|b| b.is_ascii_hexdigit())
        });
        if is_id { Ok(Self(text)) } else { Err("cursor must be the next_cursor of an earlier page") }
    }
}

impl Cursor {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn into_inner(self) -> String {
        self.0
    }
}
