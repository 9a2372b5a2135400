//! Server-sent events, read from bytes in pieces of any size.

/// One message of the stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Message {
    /// The id to name when the stream is taken up again, if the message carries one.
    pub id: Option<String>,
    pub event: String,
    pub data: String,
}

/// Turns bytes into messages; what is not complete yet is kept for the next piece.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    message: Message,
    has_data: bool,
    after_carriage_return: bool,
}

impl Parser {
    /// The messages that `bytes` completes.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        for &byte in bytes {
            // CR, LF and CR LF all end a line.
            let second_half = byte == b'\n' && self.after_carriage_return;
            self.after_carriage_return = byte == b'\r';
            match byte {
                _ if second_half => {}
                b'\r' | b'\n' => messages.extend(self.end_line()),
                _ => self.line.push(byte),
            }
        }
        messages
    }

    fn end_line(&mut self) -> Option<Message> {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        if line.is_empty() {
            return self.end_message();
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.message.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut self.message.event),
            "data" => {
                if self.has_data {
                    self.message.data.push('\n');
                }
                self.message.data.push_str(value);
                self.has_data = true;
            }
            // A comment, which keeps the connection alive, or a field such as `retry`.
            _ => {}
        }
        None
    }

    fn end_message(&mut self) -> Option<Message> {
        let message = std::mem::take(&mut self.message);
        std::mem::take(&mut self.has_data).then_some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": hello\nretry: 1000\n\nid: 7\nevent: restart\ndata: {\"a\":\ndata: \"ü\"}\n\n: beat\n\n\
                          event:progress\r\ndata:{}\r\n\r\ndata: unfinished\n";

    fn expected() -> Vec<Message> {
        vec![
            Message { id: Some("7".into()), event: "restart".into(), data: "{\"a\":\n\"ü\"}".into() },
            Message { id: None, event: "progress".into(), data: "{}".into() },
        ]
    }

    #[test]
    fn messages_are_read_and_comments_and_unfinished_ones_are_not() {
        assert_eq!(Parser::default().feed(STREAM.as_bytes()), expected());
    }

    #[test]
    fn pieces_may_end_anywhere_even_within_a_character() {
        for piece_bytes in 1..8 {
            let mut parser = Parser::default();
            let messages: Vec<_> = STREAM.as_bytes().chunks(piece_bytes).flat_map(|p| parser.feed(p)).collect();
            assert_eq!(messages, expected(), "pieces of {piece_bytes} bytes");
        }
    }
}
