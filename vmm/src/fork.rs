//! Processes that are copies of this one.

use std::io;

/// Which side of a fork this is.
pub enum Side {
    /// The new process.
    Child,
    /// The old one, with the id of the new.
    Parent(i32),
}

/// Makes a process like this one, which has one thread, in a PID namespace of its own if so asked for.
pub fn fork(new_pid_ns: bool) -> io::Result<Side> {
    let flags = libc::SIGCHLD | if new_pid_ns { libc::CLONE_NEWPID } else { 0 };
    // SAFETY: without CLONE_VM and a stack it is a fork. There is one thread, so no lock is held by another that the child
    // would not have.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match i32::try_from(pid) {
        Ok(0) => Ok(Side::Child),
        Ok(pid) if pid > 0 => Ok(Side::Parent(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}
