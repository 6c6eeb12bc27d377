//! What is said through a jail's wall: the number of a folder, and a connection to its server or why there is none.
//!
//! A question is a number in four bytes. An answer is the length of a text in four bytes, and the text. Without a text the
//! connection comes with it (SCM_RIGHTS).

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::VirtiofsdError;

/// The longest text of an answer, in bytes.
const MAX_TEXT: usize = 8192;

/// How long an answer may take: longer than a server that is to be replaced may take to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// The end in the jail.
#[derive(Debug)]
pub struct Link {
    /// The folders that can be served, in the order of their numbers.
    folders: Vec<PathBuf>,
    stream: Mutex<Option<UnixStream>>,
}

impl Link {
    /// With the folders that were named. Without any there is no `stream`.
    pub fn new(folders: Vec<PathBuf>, stream: Option<OwnedFd>) -> Self {
        Self { folders, stream: Mutex::new(stream.map(UnixStream::from)) }
    }

    /// The folder's number.
    pub fn find(&self, folder: &Path) -> Result<u32, VirtiofsdError> {
        let place = self.folders.iter().position(|named| named == folder);
        let number = place.and_then(|place| u32::try_from(place).ok());
        number.ok_or_else(|| VirtiofsdError::NotNamed(folder.to_owned()))
    }

    /// Has a server of `folder` started, in the place of an earlier one, and returns a connection to it.
    pub fn start(&self, folder: &Path) -> Result<UnixStream, VirtiofsdError> {
        let number = self.find(folder)?;
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = || Err(ErrorKind::NotConnected.into());
        match stream.as_ref().map_or_else(gone, |stream| ask(stream, number)) {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(text)) => Err(VirtiofsdError::Outside(text)),
            Err(error) => {
                // An answer that comes late would be taken for that to the next question.
                *stream = None;
                Err(VirtiofsdError::NoStarter(error))
            }
        }
    }

    /// Nothing is asked any more.
    pub fn hang_up(&self) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn ask(mut stream: &UnixStream, number: u32) -> io::Result<Result<UnixStream, String>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&number.to_ne_bytes())?;
    let mut head = [0; 4];
    let (count, file) = stream.recv_with_fd(&mut head)?;
    let length = u32::from_ne_bytes(head) as usize;
    match file {
        Some(file) if count == head.len() && length == 0 => Ok(Ok(OwnedFd::from(file).into())),
        None if count == head.len() && (1..=MAX_TEXT).contains(&length) => {
            let mut text = vec![0; length];
            stream.read_exact(&mut text)?;
            Ok(Err(String::from_utf8_lossy(&text).into_owned()))
        }
        _ if count == 0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

/// On the other end: the next question; `None` when none can come any more. Whoever asks for something that is no question
/// is not listened to again.
pub(super) fn question(mut stream: &UnixStream) -> Option<u32> {
    let mut number = [0; 4];
    let count = stream.read(&mut number).ok()?;
    (count == number.len()).then(|| u32::from_ne_bytes(number))
}

/// Answers it, without waiting for who does not read answers.
pub(super) fn answer(stream: &UnixStream, connection: Result<UnixStream, String>) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let sent = match &connection {
        Ok(connection) => send(stream, "", &[connection.as_raw_fd()]),
        Err(text) => send(stream, &text[..text.floor_char_boundary(MAX_TEXT)], &[]),
    };
    stream.set_nonblocking(false)?;
    sent
}

fn send(stream: &UnixStream, text: &str, fds: &[RawFd]) -> io::Result<()> {
    let length = u32::try_from(text.len()).map_err(io::Error::other)?.to_ne_bytes();
    let sent = stream.send_with_fds(&[&length[..], text.as_bytes()], fds)?;
    if sent == length.len() + text.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A link with two folders, and its other end.
    fn link() -> (Link, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Link::new(vec!["/a".into(), "/b".into()], Some(ours.into())), theirs)
    }

    /// What comes of asking for the second folder when the other end does this with its number.
    fn asked(act: impl FnOnce(&UnixStream, u32) + Send) -> Result<UnixStream, VirtiofsdError> {
        let (link, theirs) = link();
        thread::scope(|scope| {
            scope.spawn(move || act(&theirs, question(&theirs).unwrap()));
            link.start("/b/".as_ref())
        })
    }

    #[test]
    fn a_connection_comes_through() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut got = asked(|stream, number| {
            assert_eq!(number, 1);
            answer(stream, Ok(far)).unwrap();
        })
        .unwrap();
        near.write_all(b"x").unwrap();
        let mut said = [0];
        got.read_exact(&mut said).unwrap();
        assert_eq!(said, *b"x");
    }

    #[test]
    fn a_reason_comes_through_as_far_as_there_is_room() {
        let error = asked(|stream, _| answer(stream, Err("no é".to_owned())).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "outside of the jail: no é");
        let long = "é".repeat(MAX_TEXT);
        let error = asked(move |stream, _| answer(stream, Err(long)).unwrap()).unwrap_err();
        assert_eq!(error.to_string().len(), "outside of the jail: ".len() + MAX_TEXT);
    }

    #[test]
    fn an_answer_that_is_none_is_an_error_and_the_last() {
        let bad: [fn(&UnixStream); 5] = [
            |_| {},
            |mut stream| stream.write_all(&[0; 4]).unwrap(),
            |mut stream| stream.write_all(&[1; 3]).unwrap(),
            |mut stream| stream.write_all(&u32::MAX.to_ne_bytes()).unwrap(),
            |stream| send(stream, "a text and a connection", &[stream.as_raw_fd()]).unwrap(),
        ];
        for act in bad {
            let (link, theirs) = link();
            thread::scope(|scope| {
                scope.spawn(move || {
                    question(&theirs).unwrap();
                    act(&theirs);
                });
                for _ in 0..2 {
                    let error = link.start("/a".as_ref()).unwrap_err();
                    assert!(matches!(error, VirtiofsdError::NoStarter(_)), "{error:?}");
                }
            });
        }
    }

    #[test]
    fn what_was_not_named_is_not_asked_for() {
        let (link, theirs) = link();
        let error = link.start("/a/below".as_ref()).unwrap_err();
        assert!(error.to_string().contains("--share /a/below"), "{error}");
        link.hang_up();
        assert!(matches!(link.start("/a".as_ref()), Err(VirtiofsdError::NoStarter(_))));
        assert_eq!(question(&theirs), None, "nothing was said");
    }

    #[test]
    fn what_is_no_question_is_the_last() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[0; 3]).unwrap();
        assert_eq!(question(&theirs), None);
        // Whoever reads no answers does not hold us up.
        let text = "x".repeat(MAX_TEXT);
        let refused = (0..1000).find_map(|_| answer(&theirs, Err(text.clone())).err()).unwrap();
        assert_eq!(refused.kind(), ErrorKind::WouldBlock);
    }
}
