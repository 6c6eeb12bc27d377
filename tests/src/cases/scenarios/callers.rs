//! Whoever launches it, and however the place is named: each thread is in the pod's groups.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::cases::api::pinctl;
use crate::cases::placement::{Layout, SEPARATE, UNIFIED, in_place, spec_of_record};
use crate::check;
use crate::lab::{
    Group, Machine, PATIENCE, Pod, Role, Running, Tap, Thread, Unit, read, render, scan, strays,
};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::process::Command;
use std::time::{Duration, Instant};

/// The cases of this file.
pub const CASES: &[Case] = &[
    case("scenario_callers_v2", CgroupVersion::V2, |ctx| callers(ctx, UNIFIED)),
    case("scenario_callers_v1", CgroupVersion::V1, |ctx| callers(ctx, SEPARATE)),
];

const fn case(name: &'static str, cgroup: CgroupVersion, run: fn(&Ctx) -> Result<(), Failure>) -> Case {
    let needs = Needs { cgroup: Some(cgroup), kernel: Some(Kernel::V6_1), systemd: true, ..Needs::VM };
    Case { name, needs, timeout: Duration::from_secs(900), run }
}

/// A runtime: who launches, and what the specification's `cgroupsPath` is.
struct Runtime {
    name: &'static str,
    /// With the cgroupfs driver: the launcher's group, the pod's, and the path.
    caller: &'static str,
    pod: Option<&'static str>,
    path: &'static str,
    /// With the systemd driver: the path, and where that is. CRI-O's monitor is in a scope of its own, with a slice.
    scope: (&'static str, &'static str),
    conmon: Option<(&'static str, &'static str)>,
    /// What the containers' quotas add up to.
    quota: &'static str,
}

const RUNTIMES: [Runtime; 3] = [
    Runtime {
        name: "Docker",
        caller: "/system.slice/docker.service",
        pod: None,
        path: "/docker/3cca5734",
        scope: ("system.slice:docker:3cca5734", "/system.slice/docker-3cca5734.scope"),
        conmon: None,
        quota: "200000",
    },
    Runtime {
        name: "containerd",
        caller: "/system.slice/containerd.service",
        pod: Some("f277e232"),
        path: "/kubepods/podf277e232/9d17d1c5",
        scope: (
            "kubepods-podf277e232.slice:cri-containerd:9d17d1c5",
            "/kubepods.slice/kubepods-podf277e232.slice/cri-containerd-9d17d1c5.scope",
        ),
        conmon: None,
        quota: "500000",
    },
    Runtime {
        name: "CRI-O",
        caller: "/kubepods/pod1cc61d33/crio-conmon-1b05886a",
        pod: Some("1cc61d33"),
        path: "/kubepods/pod1cc61d33/crio-1b05886a",
        scope: (
            "kubepods-pod1cc61d33.slice:crio:1b05886a",
            "/kubepods.slice/kubepods-pod1cc61d33.slice/crio-1b05886a.scope",
        ),
        conmon: Some(("kubepods-pod1cc61d33.slice", "crio-conmon-1b05886a.scope")),
        quota: "500000",
    },
];

impl Runtime {
    /// What the runtime writes into the bundle.
    fn spec(&self, cgroups_path: &str) -> Value {
        if self.name == "containerd" {
            return spec_of_record(cgroups_path);
        }
        if self.name == "CRI-O" {
            let pod = r#"{"cpu_period":100000,"cpu_quota":500000,"cpu_shares":5120,"memory_limit_in_bytes":629145600}"#;
            let annotations = json!({ "pod-linux-resources.crio.io": pod });
            return json!({ "linux": { "cgroupsPath": cgroups_path }, "annotations": annotations });
        }
        // `docker run --cpus=2`.
        let cpu = json!({ "shares": 1024, "quota": 200_000, "period": 100_000 });
        json!({ "linux": { "cgroupsPath": cgroups_path, "resources": { "cpu": cpu } } })
    }
}

fn callers(ctx: &Ctx, layout: &Layout) -> Result<(), Failure> {
    let tap = Tap::create("pfscene0", "172.30.5.1/24")?;
    for runtime in &RUNTIMES {
        let _pod = runtime.pod.map(Pod::create).transpose()?;
        let caller = Group::create(runtime.caller)?;
        before(ctx, runtime, &caller)?;
        after(ctx, runtime, layout, &caller, false, &tap)?;
    }
    // From here on systemd looks after its slices, and removes what it does not know there.
    let launcher = Unit::start("pinfold-test-launcher")?;
    for runtime in &RUNTIMES {
        let conmon = runtime.conmon.map(Conmon::start).transpose()?;
        let caller = conmon.as_ref().map_or(&*launcher, |conmon| &conmon.group);
        after(ctx, runtime, layout, caller, true, &tap)?;
    }
    Ok(())
}

/// Without placement the threads stay with the launcher, as every VMM's do.
fn before(ctx: &Ctx, runtime: &Runtime, caller: &Group) -> Result<(), Failure> {
    let machine = machine(ctx, idle(ctx)?, json!({ "driver": "none" }), caller)?;
    let declared = machine.declaration();
    let (vm, api) = machine.serve()?;
    api.start(&declared)?;
    let threads = scan(vm.pid())?;
    println!("{}, before:", runtime.name);
    print!("{}", render(&threads, &[caller], caller));
    complete(&threads)?;
    let with_caller = threads.len() - strays(&threads, caller.path()).len();
    check!(with_caller == threads.len(), "not all with the launcher: {threads:?}");
    end(vm)
}

fn after(
    ctx: &Ctx,
    runtime: &Runtime,
    layout: &Layout,
    caller: &Group,
    systemd: bool,
    tap: &Tap,
) -> Result<(), Failure> {
    let (named, base, driver) = if systemd {
        (runtime.scope.0, runtime.scope.1, "systemd")
    } else {
        (runtime.path, runtime.path, "cgroupfs")
    };
    let base = Group::at(base);
    fs::write(ctx.scratch.join("config.json"), runtime.spec(named).to_string())?;
    // The kernel's part in the network comes with the guest's driver. Once is enough for that.
    let booted = runtime.name == "containerd" && !systemd;
    let guest = if booted {
        Machine::new(ctx)
            .silent()
            .steps("hello+net+wait")
            .net(tap, "172.30.5.2/24", "172.30.5.1")
            .set("/network-interfaces/0/vhost", json!("on"))
    } else {
        idle(ctx)?
    };
    let machine = machine(ctx, guest, json!({ "oci_spec": ctx.scratch }), caller)?;
    let declared = machine.declaration();
    let (vm, api) = machine.serve()?;
    api.start(&declared)?;
    if booted {
        vm.wait_for_guest("net ok")?;
    }
    let threads = scan(vm.pid())?;
    println!("{}, {driver}, after:", runtime.name);
    print!("{}", render(&threads, &[caller, &base], &base));
    if booted {
        // It would fail if there were strays.
        print!("{}", pinctl(ctx, &ctx.scratch.join("api.sock"), &["threads"])?);
    }
    complete(&threads)?;
    let vhost = threads.iter().any(|thread| thread.role == Role::Vhost);
    check!(vhost == booted, "that there is a vhost worker is {vhost}: {threads:?}");
    in_place(&threads, layout, &base)?;
    let quotas = layout.limits.iter().filter(|(_, file, _)| ["cpu.max", "cpu.cfs_quota_us"].contains(file));
    for (group, file, _) in quotas {
        let found = base.child(group).read(file)?;
        check!(found.split(' ').next() == Some(runtime.quota), "{file} of {group} is `{found}`");
    }
    end(vm)?;
    base.wait_gone()
}

/// A guest that does nothing: its threads are there as soon as it runs.
fn idle(ctx: &Ctx) -> Result<Machine, Failure> {
    Machine::small(ctx, "rounds=0 then=sleep")
}

fn machine(ctx: &Ctx, guest: Machine, section: Value, caller: &Group) -> Result<Machine, Failure> {
    let disk = ctx.scratch.join("data.img");
    File::create(&disk)?.set_len(16 << 20)?;
    guest
        .vcpus(2)
        .drive("data", &disk, false)
        .set("/drives/0/io_thread", json!(true))
        .cgroup(section)
        .from_caller(caller)
}

/// The threads that it has before its guest's drivers have come up.
fn complete(threads: &[Thread]) -> Result<(), Failure> {
    for role in [Role::Main, Role::Api, Role::Vcpu, Role::Io, Role::Kvm] {
        check!(threads.iter().any(|thread| thread.role == role), "no {role} among {threads:?}");
    }
    Ok(())
}

fn end(mut vm: Running) -> Result<(), Failure> {
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    vm.wait_errors_closed()
}

/// CRI-O's monitor in a scope of its own, beside the container's.
struct Conmon {
    group: Group,
    _process: Running,
}

impl Conmon {
    fn start((slice, unit): (&str, &str)) -> Result<Self, Failure> {
        let mut command = Command::new("systemd-run");
        command.args(["--quiet", "--scope", "--slice", slice, "--unit", unit, "sleep", "infinity"]);
        let process = Running::spawn(command, Vec::new(), true)?;
        let group = Group::at(&format!("/kubepods.slice/{slice}/{unit}"));
        let deadline = Instant::now() + PATIENCE;
        // It becomes that when systemd has done its part: before, groups come and go.
        while read(format!("/proc/{}/comm", process.pid()).as_ref())?.trim() != "sleep" {
            check!(Instant::now() < deadline, "systemd has not made {}: {}", group.path(), process.errors());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { group, _process: process })
    }
}
