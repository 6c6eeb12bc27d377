//! Files in memory, without a name in any file system.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// An empty file, close-on-exec, that can be sealed; `name` is for people who look at descriptors.
pub fn create(name: &CStr) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated string, and the flags are valid.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create returned a new descriptor, which nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Forbids what `seals` (`F_SEAL_*`) say, for good.
pub fn seal(file: &File, seals: i32) -> io::Result<()> {
    // SAFETY: fcntl on an open descriptor, with an integer argument.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
