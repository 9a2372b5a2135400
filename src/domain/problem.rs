//! What is wrong with a request, said in the words of the person who wrote it.

use serde::Serialize;
use utoipa::ToSchema;

use super::json;

/// One thing that is wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Problem {
    /// JSON pointer (RFC 6901) to the offending value; empty for the document as a whole.
    pub pointer: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Problem {
    pub fn new(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), message: message.into() }
    }

    /// A problem at the value that these keys lead to.
    pub fn at(keys: &[&str], message: impl Into<String>) -> Self {
        Self::new(keys.iter().map(|key| format!("/{}", json::escape(key))).collect::<String>(), message)
    }

    /// The problem as one of the document of which its own is the value at `key`.
    pub fn within(self, key: &str) -> Self {
        Self { pointer: format!("/{}{}", json::escape(key), self.pointer), ..self }
    }
}
