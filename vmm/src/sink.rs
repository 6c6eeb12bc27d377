//! Where lines for others go: a file or a FIFO. A FIFO that nobody reads never keeps us waiting.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;

use crate::source::Source;

/// Why there is no sink.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The host refused.
    #[error(
        "cannot open {path}; give a file or FIFO that this process may read and write, or one that it may create",
        path = path.display()
    )]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Lines have no business there.
    #[error("{path} cannot take lines; give a file or a FIFO", path = .0.display())]
    Kind(PathBuf),
}

/// An open file or FIFO that takes lines.
#[derive(Debug)]
pub struct Sink {
    file: File,
    /// For what is not a regular file: the rest of a line that was longer than the room for it. It comes before
    /// anything else, so that no reader sees half a line.
    rest: Option<Mutex<Vec<u8>>>,
}

/// Opens `path`, a file, FIFO or character device, to append to it, and makes a file if there is nothing. Does not
/// wait for a FIFO's reader, and neither do writes.
pub fn open(path: &Path) -> Result<File, SinkError> {
    open_in(&Source::Host, path)
}

/// The same of a path in `source`.
pub fn open_in(source: &Source<'_>, path: &Path) -> Result<File, SinkError> {
    let failed = |source| SinkError::Open { path: path.to_owned(), source };
    // Reading too: a FIFO opens without a reader then, and one that leaves raises no SIGPIPE.
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY;
    // Only then to create it: with O_CREAT kernels refuse other users' FIFOs in places like /tmp
    // (sysctl fs.protected_fifos).
    let file = match source.open(path, flags) {
        Err(error) if error.kind() == ErrorKind::NotFound => source.open(path, flags | OFlags::CREATE),
        result => result,
    };
    let file = file.map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    match kind.is_file() || kind.is_fifo() || kind.is_char_device() {
        true => Ok(file),
        false => Err(SinkError::Kind(path.to_owned())),
    }
}

impl From<File> for Sink {
    /// Of what [`open`] opened, maybe in another process.
    fn from(file: File) -> Self {
        let is_file = file.metadata().is_ok_and(|data| data.is_file());
        Self { file, rest: (!is_file).then(Mutex::default) }
    }
}

impl Sink {
    /// Opens `path` to append lines to it.
    pub fn open(path: &Path) -> Result<Self, SinkError> {
        open(path).map(Self::from)
    }

    /// Its descriptor, the same as long as it lives.
    pub fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Writes `line`, which ends with a newline, whole or not at all; only a disk that fails or is full may end
    /// it early. [`ErrorKind::WouldBlock`] says that a FIFO had no room for it.
    pub fn write_line(&self, line: &[u8]) -> io::Result<()> {
        let Some(rest) = &self.rest else {
            return (&self.file).write_all(line);
        };
        // Held over writes that do not block.
        let mut rest = rest.lock().unwrap_or_else(PoisonError::into_inner);
        while !rest.is_empty() {
            let written = self.write(&rest)?;
            rest.drain(..written);
        }
        let written = self.write(line)?;
        rest.extend_from_slice(&line[written..]);
        Ok(())
    }

    /// Writes what fits: all or nothing of up to `PIPE_BUF` bytes, at least one byte of more.
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.file).write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => return Ok(written.min(bytes.len())),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    /// A FIFO in `dir`.
    pub fn fifo(dir: &Path) -> PathBuf {
        let path = dir.join("fifo");
        let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the name is a NUL-terminated string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0, "{}", io::Error::last_os_error());
        path
    }

    /// What a FIFO holds that somebody still has open for writing.
    pub fn read_available(reader: &mut File) -> Vec<u8> {
        let mut bytes = Vec::new();
        assert_eq!(reader.read_to_end(&mut bytes).unwrap_err().kind(), ErrorKind::WouldBlock);
        bytes
    }

    /// Opens a FIFO to read from it without waiting.
    pub fn reader(path: &Path) -> File {
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
    }

    #[test]
    fn a_file_is_made_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for line in ["one\n", "two\n"] {
            Sink::open(&path).unwrap().write_line(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn the_descriptor_is_closed_on_exec() {
        let dir = tempfile::tempdir().unwrap();
        let sink = Sink::open(&dir.path().join("log")).unwrap();
        // SAFETY: F_GETFD only reads.
        let flags = unsafe { libc::fcntl(sink.file.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags, libc::FD_CLOEXEC);
    }

    #[test]
    fn a_fifo_needs_no_reader_and_its_reader_may_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let sink = Sink::open(&path).unwrap();
        sink.write_line(b"early\n").unwrap();
        assert_eq!(read_available(&mut reader(&path)), b"early\n");
        sink.write_line(b"late\n").unwrap();
        assert_eq!(read_available(&mut reader(&path)), b"late\n");
    }

    #[test]
    fn a_full_fifo_takes_whole_lines_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let sink = Sink::open(&path).unwrap();
        let line = [[b'x'; 999].as_slice(), b"\n"].concat();
        let mut taken = 0;
        let error = loop {
            match sink.write_line(&line) {
                Ok(()) => taken += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert!(taken > 0);
        assert_eq!(read_available(&mut reader(&path)), line.repeat(taken));
        sink.write_line(&line).unwrap();
    }

    #[test]
    fn a_line_that_is_longer_than_the_fifo_arrives_in_one_piece_before_any_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let sink = Sink::open(&path).unwrap();
        let long = [vec![b'x'; 200_000].as_slice(), b"\n"].concat();
        sink.write_line(&long).unwrap();
        assert_eq!(sink.write_line(b"lost\n").unwrap_err().kind(), ErrorKind::WouldBlock);
        let mut reader = reader(&path);
        let mut bytes = read_available(&mut reader);
        while sink.write_line(b"last\n").is_err() {
            let more = read_available(&mut reader);
            assert!(!more.is_empty(), "a FIFO that was read empty takes more");
            bytes.extend(more);
        }
        bytes.extend(read_available(&mut reader));
        assert!(bytes == [long.as_slice(), b"last\n"].concat());
    }

    #[test]
    fn errors_name_the_path() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("no/log"), dir.path().to_owned()] {
            let error = Sink::open(&path).unwrap_err();
            assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
        }
        assert!(Sink::open(Path::new("/dev/null")).unwrap().write_line(b"\n").is_ok());
    }
}
