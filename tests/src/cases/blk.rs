//! Disks: what the guest reads is what is in the file, and what it has flushed is on the disk.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Api, LoopDevice, Machine, Mounted, PATIENCE, Pod, Running, caller, run};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "blk_reads_and_writes",
        needs: Needs { kvm: true, scratch_disk: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: reads_and_writes,
    },
    Case {
        name: "blk_io_uring_on_a_thread_of_its_own",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: io_uring,
    },
    Case {
        name: "blk_on_block_devices",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: block_devices,
    },
    Case {
        name: "blk_faults_of_the_host",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: faults,
    },
    Case {
        name: "blk_exits",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: exits,
    },
];

/// What the guest's step `write` repeats, and how much of it it writes.
const PATTERN: &[u8] = b"pinfold\n";
const WRITTEN: usize = 1 << 20;

fn reads_and_writes(ctx: &Ctx) -> Result<(), Failure> {
    let device = ctx.scratch_disk.as_ref().ok_or_else(|| Failure::new("no scratch disk"))?;
    let disk = Mounted::format(device, &ctx.scratch.join("mnt"))?;
    let read_only = ctx.scratch.join("read-only.img");
    fs::write(&read_only, noise(3 << 20))?;
    let data = disk.folder.join("data.img");
    File::create(&data)?.set_len(8 << 20)?;
    run(&mut Command::new("sync"))?;

    let mut vm = Machine::new(ctx)
        .drive("code", &read_only, true)
        .drive("data", &data, false)
        .set("/drives/1/cache_type", json!("Writeback"))
        .steps("blk+wait")
        .start()?;
    let expected =
        format!("blk vda bytes={} ro=1 sha256={}", read_only.metadata()?.len(), sha256(&read_only)?);
    let line = vm.wait_for_guest("blk vda ")?;
    check!(line == expected, "the guest read `{line}`, not `{expected}`");
    let line = vm.wait_for_guest("blk vdb ")?;
    check!(line.starts_with("blk vdb bytes=8388608 ro=0 "), "the guest found `{line}`");
    vm.wait_for_guest("waiting")?;

    let before = flushes(device)?;
    vm.send_line("run write")?;
    // Success or failure, whichever is said.
    let line = vm.wait_for_guest("write ")?;
    let after = flushes(device)?;
    println!("flushes of {}: {before} before the guest's fsync, {after} after it", device.display());
    check!(line.starts_with("write vdb done bytes=1048576 "), "the guest said `{line}`");
    // The ext2 on the disk has no journal: nobody but the guest asked for a flush meanwhile.
    check!(after > before, "the guest's fsync did not reach the disk");
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;

    let mut found = vec![0; WRITTEN];
    File::open(&data)?.read_exact(&mut found)?;
    check!(found.chunks(PATTERN.len()).all(|chunk| chunk == PATTERN), "the file holds something else");
    check!(fs::read(&read_only)? == noise(3 << 20), "the read-only disk's file has changed");
    Ok(())
}

/// An `Async` drive with its own thread beside one on the event loop: contents, discards, threads, PATCH, and a reset
/// under load.
fn io_uring(ctx: &Ctx) -> Result<(), Failure> {
    const SIZE: usize = 8 << 20;
    let pod = Pod::create("blk-uring")?;
    let caller = caller()?;
    let image = |name: &str| -> Result<PathBuf, Failure> {
        let path = ctx.scratch.join(name);
        fs::write(&path, noise(SIZE))?;
        Ok(path)
    };
    let (first, second, other) = (image("first.img")?, image("second.img")?, image("other.img")?);
    let machine = Machine::new(ctx)
        .vcpus(2)
        .drive("data", &first, false)
        .drive("b", &other, false)
        .set("/drives/0/io_engine", json!("Async"))
        .set("/drives/0/io_thread", json!(true))
        .set("/drives/0/cache_type", json!("Writeback"))
        .set("/drives/0/queues", json!(2))
        .set("/drives/1/io_engine", json!("Async"))
        .cgroup(json!({ "parent": pod.path() }))
        .steps("blk+wait")
        .from_caller(&caller)?;
    let (mut vm, api) = start_by_api(machine)?;
    let line = vm.wait_for_guest("blk vda ")?;
    let expected = format!("blk vda bytes={SIZE} ro=0 sha256={}", sha256(&first)?);
    check!(line == expected, "the guest read `{line}`, not `{expected}`");
    vm.wait_for_guest("waiting")?;

    let command =
        "dd if=/dev/vdb of=/dev/vda bs=65536 skip=16 count=16 conv=fsync 2>/dev/null && echo copied";
    let line = vm.ask(&format!("do {command}"))?;
    check!(line == "did copied", "the guest said `{line}`");
    check!(
        fs::read(&first)?[..1 << 20] == noise(SIZE)[1 << 20..2 << 20],
        "the first MiB is not what was written"
    );

    let before = first.metadata()?.blocks();
    let line = vm.ask("do blkdiscard -o 4194304 -l 1048576 /dev/vda && echo discarded")?;
    check!(line == "did discarded", "the guest said `{line}`");
    let after = first.metadata()?.blocks();
    check!(
        after + (1 << 20) / 1024 <= before,
        "{before} sectors are in use before the discard, {after} after it"
    );
    let line = vm.ask("do pinfold-guest zero /dev/vda 5242880 1048576")?;
    check!(line == "did pinfold-guest: zeroed", "the guest said `{line}`");
    let zeroed = first.metadata()?.blocks();
    check!(
        zeroed + (1 << 20) / 1024 > after,
        "{zeroed} sectors are in use after the zeroing, {after} before it"
    );
    check!(fs::read(&first)?[4 << 20..6 << 20].iter().all(|byte| *byte == 0), "not all is zero");
    let line = vm.ask("disk vda")?;
    let expected = format!("disk vda bytes={SIZE} sha256={}", sha256(&first)?);
    check!(line == expected, "the guest read `{line}`, not `{expected}`");

    vm.send_line("run load")?;
    vm.wait_for_guest("load running")?;
    let seen = wait_for_roles(&api, &["main", "api", "vcpu", "io", "iou"])?;
    let of = |role| {
        let threads = seen["threads"].as_array().into_iter().flatten();
        threads.filter(move |thread| thread["role"] == role)
    };
    check!(of("io").all(|thread| thread["comm"] == "pinfold_io data"), "{seen}");
    let (main, vcpu) =
        (of("main").next().map(|one| &one["cgroup"]), of("vcpu").next().map(|one| &one["cgroup"]));
    check!(main != vcpu, "{seen}");
    check!(of("io").chain(of("iou")).all(|thread| Some(&thread["cgroup"]) == main), "{seen}");

    for path in [&second, &first, &second] {
        let before = vm.guest_io()?;
        api.patch("/drives/data", &json!({ "drive_id": "data", "path_on_host": path }))?;
        let deadline = Instant::now() + PATIENCE;
        while vm.guest_io()? == before {
            check!(Instant::now() < deadline, "the guest's I/O stands still");
        }
    }
    check!(fs::read(&second)? != noise(SIZE), "the file that took over was not written");
    check!(api.get("/cgroup/threads")?["strays"] == json!([]), "{}", api.get("/cgroup/threads")?);
    check!(!vm.console().contains("I/O error"), "the guest met an error: {}", vm.console());
    check!(!vm.errors().contains("cannot be had"), "io_uring was not used: {}", vm.errors());
    // Requests are in flight.
    vm.send_line("reboot")?;
    vm.expect_exit(0)
}

/// Drives on block devices, by each engine: contents, discards, zeroes, and a device that grows.
fn block_devices(ctx: &Ctx) -> Result<(), Failure> {
    const SIZE: u64 = 8 << 20;
    let folder = Mounted::tmpfs(&ctx.scratch.join("images"), "64m")?;
    let loops = ["sync", "async"]
        .iter()
        .map(|name| {
            let file = folder.folder.join(name);
            fs::write(&file, noise(usize::try_from(SIZE)?))?;
            LoopDevice::over(&file)
        })
        .collect::<Result<Vec<_>, Failure>>()?;
    let machine = Machine::new(ctx)
        .drive("sync", &loops[0].device, false)
        .drive("async", &loops[1].device, false)
        .set("/drives/1/io_engine", json!("Async"))
        .set("/drives/0/cache_type", json!("Writeback"))
        .set("/drives/1/cache_type", json!("Writeback"))
        .steps("blk+wait");
    let (mut vm, api) = machine.start_and_connect()?;
    for (disk, backing) in ["vda", "vdb"].iter().zip(&loops) {
        let line = vm.wait_for_guest(&format!("blk {disk} "))?;
        let expected = format!("blk {disk} bytes={SIZE} ro=0 sha256={}", sha256(&backing.file)?);
        check!(line == expected, "the guest read `{line}`, not `{expected}`");
    }
    for (disk, backing) in ["vda", "vdb"].iter().zip(&loops) {
        let before = backing.file.metadata()?.blocks();
        let line = vm.ask(&format!("do blkdiscard -o 4194304 -l 1048576 /dev/{disk} && echo discarded"))?;
        check!(line == "did discarded", "the guest said `{line}`");
        let after = backing.file.metadata()?.blocks();
        check!(after + 2048 <= before, "{disk}: {before} sectors in use before the discard, {after} after");
        let line = vm.ask(&format!("do pinfold-guest zero /dev/{disk} 5242880 1048576"))?;
        check!(line == "did pinfold-guest: zeroed", "the guest said `{line}`");
        let line =
            vm.ask(&format!("do dd if=/dev/zero of=/dev/{disk} bs=65536 count=16 conv=fsync && echo zeros"))?;
        check!(line == "did zeros", "the guest said `{line}`");
        let found = fs::read(&backing.file)?;
        check!(found[..1 << 20].iter().all(|byte| *byte == 0), "{disk}: what was written is not there");
        check!(found[4 << 20..6 << 20].iter().all(|byte| *byte == 0), "{disk}: not all is zero");
        check!(found[6 << 20..] == noise(8 << 20)[6 << 20..], "{disk}: something else has changed");

        backing.grow(2 * SIZE)?;
        let id = if *disk == "vda" { "sync" } else { "async" };
        api.patch(&format!("/drives/{id}"), &json!({ "drive_id": id, "path_on_host": backing.device }))?;
        let expected = format!("disk {disk} bytes={} sha256={}", 2 * SIZE, sha256(&backing.file)?);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = vm.ask(&format!("disk {disk}"))?;
            if line == expected {
                break;
            }
            check!(Instant::now() < deadline, "the guest reads `{line}`, not `{expected}`");
        }
    }
    check!(!vm.console().contains("I/O error"), "the guest met an error: {}", vm.console());
    vm.send_line("poweroff")?;
    vm.expect_exit(0)
}

/// Disks that are full, have shrunk, and are gone: the guest sees errors, and all else goes on.
fn faults(ctx: &Ctx) -> Result<(), Failure> {
    let small = Mounted::tmpfs(&ctx.scratch.join("small"), "4m")?;
    let full = |name: &str| -> Result<PathBuf, Failure> {
        let path = small.folder.join(name);
        File::create(&path)?.set_len(64 << 20)?;
        Ok(path)
    };
    let (full_sync, full_async) = (full("sync.img")?, full("async.img")?);
    let shrunk = ctx.scratch.join("shrunk.img");
    File::create(&shrunk)?.set_len(8 << 20)?;
    let good = ctx.scratch.join("good.img");
    File::create(&good)?.set_len(8 << 20)?;
    let mut vm = Machine::new(ctx)
        .drive("a", &full_sync, false)
        .drive("b", &full_async, false)
        .drive("c", &shrunk, false)
        .drive("d", &good, false)
        .set("/drives/1/io_engine", json!("Async"))
        .set("/drives/2/io_engine", json!("Async"))
        .steps("wait")
        .start()?;
    vm.wait_for_guest("waiting")?;
    let attempt = |vm: &mut Running, words: &str| {
        vm.ask(&format!("do dd {words} bs=65536 2>/dev/null && echo fine || echo failed"))
    };
    for disk in ["vda", "vdb"] {
        let said = attempt(&mut vm, &format!("if=/dev/zero of=/dev/{disk} count=256 oflag=direct"))?;
        check!(said == "did failed", "writing to a full disk: `{said}`");
    }
    File::options().write(true).open(&shrunk)?.set_len(1 << 20)?;
    let said = attempt(&mut vm, "if=/dev/vdc of=/dev/null count=1 skip=64 iflag=direct")?;
    check!(said == "did failed", "reading behind the end: `{said}`");
    fs::remove_file(&shrunk)?;
    for words in [
        "if=/dev/vdc of=/dev/null count=1 iflag=direct",
        "if=/dev/vda of=/dev/null count=1 iflag=direct",
        "if=/dev/zero of=/dev/vdd count=16 oflag=direct",
    ] {
        let said = attempt(&mut vm, words)?;
        check!(said == "did fine", "{words}: `{said}`");
    }
    let warned = vm.errors().lines().filter(|line| line.contains("drive ")).count();
    check!((1..=3 * 8).contains(&warned), "{warned} lines in the log: {}", vm.errors());
    vm.send_line("poweroff")?;
    vm.expect_exit(0)
}

/// Exits of the guest for each 4 KiB read at random, 32 at a time.
fn exits(ctx: &Ctx) -> Result<(), Failure> {
    const COUNT: u64 = 1_000;
    let memory = Mounted::tmpfs(&ctx.scratch.join("memory"), "64m")?;
    let path = memory.folder.join("disk.img");
    fs::write(&path, noise(32 << 20))?;
    let mut vm = Machine::new(ctx)
        .drive("a", &path, true)
        .drive("b", &path, true)
        .drive("c", &path, true)
        .set("/drives/1/io_engine", json!("Async"))
        .set("/drives/2/io_thread", json!(true))
        .steps("wait")
        .start()?;
    vm.wait_for_guest("waiting")?;
    for (disk, what) in [("vda", "Sync"), ("vdb", "Async"), ("vdc", "Sync on a thread of its own")] {
        for depth in [1, 32] {
            let before = exits_so_far(&vm)?;
            let said = vm.ask(&format!("do pinfold-guest random /dev/{disk} {depth} {COUNT}"))?;
            check!(said == format!("did pinfold-guest: read {COUNT}"), "`{said}`");
            let exits = exits_so_far(&vm)?.saturating_sub(before);
            // Lossless: both are far below 2^52.
            println!("{what}, depth {depth}: {:.2} exits for each read", exits as f64 / COUNT as f64);
        }
    }
    vm.send_line("poweroff")?;
    vm.expect_exit(0)
}

/// How often the guest was left, by KVM's own count.
fn exits_so_far(vm: &Running) -> Result<u64, Failure> {
    let prefix = format!("{}-", vm.pid());
    let folder = fs::read_dir("/sys/kernel/debug/kvm")?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .ok_or_else(|| Failure::new("KVM shows no figures of the VM"))?;
    Ok(crate::lab::read(&folder.path().join("exits"))?.trim().parse()?)
}

/// Declares all that `machine` would, by the API, and starts it.
fn start_by_api(machine: Machine) -> Result<(Running, Api), Failure> {
    let declared = machine.declaration();
    let (vm, api) = machine.serve()?;
    for section in ["boot-source", "machine-config"] {
        api.put(&format!("/{section}"), &declared[section])?;
    }
    for drive in declared["drives"].as_array().into_iter().flatten() {
        let id = drive["drive_id"].as_str().unwrap_or_default();
        api.put(&format!("/drives/{id}"), drive)?;
    }
    api.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    Ok((vm, api))
}

/// Waits until threads of all these roles are seen at once, without strays at any time.
fn wait_for_roles(api: &Api, roles: &[&str]) -> Result<Value, Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = api.get("/cgroup/threads")?;
        check!(seen["strays"] == json!([]), "strays: {seen}");
        let has = |role: &&str| {
            seen["threads"].as_array().into_iter().flatten().any(|thread| thread["role"] == **role)
        };
        if roles.iter().all(has) {
            return Ok(seen);
        }
        check!(Instant::now() < deadline, "not all of {roles:?}: {seen}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes without a pattern that a mistake in addressing could hide in.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        // The multiplier of PCG; the upper bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn sha256(file: &Path) -> Result<String, Failure> {
    let output = run(Command::new("sha256sum").arg(file))?;
    Ok(output.split(' ').next().unwrap_or_default().to_owned())
}

/// How many flushes the block device has completed: field 16 of its `stat` (Documentation/block/stat.rst).
fn flushes(device: &Path) -> Result<u64, Failure> {
    let name = device.file_name().ok_or_else(|| Failure::new("the scratch disk has no name"))?;
    let stat = crate::lab::read(&Path::new("/sys/block").join(name).join("stat"))?;
    let field = stat.split_whitespace().nth(15).and_then(|number| number.parse().ok());
    field.ok_or_else(|| Failure(format!("no count of flushes in `{stat}`")))
}
