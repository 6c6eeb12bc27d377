//! Every thread of a busy VM is in its cgroup, the caller pays for nothing, and nothing is left behind.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{
    Group, Machine, PATIENCE, Pod, Role, Running, Tap, Thread, Unit, containers_of_record, render, scan,
    strays,
};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    case("placement_v2_61", CgroupVersion::V2, Kernel::V6_1, |ctx| placement(ctx, UNIFIED, Kernel::V6_1)),
    case("placement_v2_73", CgroupVersion::V2, Kernel::V7, |ctx| placement(ctx, UNIFIED, Kernel::V7)),
    case("placement_v1", CgroupVersion::V1, Kernel::V6_1, |ctx| placement(ctx, SEPARATE, Kernel::V6_1)),
];

const fn case(
    name: &'static str,
    cgroup: CgroupVersion,
    kernel: Kernel,
    run: fn(&Ctx) -> Result<(), Failure>,
) -> Case {
    let needs = Needs { cgroup: Some(cgroup), kernel: Some(kernel), systemd: true, ..Needs::VM };
    Case { name, needs, timeout: Duration::from_secs(900), run }
}

/// What a layout looks like from outside, with paths below the pod's group.
pub(super) struct Layout {
    /// The group of the vCPU threads, and the controllers by which they are in it.
    pub(super) vcpus: (&'static str, &'static [&'static str]),
    /// The group of all other threads by the same controllers.
    overhead: &'static str,
    /// The group of all threads by all other controllers, and these.
    sandbox: (&'static str, &'static [&'static str]),
    /// Limits that the containers of the example add up to: group, file, value.
    pub(super) limits: &'static [(&'static str, &'static str, &'static str)],
}

pub(super) const UNIFIED: &Layout = &Layout {
    vcpus: ("kata-sandbox/kata-sandbox-vcpus", &["unified"]),
    overhead: "kata-sandbox/kata-sandbox-overhead",
    sandbox: ("kata-sandbox", &[]),
    limits: &[
        ("kata-sandbox/kata-sandbox-vcpus", "cpu.max", "500000 100000"),
        ("kata-sandbox/kata-sandbox-vcpus", "cpu.weight", "363"),
        ("kata-sandbox", "memory.max", "629145600"),
    ],
};

pub(super) const SEPARATE: &Layout = &Layout {
    vcpus: ("kata-sandbox-vcpus", &["cpu", "cpuacct", "cpuset"]),
    overhead: "kata-sandbox",
    sandbox: ("kata-sandbox", &["memory", "blkio", "pids", "name=systemd"]),
    limits: &[
        ("kata-sandbox-vcpus", "cpu.shares", "5120"),
        ("kata-sandbox-vcpus", "cpu.cfs_quota_us", "500000"),
        ("kata-sandbox-vcpus", "cpu.cfs_period_us", "100000"),
        ("kata-sandbox", "memory.limit_in_bytes", "629145600"),
    ],
};

/// Sectors and packets that count as I/O going on: some seconds' worth in nested emulation.
const BUSY: u64 = 1000;

fn placement(ctx: &Ctx, layout: &Layout, kernel: Kernel) -> Result<(), Failure> {
    let pod = Pod::create("2f7c9d10")?;
    let caller = Unit::start("pinfold-test-launcher")?;
    let tap = Tap::create("pfplace0", "172.30.2.1/24")?;

    let anon = caller.anon_bytes()?;
    let declared = json!({ "parent": pod.path(), "containers": containers_of_record() });
    let mut vm = launch(ctx, &declared, &caller, &tap)?;
    let launched = caller.cpu_usec()?;
    let charged = caller.anon_bytes()?;
    check!(charged == anon, "the caller had {anon} bytes of anonymous memory, after the launch {charged}");
    limited(layout, &pod)?;
    let threads = scan(vm.pid())?;
    print!("{}", render(&threads, &[&caller, &pod], &pod));
    in_place(&threads, layout, &pod)?;
    complete(&threads, vm.pid(), kernel)?;
    keep_busy(&mut vm, BUSY)?;
    // Nothing has wandered off or come up elsewhere under load.
    in_place(&scan(vm.pid())?, layout, &pod)?;
    // Nobody is in the caller's group any more, so the figure stands still to the microsecond.
    let used = caller.cpu_usec()?;
    check!(used == launched, "the caller used {launched} us up to the launch, and {used} us after the I/O");

    // systemd does to the launcher what it likes to.
    for property in ["CPUWeight=50", "MemoryMax=1G", "TasksMax=1000", "CPUWeight=", "MemoryMax="] {
        caller.set(property)?;
    }
    in_place(&scan(vm.pid())?, layout, &pod)?;

    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    pod.expect_empty("a power-off")?;
    drop(vm);

    // The same place and size as a runtime says it, in a group that it has not made.
    let specified = pod.child("cri-4f");
    std::fs::write(ctx.scratch.join("config.json"), spec_of_record(specified.path()).to_string())?;
    let mut vm = launch(ctx, &json!({ "oci_spec": ctx.scratch }), &caller, &tap)?;
    limited(layout, &specified)?;
    in_place(&scan(vm.pid())?, layout, &specified)?;
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    pod.expect_empty("SIGTERM")?;
    drop(vm);

    let mut vm = launch(ctx, &declared, &caller, &tap)?;
    // With whatever is left of the launcher's.
    caller.stop()?;
    in_place(&scan(vm.pid())?, layout, &pod)?;
    vm.signal(libc::SIGKILL)?;
    let status = vm.wait_exit()?;
    check!(status.signal() == Some(libc::SIGKILL), "SIGKILL ended it with {status}");
    // The reaper closes it last.
    vm.wait_errors_closed()?;
    pod.expect_empty("SIGKILL")
}

/// What containerd writes for a pod of the two containers of the example: the parts that matter.
pub(super) fn spec_of_record(cgroups_path: &str) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": { "args": ["/pause"] },
        "linux": { "cgroupsPath": cgroups_path, "resources": { "devices": [], "cpu": { "shares": 2 } } },
        "annotations": {
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-cpu-quota": "500000",
            "io.kubernetes.cri.sandbox-cpu-shares": "5120",
            "io.kubernetes.cri.sandbox-memory": "629145600",
        },
    })
}

/// The groups below `base` have the limits of the example.
fn limited(layout: &Layout, base: &Group) -> Result<(), Failure> {
    for (group, file, value) in layout.limits {
        let found = base.child(group).read(file)?;
        check!(found == *value, "{file} of {group} is `{found}`, not `{value}`");
    }
    Ok(())
}

/// Launches a VM with this section `cgroup` from the caller's group and waits until its disks and its network are busy.
fn launch(ctx: &Ctx, section: &Value, caller: &Group, tap: &Tap) -> Result<Running, Failure> {
    let disks = [ctx.scratch.join("root.img"), ctx.scratch.join("data.img")];
    for disk in &disks {
        File::create(disk)?.set_len(32 << 20)?;
    }
    let vm = Machine::new(ctx)
        .vcpus(2)
        .steps("hello+net+load+wait")
        .drive("root", &disks[0], true)
        .drive("data", &disks[1], false)
        .net(tap, "172.30.2.2/24", "172.30.2.1")
        .set("/network-interfaces/0/vhost", json!("on"))
        .cgroup(section.clone())
        .from_caller(caller)?
        .start()?;
    for line in ["up cpus=2 ", "net ok ", "load running", "waiting"] {
        vm.wait_for_guest(line)?;
    }
    Ok(vm)
}

/// Each thread is where its role belongs, in every hierarchy that counts.
pub(super) fn in_place(threads: &[Thread], layout: &Layout, pod: &Group) -> Result<(), Failure> {
    let astray = strays(threads, pod.child("kata-sandbox").path());
    check!(astray.is_empty(), "outside the tree: {astray:?}");
    let (vcpus, split) = layout.vcpus;
    let (sandbox, whole) = layout.sandbox;
    for thread in threads {
        let own = if thread.role == Role::Vcpu { vcpus } else { layout.overhead };
        let wanted = split.iter().map(|name| (name, own)).chain(whole.iter().map(|name| (name, sandbox)));
        for (controller, group) in wanted {
            let wanted = pod.child(group);
            let found = thread.groups.get(*controller).map(String::as_str);
            check!(found == Some(wanted.path()), "by {controller} not in {}: {thread:?}", wanted.path());
        }
    }
    Ok(())
}

/// The threads that a busy VM has are among those found, so that the scan means something.
fn complete(threads: &[Thread], pid: u32, kernel: Kernel) -> Result<(), Failure> {
    for name in ["fc_vcpu 0", "fc_vcpu 1"] {
        check!(
            threads.iter().filter(|thread| thread.comm == name).count() == 1,
            "not one {name}: {threads:?}"
        );
    }
    let main = threads.iter().find(|thread| thread.role == Role::Main);
    check!(main.is_some_and(|thread| thread.comm == "pinfold"), "the main thread is {main:?}");
    let worker = threads
        .iter()
        .find(|thread| thread.role == Role::Vhost)
        .ok_or_else(|| Failure(format!("no vhost worker: {threads:?}")))?;
    check!(worker.kernel, "{worker:?} runs user code");
    let ours = Path::new("/proc").join(format!("{pid}/task/{}", worker.tid)).exists();
    check!(ours == (kernel == Kernel::V7), "on {kernel}, that the worker is a thread of ours is {ours}");
    check!(threads.iter().any(|thread| thread.role == Role::Kvm), "no worker of KVM: {threads:?}");
    Ok(())
}

/// Waits until the guest's counters of I/O have grown by `amount`.
pub(super) fn keep_busy(vm: &mut Running, amount: u64) -> Result<(), Failure> {
    let before = vm.guest_io()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let moved = vm.guest_io()?.saturating_sub(before);
        if moved >= amount {
            println!("the guest moved {moved} sectors and packets");
            return Ok(());
        }
        check!(Instant::now() < deadline, "the guest moved only {moved} sectors and packets");
        // Asking costs the guest time, too.
        std::thread::sleep(Duration::from_millis(500));
    }
}
