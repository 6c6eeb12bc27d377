//! The few file operations that placing needs, with errors that name file, value and way out.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::hierarchy::Hierarchy;

/// Most bytes read from one cgroup file: room for the longest `cgroup.procs` that matters.
pub(crate) const READ_LIMIT: u64 = 1 << 20;

/// A file of a cgroup refused something. The text names what was done, to which file, and the way out; the
/// source is the kernel's answer.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}{seen}; {}", path.display(), way_out(source.raw_os_error()))]
pub struct FileError {
    doing: String,
    path: PathBuf,
    /// Where that was looked up, as far as it is known, in brackets.
    seen: String,
    #[source]
    source: io::Error,
}

impl FileError {
    pub(crate) fn new(doing: impl Into<String>, path: &Path, source: io::Error) -> Self {
        Self { doing: doing.into(), path: path.to_owned(), seen: String::new(), source }
    }

    /// With where the file was looked up, if it is not there or not for us.
    pub(crate) fn in_sight_of(mut self, hierarchy: &Hierarchy) -> Self {
        if let Some(libc::ENOENT | libc::EACCES | libc::EPERM | libc::EROFS) = self.errno() {
            self.seen = format!(" ({})", hierarchy.shown());
        }
        self
    }

    /// The file or directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's error number, where it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// The kernel's answer alone.
    pub(crate) fn answer(&self) -> String {
        self.source.to_string()
    }
}

fn way_out(errno: Option<i32>) -> &'static str {
    match errno {
        Some(libc::EACCES | libc::EPERM) => {
            "run as root, or have this cgroup delegated to the user that runs Pinfold"
        }
        Some(libc::EROFS) => "cgroupfs is mounted read-only here: mount it writable",
        Some(libc::ENOENT) => {
            "the group, or the controller that would bring the file, is not there: create the parent, enable \
             the controller, or name another parent in cgroup.parent"
        }
        Some(libc::ENODEV) => "the group was removed meanwhile: start again",
        Some(libc::EBUSY) => {
            "processes or groups in it are in the way: let them end, or name another parent in cgroup.parent"
        }
        Some(libc::EOPNOTSUPP) => {
            "the group's type, or the controllers enabled above it, do not allow it (see cgroup.type and \
             cgroup.subtree_control there): name another parent in cgroup.parent"
        }
        Some(libc::EINVAL | libc::ERANGE) => {
            "the kernel does not take this value here: give one within the limits of the group above"
        }
        Some(libc::ENOSPC) => "the group has no CPUs or memory nodes, or too many groups exist already",
        Some(libc::EAGAIN) => "a limit on the number of groups or tasks above is used up: raise it",
        Some(libc::ELOOP | libc::ENOTDIR | libc::ENAMETOOLONG) => {
            "it does not lead to a cgroup: name another"
        }
        _ => "see the kernel's answer",
    }
}

/// The whole text of a kernel file.
pub(crate) fn read(path: &Path) -> Result<String, FileError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(READ_LIMIT).read_to_string(&mut text))
        .map_err(|source| FileError::new("read", path, source))?;
    Ok(text)
}

/// Writes one value, in one write, to an existing kernel file.
pub(crate) fn write(path: &Path, value: &str) -> Result<(), FileError> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| write_failed(path, value, source))
}

pub(crate) fn write_failed(path: &Path, value: &str, source: io::Error) -> FileError {
    FileError::new(format!("write `{value}` to"), path, source)
}

/// The files of groups, as far as limits need them: tests put others in their place.
pub(crate) trait Files {
    fn exists(&self, path: &Path) -> bool;
    fn read(&self, path: &Path) -> Result<String, FileError>;
    fn write(&self, path: &Path, value: &str) -> Result<(), FileError>;
}

/// Those that the kernel shows.
pub(crate) struct Kernel;

impl Files for Kernel {
    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn read(&self, path: &Path) -> Result<String, FileError> {
        read(path)
    }

    fn write(&self, path: &Path, value: &str) -> Result<(), FileError> {
        write(path, value)
    }
}

/// Whether the effective user may make groups in `dir`.
pub(crate) fn may_create_in(dir: &Path) -> Result<(), FileError> {
    let fail = |source| FileError::new("make a group in", dir, source);
    let name = CString::new(dir.as_os_str().as_bytes()).map_err(|nul| fail(nul.into()))?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call, which only reads it.
    let rc =
        unsafe { libc::faccessat(libc::AT_FDCWD, name.as_ptr(), libc::W_OK | libc::X_OK, libc::AT_EACCESS) };
    if rc == 0 { Ok(()) } else { Err(fail(io::Error::last_os_error())) }
}

/// A kernel file opened for writing beforehand, to move a thread or process through: the kernel checks the
/// rights of who opened it, so it works after a chroot and without the rights.
#[derive(Debug)]
pub(crate) struct Door {
    /// For messages only.
    pub(crate) path: PathBuf,
    pub(crate) file: File,
}

impl Door {
    pub(crate) fn open(path: PathBuf) -> Result<Self, FileError> {
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(FileError::new("open for placing threads", &path, source)),
        }
    }

    /// Moves the calling thread (`tasks`, `cgroup.threads`) or process (`cgroup.procs`).
    pub(crate) fn enter(&self) -> Result<(), FileError> {
        self.move_in(0)
    }

    /// Moves a thread or process; 0 means the writer.
    pub(crate) fn move_in(&self, id: i32) -> Result<(), FileError> {
        (&self.file).write_all(id.to_string().as_bytes()).map_err(|source| {
            FileError::new(format!("place a thread or process by writing `{id}` to"), &self.path, source)
        })
    }
}
