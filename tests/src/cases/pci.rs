//! The same devices on PCI: the guest finds all of them, in order, and neither side leaves the fast path.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Api, Machine, PATIENCE, Role, Running, Tap, scan};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "pci_devices", needs: Needs::VM, timeout: Case::TIMEOUT, run: devices },
    Case {
        name: "pci_moved",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: moved,
    },
];

/// What the guest finds, in the order of [`devices`]: the host bridge, then block, block, net, net, vsock, entropy,
/// balloon.
const FUNCTIONS: [&str; 8] = [
    "00:00.0=1b36:0008",
    "00:01.0=1af4:1042",
    "00:02.0=1af4:1042",
    "00:03.0=1af4:1041",
    "00:04.0=1af4:1041",
    "00:05.0=1af4:1053",
    "00:06.0=1af4:1044",
    "00:07.0=1af4:1045",
];

/// Exits that may be for something else. On virtio-mmio there are two for each interrupt.
const FEW: u64 = 16;

/// Every device on PCI, declared through the API.
fn devices(ctx: &Ctx) -> Result<(), Failure> {
    let taps = [Tap::create("pfpci0", "172.30.8.1/24")?, Tap::create("pfpci1", "172.30.9.1/24")?];
    let [root, data, larger] = ["root", "data", "larger"].map(|name| ctx.scratch.join(name));
    for (path, mib) in [(&root, 3), (&data, 8), (&larger, 12)] {
        File::create(path)?.set_len(mib << 20)?;
    }
    let machine = Machine::new(ctx)
        .mem_mib(512)
        .net(&taps[0], "172.30.8.2/24", "172.30.8.1")
        .steps("hello+net+rng+wait");
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    let [metrics, vsock] = ["metrics", "vsock"].map(|name| ctx.scratch.join(name));
    api.put("/metrics", &json!({ "metrics_path": metrics }))?;
    api.put("/boot-source", &declared["boot-source"])?;
    api.put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 512 }))?;
    check!(api.get("/machine-config")?.get("pci").is_none(), "{}", api.get("/machine-config")?);
    api.patch("/machine-config", &json!({ "pci": true }))?;
    check!(api.get("/machine-config")?["pci"] == true, "{}", api.get("/machine-config")?);
    let drive = |id: &str, path: &Path, root: bool| json!({ "drive_id": id, "path_on_host": path, "is_root_device": root, "is_read_only": root });
    api.put("/drives/data", &drive("data", &data, false))?;
    api.put("/drives/root", &drive("root", &root, true))?;
    for (index, vhost) in ["on", "off"].into_iter().enumerate() {
        let id = format!("eth{index}");
        let interface = json!({ "iface_id": id, "host_dev_name": taps[index].name(), "vhost": vhost });
        api.put(&format!("/network-interfaces/{id}"), &interface)?;
    }
    api.put("/entropy", &json!({}))?;
    api.put("/vsock", &json!({ "guest_cid": 3, "uds_path": vsock }))?;
    api.put("/balloon", &json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 }))?;
    api.put("/actions", &json!({ "action_type": "InstanceStart" }))?;

    let line = vm.wait_for_guest("net ")?;
    check!(line.starts_with("net ok "), "the guest said `{line}`");
    let line = vm.wait_for_guest("rng ")?;
    check!(line == "rng virtio_rng.0 bytes=32", "the guest said `{line}`");
    vm.wait_for_guest("waiting")?;
    let booting = exits(&api, &metrics)?;
    println!("exits of the guest's start: {booting}");
    let (functions, _) = pci(&mut vm)?;
    check!(functions == FUNCTIONS, "the guest found {functions:?}");
    for (disk, bytes) in [("vda", 3 << 20), ("vdb", 8 << 20)] {
        let line = vm.ask(&format!("disk {disk}"))?;
        check!(line.starts_with(&format!("disk {disk} bytes={bytes} ")), "the guest found `{line}`");
    }
    let line = vm.ask("ping eth1 172.30.9.2/24 172.30.9.1")?;
    check!(line == "ping ok eth1", "the guest said `{line}`");
    let workers = scan(vm.pid())?.iter().filter(|thread| thread.role == Role::Vhost).count();
    check!(workers == 1, "{workers} vhost workers for one interface on vhost");

    fast(&mut vm, &api, &metrics)?;
    vm.talk_over_vsock(&vsock)?;
    resize(&mut vm, &api, &larger)?;
    api.patch("/balloon", &json!({ "amount_mib": 64 }))?;
    let deadline = Instant::now() + PATIENCE;
    while api.get("/balloon/statistics")?["actual_mib"] != 64 {
        check!(Instant::now() < deadline, "the balloon does not fill: {}", api.get("/balloon/statistics")?);
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    vm.send_line("poweroff")?;
    vm.expect_exit(0)
}

/// Requests and packets take neither a kick nor an interrupt through us on the vCPU's thread.
fn fast(vm: &mut Running, api: &Api, metrics: &Path) -> Result<(), Failure> {
    let (_, before) = pci(vm)?;
    exits(api, metrics)?;
    vm.send_line("run write")?;
    let line = vm.wait_for_guest("write ")?;
    check!(line.starts_with("write vdb done bytes=1048576 "), "the guest said `{line}`");
    for guest in ["172.30.8.2", "172.30.9.2"] {
        let output = Command::new("ping").args(["-A", "-c", "50", "-W", "20", guest]).output()?;
        check!(output.status.success(), "{guest}: {}", String::from_utf8_lossy(&output.stdout));
    }
    let line = exits(api, metrics)?;
    let count = |name: &str| line[name].as_u64().unwrap_or(u64::MAX);
    println!("exits of the I/O: {line}");
    let (_, after) = pci(vm)?;
    let mut interrupts = 0;
    for name in ["virtio1-req.0", "virtio2-input.0", "virtio3-input.0"] {
        let delta = count_of(&after, name)?.saturating_sub(count_of(&before, name)?);
        println!("{name}: {delta} interrupts");
        check!(delta > 0, "{name} did not interrupt: {before:?}, then {after:?}");
        interrupts += delta;
    }
    check!(interrupts > 5 * FEW, "{interrupts} interrupts are too few to tell");
    let mmio = count("exit_mmio_read").saturating_add(count("exit_mmio_write"));
    check!(mmio <= FEW, "{mmio} exits for memory-mapped registers: {line}");
    Ok(())
}

/// A drive with another file: the configuration's vector tells the guest of its size.
fn resize(vm: &mut Running, api: &Api, larger: &Path) -> Result<(), Failure> {
    let (_, before) = pci(vm)?;
    api.patch("/drives/data", &json!({ "drive_id": "data", "path_on_host": larger }))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let line = vm.ask("disk vdb")?;
        if line.starts_with("disk vdb bytes=12582912 ") {
            break;
        }
        check!(Instant::now() < deadline, "the guest still sees `{line}`");
    }
    let (_, after) = pci(vm)?;
    let delta = count_of(&after, "virtio1-config")? - count_of(&before, "virtio1-config")?;
    check!(delta == 1, "{delta} configuration interrupts");
    Ok(())
}

/// What has been counted since the last time.
fn exits(api: &Api, metrics: &Path) -> Result<Value, Failure> {
    api.put("/actions", &json!({ "action_type": "FlushMetrics" }))?;
    let text = fs::read_to_string(metrics)?;
    let line: Value = serde_json::from_str(text.lines().next_back().unwrap_or_default())?;
    Ok(line["vcpu"].clone())
}

/// The functions that the guest sees, and its message-signalled interrupts.
fn pci(vm: &mut Running) -> Result<(Vec<String>, Vec<String>), Failure> {
    let line = vm.ask("pci")?;
    let words = line.split(' ').skip(1).map(str::to_owned);
    Ok(words.partition(|word| word.starts_with("00:")))
}

fn count_of(interrupts: &[String], name: &str) -> Result<u64, Failure> {
    let found = interrupts.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let count = found.and_then(|count| count.parse().ok());
    count.ok_or_else(|| Failure(format!("no {name} in {interrupts:?}")))
}

/// Several vCPUs, the other form of the kernel, the configuration file, and a guest that moves a BAR.
fn moved(ctx: &Ctx) -> Result<(), Failure> {
    let [first, second] = ["first", "second"].map(|name| ctx.scratch.join(name));
    File::create(&first)?.set_len(8 << 20)?;
    File::create(&second)?.set_len(8 << 20)?;
    let mut vm = Machine::new(ctx)
        .kernel(&ctx.bzimage)
        .vcpus(2)
        .drive("first", &first, true)
        .drive("second", &second, false)
        .set("/machine-config/pci", json!(true))
        // The kernel gives the second drive's BAR another place, at a multiple of 1 MiB.
        .boot_args("pci=resource_alignment=20@00:02.0")
        .steps("hello+wait")
        .start()?;
    vm.wait_for_guest("up cpus=2 ")?;
    vm.wait_for_guest("waiting")?;
    let line = vm.ask("bar 00:01.0")?;
    check!(line == "bar 00:01.0 0x00000000c0108000", "the guest says `{line}`");
    let line = vm.ask("bar 00:02.0")?;
    let at = line.strip_prefix("bar 00:02.0 0x").map(|number| u64::from_str_radix(number, 16));
    let Some(Ok(at)) = at else { return Err(Failure(format!("the guest says `{line}`"))) };
    check!(at > 0xC010_0000 && at.is_multiple_of(1 << 20), "it was not moved: `{line}`");
    vm.send_line("run write")?;
    let line = vm.wait_for_guest("write ")?;
    check!(line.starts_with("write vdb done bytes=1048576 "), "the guest said `{line}`");
    let line = vm.ask("disk vda")?;
    check!(line.starts_with("disk vda bytes=8388608 "), "the guest said `{line}`");
    vm.send_line("reboot")?;
    vm.expect_exit(0)
}
