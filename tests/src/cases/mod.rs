//! All cases.

mod demo;
mod host_selfcheck;
mod lab_selfcheck;

pub use demo::DEMO;

use crate::case::Case;

/// Every test. The harness orders them by host.
pub fn all() -> Vec<&'static Case> {
    [host_selfcheck::CASES, lab_selfcheck::CASES].into_iter().flatten().collect()
}

/// The test with this name, or the demo.
pub fn find(name: &str) -> Option<&'static Case> {
    all().into_iter().chain([&DEMO]).find(|case| case.name == name)
}
