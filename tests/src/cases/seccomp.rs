//! Every thread of a running VM has its filter, and what happens when one violates it.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Machine, Pod, caller};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

/// The cases of this file.
pub const CASES: &[Case] =
    &[Case { name: "seccomp_violation", needs: Needs::VM, timeout: Case::TIMEOUT, run: violation }];

/// The built-in policy.
const POLICY: &str = include_str!("../../../resources/assets/seccomp/x86_64.json");

/// A VM whose policy forbids the main thread to list the threads is asked for them.
fn violation(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("seccomp")?;
    let caller = caller()?;
    let [policy, log, metrics, disk] =
        ["policy", "log", "metrics", "disk"].map(|name| ctx.scratch.join(name));
    let mut rules: Value = serde_json::from_str(POLICY)?;
    if let Some(Value::Array(rules)) = rules.pointer_mut("/main/filter") {
        rules.retain(|rule| rule["syscall"] != "getdents64");
    }
    fs::write(&policy, rules.to_string())?;
    File::create(&disk)?.set_len(8 << 20)?;
    let machine = Machine::new(ctx)
        .drive("data", &disk, false)
        .set("/drives/0/io_thread", json!(true))
        .cgroup(json!({ "parent": pod.path() }))
        .steps("hello+wait")
        .flag("--seccomp-filter")
        .flag(&policy)
        .flag("--log-path")
        .flag(&log)
        .flag("--metrics-path")
        .flag(&metrics)
        .from_caller(&caller)?;
    let declared = machine.declaration();
    let (mut vm, api) = machine.serve()?;
    // Where there is no guest yet the main thread has no filter.
    check!(filtered(vm.pid(), "pinfold")? == Some(false), "the main thread has a filter already");
    api.get("/cgroup/threads")?;
    api.put("/boot-source", &declared["boot-source"])?;
    api.put("/drives/data", &declared["drives"][0])?;
    api.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    vm.wait_for_guest("waiting")?;
    for comm in ["pinfold", "pinfold_api", "pinfold_io data", "fc_vcpu 0"] {
        check!(filtered(vm.pid(), comm)? == Some(true), "{comm} has no filter: {:?}", threads(vm.pid())?);
    }
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", vm.pid()))?;
    let reaper: u32 = children.trim().parse().map_err(|_| Failure(format!("the children are {children}")))?;
    check!(filtered(reaper, "pinfold_reaper")? == Some(true), "the reaper has no filter");

    check!(api.get("/cgroup/threads").is_err(), "the threads were listed");
    vm.expect_exit(148)?;
    vm.wait_errors_closed()?;
    let wanted = "pinfold: the thread \"pinfold\" made the system call 217 (getdents64), which its seccomp filter forbids";
    for text in [vm.errors(), fs::read_to_string(&log)?] {
        check!(text.contains(wanted), "it says `{text}`");
    }
    let text = fs::read_to_string(&metrics)?;
    let last: Value = serde_json::from_str(text.lines().next_back().unwrap_or_default())?;
    check!(last["seccomp"]["num_faults"] == 1, "the last line of metrics is {last}");
    let left = pod.children()?;
    check!(left.is_empty(), "{left:?} is left below {}", pod.path());
    Ok(())
}

/// Whether the thread of this name has a filter and no way to new privileges. `None` if there is no such thread.
fn filtered(pid: u32, comm: &str) -> Result<Option<bool>, Failure> {
    Ok(threads(pid)?.get(comm).copied())
}

/// The same of all threads of a process.
fn threads(pid: u32) -> Result<BTreeMap<String, bool>, Failure> {
    let mut threads = BTreeMap::new();
    for entry in fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))?.flatten() {
        let status = fs::read_to_string(entry.path().join("status"))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
        };
        let filter = field("Seccomp").as_deref() == Some("2") && field("NoNewPrivs").as_deref() == Some("1");
        threads.insert(field("Name").unwrap_or_default(), filter);
    }
    Ok(threads)
}
