//! The last report, which is written however Pinfold ends.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{Machine, Made, Pod, Running, caller};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The cases of this file.
pub const CASES: &[Case] =
    &[case("exit_report_v2", CgroupVersion::V2), case("exit_report_v1", CgroupVersion::V1)];

const fn case(name: &'static str, cgroup: CgroupVersion) -> Case {
    let needs = Needs { cgroup: Some(cgroup), kernel: Some(Kernel::V6_1), ..Needs::VM };
    Case { name, needs, timeout: Duration::from_secs(600), run: endings }
}

/// The sandbox's memory, and more than that for the guest to fill.
const LIMIT: u64 = 160 << 20;
const FILL: u64 = 200 << 20;

/// What the launches have in common.
struct Place {
    pod: Pod,
    caller: Made,
    report: PathBuf,
}

impl Place {
    fn machine(&self, ctx: &Ctx) -> Result<Machine, Failure> {
        let container = json!({ "id": "c", "resources": { "memory": { "limit": LIMIT } } });
        Machine::new(ctx)
            .mem_mib(512)
            .steps("hello+wait")
            .cgroup(json!({ "parent": self.pod.path(), "containers": [container] }))
            .flag("--exit-report")
            .flag(&self.report)
            .from_caller(&self.caller)
    }

    /// The one line of the report, once nobody can write another.
    fn reported(&self, vm: &Running, after: &str) -> Result<Value, Failure> {
        vm.wait_errors_closed()?;
        let text = fs::read_to_string(&self.report)?;
        fs::remove_file(&self.report)?;
        println!("{after}: {text}");
        self.pod.expect_empty(after)?;
        let report: Value = serde_json::from_str(&text)?;
        check!(report["pid"] == vm.pid(), "the report is of another process: {report}");
        for figure in ["/memory_peak_bytes", "/cpu/usage_usec"] {
            check!(report.pointer(figure).and_then(Value::as_u64) > Some(0), "no {figure}: {report}");
        }
        Ok(report)
    }
}

fn endings(ctx: &Ctx) -> Result<(), Failure> {
    let place = Place { pod: Pod::create("exit")?, caller: caller()?, report: ctx.scratch.join("report") };

    let mut vm = place.machine(ctx)?.start()?;
    vm.wait_for_guest("waiting")?;
    vm.send_line("poweroff")?;
    let report = place.reported(&vm, "a power-off")?;
    vm.expect_exit(0)?;
    ended(&report, json!(0), json!(null), false)?;

    // Before there is a guest.
    let mut vm = place.machine(ctx)?.kernel(Path::new("/nowhere/vmlinux")).start()?;
    let report = place.reported(&vm, "a failed start")?;
    vm.expect_exit(152)?;
    ended(&report, json!(152), json!(null), false)?;

    for (signal, code, by) in
        [(libc::SIGTERM, json!(0), json!(null)), (libc::SIGKILL, json!(null), json!(libc::SIGKILL))]
    {
        let (vm, _) = place.machine(ctx)?.serve()?;
        vm.signal(signal)?;
        ended(&place.reported(&vm, &format!("signal {signal}"))?, code, by, false)?;
        drop(vm);
    }

    let before = kills(&place.pod)?;
    let mut vm = place.machine(ctx)?.start()?;
    vm.wait_for_guest("waiting")?;
    vm.send_line(&format!("do head -c {FILL} /dev/zero >/tmp/fill"))?;
    let report = place.reported(&vm, "too much memory")?;
    let status = vm.wait_exit()?;
    check!(status.signal() == Some(libc::SIGKILL), "it ended with {status}");
    ended(&report, json!(null), json!(libc::SIGKILL), true)?;
    let peak = report["memory_peak_bytes"].as_u64();
    check!(peak > Some(LIMIT / 2) && peak <= Some(LIMIT), "{report}");
    // On v1 a group does not know of the kills in the groups below it.
    if before.is_some() {
        check!(kills(&place.pod)? > before, "the pod has no kill: {:?}", kills(&place.pod)?);
    }

    let unplaced = Machine::new(ctx).flag("--exit-report").flag(&place.report);
    let mut vm = unplaced.start()?;
    vm.expect_exit(152)?;
    check!(vm.errors().contains("--exit-report") && vm.errors().contains("none"), "{}", vm.errors());
    check!(!place.report.exists(), "a report is there");
    Ok(())
}

fn ended(report: &Value, code: Value, signal: Value, oom_killed: bool) -> Result<(), Failure> {
    let as_wanted = report["exit_code"] == code && report["signal"] == signal;
    check!(as_wanted && report["oom_killed"] == oom_killed, "the report says {report}");
    Ok(())
}

/// The kills for memory that a group counts with those below it (v2).
fn kills(pod: &Pod) -> Result<Option<u64>, Failure> {
    let Ok(text) = pod.read("memory.events") else { return Ok(None) };
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
    count.map(Some).ok_or_else(|| Failure(format!("no oom_kill in `{text}`")))
}
