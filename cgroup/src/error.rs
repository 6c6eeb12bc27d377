//! What placing can fail with.

use crate::counters::StatsError;
use crate::file::FileError;
use crate::parts::PartsError;
use crate::plan::PlanError;
use crate::scope::ScopeError;

/// Why threads cannot be placed, or groups not be removed. Each text says what to do; its sources say what the
/// kernel answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no place for them.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// systemd has not made the scope.
    #[error(transparent)]
    Scope(#[from] ScopeError),
    /// A file or directory of a group refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Figures cannot be read.
    #[error(transparent)]
    Stats(#[from] StatsError),
    /// What arrived through an exec is not what was sent.
    #[error(transparent)]
    Parts(#[from] PartsError),
}
