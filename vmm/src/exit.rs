//! How the process ends: its exit code, and the one line that says why.

use std::error::Error;

use crate::lookup;

/// An error and what caused it, in one line; of what was looked up, with where, if that is not the host's root.
pub fn chain(error: &dyn Error) -> String {
    resources::chain(error) + &lookup::place_of(error)
}

/// Exit codes, as Firecracker's clients know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The guest shut down or reset, or we were asked to stop.
    Ok = 0,
    /// Something failed while the guest ran.
    Generic = 1,
    /// A thread asked the kernel for what its seccomp filter forbids.
    BadSyscall = 148,
    /// The configuration cannot be honoured; placement included.
    BadConfiguration = 152,
    /// The command line makes no sense.
    BadArguments = 153,
    /// The terminal went away.
    Hangup = 156,
}

impl From<Code> for std::process::ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// Why the process ends before its time.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: Code,
    /// One line: what was being done, to what, what went wrong, and the way out.
    pub message: String,
}

impl Failure {
    /// The configuration cannot be honoured because of `error`.
    pub fn configuration(error: &dyn Error) -> Self {
        Self { code: Code::BadConfiguration, message: chain(error) }
    }

    /// Something failed while the guest ran.
    pub fn generic(error: &dyn Error) -> Self {
        Self { code: Code::Generic, message: chain(error) }
    }
}
