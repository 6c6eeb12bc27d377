//! Signals that ask us to stop, as events of the event loop.

use std::fs::File;
use std::io::{self, Read};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use crate::metrics::METRICS;

/// The signals that end the microVM in good order.
const STOPPING: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// A signalfd.
pub struct StopSignals(File);

impl StopSignals {
    /// Blocks the stopping signals in the calling thread, and so in every thread that it spawns from now on, and
    /// opens a descriptor that tells of them.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set, the others work on it; the signal numbers are valid.
        let (set, blocked) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in STOPPING {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let set = set.assume_init();
            (set, libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))
        };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        // SAFETY: the set is initialised, and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd returned a new descriptor, which nobody else owns.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The signal that arrived, if one did.
    pub fn take(&mut self) -> Option<i32> {
        let mut info = [0; mem::size_of::<libc::signalfd_siginfo>()];
        let signal = match self.0.read(&mut info) {
            // `ssi_signo` is the first field, 32 bits wide.
            Ok(size) if size == info.len() => i32::from_ne_bytes([info[0], info[1], info[2], info[3]]),
            _ => return None,
        };
        if signal == libc::SIGHUP {
            METRICS.signals.sighup.store(1);
        }
        Some(signal)
    }
}

impl AsRawFd for StopSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
