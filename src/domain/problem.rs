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

    /// The problem in few words: what it quotes may have come from a file of noise.
    pub fn shortened(self) -> Self {
        Self { pointer: shortened(self.pointer), message: shortened(self.message) }
    }

    /// The problem as one of the document of which its own is the value at `key`.
    pub fn within(self, key: &str) -> Self {
        Self { pointer: format!("/{}{}", json::escape(key), self.pointer), ..self }
    }
}

fn shortened(mut text: String) -> String {
    const MAX_BYTES: usize = 500;
    if text.len() > MAX_BYTES {
        text.truncate(text.floor_char_boundary(MAX_BYTES));
        text.push('…');
        text.shrink_to_fit();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::Problem;

    #[test]
    fn what_is_quoted_at_length_is_cut() {
        let long = Problem::new("ä".repeat(2_000), "b".repeat(501)).shortened();
        assert_eq!((long.pointer, long.message), ("ä".repeat(250) + "…", "b".repeat(500) + "…"));
        let short = Problem::new("/a", "b".repeat(500));
        assert_eq!(short.clone().shortened(), short);
    }
}
