//! Hierarchies that are not as systemd mounts them, and places that come with less than root has. Their guest does
//! nothing: where the threads are is known as soon as they are there.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::cases::placement::{Layout, SEPARATE, UNIFIED, in_place};
use crate::check;
use crate::lab::{Api, Group, Machine, Pod, Role, Running, read, scan, write};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "pinned_vcpus",
        // Here, where there may be more than one CPU.
        needs: Needs { idle_vm: true, ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: pinned,
    },
    case("hierarchies_v2", CgroupVersion::V2, v2),
    case("hierarchies_v1", CgroupVersion::V1, v1),
];

const fn case(name: &'static str, cgroup: CgroupVersion, run: fn(&Ctx) -> Result<(), Failure>) -> Case {
    let needs = Needs { cgroup: Some(cgroup), kernel: Some(Kernel::V6_1), systemd: true, ..Needs::VM };
    Case { name, needs, timeout: Duration::from_secs(600), run }
}

fn v2(ctx: &Ctx) -> Result<(), Failure> {
    in_a_namespace(ctx)?;
    mounted_elsewhere(ctx)?;
    delegated(ctx)?;
    by_the_users_manager(ctx)?;
    without_controllers(ctx)?;
    vanishing(ctx, UNIFIED)
}

fn v1(ctx: &Ctx) -> Result<(), Failure> {
    hybrid(ctx)?;
    beyond_the_parent(ctx)?;
    vanishing(ctx, SEPARATE)
}

/// Launches by this command line before Pinfold's, and starts the guest that does nothing.
fn start(ctx: &Ctx, wrapper: &[&str], section: Value, caller: &Group) -> Result<(Running, Api), Failure> {
    let machine = machine(ctx, wrapper, section, caller)?;
    let declared = machine.declaration();
    let (vm, api) = machine.serve()?;
    api.start(&declared)?;
    Ok((vm, api))
}

fn machine(ctx: &Ctx, wrapper: &[&str], section: Value, caller: &Group) -> Result<Machine, Failure> {
    Machine::small(ctx, "then=sleep")?.within(wrapper).vcpus(2).cgroup(section).from_caller(caller)
}

fn end(mut vm: Running) -> Result<(), Failure> {
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    vm.wait_errors_closed()
}

/// A launch that is refused with 152, and its words.
fn refused(ctx: &Ctx, wrapper: &[&str], section: Value, caller: &Group) -> Result<String, Failure> {
    let mut vm = machine(ctx, wrapper, section, caller)?.start()?;
    vm.expect_exit(152)?;
    vm.wait_errors_closed()?;
    println!("{}", vm.errors());
    Ok(vm.errors())
}

/// In a container with a cgroup namespace of its own, the root that it sees is its own group.
fn in_a_namespace(ctx: &Ctx) -> Result<(), Failure> {
    let container = Group::create("/container")?;
    let wrapper = [
        "unshare",
        "--cgroup",
        "--mount",
        "sh",
        "-c",
        r#"umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$0" "$@""#,
    ];
    let quota = json!([{ "id": "c", "resources": { "cpu": { "quota": 50_000 } } }]);
    let (vm, api) = start(ctx, &wrapper, json!({ "containers": quota }), &container)?;
    for thread in scan(vm.pid())? {
        let name = if thread.role == Role::Vcpu { "kata-sandbox-vcpus" } else { "kata-sandbox-overhead" };
        let wanted = container.child(name);
        check!(thread.groups["unified"] == wanted.path(), "not in {}: {thread:?}", wanted.path());
    }
    let places = api.get("/cgroup")?["in_force"]["places"].clone();
    check!(places[0]["vcpus"] == "/kata-sandbox-vcpus", "as it sees them: {places}");
    let max = container.child("kata-sandbox-vcpus").read("cpu.max")?;
    check!(max == "50000 100000", "the quota is {max}");
    end(vm)?;
    container.expect_empty("the namespace")?;

    // With the host's mount, which shows nothing of what has a name in the namespace.
    let errors = refused(ctx, &["unshare", "--cgroup"], json!({ "parent": "/" }), &container)?;
    for words in ["/sys/fs/cgroup is outside of its cgroup namespace", "as seen in the cgroup namespace"] {
        check!(errors.contains(words), "not said: {words}");
    }
    Ok(())
}

fn mounted_elsewhere(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("elsewhere")?;
    let point = ctx.scratch.join("cg");
    fs::create_dir(&point)?;
    let script =
        format!(r#"mount -t cgroup2 none {} && umount -l /sys/fs/cgroup && exec "$0" "$@""#, point.display());
    let wrapper = ["unshare", "--mount", "sh", "-c", &script];
    let caller = Group::create("/system.slice/containerd.service")?;
    let (vm, api) = start(ctx, &wrapper, json!({ "parent": pod.path() }), &caller)?;
    in_place(&scan(vm.pid())?, UNIFIED, &pod)?;
    let seen = format!("{} shows / of v2, as seen in the mount namespace", point.display());
    // When something is mounted over it while it runs, too.
    let container = json!({ "id": "c", "resources": { "cpu": { "quota": 50_000 } } });
    inside(vm.pid(), &["mount", "-t", "tmpfs", "none"], &point)?;
    let fault = api.request("PUT", "/cgroup/containers/c", &container.to_string())?.fault()?;
    for words in [seen.as_str(), "(looked up in the root / of the mount namespace mnt:["] {
        check!(fault.contains(words), "not said: {words} in {fault}");
    }
    inside(vm.pid(), &["umount"], &point)?;
    api.put("/cgroup/containers/c", &container)?;
    end(vm)?;
    pod.expect_empty("another mount")?;
    let errors = refused(ctx, &wrapper, json!({ "parent": "/nowhere" }), &caller)?;
    check!(errors.contains(&seen), "not said: {seen}");
    Ok(())
}

/// Does this to `path` in the mount namespace of a process.
fn inside(pid: u32, words: &[&str], path: &Path) -> Result<(), Failure> {
    let mut command = Command::new("nsenter");
    command.args(["--mount", "--target", &pid.to_string()]).args(words).arg(path);
    let output = command.output()?;
    check!(output.status.success(), "{command:?}: {output:?}");
    Ok(())
}

/// An ordinary user in a part of the tree that is the user's own.
fn delegated(ctx: &Ctx) -> Result<(), Failure> {
    const USER: u32 = 1000;
    let group = fs::metadata("/dev/kvm")?.gid().to_string();
    let delegated = Group::create("/delegated")?;
    let (caller, base) = (Group::create("/delegated/caller")?, Group::create("/delegated/pod")?);
    for owned in [&*delegated, &*caller, &*base] {
        let folder = owned.dir("")?;
        for file in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
            chown(folder.join(file), Some(USER), Some(USER))?;
        }
    }
    chown(&ctx.scratch, Some(USER), Some(USER))?;
    let user = USER.to_string();
    let wrapper = ["setpriv", "--reuid", &user, "--regid", &user, "--groups", &group];
    let container = json!({ "id": "c", "resources": { "memory": { "limit": 256 << 20 } } });
    let section = json!({ "parent": base.path(), "containers": [container] });
    let (vm, api) = start(ctx, &wrapper, section, &caller)?;
    let owner = fs::metadata(format!("/proc/{}", vm.pid()))?.uid();
    check!(owner == USER, "it runs as {owner}");
    in_place(&scan(vm.pid())?, UNIFIED, &base)?;
    let unapplied = api.get("/cgroup")?["in_force"]["unapplied"].clone();
    check!(unapplied == json!([]), "{unapplied}");
    end(vm)?;
    base.expect_empty("an ordinary user")?;

    let errors = refused(ctx, &wrapper, json!({ "parent": "/system.slice" }), &caller)?;
    for words in ["/sys/fs/cgroup/system.slice", "/sys/fs/cgroup shows / of v2", "delegated to the user"] {
        check!(errors.contains(words), "not said: {words}");
    }
    Ok(chown(&ctx.scratch, Some(0), Some(0))?)
}

/// systemd makes an ordinary user's scope as it makes root's, in the part of the tree that is the user manager's.
fn by_the_users_manager(ctx: &Ctx) -> Result<(), Failure> {
    const USER: u32 = 1001;
    let (user, group) = (USER.to_string(), fs::metadata("/dev/kvm")?.gid().to_string());
    command(&["useradd", "--uid", &user, "pinfold-test"])?;
    let manager = format!("user@{USER}.service");
    command(&["systemctl", "start", &manager])?;
    chown(&ctx.scratch, Some(USER), Some(USER))?;
    let runtime = format!("XDG_RUNTIME_DIR=/run/user/{USER}");
    let wrapper = ["setpriv", "--reuid", &user, "--regid", &user, "--groups", &group, "env", &runtime];
    let base = Group::at(&format!("/user.slice/user-{USER}.slice/{manager}/app.slice/pinfold-of-user.scope"));
    let container = json!({ "id": "c", "resources": {
        "cpu": { "quota": 50_000 }, "memory": { "limit": 256 << 20 } } });
    let section = json!({ "driver": "systemd", "containers": [container] });
    let session = Group::create("/session")?;
    let machine = machine(ctx, &wrapper, section.clone(), &session)?.flag("--id").flag("of-user");
    let declared = machine.declaration();
    let (vm, api) = machine.serve()?;
    api.start(&declared)?;
    in_place(&scan(vm.pid())?, UNIFIED, &base)?;
    let unapplied = api.get("/cgroup")?["in_force"]["unapplied"].clone();
    check!(unapplied == json!([]), "{unapplied}");
    end(vm)?;
    base.wait_gone()?;
    command(&["systemctl", "stop", &manager])?;

    // Without the manager.
    let errors = refused(ctx, &wrapper, section, &session)?;
    check!(errors.contains("cannot reach systemd over the user's bus"), "not said");
    command(&["userdel", "pinfold-test"])?;
    Ok(chown(&ctx.scratch, Some(0), Some(0))?)
}

fn command(words: &[&str]) -> Result<(), Failure> {
    let status = Command::new(words[0]).args(&words[1..]).status()?;
    check!(status.success(), "{words:?} ended with {status}");
    Ok(())
}

/// What cannot be limited is said, and the threads are placed.
fn without_controllers(ctx: &Ctx) -> Result<(), Failure> {
    let above = Group::create("/bare")?;
    let base = above.child("pod");
    fs::create_dir(base.dir("")?)?;
    let bare = base.read("cgroup.controllers")?;
    check!(bare.is_empty(), "there are controllers: {bare}");
    let container = json!({ "id": "c", "resources": {
        "cpu": { "quota": 50_000, "cpus": "0" }, "memory": { "limit": 256 << 20 } } });
    let section = json!({ "parent": base.path(), "containers": [container] });
    let (vm, api) = start(ctx, &[], section, &above)?;
    in_place(&scan(vm.pid())?, UNIFIED, &base)?;
    let in_force = api.get("/cgroup")?["in_force"].clone();
    let unapplied = in_force["unapplied"].to_string();
    println!("{unapplied}");
    for limit in ["cpu.max", "cpuset.cpus", "memory.max"] {
        check!(
            unapplied.contains(limit) && unapplied.contains("/bare/pod"),
            "{limit} is not named: {unapplied}"
        );
    }
    check!(in_force["limits"] == json!([]), "{in_force}");
    end(vm)?;
    base.expect_empty("no controllers")?;
    Ok(fs::remove_dir(base.dir("")?)?)
}

/// A group that somebody removes while nobody is in it, and a base that somebody wants to change under us.
fn vanishing(ctx: &Ctx, layout: &Layout) -> Result<(), Failure> {
    let pod = Pod::create("vanishing")?;
    let caller = Group::create("/system.slice/containerd.service")?;
    let section = json!({ "parent": pod.path() });
    let (vm, api) = start(ctx, &[], section.clone(), &caller)?;
    for root in ["cpu", "memory"] {
        let folder = pod.dir(root)?;
        check!(fs::remove_dir(&folder).is_err(), "{} could be removed", folder.display());
        let kind = folder.join("cgroup.type");
        if kind.exists() {
            check!(fs::write(&kind, "threaded").is_err(), "the kernel lets the pod become threaded");
        }
    }
    in_place(&scan(vm.pid())?, layout, &pod)?;
    drop(api);
    end(vm)?;

    let machine = machine(ctx, &[], section, &caller)?;
    let declared = machine.declaration();
    let (vm, api) = machine.serve()?;
    let vcpus = pod.child(layout.vcpus.0);
    fs::remove_dir(vcpus.dir("cpu")?)?;
    let quota = json!({ "containers": [{ "id": "c", "resources": { "cpu": { "quota": 50_000 } } }] });
    let fault = api.request("PATCH", "/cgroup", &quota.to_string())?.fault()?;
    println!("{fault}");
    check!(fault.contains(vcpus.path()), "the group is not named: {fault}");
    check!(api.get("/cgroup")?["containers"] == json!([]), "it is declared");
    let Err(Failure(failure)) = api.start(&declared) else {
        return Err(Failure::new("the vCPUs run in a group that is not there"));
    };
    println!("{failure}");
    check!(failure.contains(vcpus.path()) && failure.contains("removed meanwhile"), "{failure}");
    end(vm)?;
    pod.expect_empty("a group that went away")
}

/// Beside v1 the unified hierarchy without controllers, where systemd has it.
fn hybrid(ctx: &Ctx) -> Result<(), Failure> {
    let unified = Unified::mount()?;
    let pod = Pod::create("hybrid")?;
    let caller = Group::create("/system.slice/containerd.service")?;
    let (vm, _) = start(ctx, &[], json!({ "parent": pod.path() }), &caller)?;
    in_place(&scan(vm.pid())?, SEPARATE, &pod)?;
    let wanted = pod.child("kata-sandbox");
    check!(
        unified.all_in(vm.pid(), &[wanted.path(); 2])?,
        "in the unified hierarchy not in {}",
        wanted.path()
    );
    end(vm)?;
    pod.expect_empty("hybrid")?;
    check!(!unified.folder(&wanted).exists(), "{} is left there", wanted.path());

    // By request the other way round: nothing can be limited there.
    let base = Group::at("/pods");
    fs::create_dir(unified.folder(&base))?;
    let quota = json!([{ "id": "c", "resources": { "cpu": { "quota": 50_000 } } }]);
    let section = json!({ "version": "v2", "parent": base.path(), "containers": quota });
    let (vm, api) = start(ctx, &[], section, &caller)?;
    let sandbox = base.child("kata-sandbox");
    let (overhead, vcpus) = (sandbox.child("kata-sandbox-overhead"), sandbox.child("kata-sandbox-vcpus"));
    check!(unified.all_in(vm.pid(), &[overhead.path(), vcpus.path()])?, "not in {}", sandbox.path());
    let unapplied = api.get("/cgroup")?["in_force"]["unapplied"].to_string();
    println!("{unapplied}");
    check!(unapplied.contains("cpu.max"), "cpu.max is not named: {unapplied}");
    end(vm)?;
    check!(!unified.folder(&sandbox).exists(), "{} is left", sandbox.path());
    Ok(fs::remove_dir(unified.folder(&base))?)
}

/// The unified hierarchy at /sys/fs/cgroup/unified. Where it is not there it is mounted for a while, in a folder that
/// systemd has read-only.
struct Unified {
    point: PathBuf,
    ours: bool,
}

impl Unified {
    fn mount() -> Result<Self, Failure> {
        let point = PathBuf::from("/sys/fs/cgroup/unified");
        if point.join("cgroup.procs").exists() {
            return Ok(Self { point, ours: false });
        }
        let unified = Self { point, ours: true };
        command(&["mount", "-o", "remount,rw", "/sys/fs/cgroup"])?;
        fs::create_dir(&unified.point)?;
        command(&["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup/unified"])?;
        Ok(unified)
    }

    fn folder(&self, group: &Group) -> PathBuf {
        self.point.join(group.path().trim_start_matches('/'))
    }

    /// Whether in this hierarchy the vCPU threads are in the second of `groups` and all others in the first.
    fn all_in(&self, pid: u32, groups: &[&str; 2]) -> Result<bool, Failure> {
        for thread in scan(pid)? {
            let text = read(&Path::new("/proc").join(thread.tid.to_string()).join("cgroup"))?;
            let wanted = format!("0::{}", groups[usize::from(thread.role == Role::Vcpu)]);
            if !text.lines().any(|line| line == wanted) {
                println!("{thread:?} is not in {wanted}");
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for Unified {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        drop(command(&["umount", "-l", "/sys/fs/cgroup/unified"]));
        drop(fs::remove_dir(&self.point));
        drop(command(&["mount", "-o", "remount,ro", "/sys/fs/cgroup"]));
    }
}

/// v1 takes no quota above that of the group around it.
fn beyond_the_parent(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("small")?;
    pod.write("cpu.cfs_quota_us", "20000")?;
    let caller = Group::create("/system.slice/containerd.service")?;
    let container = json!({ "id": "c", "resources": { "cpu": { "quota": 50_000 } } });
    let errors = refused(ctx, &[], json!({ "parent": pod.path(), "containers": [container] }), &caller)?;
    for words in ["cpu.cfs_quota_us", "within the limits of the group above"] {
        check!(errors.contains(words), "not said: {words}");
    }
    pod.expect_empty("a quota beyond the pod's")
}

/// Each vCPU has a CPU of its own, also after the group's CPUs have changed, for which the kernel forgets it.
fn pinned(ctx: &Ctx) -> Result<(), Failure> {
    let base = Group::create("/pinned")?;
    let caller = Group::create("/caller")?;
    let cpus = base.read("cpuset.cpus.effective").or_else(|_| base.read("cpuset.cpus"))?;
    let both = if cpus.starts_with("0-") { "0-1" } else { "0" };
    let count = if both == "0" { 1 } else { 2 };
    let container =
        |shares: u32| json!([{ "id": "c", "resources": { "cpu": { "cpus": both, "shares": shares } } }]);
    let section = json!({ "parent": base.path(), "pin_vcpus": true, "containers": container(1024) });
    let machine = machine(ctx, &[], section, &caller)?.vcpus(count);
    let declared = machine.declaration();
    let (vm, api) = machine.serve()?;
    api.start(&declared)?;
    let first = affinities(&vm)?;
    check!(first == ["0", "1"][..usize::from(count)], "the vCPUs run on {first:?}");
    let vcpus = scan(vm.pid())?
        .into_iter()
        .find(|thread| thread.role == Role::Vcpu)
        .and_then(|thread| thread.groups.get("cpuset").or(thread.groups.get("unified")).cloned());
    let vcpus = Group::at(&vcpus.ok_or_else(|| Failure::new("no vCPU"))?);
    let file = vcpus.dir("cpuset")?.join("cpuset.cpus");
    // From outside: all are on one CPU, and then on both. Newer kernels remember what was set.
    write(&file, "0")?;
    write(&file, both)?;
    for thread in scan(vm.pid())?.into_iter().filter(|thread| thread.role == Role::Vcpu) {
        let tid = thread.tid.to_string();
        Command::new("taskset").args(["--pid", "--cpu-list", both, &tid]).output()?;
    }
    let forgotten = affinities(&vm)?;
    check!(forgotten.iter().all(|cpus| *cpus == both), "they are still pinned: {forgotten:?}");
    api.patch("/cgroup", &json!({ "containers": container(2048) }))?;
    let again = affinities(&vm)?;
    println!("{first:?}, changed from outside {forgotten:?}, after a change {again:?}");
    check!(again == first, "the vCPUs run on {again:?}");
    end(vm)?;
    base.expect_empty("the end")
}

/// The CPUs of each vCPU's thread.
fn affinities(vm: &Running) -> Result<Vec<String>, Failure> {
    let vcpus = scan(vm.pid())?.into_iter().filter(|thread| thread.role == Role::Vcpu);
    vcpus
        .map(|thread| {
            let status = read(format!("/proc/{}/task/{}/status", vm.pid(), thread.tid).as_ref())?;
            let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            Ok(list.unwrap_or_default().trim().to_owned())
        })
        .collect()
}
