//! A folder of the host's in the guest, by a virtiofsd that Pinfold starts.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{Group, Machine, PATIENCE, Pod, Running};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[Case {
    name: "fs_shared_folder",
    // Debian 12 has no virtiofsd.
    needs: Needs { cgroup: Some(CgroupVersion::V2), kernel: Some(Kernel::V7), ..Needs::VM },
    timeout: Case::TIMEOUT,
    run: shared_folder,
}];

fn shared_folder(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("5d1e6a40")?;
    let folder = ctx.scratch.join("shared");
    fs::create_dir(&folder)?;
    fs::write(folder.join("hello"), "hello from the host\n")?;

    let mut vm = launch(ctx, &pod, &folder)?;
    let line = vm.ask("fs shared")?;
    check!(line == "fs shared hello from the host", "the guest says `{line}`");
    let answer = fs::read_to_string(folder.join("answer"))?;
    check!(answer == "the guest was here\n", "the guest wrote `{answer}`");
    let servers = virtiofsds()?;
    check!(!servers.is_empty(), "no virtiofsd runs");
    let overhead = pod.child("kata-sandbox/kata-sandbox-overhead");
    for pid in &servers {
        in_group(*pid, &overhead)?;
    }

    // Without its server the file system answers with errors, and the guest goes on.
    for pid in &servers {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(*pid, libc::SIGKILL) };
    }
    wait_for_end()?;
    let line = vm.ask("fs-check")?;
    check!(line.contains("not connected"), "the guest says `{line}`");
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    pod.expect_empty("the loss of virtiofsd")?;

    let mut vm = launch(ctx, &pod, &folder)?;
    vm.ask("fs shared")?;
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    check!(virtiofsds()?.is_empty(), "virtiofsd is there after a power-off");
    pod.expect_empty("a power-off")?;

    let mut vm = launch(ctx, &pod, &folder)?;
    vm.ask("fs shared")?;
    vm.signal(libc::SIGKILL)?;
    vm.wait_exit()?;
    vm.wait_errors_closed()?;
    wait_for_end()?;
    pod.expect_empty("SIGKILL")
}

fn launch(ctx: &Ctx, pod: &Pod, folder: &Path) -> Result<Running, Failure> {
    let vm = Machine::new(ctx)
        .steps("hello+wait")
        .set("/fs", json!([{ "tag": "shared", "shared_dir": folder }]))
        .cgroup(json!({ "parent": pod.path() }))
        .start()?;
    vm.wait_for_guest("waiting")?;
    Ok(vm)
}

/// Checks that a process is in this group of v2.
pub(super) fn in_group(pid: libc::pid_t, group: &Group) -> Result<(), Failure> {
    let found = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    check!(found.trim_end() == format!("0::{}", group.path()), "{pid} is in {found}");
    Ok(())
}

/// The processes of that name.
pub(super) fn virtiofsds() -> Result<Vec<libc::pid_t>, Failure> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process that has just ended has no name.
        if fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim_end() == "virtiofsd") {
            found.push(pid);
        }
    }
    Ok(found)
}

fn wait_for_end() -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    // One that was killed is a zombie until we wait for it, which its parent does at the end.
    let running = || {
        let mut pids = virtiofsds()?;
        pids.retain(|pid| {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
        });
        Ok::<_, Failure>(pids)
    };
    while !running()?.is_empty() {
        check!(Instant::now() < deadline, "virtiofsd {:?} still runs", running()?);
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
