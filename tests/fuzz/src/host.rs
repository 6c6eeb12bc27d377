//! What targets need of the host: files, sockets, folders.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// A file without a name that holds `contents`.
pub fn memfd(contents: &[u8]) -> io::Result<File> {
    // SAFETY: the name is a string that ends with a zero.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: nobody else knows this new descriptor.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(contents)?;
    Ok(file)
}

/// Where an open file can be opened anew.
pub fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Two ends of a socket that keeps the borders of messages; neither waits.
pub fn packet_pair() -> io::Result<[File; 2]> {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: nobody else knows these new descriptors.
    Ok(fds.map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
}

/// A folder of this process's, in memory where there is such a file system.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let parent = Path::new("/dev/shm");
        let parent = if parent.is_dir() { parent.to_owned() } else { std::env::temp_dir() };
        // By the process's number: who gets the number of one that crashed takes its folder over.
        let folder = parent.join(format!("pinfold-fuzz-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("the host has room for temporary files");
        folder
    })
}

/// Takes that folder away. To be called when no target runs any more.
pub fn clean_up() {
    let _ = std::fs::remove_dir_all(folder());
}

/// A name in [`folder`] that nobody had before.
pub fn fresh_path() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    folder().join(NEXT.fetch_add(1, Ordering::Relaxed).to_string())
}
