//! `cargo demo`: builds what is missing, boots a VM under load on this machine or in the emulated host, and
//! shows where its threads are. `--cgroup v1|v2` and `--kernel 6.1|7` choose another emulated host.

use std::io::Write;
use std::process::ExitCode;
use tests::case::{Case, CgroupVersion, Failure, Kernel};
use tests::cases::DEMO;
use tests::registry::Registry;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("pinfold: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let mut demo = Case { ..DEMO };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        match (flag.as_str(), arguments.next().as_deref()) {
            ("--cgroup", Some("v1")) => demo.needs.cgroup = Some(CgroupVersion::V1),
            ("--cgroup", Some("v2")) => demo.needs.cgroup = Some(CgroupVersion::V2),
            ("--kernel", Some("6.1")) => demo.needs.kernel = Some(Kernel::V6_1),
            ("--kernel", Some("7")) => demo.needs.kernel = Some(Kernel::V7),
            _ => return Err(Failure::new("usage: cargo demo [-- [--cgroup v1|v2] [--kernel 6.1|7]]")),
        }
    }
    Registry::new()?.lane().run(&demo, &mut |text| {
        print!("{text}");
        // Nobody to show it to: the exit code still tells.
        drop(std::io::stdout().flush());
    })
}
