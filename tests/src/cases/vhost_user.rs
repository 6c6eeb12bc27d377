//! Devices that another process serves by vhost-user: a drive by QEMU's storage daemon, a network interface by passt.

use super::net::{MIB, Serve, give, listen, take, words};
use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{Api, Machine, PATIENCE, Pod, Running};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "vhost_user_drive", needs: NEEDS, timeout: Case::TIMEOUT, run: drive },
    Case { name: "vhost_user_net", needs: NEEDS, timeout: Case::TIMEOUT, run: net },
];

/// The host that has the servers.
const NEEDS: Needs = Needs { cgroup: Some(CgroupVersion::V2), kernel: Some(Kernel::V7), ..Needs::VM };

/// Bytes of the disk.
const SIZE: usize = 8 << 20;

fn drive(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("0b7a3d51")?;
    let disk = ctx.scratch.join("disk");
    fs::write(&disk, vec![b'p'; SIZE])?;
    let mut server = storage(&disk, ctx.scratch.join("disk.sock"))?;

    let machine = Machine::new(ctx)
        .steps("hello+blk+wait")
        .set("/drives", json!([{ "drive_id": "data", "is_root_device": false, "socket": server.socket }]))
        .set("/drives/0/cache_type", json!("Writeback"))
        .cgroup(json!({ "parent": pod.path() }));
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    launch(&api, &declared, "drives/data", &declared["drives"][0])?;
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

/// The address that the guest takes for the host's, and its own.
const PEER: &str = "172.30.2.1";
const GUEST: &str = "172.30.2.2";

fn net(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("5e1f9c22")?;
    // passt answers a ping with one of its own.
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    let mut server = passt(ctx.scratch.join("net.sock"))?;
    let interface = json!({ "iface_id": "eth0", "socket": server.socket, "guest_mac": "06:00:ac:10:00:02" });
    let machine = Machine::new(ctx)
        .set("/network-interfaces", json!([interface]))
        .boot_args(&format!("pinfold.ip={GUEST}/24 pinfold.peer={PEER}"))
        .steps("net+wait")
        .cgroup(json!({ "parent": pod.path() }));
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    launch(&api, &declared, "network-interfaces/eth0", &declared["network-interfaces"][0])?;
    let line = vm.wait_for_guest("net ")?;
    check!(line == format!("net ok peer={PEER} mac=06:00:ac:10:00:02"), "the guest says `{line}`");
    vm.wait_for_guest("waiting")?;
    let shown = &api.get("/vm/config")?["network-interfaces"][0]["backend"];
    check!(shown == "vhost-user", "the backend shown is {shown}");
    let limited =
        json!({ "iface_id": "eth0", "rx_rate_limiter": { "ops": { "size": 9, "refill_time": 9 } } });
    let refused = api.request("PATCH", "/network-interfaces/eth0", &limited.to_string())?;
    check!(refused.fault()?.contains("rx_rate_limiter"), "{}", refused.fault()?);

    for (order, serve) in [("push", take as Serve), ("pull", give as Serve)] {
        let (port, thread) = listen("127.0.0.1", 1, words(), serve)?;
        let line = vm.ask(&format!("{order} {port} {MIB}"))?;
        check!(line == format!("{order}ed on 1"), "the guest says `{line}`");
        thread.join().map_err(|_| Failure::new("the server panicked"))??;
    }
    check!(vm.ask("run load")? == "load running", "no load");
    server.kill()?;
    let line = vm.ask("carrier 0")?;
    check!(line == "carrier 0", "the guest says `{line}`");
    check!(vm.errors().matches("the back-end is gone").count() == 1, "not told once: {}", vm.errors());
    check!(vm.ask("echo still here")? == "echo still here", "the guest is not there");
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    pod.expect_empty("the loss of a server")
}

/// Starts what is declared, with one device.
fn launch(api: &Api, declared: &Value, path: &str, device: &Value) -> Result<(), Failure> {
    for section in ["boot-source", "machine-config"] {
        api.put(&format!("/{section}"), &declared[section])?;
    }
    api.put(&format!("/{path}"), device)?;
    api.put("/actions", &json!({ "action_type": "InstanceStart" }))
}

/// A storage daemon that serves a file.
fn storage(disk: &Path, socket: PathBuf) -> Result<Server, Failure> {
    let export = format!(
        "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={},writable=on",
        socket.display()
    );
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={}", disk.display()))
        .args(["--export", &export]);
    Server::start(command, socket)
}

/// A passt that connects the guest with this host's own services.
fn passt(socket: PathBuf) -> Result<Server, Failure> {
    let mut command = Command::new("passt");
    command
        .args(["--vhost-user", "--foreground", "--one-off", "--runas", "0"])
        .args(["--address", GUEST, "--netmask", "24", "--gateway", PEER, "--map-host-loopback", PEER])
        .arg("--socket")
        .arg(&socket);
    Server::start(command, socket)
}

/// Whether somebody listens on a socket, who may take one connection only: the kernel's list has its flags, of which
/// __SO_ACCEPTCON is alone there, and its path.
fn listens(socket: &Path) -> Result<bool, Failure> {
    let sockets = fs::read_to_string("/proc/net/unix")?;
    Ok(sockets.lines().any(|line| {
        Path::new(line.split(' ').next_back().unwrap_or_default()) == socket && line.contains(" 00010000 ")
    }))
}

/// A process that serves a device.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts it, and waits until it listens.
    fn start(mut command: Command, socket: PathBuf) -> Result<Self, Failure> {
        let child = command.stdin(Stdio::null()).spawn()?;
        let mut server = Self { child, socket };
        let deadline = Instant::now() + PATIENCE;
        while !listens(&server.socket)? {
            check!(server.child.try_wait()?.is_none(), "{command:?} ended");
            check!(Instant::now() < deadline, "{command:?} does not listen");
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
            eprintln!("a server is not ended: {failure}");
        }
    }
}
