//! The guest's console on our standard input and output.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, Once, PoisonError};

/// The terminal that is in raw mode now, and how it was before.
static RAW: Mutex<Option<(OwnedFd, libc::termios)>> = Mutex::new(None);

/// The settings of a terminal; `None` if `fd` is none.
pub fn terminal_settings(fd: BorrowedFd<'_>) -> Option<libc::termios> {
    let mut settings = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: tcgetattr fills the struct when it returns 0, and only then is it read.
    unsafe { (libc::tcgetattr(fd.as_raw_fd(), settings.as_mut_ptr()) == 0).then(|| settings.assume_init()) }
}

/// Sets a terminal as `settings` say.
pub fn set_terminal(fd: BorrowedFd<'_>, settings: &libc::termios) -> io::Result<()> {
    // SAFETY: the struct is initialised and only read.
    match unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, settings) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether standard input is ours to use: a shell stops background jobs that change its terminal or read from it.
pub fn in_foreground() -> bool {
    let stdin = io::stdin();
    // SAFETY: both take no pointer.
    terminal_settings(stdin.as_fd()).is_none()
        || unsafe { libc::tcgetpgrp(stdin.as_raw_fd()) == libc::getpgrp() }
}

/// Puts the terminal back as it was. Does nothing when it was never changed, or already put back.
fn restore() {
    if let Some((fd, settings)) = RAW.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Nothing can be done about a terminal that is gone.
        let _ = set_terminal(fd.as_fd(), &settings);
    }
}

/// The same for a signal handler that does not return: where the terminal is being changed just now, it does nothing.
pub fn restore_at_the_end() {
    if let Ok(raw) = RAW.try_lock()
        && let Some((fd, settings)) = &*raw
    {
        let _ = set_terminal(fd.as_fd(), settings);
    }
}

/// While it lives, the terminal on standard input, if it is one, hands us every key as it is pressed. It is put
/// back on drop and on panic; after a SIGKILL the reaper does it.
pub struct RawTerminal(());

impl RawTerminal {
    /// Switches to raw mode. Leaves the terminal alone in a background job.
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        if let Some(before) = terminal_settings(stdin.as_fd()).filter(|_| in_foreground()) {
            static HOOK: Once = Once::new();
            HOOK.call_once(|| {
                let next = std::panic::take_hook();
                std::panic::set_hook(Box::new(move |info| {
                    restore();
                    next(info);
                }));
            });
            let mut raw = before;
            // SAFETY: cfmakeraw changes the struct in place.
            unsafe { libc::cfmakeraw(&raw mut raw) };
            *RAW.lock().unwrap_or_else(PoisonError::into_inner) =
                Some((stdin.as_fd().try_clone_to_owned()?, before));
            set_terminal(stdin.as_fd(), &raw)?;
        }
        Ok(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Standard input, read as it comes.
pub struct Input(File);

impl Input {
    /// A descriptor of our own for standard input.
    pub fn open() -> io::Result<Self> {
        Ok(Self(io::stdin().as_fd().try_clone_to_owned()?.into()))
    }

    /// Reads what is there, `buffer.len()` bytes at most; 0 at its end. Call it only when it is readable.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Milliseconds for which a reader of the console may keep the guest waiting.
const PATIENCE: i32 = 200;

/// Standard output for the guest's console. A reader that does not read delays the guest for
/// [`PATIENCE`]; from then on what it does not take is lost, until it reads again. So it keeps neither the guest
/// nor us, who may want the serial port that a vCPU is writing to, waiting for long. A signal ends the
/// wait.
pub struct Output {
    file: File,
    stalled: bool,
}

impl Output {
    /// A descriptor of our own for standard output.
    pub fn open() -> io::Result<Self> {
        Ok(Self { file: io::stdout().as_fd().try_clone_to_owned()?.into(), stalled: false })
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut poll = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, which lives through the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, if self.stalled { 0 } else { PATIENCE }) };
        self.stalled = ready == 0;
        // `write_all` would repeat an interrupted write for ever.
        match ready {
            1 => self.file.write(bytes).map_err(|error| match error.kind() {
                io::ErrorKind::Interrupted => io::ErrorKind::TimedOut.into(),
                _ => error,
            }),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
