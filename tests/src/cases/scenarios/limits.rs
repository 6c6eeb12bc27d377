//! Limits as an operator meets them: a burner under a quota, a launcher with hardly any CPU time, a slice's memory.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::cases::api::pinctl;
use crate::cases::placement::keep_busy;
use crate::cases::why::{burner, until};
use crate::check;
use crate::lab::{Api, Group, Machine, Made, PATIENCE, Pod, Running, get_as_documented, read};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[case("scenario_cpu_v2", cpu), case("scenario_ecs_slice_v2", slice)];

const fn case(name: &'static str, run: fn(&Ctx) -> Result<(), Failure>) -> Case {
    let needs =
        Needs { cgroup: Some(CgroupVersion::V2), kernel: Some(Kernel::V6_1), systemd: true, ..Needs::VM };
    Case { name, needs, timeout: Duration::from_secs(900), run }
}

/// Sectors that count as I/O going on.
const BUSY: u64 = 500;

fn cpu(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("scene-cpu")?;
    let caller = Group::create("/system.slice/containerd.service")?;
    let container = json!({ "id": "c", "resources": {} });
    let section = json!({ "parent": pod.path(), "containers": [container] });
    let (mut vm, api) = boot(ctx, section, &caller)?;
    burning(&api, &mut vm, &pod)?;
    println!("placed in the pod:");
    let withheld = slow_caller(&mut vm, &caller)?;
    check!(withheld == 0, "the launcher's limit withheld CPUs for {withheld} us");
    let found = get_as_documented(&api, "/cgroup/diagnosis")?;
    check!(found["verdict"]["cause"] != "quota_above", "{found}");
    neighbour(ctx, &api, &vm)?;
    drop(api);
    end(vm)?;
    pod.expect_empty("the end")?;

    let (mut vm, _api) = boot(ctx, json!({ "driver": "none" }), &caller)?;
    println!("left with the launcher:");
    let withheld = slow_caller(&mut vm, &caller)?;
    check!(withheld > 0, "the launcher's limit withheld nothing");
    end(vm)
}

/// Two vCPUs that burn get all that there is, and half of that under a quota of half.
fn burning(api: &Api, vm: &mut Running, pod: &Group) -> Result<(), Failure> {
    // As many as there are CPUs for.
    let cpus = std::thread::available_parallelism()?.get().min(2) as u64;
    let vcpus = pod.child("kata-sandbox/kata-sandbox-vcpus");
    vm.send_line(
        "do for n in 1 2; do (while :; do :; done) >/dev/null 2>&1 & echo $! >>/tmp/burners; done; echo burning",
    )?;
    vm.wait_for_guest("did burning")?;
    let free = window(&vcpus, |used| used.percent >= 75 * cpus)?;
    check!(free.nr_throttled == 0, "throttled without a limit: {free:?}");
    let quota = cpus * 50_000;
    api.patch(
        "/cgroup",
        &json!({ "containers": [{ "id": "c", "resources": { "cpu": { "quota": quota } } }] }),
    )?;
    // The first period may have begun without.
    let limited = window(&vcpus, |used| used.nr_throttled > 0 && used.percent <= 60 * cpus)?;
    println!(
        "{cpus} CPUs: without a limit the vCPUs use {}%, with half of that {}%, throttled in {} periods",
        free.percent, limited.percent, limited.nr_throttled
    );
    let stats = get_as_documented(api, "/cgroup/stats")?;
    check!(stats["vcpus"]["cpu"]["nr_throttled"].as_u64() > Some(0), "{stats}");
    api.patch("/cgroup", &json!({ "containers": [] }))?;
    vm.send_line("do kill $(cat /tmp/burners); echo idle")?;
    vm.wait_for_guest("did idle")?;
    Ok(())
}

/// What a group used in a while.
#[derive(Debug)]
struct Used {
    percent: u64,
    nr_throttled: u64,
}

/// Looks at the group's use, two seconds at a time, until it is as wanted.
fn window(group: &Group, wanted: impl Fn(&Used) -> bool) -> Result<Used, Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (then, usage, throttled) =
            (Instant::now(), stat(group, "usage_usec")?, stat(group, "nr_throttled")?);
        std::thread::sleep(Duration::from_secs(2));
        let micros = u64::try_from(then.elapsed().as_micros())?;
        let used = Used {
            percent: (stat(group, "usage_usec")? - usage) * 100 / micros,
            nr_throttled: stat(group, "nr_throttled")? - throttled,
        };
        if wanted(&used) {
            return Ok(used);
        }
        check!(Instant::now() < deadline, "{} used {used:?}", group.path());
    }
}

/// The guest does I/O, first with a launcher as it is, then with one that may use a hundredth of a CPU. Returns for how
/// long that limit withheld CPUs, in microseconds.
fn slow_caller(vm: &mut Running, caller: &Group) -> Result<u64, Failure> {
    vm.send_line("run load")?;
    vm.wait_for_guest("load running")?;
    keep_busy(vm, BUSY)?;
    let free = moved(vm, || Ok(()))?;
    let before = stat(caller, "throttled_usec")?;
    let limited = moved(vm, || caller.write("cpu.max", "1000 100000"))?;
    let withheld = stat(caller, "throttled_usec")? - before;
    caller.write("cpu.max", "max")?;
    // It was slow, and it is well.
    keep_busy(vm, BUSY)?;
    println!(
        "in 3 s the guest moves {free} sectors, and {limited} with 1% of a CPU for the launcher's group, of which \
         CPUs were withheld for {} ms",
        withheld / 1000
    );
    Ok(withheld)
}

/// What the guest's disk moves in three seconds from `begin` on, in sectors.
fn moved(vm: &Running, begin: impl FnOnce() -> Result<(), Failure>) -> Result<u64, Failure> {
    let bytes = || -> Result<u64, Failure> {
        let text = read(format!("/proc/{}/io", vm.pid()).as_ref())?;
        let counts =
            text.lines().filter_map(|line| line.strip_prefix("rchar: ").or(line.strip_prefix("wchar: ")));
        Ok(counts.map(str::parse::<u64>).sum::<Result<_, _>>()?)
    };
    begin()?;
    let before = bytes()?;
    std::thread::sleep(Duration::from_secs(3));
    Ok((bytes()? - before) / 512)
}

/// Somebody else's pod that burns takes CPU time away from the guest's I/O, and that is said.
fn neighbour(ctx: &Ctx, api: &Api, vm: &Running) -> Result<(), Failure> {
    let alone = moved(vm, || Ok(()))?;
    let group = Group::create("/kubepods/podneighbour")?;
    let burners = [burner(&group)?, burner(&group)?];
    let beside = moved(vm, || Ok(()))?;
    until(api, "host_contention", "vcpus")?;
    println!("in 3 s the guest moves {alone} sectors alone, and {beside} beside a pod that burns");
    print!("{}", pinctl(ctx, &ctx.scratch.join("api.sock"), &["why"])?);
    drop(burners);
    Ok(())
}

fn boot(ctx: &Ctx, section: Value, caller: &Group) -> Result<(Running, Api), Failure> {
    let disk = ctx.scratch.join("data.img");
    File::create(&disk)?.set_len(16 << 20)?;
    let machine = Machine::new(ctx)
        .vcpus(2)
        .steps("hello+wait")
        .drive("data", &disk, false)
        .cgroup(section)
        .from_caller(caller)?;
    let declared = machine.declaration();
    let (vm, api) = machine.serve()?;
    api.start(&declared)?;
    vm.wait_for_guest("waiting")?;
    Ok((vm, api))
}

fn end(mut vm: Running) -> Result<(), Failure> {
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    vm.wait_errors_closed()
}

/// A figure of `cpu.stat`.
fn stat(group: &Group, name: &str) -> Result<u64, Failure> {
    figure(group, "cpu.stat", name)
}

fn figure(group: &Group, file: &str, name: &str) -> Result<u64, Failure> {
    let text = group.read(file)?;
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    found.ok_or_else(|| Failure(format!("no {name} in {file} of {}: {text}", group.path())))
}

/// A slice as ECS makes for a task: its memory is limited, its containers' is not.
struct Slice(Group);

const SLICE: &str = "ecstasks-9f31.slice";

impl Slice {
    fn start(memory: u64) -> Result<Self, Failure> {
        let group = Group::at(&format!("/ecstasks.slice/{SLICE}"));
        systemctl(&["set-property", "--runtime", SLICE, &format!("MemoryMax={memory}")])?;
        systemctl(&["start", SLICE])?;
        Ok(Self(group))
    }
}

impl Drop for Slice {
    fn drop(&mut self) {
        // Nobody else uses it.
        drop(systemctl(&["stop", SLICE]));
        drop(systemctl(&["revert", SLICE]));
    }
}

fn slice(ctx: &Ctx) -> Result<(), Failure> {
    const LIMIT: u64 = 160 << 20;
    let slice = Slice::start(LIMIT)?;
    let max = slice.0.read("memory.max")?;
    check!(max == LIMIT.to_string(), "the slice's limit is {max}");
    let caller: Made = Group::create("/system.slice/ecs.service")?;
    let report = ctx.scratch.join("report");
    let mut vm = Machine::new(ctx)
        .mem_mib(512)
        .steps("hello+wait")
        .cgroup(json!({ "parent": "ecstasks-9f31.slice:docker:4f" }))
        .flag("--exit-report")
        .flag(&report)
        .from_caller(&caller)?
        .start()?;
    vm.wait_for_guest("waiting")?;
    let scope = slice.0.child("docker-4f.scope");
    let own = scope.child("kata-sandbox").read("memory.max")?;
    check!(own == "max", "the sandbox's own limit is {own}");
    vm.send_line("do head -c 209715200 /dev/zero >/tmp/fill")?;
    vm.wait_errors_closed()?;
    let status = vm.wait_exit()?;
    check!(status.signal() == Some(libc::SIGKILL), "it ended with {status}");
    let text = fs::read_to_string(&report)?;
    println!("{text}");
    let report: Value = serde_json::from_str(&text)?;
    check!(report["oom_killed"] == true && report["signal"] == libc::SIGKILL, "{report}");
    let kills = figure(&slice.0, "memory.events", "oom_kill")?;
    check!(kills > 0, "the slice has no kill");
    println!("memory.events of the slice:\n{}", slice.0.read("memory.events")?);
    scope.wait_gone()
}

fn systemctl(arguments: &[&str]) -> Result<(), Failure> {
    let status = Command::new("systemctl").args(arguments).status()?;
    check!(status.success(), "systemctl {arguments:?} ended with {status}");
    Ok(())
}
