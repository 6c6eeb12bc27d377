//! What `cargo demo` shows: a VM under I/O load, launched from a runtime's cgroup, with all its threads in the
//! pod's.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::lab::{Machine, Pod, Tap, caller, containers_of_record, render, scan, strays};
use serde_json::json;
use std::fs::File;
use std::time::Duration;

/// The demo. It is no test of its own: others check the same, one thing at a time.
pub const DEMO: Case = Case { name: "demo", needs: Needs::VM, timeout: Duration::from_secs(600), run };

fn run(ctx: &Ctx) -> Result<(), Failure> {
    let kernel = crate::lab::read("/proc/sys/kernel/osrelease".as_ref())?;
    println!("host kernel {}", kernel.trim());
    let pod = Pod::create("8f6b1a52")?;
    let caller = caller()?;
    let tap = Tap::create("pfdemo0", "172.30.0.1/24")?;
    let disks = [ctx.scratch.join("root.img"), ctx.scratch.join("data.img")];
    for disk in &disks {
        File::create(disk)?.set_len(32 << 20)?;
    }

    let cpu_before = caller.cpu_usec()?;
    let anon_before = caller.anon_bytes()?;
    println!("launching pinfold from {} for the pod {}", caller.path(), pod.path());
    let mut vm = Machine::new(ctx)
        .silent()
        .vcpus(2)
        .with_self_tests()
        .steps("hello+net+load+wait")
        .drive("root", &disks[0], true)
        .drive("data", &disks[1], false)
        .net(&tap, "172.30.0.2/24", "172.30.0.1")
        .cgroup(json!({
            "parent": pod.path(),
            "overhead": { "cpu": { "quota": 100_000, "period": 100_000 }, "memory": { "limit": 134_217_728 } },
            "containers": containers_of_record(),
        }))
        .from_caller(&caller)?
        .start()?;
    for line in ["up ", "net ok", "load running", "waiting"] {
        println!("guest: {}", vm.wait_for_guest(line)?);
    }
    let io_before = vm.guest_io()?;
    let anon = caller.anon_bytes()?;
    let cpu = caller.cpu_usec()?;
    let threads = scan(vm.pid())?;
    let io = vm.guest_io()? - io_before;
    println!("guest: {io} sectors and packets moved meanwhile\n");
    print!("{}", render(&threads, &[&caller, &pod], &pod));

    let astray = strays(&threads, pod.child("kata-sandbox").path());
    for thread in &astray {
        println!("stray: {} ({}) {} in {:?}", thread.comm, thread.tid, thread.role, thread.groups);
    }
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    println!(
        "\ncaller: cpu_usec={} anon_bytes={}",
        cpu.saturating_sub(cpu_before),
        i128::from(anon) - i128::from(anon_before)
    );
    println!("strays: {}", astray.len());
    // No text: `strays` stays the last line.
    if astray.is_empty() && io > 0 { Ok(()) } else { Err(Failure::new("")) }
}
