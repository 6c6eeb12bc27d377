//! Faults of guests, disks, the host and clients: each is said clearly, ends no more than it must, and leaves nothing.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{
    Api, Clock, Fifo, LoopDevice, Machine, Made, Mounted, PATIENCE, Pod, Running, Sectors, adopt_orphans,
    caller, expect_no_children, request,
};
use serde_json::json;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "faults_of_guests",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: guests,
    },
    Case {
        name: "faults_of_disks",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: disks,
    },
    Case {
        name: "faults_of_the_host",
        needs: Needs { kvm: true, own_host: true, cgroup: Some(CgroupVersion::V2), ..Needs::NOTHING },
        timeout: Duration::from_secs(600),
        run: host,
    },
];

/// A pod to place small guests in.
struct Place<'a> {
    ctx: &'a Ctx,
    pod: Pod,
    caller: Made,
}

impl Place<'_> {
    fn small(&self, words: &str) -> Result<Machine, Failure> {
        Machine::small(self.ctx, words)?
            .cgroup(json!({ "parent": self.pod.path() }))
            .from_caller(&self.caller)
    }

    /// The microVM ends with this code and a word on standard error, and leaves nothing.
    fn expect_end(&self, mut vm: Running, after: &str, code: i32, word: &str) -> Result<(), Failure> {
        vm.expect_exit(code).map_err(|failure| Failure(format!("after {after}: {failure}")))?;
        vm.wait_errors_closed()?;
        check!(vm.errors().contains(word), "after {after} it does not say {word}: {}", vm.errors());
        check!(word.is_empty() == vm.errors().is_empty(), "after {after} it says: {}", vm.errors());
        drop(vm);
        expect_no_children()?;
        self.pod.expect_empty(after)
    }
}

/// vCPUs that triple-fault, spin, and leave the guest for what nobody can do; and a console that nobody reads.
fn guests(ctx: &Ctx) -> Result<(), Failure> {
    let place = Place { ctx, pod: Pod::create("faults")?, caller: caller()? };
    adopt_orphans()?;
    place.expect_end(place.small("then=triple")?.start()?, "a triple fault", 0, "")?;
    place.expect_end(
        place.small("then=lost")?.start()?,
        "a jump to nowhere",
        1,
        "KVM_EXIT_INTERNAL_ERROR",
    )?;

    let machine = place.small("then=spin")?.vcpus(2);
    let socket = machine.socket();
    let vm = machine.start_with_api()?;
    vm.wait_for_line("small: end")?;
    let api = Api::connect(&socket)?;
    for state in ["Paused", "Resumed", "Paused", "Resumed"] {
        api.patch("/vm", &json!({ "state": state }))?;
    }
    check!(api.get("/")?["state"] == "Running", "it does not run");
    vm.signal(libc::SIGTERM)?;
    place.expect_end(vm, "a spin", 0, "")?;

    // The pipe is full soon, and stays so.
    let full = Fifo::make(&ctx.scratch.join("console"))?;
    let machine = place.small("then=talk")?.console_to(full.path());
    let socket = machine.socket();
    let vm = machine.start_with_api()?;
    let api = Api::connect(&socket)?;
    full.wait_full()?;
    api.put("/actions", &json!({ "action_type": "SendCtrlAltDel" }))?;
    check!(api.get("/")?["state"] == "Running", "it does not run");
    vm.signal(libc::SIGTERM)?;
    place.expect_end(vm, "a console that nobody reads", 0, "console's output does not take")?;

    let vm = place.small("then=spin")?.mem_mib(512).limited("ulimit -v 300000").start()?;
    place.expect_end(vm, "too little address space", 152, "machine-config.mem_size_mib")?;
    let vm = place.small("then=spin")?.limited("ulimit -n 24").start_with_api()?;
    place.expect_end(vm, "too few descriptors", 152, "Too many open files")?;
    no_memory(&place)
}

/// A request for which there is no memory ends Pinfold, as all Rust programs, and nothing is left.
fn no_memory(place: &Place) -> Result<(), Failure> {
    let machine = place.small("then=spin")?;
    let socket = machine.socket();
    let mut vm = machine.start_with_api()?;
    vm.wait_for_line("small: end")?;
    let api = Api::connect(&socket)?;
    let used = crate::lab::read(Path::new(&format!("/proc/{}/statm", vm.pid())))?;
    let pages: u64 = used.split(' ').next().unwrap_or_default().parse()?;
    limit(&vm, libc::RLIMIT_AS, pages * 4096)?;
    // As many numbers as a body may hold; each takes some tens of bytes.
    let body = format!("{{\"a\":[{}1]}}", "1,".repeat(25_000));
    let answer = api.request("PUT", "/mmds", &body);
    check!(answer.is_err(), "there was memory: {answer:?}");
    let status = vm.wait_exit()?;
    vm.wait_errors_closed()?;
    check!(status.signal() == Some(libc::SIGABRT), "it ended with {status}");
    check!(vm.errors().contains("memory allocation of "), "it says: {}", vm.errors());
    check!(!socket.exists(), "{} is left", socket.display());
    drop(vm);
    expect_no_children()?;
    place.pod.expect_empty("an end for want of memory")
}

/// A block device whose file system is full, and whose writes fail after they were accepted: no flush that fails is
/// taken for one that did not.
fn disks(ctx: &Ctx) -> Result<(), Failure> {
    let place = Place { ctx, pod: Pod::create("faults")?, caller: caller()? };
    adopt_orphans()?;
    for (engine, io_thread) in [("Sync", false), ("Async", false), ("Async", true)] {
        // 4 MiB, of which 64 KiB can be written.
        let full = Mounted::tmpfs(&ctx.scratch.join(format!("{engine}{io_thread}")), "64k")?;
        let file = full.folder.join("disk");
        File::create(&file)?.set_len(4 << 20)?;
        let disk = LoopDevice::over(&file)?;
        let vm = place
            .small("rounds=200 then=reset")?
            .drive("data", &disk.device, false)
            .set("/drives/0/cache_type", json!("Writeback"))
            .set("/drives/0/io_engine", json!(engine))
            .set("/drives/0/io_thread", json!(io_thread))
            .start()?;
        vm.wait_for_line("small: end")?;
        let told = Sectors::told(&vm.console());
        println!("{engine}, own thread {io_thread}: {told:?}");
        check!(told.failed > 0, "no flush failed: {}", vm.console());
        let first = Sectors::told(vm.console().split("small: failed").next().unwrap_or_default());
        check!(first.flushed > 0, "nothing could be written: {}", vm.console());
        vm.wait_errors_closed()?;
        check!(vm.errors().contains("drive data"), "the log says: {}", vm.errors());
        drop(vm);
        // In the file: what the device's page cache holds is not on the disk.
        first.check(&disk.file)?;
        expect_no_children()?;
        place.pod.expect_empty("a disk that fails")?;
    }
    Ok(())
}

/// A Linux guest whose host has no descriptors left, whose clients and FIFOs nobody reads, and whose host's clock jumps.
fn host(ctx: &Ctx) -> Result<(), Failure> {
    let place = Place { ctx, pod: Pod::create("faults")?, caller: caller()? };
    let [disk, other, vsock] = ["disk", "other", "vsock"].map(|name| ctx.scratch.join(name));
    for path in [&disk, &other] {
        File::create(path)?.set_len(8 << 20)?;
    }
    let (log, metrics) = (Fifo::make(&ctx.scratch.join("log"))?, Fifo::make(&ctx.scratch.join("metrics"))?);
    let machine = Machine::new(ctx)
        .drive("data", &disk, false)
        .set("/drives/0/rate_limiter", json!({ "ops": { "size": 50, "refill_time": 100 } }))
        .set("/vsock", json!({ "guest_cid": 3, "uds_path": vsock }))
        .set("/logger", json!({ "log_path": log.path(), "level": "Debug" }))
        .set("/metrics", json!({ "metrics_path": metrics.path() }))
        .cgroup(json!({ "parent": place.pod.path() }))
        .flag("--boot-timer")
        .steps("vsock+wait")
        .from_caller(&place.caller)?;
    let socket = machine.socket();
    let mut vm = machine.start_with_api()?;
    vm.wait_for_guest("waiting")?;
    let api = Api::connect(&socket)?;

    no_descriptors(&mut vm, &api, &vsock, &other)?;
    vm.talk_over_vsock(&vsock)?;
    silent_client(&socket, &vm)?;
    full_fifos(&api, &log, &metrics)?;
    jumping_clock(&mut vm)?;

    check!(api.get("/cgroup/threads")?["strays"] == json!([]), "{}", api.get("/cgroup/threads")?);
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    vm.wait_errors_closed()?;
    check!(!vm.errors().contains("panicked"), "{}", vm.errors());
    place.pod.expect_empty("all that")
}

/// EMFILE: clients of the API and of vsock wait, what needs a file is refused, and the guest goes on.
fn no_descriptors(vm: &mut Running, api: &Api, vsock: &Path, other: &Path) -> Result<(), Failure> {
    let mut early = api.connection()?;
    early.send(&request("GET", "/", ""))?;
    check!(early.response()?.status == 200, "no answer");
    // Those that there are stay open; of numbers below this none is free.
    limit(vm, libc::RLIMIT_NOFILE, 3)?;
    let mut late = api.connection()?;
    late.send(&request("GET", "/", ""))?;
    let mut guest = UnixStream::connect(vsock)?;
    guest.write_all(b"CONNECT 1024\n")?;
    let body = json!({ "drive_id": "data", "path_on_host": other }).to_string();
    early.send(&request("PATCH", "/drives/data", &body))?;
    let fault = early.response()?.fault()?;
    check!(fault.contains("other") && fault.contains("Too many open files"), "`{fault}`");
    // The waiting clients keep nobody busy. A thread that spins would take all of the second.
    let before = busy_ticks(vm)?;
    std::thread::sleep(Duration::from_secs(1));
    let spent = busy_ticks(vm)? - before;
    check!(spent < 50, "the threads ran for {spent}0 ms of a second");
    let io = vm.guest_io()?;
    let line =
        vm.ask("do dd if=/dev/vda of=/dev/null bs=4096 count=64 iflag=direct 2>/dev/null && echo fine")?;
    check!(line == "did fine" && vm.guest_io()? > io, "the guest's I/O: `{line}`");

    limit(vm, libc::RLIMIT_NOFILE, 1024)?;
    check!(late.response()?.status == 200, "the client that waited has no answer");
    // The next one to come is a reason to look again.
    let mut next = UnixStream::connect(vsock)?;
    next.write_all(b"CONNECT 1024\n")?;
    for stream in [&mut guest, &mut next] {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut answer = [0; 3];
        stream.read_exact(&mut answer)?;
        check!(&answer == b"OK ", "vsock says {answer:?}");
    }
    api.patch("/drives/data", &json!({ "drive_id": "data", "path_on_host": other }))
}

/// A client that sends requests and never reads an answer holds up nobody, and costs a bounded amount of memory.
fn silent_client(socket: &Path, vm: &Running) -> Result<(), Failure> {
    const MOST_KIB: u64 = 4096;
    let before = anonymous_kib(vm)?;
    let mut silent = UnixStream::connect(socket)?;
    silent.set_nonblocking(true)?;
    let text = request("GET", "/vm/config", "").repeat(100);
    let mut sent = 0;
    let api = Api::connect(socket)?;
    // Until the buffers between us and it are full: several attempts in a row fail.
    let mut refused = 0;
    while refused < 5 {
        match silent.write(text.as_bytes()) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                refused += 1;
                check!(api.get("/")?["state"] == "Running", "others wait");
            }
            Err(error) => return Err(error.into()),
        }
    }
    let grown = anonymous_kib(vm)?.saturating_sub(before);
    println!("a client sent {sent} bytes and read nothing: {grown} KiB more");
    check!(grown < MOST_KIB, "it holds {grown} KiB more");
    Ok(())
}

/// FIFOs for the log and the metrics that are full: requests are answered as before, and what is lost is counted.
fn full_fifos(api: &Api, log: &Fifo, metrics: &Fifo) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    let mut connection = api.connection()?;
    while !log.is_full()? {
        check!(Instant::now() < deadline, "the log does not fill its FIFO");
        // A refusal of which the log tells, in a line of some kilobytes.
        connection.send(&request("PATCH", &format!("/{}", "x".repeat(4000)), ""))?;
        connection.response()?;
    }
    let flush = json!({ "action_type": "FlushMetrics" }).to_string();
    let refused = loop {
        let answer = api.request("PUT", "/actions", &flush)?;
        if answer.status != 204 {
            break answer.fault()?;
        }
        check!(Instant::now() < deadline, "the metrics do not fill their FIFO");
    };
    check!(refused.contains("read the FIFO"), "`{refused}`");
    check!(api.get("/")?["state"] == "Running", "it does not answer");

    log.drain()?;
    metrics.drain()?;
    api.put("/actions", &serde_json::from_str(&flush)?)?;
    let text = metrics.drain()?;
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap_or_default())?;
    for lost in ["missed_metrics_count", "missed_log_count"] {
        check!(last["logger"][lost].as_u64() > Some(0), "{lost} is {}", last["logger"][lost]);
    }
    Ok(())
}

/// The host's clock jumps by a day, forth and back: a drive with a limit goes on at its rate, and what is measured is no
/// day long.
fn jumping_clock(vm: &mut Running) -> Result<(), Failure> {
    const DAY: i64 = 86_400;
    let attempt = |vm: &mut Running, when: &str| {
        let command = "dd if=/dev/vda of=/dev/null bs=512 count=100 iflag=direct 2>/dev/null && echo fine";
        let line = vm.ask(&format!("do {command}"))?;
        check!(line == "did fine", "{when}: `{line}`");
        Ok::<_, Failure>(())
    };
    let _clock = Clock::remember()?;
    for days in [1, -2, 1] {
        Clock::move_by(days * DAY)?;
        attempt(vm, &format!("after a jump of {days} days"))?;
    }
    check!(vm.ask("booted")? == "booted", "the guest does not answer");
    attempt(vm, "in the end")
}

/// Sets the soft limit; the hard one stays.
fn limit(vm: &Running, resource: libc::__rlimit_resource_t, most: u64) -> Result<(), Failure> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let pid = libc::pid_t::try_from(vm.pid())?;
    // SAFETY: the structure outlives both calls, of which the first writes it and the second reads it.
    let set = unsafe {
        libc::prlimit(pid, resource, std::ptr::null(), &raw mut limit) == 0 && {
            limit.rlim_cur = most.min(limit.rlim_max);
            libc::prlimit(pid, resource, &raw const limit, std::ptr::null_mut()) == 0
        }
    };
    if set { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// CPU time of the threads that serve clients and devices, in hundredths of a second.
fn busy_ticks(vm: &Running) -> Result<u64, Failure> {
    let mut ticks = 0;
    for entry in fs::read_dir(format!("/proc/{}/task", vm.pid()))? {
        let stat = crate::lab::read(&entry?.path().join("stat"))?;
        let Some((name, rest)) = stat.rsplit_once(") ") else { continue };
        if !name.contains("fc_vcpu") {
            // utime and stime, fields 14 and 15 (proc(5)); the third is the first here.
            ticks +=
                rest.split(' ').skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum::<u64>();
        }
    }
    Ok(ticks)
}

/// Memory of its own, the guest's included, which the kernel only grows.
fn anonymous_kib(vm: &Running) -> Result<u64, Failure> {
    let status = crate::lab::read(Path::new(&format!("/proc/{}/status", vm.pid())))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| Failure(format!("no RssAnon in `{status}`")))
}
