//! The API as today's clients use it: every endpoint, its phases, its refusals, and what the guest sees of it.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Api, Machine, PATIENCE, Pod, Tap, caller, get_as_documented};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "api_whole_life", needs: Needs::VM, timeout: Case::TIMEOUT, run: whole_life },
    Case {
        name: "api_devices",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: devices,
    },
    Case {
        name: "api_refusals",
        needs: Needs { kvm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: refusals,
    },
];

const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const AFTER: &str = "The requested operation is not supported after starting the microVM.";

/// From nothing declared to a guest that was paused, resumed, and restarted by its keyboard.
fn whole_life(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("api-life")?;
    let caller = caller()?;
    let tap = Tap::create("pfapi0", "172.30.5.1/24")?;
    let disk = ctx.scratch.join("disk");
    File::create(&disk)?.set_len(8 << 20)?;
    let machine = Machine::new(ctx)
        .vcpus(2)
        .drive("data", &disk, false)
        .net(&tap, "172.30.5.2/24", "172.30.5.1")
        .cgroup(json!({ "parent": pod.path() }))
        .steps("hello+net+wait")
        .from_caller(&caller)?;
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;

    for path in ["/", "/version", "/machine-config", "/vm/config", "/cgroup", "/cgroup/threads", "/mmds"] {
        get_as_documented(&api, path)?;
    }
    let instance = api.get("/")?;
    check!(instance["state"] == "Not started" && instance["app_name"] == "Firecracker", "{instance}");
    check!(instance["id"] == "anonymous-instance" && instance["vmm_version"] == "1.17.0", "{instance}");
    check!(api.get("/version")? == json!({ "firecracker_version": "1.17.0" }), "{}", api.get("/version")?);
    check!(
        api.request("PATCH", "/vm", r#"{"state":"Paused"}"#)?.fault()? == BEFORE,
        "paused before the start"
    );

    api.put("/boot-source", &declared["boot-source"])?;
    api.put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 256 }))?;
    api.patch("/machine-config", &json!({ "vcpu_count": 2 }))?;
    let seen = api.get("/machine-config")?;
    check!(seen["vcpu_count"] == 2 && seen["mem_size_mib"] == 256 && seen["smt"] == false, "{seen}");
    api.put("/drives/data", &declared["drives"][0])?;
    api.put("/network-interfaces/eth0", &declared["network-interfaces"][0])?;
    let config = api.get("/vm/config")?;
    check!(config["drives"][0]["drive_id"] == "data" && config["vsock"].is_null(), "{config}");
    check!(config["cgroup"]["parent"] == pod.path(), "{config}");

    api.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    check!(api.get("/")?["state"] == "Running", "not running");
    let interface = &get_as_documented(&api, "/vm/config")?["network-interfaces"][0];
    check!(interface["vhost"] == "auto" && interface["backend"] == "vhost-net", "{interface}");
    vm.wait_for_guest("up cpus=2 ")?;
    vm.wait_for_guest("waiting")?;
    let late = api.request("PUT", "/boot-source", &declared["boot-source"].to_string())?;
    check!(late.fault()? == AFTER, "{late:?}");

    for path in ["/", "/vm/config", "/cgroup"] {
        get_as_documented(&api, path)?;
    }
    let threads = get_as_documented(&api, "/cgroup/threads")?;
    check!(threads["strays"] == json!([]), "strays: {threads}");
    let roles: Vec<&str> =
        threads["threads"].as_array().into_iter().flatten().filter_map(|one| one["role"].as_str()).collect();
    for role in ["main", "api", "vcpu", "vhost", "kvm"] {
        check!(roles.contains(&role), "no {role}: {threads}");
    }
    check!(api.get("/cgroup")?["in_force"]["places"].is_array(), "{}", api.get("/cgroup")?);

    let socket = ctx.scratch.join("api.sock");
    let shown = pinctl(ctx, &socket, &["threads"])?;
    check!(shown.contains("fc_vcpu 1") && shown.contains("kata-sandbox-vcpus"), "pinctl shows {shown}");
    let shown: Value = serde_json::from_str(&pinctl(ctx, &socket, &["--json", "get", "/machine-config"])?)?;
    check!(shown["vcpu_count"] == 2, "pinctl prints {shown}");
    pinctl(ctx, &socket, &["pause"])?;
    api.patch("/vm", &json!({ "state": "Paused" }))?;
    check!(api.get("/")?["state"] == "Paused", "not paused");
    vm.send_line("echo while paused")?;
    // A paused guest says nothing, however long one waits; half a second is enough to see one that is not.
    std::thread::sleep(Duration::from_millis(500));
    check!(!vm.console().contains("while paused"), "it runs:\n{}", vm.console());
    api.patch("/vm", &json!({ "state": "Resumed" }))?;
    vm.wait_for_guest("echo while paused")?;
    check!(api.get("/")?["state"] == "Running", "not running again");

    // It presses Ctrl+Alt+Del.
    pinctl(ctx, &socket, &["stop"])?;
    vm.expect_exit(0)?;
    let output = Command::new(&ctx.pinctl).arg("--api-sock").arg(&socket).arg("threads").output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    check!(output.status.code() == Some(1) && said.contains("api.sock"), "{output:?}");
    pod.expect_empty("the end")
}

/// What pinctl prints.
pub fn pinctl(ctx: &Ctx, socket: &Path, arguments: &[&str]) -> Result<String, Failure> {
    let output = Command::new(&ctx.pinctl).arg("--api-sock").arg(socket).args(arguments).output()?;
    check!(output.status.success(), "pinctl {arguments:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Entropy, balloon, vsock, metadata, logs and metrics, as the guest and the host see them.
fn devices(ctx: &Ctx) -> Result<(), Failure> {
    let tap = Tap::create("pfapi1", "172.30.6.1/24")?;
    let machine = Machine::new(ctx)
        .mem_mib(512)
        .net(&tap, "172.30.6.2/24", "172.30.6.1")
        .set("/network-interfaces/0/vhost", json!("auto"))
        .flag("--boot-timer")
        .steps("hello+net+rng+vsock+wait");
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    let [log, metrics, vsock] = ["log", "metrics", "vsock"].map(|name| ctx.scratch.join(name));
    api.put("/logger", &json!({ "log_path": log, "level": "info", "show_level": true }))?;
    api.put("/metrics", &json!({ "metrics_path": metrics }))?;
    api.put("/boot-source", &declared["boot-source"])?;
    api.put("/machine-config", &declared["machine-config"])?;
    api.put("/network-interfaces/eth0", &declared["network-interfaces"][0])?;
    api.put("/entropy", &json!({}))?;
    api.put("/vsock", &json!({ "guest_cid": 3, "uds_path": vsock }))?;
    api.put("/balloon", &json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 }))?;
    api.put("/mmds/config", &json!({ "version": "V2", "network_interfaces": ["eth0"] }))?;
    // RDRAND: CPUID leaf 1, ECX bit 30.
    let bits = json!({ "register": "ecx", "bitmap": format!("0bx0{}", "x".repeat(30)) });
    api.put(
        "/cpu-config",
        &json!({ "cpuid_modifiers": [{ "leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [bits] }] }),
    )?;
    api.put("/mmds", &json!({ "latest": { "name": "pinfold", "tag": 1 } }))?;
    api.patch("/mmds", &json!({ "latest": { "tag": null, "color": "red" } }))?;
    check!(
        api.get("/mmds")? == json!({ "latest": { "name": "pinfold", "color": "red" } }),
        "{}",
        api.get("/mmds")?
    );
    api.put("/actions", &json!({ "action_type": "InstanceStart" }))?;

    let line = vm.wait_for_guest("rng ")?;
    check!(line.starts_with("rng virtio_rng.0 bytes=32"), "the guest says `{line}`");
    vm.wait_for_guest("waiting")?;
    for (order, answer) in [
        ("token-get latest/name", "token-get pinfold"),
        ("get latest/name", "get wget: server returned error: HTTP/1.1 401 Unauthorized"),
        ("cpu rdrand", "cpu rdrand no"),
        ("cpu sse2", "cpu sse2 yes"),
        ("booted", "booted"),
    ] {
        let line = vm.ask(order)?;
        check!(line == answer, "asked for `{order}` the guest says `{line}`");
    }

    vm.talk_over_vsock(&vsock)?;

    api.patch("/balloon", &json!({ "amount_mib": 128 }))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stats = api.get("/balloon/statistics")?;
        // The guest gives pages back one by one, and statistics come once a second.
        if stats["actual_mib"] == 128 && stats["total_memory"].is_u64() {
            check!(stats["target_mib"] == 128, "{stats}");
            break;
        }
        check!(Instant::now() < deadline, "the balloon does not fill: {stats}");
        std::thread::sleep(Duration::from_millis(200));
    }
    check!(api.get("/balloon")?["amount_mib"] == 128, "{}", api.get("/balloon")?);
    for path in ["/balloon", "/balloon/statistics", "/vm/config"] {
        get_as_documented(&api, path)?;
    }

    api.put("/actions", &json!({ "action_type": "FlushMetrics" }))?;
    let text = fs::read_to_string(&metrics)?;
    let line: Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
    check!(line["vcpu"]["exit_mmio_write"].as_u64().is_some_and(|count| count > 0), "{line}");
    let told = |group: &str, name: &str| {
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter_map(|line| line[group][name].as_u64()).sum::<u64>()
    };
    for (group, name, least) in [
        ("put_api_requests", "actions_count", 1),
        ("entropy", "entropy_bytes", 32),
        ("vsock", "conns_added", 1),
        ("vsock", "tx_bytes_count", "hello from the guest".len() as u64),
        ("balloon", "inflate_count", 1),
        ("balloon", "discarded_bytes", 128 << 20),
        ("balloon", "stats_updates_count", 1),
        ("uart", "write_count", 100),
        ("i8042", "write_count", 1),
    ] {
        check!(told(group, name) >= least, "{name} of {group} is {}", told(group, name));
    }
    check!(told("vsock", "activate_fails") == 0, "{text}");
    vm.send_line("poweroff")?;
    vm.expect_exit(0)?;
    let text = fs::read_to_string(&log)?;
    check!(text.contains("Guest-boot-time = "), "the log holds `{text}`");
    check!(text.contains(":INFO") || text.contains(" INFO"), "the log holds `{text}`");
    // Firecracker leaves it, and its clients remove it.
    check!(vsock.exists(), "{} is gone", vsock.display());
    Ok(())
}

/// What is wrong is refused with a text that says what, and changes nothing.
fn refusals(ctx: &Ctx) -> Result<(), Failure> {
    let machine = Machine::new(ctx).steps("hello+wait");
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    let missing = ctx.scratch.join("missing").display().to_string();
    let before = api.get("/vm/config")?;
    for (method, path, body, words) in [
        ("GET", "/nope", String::new(), "/nope"),
        ("PUT", "/actions", r#"{"action_type":"Explode"}"#.to_owned(), "Explode"),
        ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#.to_owned(), "boot-source"),
        ("PUT", "/machine-config", r#"{"vcpu_count":0,"mem_size_mib":1}"#.to_owned(), "vcpu_count"),
        ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":1,"x":1}"#.to_owned(), "x"),
        (
            "PUT",
            "/drives/a",
            r#"{"drive_id":"b","is_root_device":false,"path_on_host":"/x"}"#.to_owned(),
            "id",
        ),
        (
            "PUT",
            "/drives/a",
            format!(r#"{{"drive_id":"a","is_root_device":false,"path_on_host":"{missing}"}}"#),
            "missing",
        ),
        ("PUT", "/boot-source", format!(r#"{{"kernel_image_path":"{missing}"}}"#), "missing"),
        (
            "PUT",
            "/snapshot/create",
            r#"{"snapshot_path":"a","mem_file_path":"b"}"#.to_owned(),
            "not supported yet",
        ),
        ("PUT", "/hotplug/memory", r#"{"total_size_mib":128}"#.to_owned(), "not supported yet"),
        ("PUT", "/pmem/p", r#"{"id":"p","path_on_host":"/x"}"#.to_owned(), "not supported yet"),
        ("PUT", "/mmds/config", r#"{"network_interfaces":["eth9"]}"#.to_owned(), "eth9"),
        ("PATCH", "/balloon", r#"{"amount_mib":1}"#.to_owned(), BEFORE),
        ("GET", "/balloon/statistics", String::new(), BEFORE),
    ] {
        let fault = api.request(method, path, &body)?.fault()?;
        check!(fault.contains(words) && !fault.contains('\n'), "{method} {path} {body}: `{fault}`");
    }
    check!(api.get("/vm/config")? == before, "a refusal changed something");

    api.put("/boot-source", &declared["boot-source"])?;
    // A start that fails leaves everything as it was, and can be tried again.
    api.put("/network-interfaces/eth0", &json!({ "iface_id": "eth0", "host_dev_name": "no-such-tap0" }))?;
    let fault = api.request("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?.fault()?;
    check!(fault.contains("no-such-tap0"), "`{fault}`");
    check!(api.get("/")?["state"] == "Not started", "{}", api.get("/")?);
    let tap = Tap::create("no-such-tap0", "172.30.7.1/24")?;
    api.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    vm.wait_for_guest("waiting")?;

    let body = r#"{"drive_id":"a","path_on_host":"/x"}"#;
    let fault = api.request("PATCH", "/drives/a", body)?.fault()?;
    check!(fault.contains("there is no drive \"a\""), "`{fault}`");
    slow_and_many(&api)?;
    a_thousand(&api, vm.pid())?;
    drop(tap);
    vm.send_line("poweroff")?;
    vm.expect_exit(0)
}

/// Clients that say nothing, or too much, keep nobody else waiting.
fn slow_and_many(api: &Api) -> Result<(), Failure> {
    let mut half = api.connection()?;
    half.send("PUT /machine-config HTTP/1.1\r\nContent-Length: 40\r\n\r\n{")?;
    let large = format!(r#"{{"latest":"{}"}}"#, "x".repeat(60_000));
    let response = api.request("PUT", "/mmds", &large)?;
    check!(response.status == 400 && response.body.contains("error"), "{response:?}");
    check!(api.get("/")?["state"] == "Running", "others wait");
    Ok(())
}

/// A thousand connections with rubbish, with requests, and with nothing: each is answered or closed, and none leaves
/// a descriptor behind.
fn a_thousand(api: &Api, pid: u32) -> Result<(), Failure> {
    let descriptors = || Ok::<_, Failure>(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
    // The connections of before may still be closing.
    let before = descriptors()?;
    for _ in 0..10 {
        let mut connections = Vec::new();
        for index in 0..100 {
            let mut connection = api.connection()?;
            let text = match index % 4 {
                0 => "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
                1 => "\u{16}\u{3}\u{1} rubbish\r\n\r\n",
                2 => "PUT /actions HTTP/1.1\r\nContent-Length: nine\r\n\r\n",
                _ => "",
            };
            // It may have been refused and closed already.
            if !text.is_empty() && connection.send(text).is_ok() {
                connections.push(connection);
            }
        }
        for mut connection in connections {
            // An answer, or the end; what must not be is that nothing comes.
            if let Err(failure) = connection.response() {
                check!(!failure.0.contains("temporarily unavailable"), "no answer and no end: {failure}");
            }
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while descriptors()? > before {
        check!(Instant::now() < deadline, "{} descriptors, {before} before", descriptors()?);
        std::thread::sleep(Duration::from_millis(100));
    }
    check!(api.get("/")?["state"] == "Running", "it does not answer any more");
    Ok(())
}
