//! All cases.

mod api;
mod bad_input;
mod blk;
mod boots;
mod cgroup_live;
mod demo;
mod exit_report;
mod faults;
mod fctools;
mod fs;
mod fs_jail;
mod hierarchies;
mod host_selfcheck;
mod jail;
mod kata;
mod kills;
mod lab_selfcheck;
mod launches;
mod limits;
mod net;
mod own_base;
mod pci;
mod placement;
mod readme;
mod scenarios;
mod seccomp;
mod systemd;
mod vhost_user;
mod why;

pub use demo::DEMO;

use crate::bench::inside::BENCH;
use crate::case::Case;

/// Every test. The harness orders them by host.
pub fn all() -> Vec<&'static Case> {
    [
        host_selfcheck::CASES,
        lab_selfcheck::CASES,
        boots::CASES,
        blk::CASES,
        net::CASES,
        limits::CASES,
        bad_input::CASES,
        api::CASES,
        fctools::CASES,
        fs::CASES,
        fs_jail::CASES,
        vhost_user::CASES,
        kata::CASES,
        readme::CASES,
        seccomp::CASES,
        own_base::CASES,
        pci::CASES,
        hierarchies::CASES,
        placement::CASES,
        systemd::CASES,
        cgroup_live::CASES,
        jail::CASES,
        exit_report::CASES,
        why::CASES,
        faults::CASES,
        kills::CASES,
        launches::CASES,
    ]
    .into_iter()
    .flatten()
    .chain(scenarios::cases())
    .collect()
}

/// The test with this name, or the demo, or the bench.
pub fn find(name: &str) -> Option<&'static Case> {
    all().into_iter().chain([&DEMO, &BENCH]).find(|case| case.name == name)
}
