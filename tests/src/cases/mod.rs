//! All cases.

mod host_selfcheck;

use crate::case::Case;

/// Every case there is. The harness orders them by host.
pub fn all() -> Vec<&'static Case> {
    [host_selfcheck::CASES].into_iter().flatten().collect()
}

/// The case with this name.
pub fn find(name: &str) -> Option<&'static Case> {
    all().into_iter().find(|case| case.name == name)
}
