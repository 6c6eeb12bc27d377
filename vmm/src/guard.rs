//! A watch over the groups from before they are made until the reaper is ready: a SIGKILL in between would leave them
//! for ever.

use std::io::{self, PipeWriter, Read, Write};

use crate::exit::chain;
use crate::fork::{Side, fork};
use crate::reaper::PATIENCE;

/// A child that removes the groups if this process ends before the guard is dropped. It stays where we were started.
pub struct Guard {
    link: PipeWriter,
    pid: i32,
}

impl Guard {
    /// Starts it. The calling thread is the only one of the process.
    pub fn start(cleaner: cgroup::Cleaner) -> io::Result<Self> {
        let (mut link, ours) = io::pipe()?;
        match fork(false)? {
            Side::Child => {
                drop(ours);
                // SAFETY: setsid takes nothing. Whoever kills our process group means us, and not what comes after.
                unsafe { libc::setsid() };
                // The end of the link without a word: nobody is left to start a reaper.
                if link.read_exact(&mut [0]).is_err()
                    && let Err(error) = cleaner.leave_and_remove(PATIENCE)
                {
                    log::warn!("{}", chain(&error));
                }
                // SAFETY: it ends the child without what the parent has to do at its own end.
                unsafe { libc::_exit(0) }
            }
            Side::Parent(pid) => Ok(Self { link: ours, pid }),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It fails if somebody has killed the child.
        let _ = self.link.write_all(&[0]);
        // SAFETY: waitpid of a child of ours, with no status to store.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}
