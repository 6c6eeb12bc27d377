//! Kata's two shims as they are: what they send, byte for byte, and what they expect of it.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Api, PATIENCE, Pod, Running, Tap, make_fifo};
use serde_json::{Value, json};
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "kata_go", needs: Needs::VM, timeout: Case::TIMEOUT, run: go_shim },
    Case { name: "kata_rust", needs: Needs::VM, timeout: Case::TIMEOUT, run: rust_shim },
];

/// Where Kata's agent listens.
const AGENT_PORT: u32 = 1024;
/// What the guest does in place of Kata's agent. The Debian kernel of these guests finds its devices by ACPI alone,
/// so Kata's `pci=off acpi=off` is left out.
const BOOT_ARGS: &str = "console=ttyS0 quiet reboot=k panic=-1 pinfold.run=hello+vsock+net+wait";

fn go_shim(ctx: &Ctx) -> Result<(), Failure> {
    let version = String::from_utf8(Command::new(&ctx.pinfold).arg("--version").output()?.stdout)?;
    let second = version.split_whitespace().nth(1).unwrap_or_default().trim_start_matches('v');
    check!(
        second.split('.').filter_map(|part| part.parse::<u32>().ok()).count() == 3,
        "not semver: {version}"
    );

    let folder = ctx.scratch.as_path();
    let tap = Tap::create("pfkata0", "172.30.3.1/24")?;
    let (log, metrics, vsock) =
        (folder.join("logs.fifo"), folder.join("metrics.fifo"), folder.join("kata.hvsock"));
    make_fifo(&log)?;
    make_fifo(&metrics)?;
    disk(&folder.join("rootfs"), 1 << 20, 1)?;
    let mut drives = vec![json!({
        "drive_id": "rootfs", "is_read_only": true, "is_root_device": false, "path_on_host": folder.join("rootfs"),
    })];
    for index in 0..8 {
        let path = folder.join(format!("drive_{index}"));
        File::create(&path)?;
        drives.push(json!({
            "drive_id": format!("drive_{index}"), "is_read_only": false, "is_root_device": false,
            "path_on_host": path,
        }));
    }
    let config = json!({
        "boot-source": {
            "kernel_image_path": ctx.vmlinux, "initrd_path": ctx.initramfs,
            "boot_args": format!("{BOOT_ARGS} pinfold.ip=172.30.3.2/24 pinfold.peer=172.30.3.1"),
        },
        "machine-config": { "smt": false, "mem_size_mib": 256, "vcpu_count": 1 },
        "drives": drives,
        "vsock": { "guest_cid": 3, "uds_path": vsock, "vsock_id": "root" },
        "network-interfaces": [ {
            "guest_mac": "06:00:ac:10:00:02", "host_dev_name": tap.name(), "iface_id": "1",
            "rx_rate_limiter": {}, "tx_rate_limiter": {},
        } ],
        "logger": { "level": "Error", "log_path": log },
        "metrics": { "metrics_path": metrics },
    });
    let config_file = folder.join("fcConfig.json");
    fs::write(&config_file, config.to_string())?;
    let socket = folder.join("kata.sock");
    let mut command = Command::new(&ctx.pinfold);
    command.arg("--api-sock").arg(&socket).arg("--config-file").arg(&config_file);
    // Nobody reads the FIFOs yet.
    let mut vm = Running::spawn(command, Vec::new(), false)?;
    let client = GoClient { api: Api::connect(&socket)? };
    client.wait_until_running()?;
    fs::set_permissions(&vsock, Permissions::from_mode(0o600))?;
    vm.wait_for_guest("echoing on 1024")?;
    vm.wait_for_guest("waiting")?;
    answers(&vsock, &format!("CONNECT {AGENT_PORT}\n"))?;

    let mount = folder.join("mount");
    for (size, seed) in [(2 << 20, 7), (1 << 20, 9)] {
        // The same path, but another file.
        let other = folder.join("other");
        disk(&other, size, seed)?;
        fs::rename(&other, &mount)?;
        client.patch_drive("drive_0", &mount)?;
        sees(&mut vm, "vdb", &mount)?;
    }
    client.patch_drive("drive_0", &folder.join("drive_0"))?;
    let line = vm.ask("disk vdb")?;
    check!(line.starts_with("disk vdb bytes=0 "), "removed, yet the guest says `{line}`");

    // Whoever comes late hears what is said from then on.
    let mut reader =
        BufReader::new(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&metrics)?);
    client.api.put("/actions", &json!({ "action_type": "FlushMetrics" }))?;
    let line = line_of(&mut reader)?;
    check!(serde_json::from_str::<Value>(&line)?["utc_timestamp_ms"].is_u64(), "no metrics: `{line}`");
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    check!(!socket.exists(), "the API's socket is left");
    Ok(())
}

fn rust_shim(ctx: &Ctx) -> Result<(), Failure> {
    let folder = ctx.scratch.as_path();
    let pod = Pod::create("kata-rust")?;
    let tap = Tap::create("pfkata1", "172.30.4.1/24")?;
    let (socket, vsock) = (folder.join("fc.sock"), folder.join("kata.hvsock"));
    let mut command = Command::new(&ctx.pinfold);
    command.arg("--api-sock").arg(&socket).arg("--no-seccomp");
    command.arg("--cgroup").arg(json!({ "parent": pod.path() }).to_string());
    let mut vm = Running::spawn(command, Vec::new(), false)?;
    let client = RustClient { socket: &socket, api: Api::connect(&socket)? };
    client.put(
        "/boot-source",
        &json!({
            "kernel_image_path": ctx.vmlinux, "initrd_path": ctx.initramfs,
            "boot_args": format!("{BOOT_ARGS} pinfold.ip=172.30.4.2/24 pinfold.peer=172.30.4.1"),
        }),
    )?;
    client.put("/machine-config", &json!({ "vcpu_count": 2, "mem_size_mib": 256 }))?;
    disk(&folder.join("rootfs"), 1 << 20, 1)?;
    client.put("/drives/rootfs", &json!({
        "drive_id": "rootfs", "path_on_host": folder.join("rootfs"), "is_root_device": false, "is_read_only": true,
    }))?;
    for index in 1..=5 {
        let path = folder.join(format!("drive{index}"));
        File::create(&path)?;
        client.put(
            &format!("/drives/drive{index}"),
            &json!({
                "drive_id": format!("drive{index}"), "path_on_host": path, "is_root_device": false,
                "is_read_only": false,
            }),
        )?;
    }
    let cid = |cid: u32| json!({ "guest_cid": cid, "uds_path": vsock, "vsock_id": "root" });
    client.put("/vsock", &cid(3))?;
    client.put("/vsock", &cid(u32::MAX))?;
    client.put(
        "/network-interfaces/1a2b",
        &json!({
            "iface_id": "1a2b", "guest_mac": "06:00:ac:10:00:02", "host_dev_name": tap.name(),
        }),
    )?;
    client.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    vm.wait_for_guest("echoing on 1024")?;
    vm.wait_for_guest("waiting")?;
    answers(&vsock, &format!("connect {AGENT_PORT}\n"))?;

    let path = folder.join("container");
    disk(&path, 3 << 20, 5)?;
    let patch = json!({ "drive_id": "drive1", "path_on_host": path, "rate_limiter": null });
    client.patch("/drives/drive1", &patch)?;
    sees(&mut vm, "vdb", &path)?;

    let strays = client.api.get("/cgroup/threads")?["strays"].clone();
    check!(strays == json!([]), "strays: {strays}");
    vm.signal(libc::SIGKILL)?;
    let status = vm.wait_exit()?;
    check!(status.signal() == Some(libc::SIGKILL), "SIGKILL ended it with {status}");
    // The shim takes the end of standard error as the sign that all is gone.
    vm.wait_errors_closed()?;
    pod.expect_empty("the end")
}

/// Kata's Go shim: go-openapi's client on net/http.
struct GoClient {
    api: Api,
}

impl GoClient {
    /// Asks every 10 ms, for up to 10 s of hardware's time.
    fn wait_until_running(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let request = "GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Go-http-client/1.1\r\n\
                           Accept: application/json\r\nAccept-Encoding: gzip\r\n\r\n";
            let mut connection = self.api.connection()?;
            connection.send(request)?;
            let response = connection.response()?;
            check!(response.status == 200, "{response:?}");
            if response.json()?["state"] == "Running" {
                return Ok(());
            }
            check!(Instant::now() < deadline, "not running: {response:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn patch_drive(&self, id: &str, path: &Path) -> Result<(), Failure> {
        let body = json!({ "drive_id": id, "path_on_host": path }).to_string() + "\n";
        let mut connection = self.api.connection()?;
        connection.send(&format!(
            "PATCH /drives/{id} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Go-http-client/1.1\r\n\
             Content-Length: {}\r\nAccept: application/json\r\nContent-Type: application/json\r\n\
             Accept-Encoding: gzip\r\n\r\n{body}",
            body.len()
        ))?;
        let response = connection.response()?;
        check!(response.status == 204, "{body}: {response:?}");
        Ok(())
    }
}

/// Kata's Rust shim: hyper over hyperlocal.
struct RustClient<'a> {
    socket: &'a Path,
    api: Api,
}

impl RustClient<'_> {
    fn put(&self, path: &str, body: &Value) -> Result<(), Failure> {
        self.send("PUT", path, body)
    }

    fn patch(&self, path: &str, body: &Value) -> Result<(), Failure> {
        self.send("PATCH", path, body)
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> Result<(), Failure> {
        let host: String =
            self.socket.as_os_str().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let body = body.to_string();
        let mut connection = self.api.connection()?;
        connection.send(&format!(
            "{method} {path} HTTP/1.1\r\naccept: application/json\r\ncontent-type: application/json\r\n\
             host: {host}:0\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ))?;
        let response = connection.response()?;
        check!(response.status == 204, "{method} {path} {body}: {response:?}");
        Ok(())
    }
}

/// The guest sends back over vsock what it is sent.
fn answers(vsock: &Path, handshake: &str) -> Result<(), Failure> {
    let mut stream = UnixStream::connect(vsock)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(handshake.as_bytes())?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    check!(line.starts_with("OK "), "{handshake:?} was answered with {line:?}");
    let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let expected = sent.clone();
    let writer = std::thread::spawn(move || stream.write_all(&sent));
    let mut received = vec![0; expected.len()];
    reader.read_exact(&mut received)?;
    check!(received == expected, "the guest sent back something else");
    writer.join().map_err(|_| Failure::new("the writer panicked"))??;
    Ok(())
}

/// The guest sees the size and the contents of `file`.
fn sees(vm: &mut Running, disk: &str, file: &Path) -> Result<(), Failure> {
    let sum = String::from_utf8(Command::new("sha256sum").arg(file).output()?.stdout)?;
    let sum = sum.split(' ').next().unwrap_or_default().to_owned();
    let wanted = format!("disk {disk} bytes={} sha256={sum}", fs::metadata(file)?.len());
    let line = vm.ask(&format!("disk {disk}"))?;
    check!(line == wanted, "the guest says `{line}`, not `{wanted}`");
    Ok(())
}

fn disk(path: &Path, size: usize, seed: u8) -> Result<(), Failure> {
    let block = |number: usize| [(number % 251).to_le_bytes()[0] ^ seed; 512];
    let content: Vec<u8> = (0..size / 512).flat_map(block).collect();
    Ok(fs::write(path, content)?)
}

/// The next line of a FIFO that is read without waiting.
fn line_of(reader: &mut BufReader<File>) -> Result<String, Failure> {
    let deadline = Instant::now() + PATIENCE;
    let mut line = String::new();
    while !line.ends_with('\n') {
        match reader.read_line(&mut line) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        check!(Instant::now() < deadline, "no line came: `{line}`");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(line)
}
