//! Without a parent in the configuration the threads go below the cgroup that a shim made and started us in.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Group, Machine, Role, Running, scan};
use serde_json::json;
use std::process::Command;

/// The cases of this file.
pub const CASES: &[Case] = &[Case {
    name: "own_cgroup_base_v2",
    needs: Needs { cgroup: Some(CgroupVersion::V2), ..Needs::VM },
    timeout: Case::TIMEOUT,
    run: below_our_own,
}];

fn below_our_own(ctx: &Ctx) -> Result<(), Failure> {
    let base = Group::create("/kata/sandbox1")?;
    // The shim stays in the group that it made.
    let mut command = Command::new("sleep");
    command.arg("1000");
    let shim = Running::spawn(command, base.doors()?, true)?;

    let mut vm =
        Machine::new(ctx).vcpus(2).steps("hello+wait").cgroup(json!({})).from_caller(&base)?.start()?;
    vm.wait_for_guest("waiting")?;
    let threads = scan(vm.pid())?;
    for thread in &threads {
        let name = if thread.role == Role::Vcpu { "kata-sandbox-vcpus" } else { "kata-sandbox-overhead" };
        let wanted = base.child(name);
        check!(
            thread.groups.values().all(|path| path == wanted.path()),
            "{} is not in {}: {thread:?}",
            thread.comm,
            wanted.path()
        );
    }
    let vcpus = threads.iter().filter(|thread| thread.role == Role::Vcpu).count();
    check!(vcpus == 2, "{vcpus} vCPU threads: {threads:?}");
    let children = base.children()?;
    check!(children.iter().eq(["kata-sandbox-overhead", "kata-sandbox-vcpus"]), "there are {children:?}");

    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    let children = base.children()?;
    check!(children.is_empty(), "{children:?} is left");
    vm.wait_errors_closed()?;
    let residents = base.read("cgroup.procs")?;
    check!(residents == shim.pid().to_string(), "in the shim's group are {residents:?}");
    Ok(())
}
