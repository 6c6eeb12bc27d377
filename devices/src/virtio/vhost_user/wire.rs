//! Requests and answers on a back-end's socket, each with a header of request, flags and length of what follows, in 32
//! bits each, little endian.
//!
//! Not by the front end of the crate `vhost`: when an answer does not come in time, that one goes on waiting for it.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// What is asked of a back-end: the protocol's name for it, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub &'static str, pub u32);

impl Request {
    pub const GET_FEATURES: Self = Self("GET_FEATURES", 1);
    pub const SET_FEATURES: Self = Self("SET_FEATURES", 2);
    pub const SET_OWNER: Self = Self("SET_OWNER", 3);
    pub const SET_MEM_TABLE: Self = Self("SET_MEM_TABLE", 5);
    pub const SET_VRING_NUM: Self = Self("SET_VRING_NUM", 8);
    pub const SET_VRING_ADDR: Self = Self("SET_VRING_ADDR", 9);
    pub const SET_VRING_BASE: Self = Self("SET_VRING_BASE", 10);
    pub const GET_VRING_BASE: Self = Self("GET_VRING_BASE", 11);
    pub const SET_VRING_KICK: Self = Self("SET_VRING_KICK", 12);
    pub const SET_VRING_CALL: Self = Self("SET_VRING_CALL", 13);
    pub const GET_PROTOCOL_FEATURES: Self = Self("GET_PROTOCOL_FEATURES", 15);
    pub const SET_PROTOCOL_FEATURES: Self = Self("SET_PROTOCOL_FEATURES", 16);
    pub const GET_QUEUE_NUM: Self = Self("GET_QUEUE_NUM", 17);
    pub const SET_VRING_ENABLE: Self = Self("SET_VRING_ENABLE", 18);
    pub const GET_CONFIG: Self = Self("GET_CONFIG", 24);
    pub const GET_INFLIGHT_FD: Self = Self("GET_INFLIGHT_FD", 31);
    pub const SET_INFLIGHT_FD: Self = Self("SET_INFLIGHT_FD", 32);
}

/// Bytes of a header.
const HEADER_LEN: usize = 12;
/// Flags of a header: the version, that this is an answer, and that one is wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What came of a request. Whatever it is, the connection is of no use any more.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", .request.0)]
pub(super) struct TalkError {
    pub(super) request: Request,
    pub(super) reason: io::Error,
}

/// A connection to a back-end.
pub(super) struct Wire {
    stream: UnixStream,
    /// Whether the back-end acknowledges what has no answer of its own (VHOST_USER_PROTOCOL_F_REPLY_ACK).
    acknowledges: bool,
    /// How long the back-end may take to answer.
    patience: Duration,
}

impl Wire {
    /// Connects to a back-end, which may take that long for an answer.
    pub(super) fn connect(path: &Path, patience: Duration) -> io::Result<Self> {
        Self::over(UnixStream::connect(path)?, patience)
    }

    /// The same by a connection that is there.
    pub(super) fn over(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream, acknowledges: false, patience })
    }

    /// From now on every request is acknowledged.
    pub(super) fn expect_acknowledgements(&mut self) {
        self.acknowledges = true;
    }

    /// Asks for something that has no answer, with these descriptors. Where it is acknowledged, the back-end has done it
    /// on return.
    pub(super) fn tell(&mut self, request: Request, body: &[u8], fds: &[RawFd]) -> Result<(), TalkError> {
        let failed = |reason| TalkError { request, reason };
        if !self.acknowledges {
            return self.send(request, VERSION, body, fds).map_err(failed);
        }
        self.send(request, VERSION | NEED_REPLY, body, fds).map_err(failed)?;
        let mut status = [0; 8];
        self.receive(request, &mut status).map_err(failed)?;
        match u64::from_le_bytes(status) {
            0 => Ok(()),
            _ => Err(failed(io::Error::other("it refused"))),
        }
    }

    /// Asks for something that is answered with as many bytes as `answer` has.
    pub(super) fn ask(&mut self, request: Request, body: &[u8], answer: &mut [u8]) -> Result<(), TalkError> {
        let asked = self.send(request, VERSION, body, &[]);
        asked
            .and_then(|()| self.receive(request, answer).map(drop))
            .map_err(|reason| TalkError { request, reason })
    }

    /// Likewise, for what is answered with a file as well.
    pub(super) fn ask_file(
        &mut self,
        request: Request,
        body: &[u8],
        answer: &mut [u8],
    ) -> Result<File, TalkError> {
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "no file came");
        let asked = self.send(request, VERSION, body, &[]);
        asked
            .and_then(|()| self.receive(request, answer)?.ok_or_else(missing))
            .map_err(|reason| TalkError { request, reason })
    }

    /// Asks for a number.
    pub(super) fn ask_number(&mut self, request: Request) -> Result<u64, TalkError> {
        let mut answer = [0; 8];
        self.ask(request, &[], &mut answer)?;
        Ok(u64::from_le_bytes(answer))
    }

    /// The other end sees that the conversation is over.
    pub(super) fn hang_up(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Both)
    }

    fn send(&self, request: Request, flags: u32, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let header = words(&[request.1, flags, u32::try_from(body.len()).map_err(io::Error::other)?]);
        let sent = self.stream.send_with_fds(&[&header[..], body], fds)?;
        // A part is sent when the rest finds no room in time.
        if sent == header.len() + body.len() { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }

    /// Receives the answer to `request`. One of another length, or to another request, is an error.
    /// Returns the file that came along, if one did.
    fn receive(&mut self, request: Request, answer: &mut [u8]) -> io::Result<Option<File>> {
        let deadline = Instant::now() + self.patience;
        let mut header = [0; HEADER_LEN];
        let file = self.fill(&mut header, deadline)?;
        let expected = [request.1, VERSION | REPLY, u32::try_from(answer.len()).map_err(io::Error::other)?];
        // Some leave the request's wish for an answer in the answer.
        header[4] &= !NEED_REPLY.to_le_bytes()[0];
        if header[..] != words(&expected) {
            let other = format!("the answer starts with {header:02x?} where {expected:02x?} was expected");
            return Err(io::Error::new(io::ErrorKind::InvalidData, other));
        }
        self.fill(answer, deadline)?;
        Ok(file)
    }

    /// Receives as many bytes as `buffer` has, until `deadline`, and a file if one comes along.
    fn fill(&mut self, mut buffer: &mut [u8], deadline: Instant) -> io::Result<Option<File>> {
        let mut file = None;
        while !buffer.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let late =
                || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {:?}", self.patience));
            if left.is_zero() {
                return Err(late());
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.recv_with_fd(buffer).map_err(io::Error::from) {
                Ok((0, _)) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up")),
                Ok((count, came)) => {
                    file = file.or(came);
                    buffer = &mut buffer[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(late()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(file)
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// `words` as they are sent.
pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// `numbers` likewise.
pub(super) fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::super::peer::message;
    use super::*;

    /// What comes of a request, whose answer is a number, if the back-end says this and is there until `stay` comes to
    /// an end.
    fn asked(says: &[u8], stay: Duration) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut wire = Wire::connect(&path, Duration::from_millis(300)).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        std::thread::scope(|scope| {
            let (done, ended) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                io::Read::read_exact(&mut stream, &mut [0; HEADER_LEN]).unwrap();
                for byte in says {
                    // The other end may have had enough.
                    let _ = io::Write::write_all(&mut stream, &[*byte]);
                }
                let _ = ended.recv_timeout(stay);
            });
            let answer = wire.ask_number(Request::GET_FEATURES);
            drop(done);
            answer.map_or_else(|error| error.to_string(), |number| number.to_string())
        })
    }

    /// As long as is needed.
    const STAYS: Duration = Duration::from_secs(3600);

    #[test]
    fn an_answer_may_come_in_pieces() {
        assert_eq!(asked(&message(1, &7_u64.to_le_bytes()), STAYS), "7");
    }

    #[test]
    fn one_that_does_not_come_in_time_is_not_waited_for() {
        let whole = message(1, &7_u64.to_le_bytes());
        for len in [0, 1, HEADER_LEN, whole.len() - 1] {
            assert_eq!(asked(&whole[..len], STAYS), "GET_FEATURES: no answer within 300ms");
        }
    }

    #[test]
    fn a_back_end_may_leave_in_the_middle_of_one() {
        let whole = message(1, &7_u64.to_le_bytes());
        for len in [0, 1, HEADER_LEN, whole.len() - 1] {
            assert_eq!(asked(&whole[..len], Duration::ZERO), "GET_FEATURES: it hung up");
        }
    }

    #[test]
    fn an_answer_to_something_else_or_of_another_length_is_none() {
        let mut question = message(1, &[0; 8]);
        question[4] = 1;
        for says in [message(2, &[0; 8]), message(1, &[0; 7]), message(1, &[0; 64]), question] {
            let answer = asked(&says, STAYS);
            assert!(answer.starts_with("GET_FEATURES: the answer starts with "), "{answer}");
        }
    }
}
