//! The process, and the program.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

use super::VirtiofsdError;
use crate::descriptors::inheritable;

/// Where distributions have it, if not in the PATH.
pub(super) const ELSEWHERE: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"];

/// How long it may take to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running server. When it is dropped the server has ended.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
}

impl Virtiofsd {
    /// Starts `program` as the server of `folder`, and returns it with a connection to it. It is born in the caller's
    /// group, and ends with the calling thread.
    pub fn start(program: &Path, folder: &Path) -> Result<(Self, UnixStream), VirtiofsdError> {
        check_folder(folder)?;
        let base = std::env::temp_dir();
        let (stream, listener) =
            connect(&base).map_err(|source| VirtiofsdError::Socket { path: base, source })?;
        let fd = listener.as_raw_fd();
        let mut command = Command::new(program);
        command.arg(format!("--fd={fd}")).arg("--shared-dir").arg(folder).arg("--sandbox=namespace");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only system calls are made, which use no memory of the parent's.
        unsafe { command.pre_exec(move || prepare(fd)) };
        let child =
            command.spawn().map_err(|source| VirtiofsdError::Spawn { path: program.to_owned(), source })?;
        log::info!("virtiofsd {} serves {}", child.id(), folder.display());
        Ok((Self { child }, stream))
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

/// In the child: it ends with its parent, takes signals that the parent blocks, and keeps `fd` alone of what is open.
fn prepare(fd: i32) -> io::Result<()> {
    let mut none = MaybeUninit::uninit();
    // SAFETY: sigemptyset fills the set, which sigprocmask only reads; both may be called between fork and exec.
    let unblocked = unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
    };
    if unblocked < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no memory is involved.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    inheritable(&[fd])
}

/// The program.
pub(super) fn find() -> Result<PathBuf, VirtiofsdError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join("virtiofsd"))
        .chain(ELSEWHERE.map(PathBuf::from))
        .find(|program| program.is_file())
        .and_then(|program| std::path::absolute(program).ok())
        .ok_or(VirtiofsdError::Missing)
}

/// Whether there is such a folder.
pub(super) fn check_folder(folder: &Path) -> Result<(), VirtiofsdError> {
    let wrong = |source| VirtiofsdError::Folder { path: folder.to_owned(), source };
    match fs::metadata(folder).map_err(wrong)?.is_dir() {
        true => Ok(()),
        false => Err(wrong(io::ErrorKind::NotADirectory.into())),
    }
}

/// A listening socket that has no place any more, and the connection to it that waits to be accepted. For a moment it is
/// in `base`, in a folder that nobody else can look into.
fn connect(base: &Path) -> io::Result<(UnixStream, UnixListener)> {
    let folder = TempDir::new_with_prefix(base.join("pinfold-fs-"))?;
    let socket = folder.as_path().join("socket");
    let listener = UnixListener::bind(&socket)?;
    Ok((UnixStream::connect(&socket)?, listener))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_connection_waits_to_be_accepted_and_leaves_nothing() {
        let base = tempfile::tempdir().unwrap();
        let (mut stream, listener) = connect(base.path()).unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
        stream.write_all(b"x").unwrap();
        let mut said = [0];
        listener.accept().unwrap().0.read_exact(&mut said).unwrap();
        assert_eq!(said, *b"x");
        assert!(connect(&base.path().join("missing")).is_err());
    }

    #[test]
    fn what_is_no_folder_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Virtiofsd::start("/bin/true".as_ref(), file.path()).unwrap_err();
        assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
    }
}
