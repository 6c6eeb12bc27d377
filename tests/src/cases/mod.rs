//! All cases.

mod api;
mod bad_input;
mod blk;
mod boots;
mod demo;
mod fctools;
mod fs;
mod host_selfcheck;
mod kata;
mod lab_selfcheck;
mod net;
mod own_base;
mod placement;
mod readme;

pub use demo::DEMO;

use crate::case::Case;

/// Every test. The harness orders them by host.
pub fn all() -> Vec<&'static Case> {
    [
        host_selfcheck::CASES,
        lab_selfcheck::CASES,
        boots::CASES,
        blk::CASES,
        net::CASES,
        bad_input::CASES,
        api::CASES,
        fctools::CASES,
        fs::CASES,
        kata::CASES,
        readme::CASES,
        own_base::CASES,
        placement::CASES,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The test with this name, or the demo.
pub fn find(name: &str) -> Option<&'static Case> {
    all().into_iter().chain([&DEMO]).find(|case| case.name == name)
}
