//! The namespaces of a jail, and its root.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount_bind_recursive, mount_change, open_tree,
    unmount,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::JailError;

/// Moves this process to a network namespace.
pub fn enter_netns(path: &Path) -> Result<(), JailError> {
    let file = File::open(path).map_err(|source| JailError::Path {
        doing: "open --netns",
        path: path.to_owned(),
        source,
    })?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|error| {
        JailError::Path { doing: "enter --netns", path: path.to_owned(), source: error.into() }
    })
}

/// The directory of this process's threads in /proc, as a mount of its own: nothing else of /proc can be reached from it.
/// With ids as the host sees them.
pub fn tasks() -> Result<OwnedFd, JailError> {
    let failed = |error: rustix::io::Errno| JailError::Call {
        doing: "open /proc/self/task as a mount of its own",
        source: error.into(),
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, "/proc/self/task", flags).map_err(failed)
}

/// Makes `root` the root of this process, in a mount namespace of its own in which nothing else is mounted. What the host
/// mounts below `root` later arrives. Returns the namespace's name.
pub fn enter_root(root: &Path) -> Result<String, JailError> {
    let call = |doing| move |error: rustix::io::Errno| JailError::Call { doing, source: error.into() };
    // SAFETY: a mount namespace of its own means nothing for memory or descriptors.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(call("make a mount namespace"))?;
    let namespace = fs::read_link("/proc/self/ns/mnt")
        .map_err(|source| JailError::Call { doing: "read /proc/self/ns/mnt", source })?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(call("keep mounts from the host"))?;
    mount_bind_recursive(root, root).map_err(call("make the jail a mount"))?;
    rustix::process::chdir(root).map_err(call("enter the jail"))?;
    // The old root is on top of the new one then, where it can be taken away without a folder for it (pivot_root(2)).
    rustix::process::pivot_root(".", ".").map_err(call("make the jail the root (pivot_root)"))?;
    unmount(".", UnmountFlags::DETACH).map_err(call("let go of the old root"))?;
    rustix::process::chdir("/").map_err(call("enter the new root"))?;
    Ok(namespace.to_string_lossy().into_owned())
}

/// Opens `/dev/null` of the host.
pub fn null() -> Result<OwnedFd, JailError> {
    rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| JailError::Call { doing: "open /dev/null", source: error.into() })
}

/// Begins a session, if this process does not lead one, and has the standard streams be `null`.
pub fn daemonize(null: &OwnedFd) -> Result<(), JailError> {
    let call = |doing| move |error: rustix::io::Errno| JailError::Call { doing, source: error.into() };
    rustix::process::setsid().map_err(call("begin a session (setsid)"))?;
    rustix::stdio::dup2_stdin(null)
        .and_then(|()| rustix::stdio::dup2_stdout(null))
        .and_then(|()| rustix::stdio::dup2_stderr(null))
        .map_err(call("replace the standard streams"))
}

/// Has no descriptor of the caller's survive an exec but the standard streams.
pub fn close_inherited() -> Result<(), JailError> {
    let failed = |source| JailError::Call { doing: "look at our descriptors in /proc/self/fd", source };
    for entry in fs::read_dir("/proc/self/fd").map_err(failed)? {
        let number = entry.map_err(failed)?.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number.filter(|number| *number > 2) {
            crate::descriptors::hide(number).map_err(failed)?;
        }
    }
    Ok(())
}
