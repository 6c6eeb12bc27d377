//! Why is it slow, and what would other limits do? Asked about a guest that uses all the CPU time that it gets.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::cases::api::pinctl;
use crate::check;
use crate::lab::{Api, Group, Machine, PATIENCE, Pod, Running, caller, get_as_documented};
use serde_json::json;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "why_v2", needs: NEEDS, timeout: Duration::from_secs(900), run: why },
    Case {
        name: "why_io_v2",
        needs: Needs { scratch_disk: true, ..NEEDS },
        timeout: Duration::from_secs(600),
        run: why_io,
    },
];

const NEEDS: Needs = Needs { cgroup: Some(CgroupVersion::V2), kernel: Some(Kernel::V6_1), ..Needs::VM };

fn why(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("why")?;
    let caller = caller()?;
    let machine = Machine::new(ctx)
        .vcpus(2)
        .steps("hello+wait")
        .cgroup(json!({ "parent": pod.path() }))
        .from_caller(&caller)?;
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    // Nobody can say anything of vCPUs that are not there. The other threads may well wait for a CPU here.
    let idle = get_as_documented(&api, "/cgroup/diagnosis?window_ms=100")?;
    check!(idle["verdict"]["group"] != "vcpus" && idle["vcpus"]["threads"] == 0, "before the start: {idle}");
    api.start(&declared)?;
    vm.wait_for_guest("waiting")?;
    vm.send_line(
        "do for n in 1 2; do (while :; do :; done) >/dev/null 2>&1 & echo $! >>/tmp/burners; done; echo burning",
    )?;
    vm.wait_for_guest("did burning")?;

    quota(&api, Some(20_000))?;
    until(&api, "own_quota", "vcpus")?;
    let socket = ctx.scratch.join("api.sock");
    print!("{}", pinctl(ctx, &socket, &["why"])?);
    print!("{}", pinctl(ctx, &socket, &["what-if", "--quota", "60000"])?);
    other_limits(&api)?;
    refused(&api)?;

    quota(&api, None)?;
    let neighbour = Group::create(pod.child("neighbour").path())?;
    let burners = [burner(&neighbour)?, burner(&neighbour)?];
    until(&api, "host_contention", "vcpus")?;
    print!("{}", pinctl(ctx, &socket, &["why"])?);
    drop(burners);
    drop(neighbour);

    pod.write("cpu.max", "20000 100000")?;
    until(&api, "quota_above", "vcpus")?;
    print!("{}", pinctl(ctx, &socket, &["why"])?);
    pod.write("cpu.max", "max")?;

    vm.send_line("do kill $(cat /tmp/burners); echo idle")?;
    vm.wait_for_guest("did idle")?;
    let memory = api.get("/cgroup/stats")?["memory"]["current_bytes"].clone();
    let used = memory.as_u64().ok_or_else(|| Failure(format!("{memory} bytes are in use")))?;
    // The kernel makes who goes beyond this wait.
    pod.write("memory.high", &(used + (8 << 20)).to_string())?;
    vm.send_line("do (head -c 100000000 /dev/zero >/tmp/fill) >/dev/null 2>&1 & echo filling")?;
    until(&api, "memory", "vcpus")?;
    print!("{}", pinctl(ctx, &socket, &["why"])?);
    pod.write("memory.high", "max")?;

    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    pod.expect_empty("the end")
}

/// A disk that the pod may read slowly: the thread that serves it waits, and the vCPUs have nothing to do.
fn why_io(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("why-io")?;
    let caller = caller()?;
    let disk = ctx.scratch_disk.as_deref().ok_or_else(|| Failure::new("no disk to read from"))?;
    let machine = Machine::new(ctx)
        .drive("data", disk, true)
        .steps("hello+wait")
        .cgroup(json!({ "parent": pod.path() }))
        .from_caller(&caller)?;
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    api.start(&declared)?;
    vm.wait_for_guest("waiting")?;
    let device = fs::metadata(disk)?.rdev();
    let slow = format!("{}:{} rbps=", libc::major(device), libc::minor(device));
    pod.write("io.max", &format!("{slow}131072"))?;
    vm.send_line("run load")?;
    until(&api, "io", "overhead")?;
    print!("{}", pinctl(ctx, &ctx.scratch.join("api.sock"), &["why"])?);
    pod.write("io.max", &format!("{slow}max"))?;
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    pod.expect_empty("the end")
}

fn quota(api: &Api, quota: Option<u64>) -> Result<(), Failure> {
    let containers = quota.map(|quota| json!({ "id": "c", "resources": { "cpu": { "quota": quota } } }));
    api.patch("/cgroup", &json!({ "containers": containers.as_slice() }))
}

/// A process in this group that uses all the CPU time that it gets.
pub(super) fn burner(group: &Group) -> Result<Running, Failure> {
    let mut command = Command::new("sh");
    command.args(["-c", "while :; do :; done"]);
    Running::spawn(command, group.doors()?, true)
}

/// Asks until this holds the group's threads back. The first second may have been another.
pub(super) fn until(api: &Api, cause: &str, group: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = get_as_documented(api, "/cgroup/diagnosis")?;
        let verdict = &found["verdict"];
        if verdict["cause"] == cause && verdict["group"] == group {
            return Ok(());
        }
        check!(Instant::now() < deadline, "not {cause}: {found}");
    }
}

/// What is said about a lower and a higher quota is what comes of them.
fn other_limits(api: &Api) -> Result<(), Failure> {
    let asked = {
        let api = api.clone();
        std::thread::spawn(move || get_as_documented(&api, "/cgroup/what-if?quota=10000&window_ms=5000"))
    };
    // A diagnosis at the same time is a question of its own; what is no question is answered at once.
    get_as_documented(api, "/cgroup/diagnosis?window_ms=100")?;
    check!(api.get("/")?["state"] == "Running", "not running");
    check!(!asked.is_finished(), "others were held up, or the answer came early");
    let lower = asked.join().map_err(|_| Failure::new("the asking thread panicked"))??;
    let higher = get_as_documented(api, "/cgroup/what-if?quota=60000&window_ms=3000")?;
    check!(lower["cut_off"] == true && higher["cut_off"] == true, "{lower} {higher}");
    // What was not cut off is known, so that the answer is no wide range.
    quota(api, None)?;
    let known = get_as_documented(api, "/cgroup/what-if?quota=30000&window_ms=3000")?;
    check!(known["cut_off"] == false, "{known}");
    for (micros, answer) in [(10_000, lower), (60_000, higher), (30_000, known)] {
        quota(api, Some(micros))?;
        // What is in force is asked about, so that it is recorded.
        let now = get_as_documented(api, "/cgroup/what-if?window_ms=3000")?;
        check!(now["in_force"]["quota"] == micros && now["asked"] == now["in_force"], "{now}");
        println!("{}\n{}", answer["sentence"], now["recorded"]);
        for (figure, slack) in [("throttled_percent", 30.0), ("cpus_used", 0.07)] {
            let (range, found) = (&answer["predicted"][figure], now["recorded"][figure].as_f64());
            let bounds = range["lower"].as_f64().zip(range["upper"].as_f64());
            let inside = bounds
                .zip(found)
                .is_some_and(|((lower, upper), found)| (lower - slack..=upper + slack).contains(&found));
            check!(inside, "{figure} is {found:?}, not as in {answer}");
        }
    }
    Ok(())
}

fn refused(api: &Api) -> Result<(), Failure> {
    for (query, words) in [("quota=999", "999"), ("cpus=4000", "4000"), ("quota=5000&period=5", "period 5")] {
        let fault = api.request("GET", &format!("/cgroup/what-if?{query}"), "")?.fault()?;
        check!(fault.contains(words), "{query}: {fault}");
    }
    Ok(())
}
