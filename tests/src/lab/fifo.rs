//! FIFOs whose readers do not read.

use super::PATIENCE;
use crate::case::Failure;
use crate::check;
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Makes a FIFO.
pub fn make_fifo(path: &Path) -> Result<(), Failure> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is a NUL-terminated string.
    if unsafe { libc::mkfifo(name.as_ptr(), 0o600) } == 0 {
        return Ok(());
    }
    Err(Failure(format!("cannot make {}: {}", path.display(), std::io::Error::last_os_error())))
}

/// A FIFO that is read only when asked to.
#[derive(Debug)]
pub struct Fifo {
    path: PathBuf,
    file: File,
}

impl Fifo {
    /// Makes it at `path` and opens both its ends.
    pub fn make(path: &Path) -> Result<Self, Failure> {
        make_fifo(path)?;
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is no room for a line.
    pub fn is_full(&self) -> Result<bool, Failure> {
        let mut poll = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, which lives through the call.
        Ok(unsafe { libc::poll(&raw mut poll, 1, 0) } == 0)
    }

    /// Waits until there is no room for a line.
    pub fn wait_full(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_full()? {
            check!(Instant::now() < deadline, "{} does not fill", self.path.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Reads what is there.
    pub fn drain(&self) -> Result<String, Failure> {
        let mut bytes = Vec::new();
        match (&self.file).read_to_end(&mut bytes) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error.into()),
            _ => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        }
    }
}
