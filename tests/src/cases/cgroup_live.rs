//! Limits that follow containers while the guest runs, and figures of what the groups used.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::cases::api::pinctl;
use crate::check;
use crate::lab::{
    Api, Group, Machine, PATIENCE, Pod, Running, caller, containers_of_record, get_as_documented,
};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] =
    &[case("cgroup_live_v2", CgroupVersion::V2, V2), case("cgroup_live_v1", CgroupVersion::V1, V1)];

const fn case(name: &'static str, cgroup: CgroupVersion, run: fn(&Ctx) -> Result<(), Failure>) -> Case {
    let needs = Needs { cgroup: Some(cgroup), kernel: Some(Kernel::V6_1), ..Needs::VM };
    Case { name, needs, timeout: Duration::from_secs(900), run }
}

const V2: fn(&Ctx) -> Result<(), Failure> = |ctx| live(ctx, &UNIFIED);
const V1: fn(&Ctx) -> Result<(), Failure> = |ctx| live(ctx, &SEPARATE);

/// Files of limits: the group, the file, its text without containers, with the two of record, with a third of half a
/// CPU and 100 MiB, and then with an overhead of 64 MiB.
type Limit = (&'static str, &'static str, [&'static str; 4]);

struct Layout {
    limits: &'static [Limit],
    memory: (&'static str, &'static str),
    quota: (&'static str, &'static str),
    /// Whether a group's events are those of the groups in it as well.
    tells_above: bool,
}

const UNIFIED: Layout = Layout {
    limits: &[
        (
            "kata-sandbox/kata-sandbox-vcpus",
            "cpu.max",
            ["max 100000", "500000 100000", "550000 100000", "550000 100000"],
        ),
        ("kata-sandbox/kata-sandbox-vcpus", "cpu.weight", ["100", "363", "421", "421"]),
        ("kata-sandbox/kata-sandbox-overhead", "cpu.max", ["max 100000"; 4]),
        ("kata-sandbox", "memory.max", ["max", "629145600", "734003200", "801112064"]),
    ],
    memory: ("kata-sandbox", "memory.max"),
    quota: ("kata-sandbox/kata-sandbox-vcpus", "cpu.max"),
    tells_above: true,
};

const SEPARATE: Layout = Layout {
    limits: &[
        ("kata-sandbox-vcpus", "cpu.cfs_quota_us", ["-1", "500000", "550000", "550000"]),
        ("kata-sandbox-vcpus", "cpu.shares", ["1024", "5120", "6144", "6144"]),
        ("kata-sandbox", "cpu.cfs_quota_us", ["-1"; 4]),
        (
            "kata-sandbox",
            "memory.limit_in_bytes",
            ["9223372036854771712", "629145600", "734003200", "801112064"],
        ),
    ],
    memory: ("kata-sandbox", "memory.limit_in_bytes"),
    quota: ("kata-sandbox-vcpus", "cpu.cfs_quota_us"),
    tells_above: false,
};

impl Layout {
    /// The files are as in this stage.
    fn check(&self, pod: &Group, stage: usize) -> Result<(), Failure> {
        for (group, file, texts) in self.limits {
            let found = pod.child(group).read(file)?;
            check!(found == texts[stage], "{file} of {group} is `{found}`, not `{}`", texts[stage]);
        }
        Ok(())
    }
}

fn live(ctx: &Ctx, layout: &Layout) -> Result<(), Failure> {
    let pod = Pod::create("live")?;
    let caller = caller()?;
    let disk = ctx.scratch.join("disk");
    File::create(&disk)?.set_len(64 << 20)?;
    let machine = Machine::new(ctx)
        .vcpus(2)
        .drive("data", &disk, true)
        .set("/balloon", json!({ "amount_mib": 0, "deflate_on_oom": false }))
        .cgroup(json!({ "parent": pod.path(), "containers": containers_of_record() }))
        .steps("hello+wait")
        .from_caller(&caller)?;
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    let socket = ctx.scratch.join("api.sock");

    // Before the start limits change as well.
    layout.check(&pod, 1)?;
    api.put("/cgroup", &json!({ "parent": pod.path(), "containers": [] }))?;
    layout.check(&pod, 0)?;
    api.patch("/cgroup", &json!({ "containers": containers_of_record() }))?;
    layout.check(&pod, 1)?;
    let moved = api.request("PUT", "/cgroup", r#"{"parent": "/elsewhere"}"#)?.fault()?;
    check!(moved.starts_with("cgroup.parent: cannot be changed"), "{moved}");
    api.start(&declared)?;
    vm.wait_for_guest("waiting")?;

    // A third container comes and goes.
    let third = json!({ "id": "cont-3", "resources": { "cpu": { "quota": 50_000 }, "memory": { "limit": 100 << 20 } } });
    api.put("/cgroup/containers/cont-3", &third)?;
    layout.check(&pod, 2)?;
    api.patch("/cgroup/overhead", &json!({ "memory": { "limit": 64 << 20 } }))?;
    layout.check(&pod, 3)?;
    let shown = get_as_documented(&api, "/cgroup")?;
    check!(shown["containers"].as_array().is_some_and(|all| all.len() == 3), "{shown}");
    check!(shown["in_force"]["pending"] == json!([]), "{shown}");
    print!("{}", pinctl(ctx, &socket, &["container", "list"])?);
    // An overhead that says nothing about memory, where a limit of 0 would be no limit at all.
    api.patch("/cgroup", &json!({ "overhead": {} }))?;
    layout.check(&pod, 2)?;
    pinctl(ctx, &socket, &["container", "rm", "cont-3"])?;
    layout.check(&pod, 1)?;
    let gone = api.request("DELETE", "/cgroup/containers/cont-3", "")?.fault()?;
    check!(gone.contains("cont-3"), "{gone}");

    refused(&api, layout, &pod)?;
    throttled(ctx, &api, &mut vm, layout, &pod)?;
    pending(&api, &mut vm, layout, &pod)?;
    if layout.tells_above {
        killed(ctx, &api, &pod)?;
    }

    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    pod.expect_empty("the end")
}

/// What cannot be had changes nothing.
fn refused(api: &Api, layout: &Layout, pod: &Group) -> Result<(), Failure> {
    let (before, quota) = (api.get("/cgroup")?, pod.child(layout.quota.0).read(layout.quota.1)?);
    let far =
        json!({ "containers": [{ "id": "far", "resources": { "cpu": { "cpus": "8190", "quota": 1000 } } }] });
    let fault = api.request("PATCH", "/cgroup", &far.to_string())?.fault()?;
    check!(fault.contains("8190"), "{fault}");
    check!(api.get("/cgroup")? == before, "it is declared: {}", api.get("/cgroup")?);
    check!(pod.child(layout.quota.0).read(layout.quota.1)? == quota, "the quota changed");
    Ok(())
}

/// A busy guest with a tenth of a CPU is throttled, and the figures say so.
fn throttled(ctx: &Ctx, api: &Api, vm: &mut Running, layout: &Layout, pod: &Group) -> Result<(), Failure> {
    vm.send_line("run blk")?;
    let tenth = json!({ "id": "slow", "resources": { "cpu": { "quota": 10_000 } } });
    api.patch("/cgroup", &json!({ "containers": [tenth] }))?;
    let quota = pod.child(layout.quota.0).read(layout.quota.1)?;
    check!(quota.starts_with("10000"), "the quota is {quota}");
    let before = get_as_documented(api, "/cgroup/stats")?;
    let deadline = Instant::now() + PATIENCE;
    let after = loop {
        let now = get_as_documented(api, "/cgroup/stats")?;
        let grown = |name: &str| -> Option<u64> {
            let of = |stats: &Value| stats["vcpus"]["cpu"][name].as_u64();
            Some(of(&now)?.saturating_sub(of(&before)?))
        };
        let names = ["nr_throttled", "throttled_usec", "usage_usec", "nr_periods"];
        if names.iter().all(|name| grown(name) > Some(0)) {
            break now;
        }
        check!(Instant::now() < deadline, "not throttled: {} then {}", before["vcpus"], now["vcpus"]);
        std::thread::sleep(Duration::from_millis(200));
    };
    check!(after["memory"]["anon_bytes"].as_u64() > Some(16 << 20), "{}", after["memory"]);
    check!(after["roles"]["vcpu"]["threads"] == 2, "{}", after["roles"]);
    print!("{}", pinctl(ctx, &ctx.scratch.join("api.sock"), &["top", "--count", "1"])?);
    let text = api.request("GET", "/metrics/prometheus", "")?;
    check!(text.head.contains("text/plain; version=0.0.4"), "{text:?}");
    check!(text.body.contains("pinfold_cpu_throttled_seconds_total{group=\"vcpus\"} "), "{}", text.body);
    api.patch("/cgroup", &json!({ "containers": containers_of_record() }))?;
    vm.wait_for_guest("blk vda")?;
    layout.check(pod, 1)
}

/// Less memory than is in use waits until the balloon has freed it.
fn pending(api: &Api, vm: &mut Running, layout: &Layout, pod: &Group) -> Result<(), Failure> {
    let memory = get_as_documented(api, "/cgroup/stats")?["memory"].clone();
    let used = memory["anon_bytes"].as_u64().ok_or_else(|| Failure(format!("{memory}")))?;
    // In whole pages, so that the file says the same.
    let wanted = used & !0xfff;
    let text = wanted.to_string();
    let small = json!({ "id": "small", "resources": { "memory": { "limit": wanted } } });
    api.patch("/cgroup", &json!({ "containers": [small] }))?;
    let (group, file) = layout.memory;
    let limit = || pod.child(group).read(file);
    check!(limit()? == "629145600", "{file} is {}", limit()?);
    let shown = get_as_documented(api, "/cgroup")?;
    check!(shown["in_force"]["pending"].as_array().is_some_and(|all| all.len() == 1), "{shown}");
    let marked =
        shown["in_force"]["limits"].as_array().into_iter().flatten().find(|limit| limit["pending"] == text);
    check!(marked.is_some_and(|limit| limit["file"] == file && limit["group"] == "sandbox"), "{shown}");

    api.patch("/balloon", &json!({ "amount_mib": 160 }))?;
    let deadline = Instant::now() + PATIENCE;
    while limit()? != text {
        check!(
            Instant::now() < deadline,
            "{file} is {} and not {wanted}; {}",
            limit()?,
            api.get("/cgroup/stats")?["memory"]
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    let shown = api.get("/cgroup")?;
    check!(shown["in_force"]["pending"] == json!([]), "{shown}");
    // The guest lives.
    vm.ask("memory")?;
    api.patch("/cgroup", &json!({ "containers": containers_of_record() }))?;
    api.patch("/balloon", &json!({ "amount_mib": 0 }))?;
    let none = get_as_documented(api, "/cgroup/events")?;
    check!(
        none["events"].as_array().is_some_and(|all| all.iter().all(|one| one["kind"] != "oom_kill")),
        "{none}"
    );
    Ok(())
}

/// Whoever waits for events hears of a kill in the pod, and holds up nobody while it waits.
fn killed(ctx: &Ctx, api: &Api, pod: &Group) -> Result<(), Failure> {
    let last = api.get("/cgroup/events")?["last_id"].clone();
    let asked = format!("/cgroup/events?since={last}&timeout_ms=60000");
    let waiting = {
        let api = api.clone();
        std::thread::spawn(move || api.get(&asked).map_err(|failure| failure.to_string()))
    };
    check!(api.get("/")?["state"] == "Running", "not running");
    let neighbour = Group::create(pod.child("neighbour").path())?;
    neighbour.write("memory.max", "8388608")?;
    let mut command = Command::new("tail");
    command.arg("/dev/zero");
    let mut glutton = Running::spawn(command, neighbour.doors()?, true)?;
    let status = glutton.wait_exit()?;
    check!(status.signal() == Some(libc::SIGKILL), "it ended with {status}");
    let told = waiting.join().map_err(|_| Failure::new("the waiting thread panicked"))?.map_err(Failure)?;
    let of_pod = |one: &Value| one["group"] == pod.path();
    check!(told["events"].as_array().is_some_and(|all| all.iter().any(of_pod)), "{told}");
    let all = get_as_documented(api, "/cgroup/events")?;
    let kill = |one: &Value| of_pod(one) && one["kind"] == "oom_kill" && one["count"] == 1;
    check!(all["events"].as_array().is_some_and(|all| all.iter().any(kill)), "{all}");
    print!("{}", pinctl(ctx, &ctx.scratch.join("api.sock"), &["events"])?);
    Ok(())
}
