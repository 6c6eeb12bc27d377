//! A drive that another process serves: QEMU's storage daemon, by vhost-user.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{Machine, PATIENCE, Pod, Running};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[Case {
    name: "vhost_user_drive",
    // The host that has the storage daemon.
    needs: Needs { cgroup: Some(CgroupVersion::V2), kernel: Some(Kernel::V7), ..Needs::VM },
    timeout: Case::TIMEOUT,
    run: drive,
}];

/// Bytes of the disk.
const SIZE: usize = 8 << 20;

fn drive(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("0b7a3d51")?;
    let disk = ctx.scratch.join("disk");
    fs::write(&disk, vec![b'p'; SIZE])?;
    let mut server = Server::start(&disk, ctx.scratch.join("disk.sock"))?;

    let machine = Machine::new(ctx)
        .steps("hello+blk+wait")
        .set("/drives", json!([{ "drive_id": "data", "is_root_device": false, "socket": server.socket }]))
        .set("/drives/0/cache_type", json!("Writeback"))
        .cgroup(json!({ "parent": pod.path() }));
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    for section in ["boot-source", "machine-config", "drives/data"] {
        let body = declared.get(section).unwrap_or(&declared["drives"][0]);
        api.put(&format!("/{section}"), body)?;
    }
    api.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    let line = vm.wait_for_guest("blk ")?;
    check!(line.starts_with(&format!("blk vda bytes={SIZE} ro=0 ")), "the guest says `{line}`");
    vm.wait_for_guest("waiting")?;
    vm.send_line("run write")?;
    let line = vm.wait_for_guest("write ")?;
    check!(line.starts_with("write vda done "), "the guest says `{line}`");
    check!(fs::read(&disk)?.starts_with(b"pinfold\npinfold\n"), "what the guest wrote is not in the file");

    // The drive may be looked at again, and nothing else.
    api.patch("/drives/data", &json!({ "drive_id": "data" }))?;
    let body = json!({ "drive_id": "data", "path_on_host": disk }).to_string();
    let refused = api.request("PATCH", "/drives/data", &body)?;
    check!(refused.fault()?.contains("path_on_host"), "{}", refused.fault()?);

    // The server goes while the guest is at it. What its kernel says of that is not to get between its answers.
    check!(
        vm.ask("do echo 1 >/proc/sys/kernel/printk && echo quiet")? == "did quiet",
        "the kernel is not quiet"
    );
    check!(vm.ask("run load")? == "load running", "no load");
    server.kill()?;
    reads_fail(&mut vm)?;
    check!(vm.errors().matches("the back-end is gone").count() == 1, "not told once: {}", vm.errors());
    check!(vm.ask("echo still here")? == "echo still here", "the guest is not there");
    let body = json!({ "drive_id": "data" }).to_string();
    let refused = api.request("PATCH", "/drives/data", &body)?;
    check!(refused.fault()?.contains("is gone"), "{}", refused.fault()?);
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    pod.expect_empty("the loss of a server")
}

/// Every read of the disk fails, and at once.
fn reads_fail(vm: &mut Running) -> Result<(), Failure> {
    for _ in 0..2 {
        let line = vm.ask("do dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct")?;
        check!(line.ends_with("Input/output error"), "the guest says `{line}`");
    }
    Ok(())
}

/// A storage daemon that serves a file.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts one, and waits until it listens.
    fn start(disk: &Path, socket: PathBuf) -> Result<Self, Failure> {
        let export = format!(
            "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={},writable=on",
            socket.display()
        );
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", disk.display()))
            .args(["--export", &export])
            .stdin(Stdio::null())
            .spawn()?;
        let mut server = Self { child, socket };
        let deadline = Instant::now() + PATIENCE;
        while !server.socket.exists() {
            check!(server.child.try_wait()?.is_none(), "the storage daemon ended");
            check!(Instant::now() < deadline, "the storage daemon does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(failure) = self.kill() {
            eprintln!("the storage daemon is not ended: {failure}");
        }
    }
}
