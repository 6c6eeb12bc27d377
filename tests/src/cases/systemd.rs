//! The systemd driver: a scope in the right slice with every thread below it, which goes away with the VM, however
//! that ends.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{Group, Machine, Role, Running, Unit, containers_of_record, scan, strays};
use serde_json::{Value, json};
use std::process::Command;
use std::time::Duration;

/// The cases of this file.
pub const CASES: &[Case] = &[
    case("systemd_v2_61", CgroupVersion::V2, Kernel::V6_1),
    case("systemd_v2_73", CgroupVersion::V2, Kernel::V7),
    case("systemd_v1", CgroupVersion::V1, Kernel::V6_1),
];

const fn case(name: &'static str, cgroup: CgroupVersion, kernel: Kernel) -> Case {
    let needs = Needs { cgroup: Some(cgroup), kernel: Some(kernel), systemd: true, ..Needs::VM };
    Case { name, needs, timeout: Duration::from_secs(600), run: scopes }
}

/// A scope as kubelet and containerd name it, and where it is.
const NAME: &str = "pftest-pod1.slice:cri-containerd:4f";
const SCOPE: &str = "/pftest.slice/pftest-pod1.slice/cri-containerd-4f.scope";
/// The scope of a VM that was given no place.
const OWN: &str = "/machine.slice/pinfold-sd-1.scope";

fn scopes(ctx: &Ctx) -> Result<(), Failure> {
    let caller = Unit::start("pinfold-test-launcher")?;
    let scope = Group::at(SCOPE);

    let vm =
        |section: Value| Machine::new(ctx).vcpus(2).steps("hello+wait").cgroup(section).from_caller(&caller);
    let named = json!({ "parent": NAME, "containers": containers_of_record() });
    let mut running = vm(named.clone())?.start()?;
    running.wait_for_guest("waiting")?;
    in_place(&running, &scope, 2)?;
    // systemd looks at all that it has anew.
    systemctl(&["daemon-reload"])?;
    caller.set("CPUWeight=50")?;
    in_place(&running, &scope, 2)?;

    let mut second = vm(named.clone())?.start()?;
    second.expect_exit(152)?;
    check!(
        second.errors().contains("cri-containerd-4f.scope exists and is populated"),
        "{}",
        second.errors()
    );
    in_place(&running, &scope, 2)?;
    running.signal(libc::SIGTERM)?;
    running.expect_exit(0)?;
    scope.wait_gone()?;

    // The same by an OCI specification, and killed. Nobody waits for systemd before the next one.
    let spec = json!({ "linux": { "cgroupsPath": NAME } });
    std::fs::write(ctx.scratch.join("config.json"), spec.to_string())?;
    let (mut killed, _api) = vm(json!({ "driver": "systemd", "oci_spec": ctx.scratch }))?.serve()?;
    in_place(&killed, &scope, 0)?;
    killed.signal(libc::SIGKILL)?;
    killed.wait_exit()?;
    killed.wait_errors_closed()?;
    check!(!ctx.scratch.join("api.sock").exists(), "the API's socket is left");
    let (mut next, _api) = vm(named)?.serve()?;
    in_place(&next, &scope, 0)?;
    next.signal(libc::SIGTERM)?;
    next.expect_exit(0)?;
    scope.wait_gone()?;

    // Without a name, over the remains of a scope that failed.
    let timed_out =
        ["--quiet", "--scope", "--unit=pinfold-sd-1", "--property=RuntimeMaxSec=1", "sleep", "1000"];
    Command::new("systemd-run").args(timed_out).status()?;
    systemctl(&["is-failed", "pinfold-sd-1.scope"])?;
    let own = Group::at(OWN);
    let sized = json!({ "size_vm": true, "containers": containers_of_record() });
    let (mut unnamed, api) = vm(sized)?.flag("--id").flag("sd-1").serve()?;
    in_place(&unnamed, &own, 0)?;
    let machine = &api.get("/vm/config")?["machine-config"];
    check!(machine["vcpu_count"] == 5 && machine["mem_size_mib"] == 728, "the microVM is {machine}");
    unnamed.signal(libc::SIGTERM)?;
    unnamed.expect_exit(0)?;
    own.wait_gone()
}

/// Each thread is where it belongs below the scope, in whose own group there is nobody, by each controller.
fn in_place(vm: &Running, scope: &Group, vcpus: usize) -> Result<(), Failure> {
    let threads = scan(vm.pid())?;
    let astray = strays(&threads, scope.child("kata-sandbox").path());
    check!(astray.is_empty(), "outside the tree: {astray:?}");
    let placed = threads.iter().filter(|thread| {
        thread.role == Role::Vcpu
            && thread
                .groups
                .iter()
                .filter(|(name, _)| ["unified", "cpu", "cpuset"].contains(&name.as_str()))
                .all(|(_, path)| path.ends_with("/kata-sandbox-vcpus"))
    });
    check!(placed.count() == vcpus, "not {vcpus} vCPU threads in their group: {threads:?}");
    // The process that removes the groups is one of them.
    check!(threads.iter().any(|thread| thread.comm == "pinfold_reaper"), "no reaper: {threads:?}");
    Ok(())
}

fn systemctl(arguments: &[&str]) -> Result<(), Failure> {
    let status = Command::new("systemctl").args(arguments).status()?;
    check!(status.success(), "systemctl {arguments:?} ended with {status}");
    Ok(())
}
