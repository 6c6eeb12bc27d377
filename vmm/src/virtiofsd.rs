//! `virtiofsd`, the server of a folder, as a process of ours.
//!
//! It is started by the main thread, before that has its seccomp filter, and so it is born in the overhead group and
//! without a filter. It has nothing of ours but a socket, and
//! ends with us, however we end.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

use crate::descriptors::inheritable;
use crate::lookup;

/// Where distributions have it, if not in the PATH.
const ELSEWHERE: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"];

/// How long it may take to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a folder is not served.
#[derive(Debug, thiserror::Error)]
pub enum VirtiofsdError {
    /// The folder cannot be used.
    #[error("shared_dir {}: give a folder that exists", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// There is no program.
    #[error(
        "there is no virtiofsd in the PATH or at {}: install it, or start it yourself and name its socket{}",
        ELSEWHERE.join(" or "),
        lookup::place()
    )]
    Missing,
    /// There is no socket for it.
    #[error("cannot make a socket for virtiofsd in {}: let it be writable", .path.display())]
    Socket {
        /// The folder for temporary files.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It cannot be started.
    #[error("cannot start {}", .path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A running server. When it is dropped the server has ended.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
}

/// A socket that a server is about to accept one connection on, in a folder that nobody else can look into. When it is
/// dropped, both are gone; the connection is not.
#[derive(Debug)]
pub struct Door {
    _folder: TempDir,
    socket: PathBuf,
}

impl Door {
    /// Where to connect.
    pub fn path(&self) -> &Path {
        &self.socket
    }
}

impl Virtiofsd {
    /// Starts a server of `folder`, and returns it with the door to it.
    pub fn start(folder: &Path) -> Result<(Self, Door), VirtiofsdError> {
        let wrong = |source| VirtiofsdError::Folder { path: folder.to_owned(), source };
        if !fs::metadata(folder).map_err(wrong)?.is_dir() {
            return Err(wrong(io::ErrorKind::NotADirectory.into()));
        }
        let program = find().ok_or(VirtiofsdError::Missing)?;
        let base = std::env::temp_dir();
        let (door, listener) =
            open_door(&base).map_err(|source| VirtiofsdError::Socket { path: base, source })?;
        let fd = listener.as_raw_fd();
        let mut command = Command::new(&program);
        command.arg(format!("--fd={fd}")).arg("--shared-dir").arg(folder).arg("--sandbox=namespace");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only system calls are made, which use no memory of the parent's.
        unsafe { command.pre_exec(move || prepare(fd)) };
        let child = command.spawn().map_err(|source| VirtiofsdError::Spawn { path: program, source })?;
        log::info!("virtiofsd {} serves {}", child.id(), folder.display());
        Ok((Self { child }, door))
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        let id = self.child.id();
        // The process has not been waited for, so that the id is still its own.
        if let Ok(pid) = i32::try_from(id) {
            // SAFETY: no memory is involved.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return log::debug!("virtiofsd {id} ended: {status}"),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                result => {
                    log::warn!("virtiofsd {id} does not end and is killed: {result:?}");
                    if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
                        log::warn!("could not kill virtiofsd {id}: {error}");
                    }
                    return;
                }
            }
        }
    }
}

/// In the child: it ends with its parent, and keeps `fd` alone of what is open.
fn prepare(fd: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    inheritable(&[fd])
}

/// The program.
fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join("virtiofsd"))
        .chain(ELSEWHERE.map(PathBuf::from))
        .find(|program| program.is_file())
}

fn open_door(base: &Path) -> io::Result<(Door, UnixListener)> {
    let folder = TempDir::new_with_prefix(base.join("pinfold-fs-"))?;
    let socket = folder.as_path().join("socket");
    let listener = UnixListener::bind(&socket)?;
    Ok((Door { _folder: folder, socket }, listener))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_door_can_be_gone_through_once_it_is_open_and_leaves_nothing() {
        let base = tempfile::tempdir().unwrap();
        let (door, listener) = open_door(base.path()).unwrap();
        let _connection = UnixStream::connect(door.path()).unwrap();
        listener.accept().unwrap();
        drop(door);
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
        assert!(open_door(&base.path().join("missing")).is_err());
    }

    #[test]
    fn what_is_no_folder_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Virtiofsd::start(file.path()).unwrap_err();
        assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
    }
}
