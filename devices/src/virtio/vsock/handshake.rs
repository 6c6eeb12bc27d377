//! The first line that a host program sends: which port of the guest's it wants.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

/// The longest line, with its end: room for `CONNECT 4294967295`, and some for blanks.
const MAX_LINE: usize = 32;

/// A host program that has not yet said what it wants.
#[derive(Debug)]
pub(super) struct Handshake {
    pub(super) socket: UnixStream,
    line: Vec<u8>,
}

/// What came of reading on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is not complete.
    Waiting,
    /// The guest's port that is wanted. What follows the line was left in the socket.
    Port(u32),
    /// It is no such line, or it ended early.
    Failed,
}

impl Handshake {
    /// Expects the line from `socket`, which does not block.
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, line: Vec::new() }
    }

    /// Reads up to the end of the line.
    pub(super) fn read(&mut self) -> Progress {
        // Byte by byte, because what follows the line is the guest's.
        let mut byte = [0];
        while self.line.len() < MAX_LINE {
            match self.socket.read(&mut byte) {
                Ok(0) => return Progress::Failed,
                Ok(_) if byte == *b"\n" => return parse(&self.line).map_or(Progress::Failed, Progress::Port),
                Ok(_) => self.line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Waiting,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Progress::Failed,
            }
        }
        Progress::Failed
    }
}

/// The port in `connect PORT`, the word in any case.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (Some(word), Some(port), None) = (words.next(), words.next(), words.next()) else { return None };
    // Digits only: the parser would take a sign as well.
    let number = port.bytes().all(|byte| byte.is_ascii_digit());
    if word.eq_ignore_ascii_case("connect") && number { port.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        for (line, port) in [
            ("CONNECT 1024", Some(1024)),
            ("connect 1024", Some(1024)),
            ("CoNNecT 0\r", Some(0)),
            ("CONNECT 4294967295", Some(u32::MAX)),
            ("CONNECT 4294967296", None),
            ("CONNECT -1", None),
            ("CONNECT +1", None),
            ("CONNECT", None),
            ("CONNECT ", None),
            ("CONNECT 1 2", None),
            ("CONNECTS 1", None),
            ("GET /", None),
            ("", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line:?}");
        }
        assert_eq!(parse(b"CONNECT \xff"), None);
    }
}
