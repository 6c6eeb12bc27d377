//! What travels through an exec.

use std::os::fd::OwnedFd;

/// What arrived is not what was sent.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartsError {
    /// Written by another version of this crate.
    #[error("the cgroup state has format {got}, this build reads {ours}; start the same build on both sides")]
    Format {
        /// The format that arrived.
        got: u32,
        /// The format that this build writes.
        ours: u32,
    },
    /// A descriptor is missing.
    #[error("the descriptor `{0}` did not arrive with the cgroup state")]
    Missing(String),
}

pub(crate) fn check_format(got: u32, ours: u32) -> Result<(), PartsError> {
    if got == ours { Ok(()) } else { Err(PartsError::Format { got, ours }) }
}

pub(crate) fn take(fds: &mut Vec<(String, OwnedFd)>, name: &str) -> Result<OwnedFd, PartsError> {
    let at = fds.iter().position(|(n, _)| n == name).ok_or_else(|| PartsError::Missing(name.to_owned()))?;
    Ok(fds.swap_remove(at).1)
}
