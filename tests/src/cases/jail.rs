//! A microVM in a jail: what it may not, and that its groups are looked after all the same.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{
    Api, Group, Machine, Made, Pod, Running, caller, containers_of_record, get_as_documented, read, scan,
    strays,
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// The cases of this file.
pub const CASES: &[Case] = &[case("jail_v2", CgroupVersion::V2, V2), case("jail_v1", CgroupVersion::V1, V1)];

const fn case(name: &'static str, cgroup: CgroupVersion, run: fn(&Ctx) -> Result<(), Failure>) -> Case {
    let needs = Needs { cgroup: Some(cgroup), kernel: Some(Kernel::V6_1), ..Needs::VM };
    Case { name, needs, timeout: std::time::Duration::from_secs(900), run }
}

const V2: fn(&Ctx) -> Result<(), Failure> = |ctx| jailed(ctx, &UNIFIED);
const V1: fn(&Ctx) -> Result<(), Failure> = |ctx| jailed(ctx, &SEPARATE);

struct Layout {
    version: &'static str,
    /// A limit: its group, file, and text with the containers of record and with one more of half a CPU.
    quota: (&'static str, &'static str, [&'static str; 2]),
    /// A limit of the group around ours.
    memory: &'static str,
}

const UNIFIED: Layout = Layout {
    version: "2",
    quota: ("kata-sandbox/kata-sandbox-vcpus", "cpu.max", ["500000 100000", "550000 100000"]),
    memory: "memory.max",
};

const SEPARATE: Layout = Layout {
    version: "1",
    quota: ("kata-sandbox-vcpus", "cpu.cfs_quota_us", ["500000", "550000"]),
    memory: "memory.limit_in_bytes",
};

const UID: u32 = 12_345;
const GID: u32 = 23_456;

/// A folder for jails, and a network namespace with a TAP.
struct Place {
    base: TempDir,
    root: PathBuf,
    pod: Pod,
    caller: Made,
    netns: Netns,
}

impl Place {
    fn jailer(&self, ctx: &Ctx, flags: &[&str]) -> Command {
        let mut command = Command::new(&ctx.pinfold);
        command.args(["jail", "--id", "vm1", "--uid", &UID.to_string(), "--gid", &GID.to_string()]);
        command
            .arg("--exec-file")
            .arg(&ctx.pinfold)
            .arg("--chroot-base-dir")
            .arg(self.base.path())
            .args(flags);
        command
    }

    /// The jail's process, by its PID file.
    fn pid(&self) -> Result<u32, Failure> {
        Ok(read(&self.root.join("pinfold.pid"))?.parse()?)
    }

    /// What is in the jail's root.
    fn contents(&self) -> Result<BTreeSet<String>, Failure> {
        let entries = fs::read_dir(&self.root)?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }
}

/// A network namespace with the TAP `tap0`, which belongs to the jail's user; deleted on drop.
struct Netns(&'static str);

impl Netns {
    fn create(name: &'static str) -> Result<Self, Failure> {
        ip(&["netns", "add", name])?;
        let made = Self(name);
        ip(&["-n", name, "tuntap", "add", "dev", "tap0", "mode", "tap", "user", &UID.to_string()])?;
        ip(&["-n", name, "address", "add", "172.30.20.1/24", "dev", "tap0"])?;
        ip(&["-n", name, "link", "set", "tap0", "up"])?;
        Ok(made)
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        drop(ip(&["netns", "delete", self.0]));
    }
}

fn ip(arguments: &[&str]) -> Result<(), Failure> {
    let output = Command::new("ip").args(arguments).output()?;
    check!(output.status.success(), "ip {arguments:?}: {output:?}");
    Ok(())
}

fn jailed(ctx: &Ctx, layout: &Layout) -> Result<(), Failure> {
    // Folders like /tmp may be on a file system without devices.
    let base = tempfile::Builder::new().prefix("pinfold-jails-").tempdir_in("/var/tmp")?;
    let root = base.path().join("pinfold/vm1/root");
    let place =
        Place { root, base, pod: Pod::create("jail")?, caller: caller()?, netns: Netns::create("pfjail")? };
    boots(ctx, &place, layout)?;
    in_a_pid_namespace(ctx, &place, layout)?;
    refused(ctx, &place)
}

/// A guest runs, and its groups are looked after, in a jail that has only what it should.
fn boots(ctx: &Ctx, place: &Place, layout: &Layout) -> Result<(), Failure> {
    // As clients do it, which put the files into the jail beforehand.
    fs::create_dir_all(&place.root)?;
    for (file, name) in [(&ctx.vmlinux, "vmlinux"), (&ctx.initramfs, "initramfs")] {
        fs::copy(file, place.root.join(name))?;
    }
    let disk = place.root.join("disk");
    fs::write(&disk, vec![7; 1 << 20])?;
    chown(&disk, Some(UID), Some(GID))?;
    let config = Machine::new(ctx)
        .vcpus(2)
        .steps("hello+net+wait")
        .set("/boot-source/kernel_image_path", json!("/vmlinux"))
        .set("/boot-source/initrd_path", json!("/initramfs"))
        .boot_args("pinfold.ip=172.30.20.2/24 pinfold.peer=172.30.20.1")
        .drive("data", Path::new("/disk"), false)
        .set(
            "/network-interfaces",
            json!([{ "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02", "vhost": "on" }]),
        )
        .cgroup(json!({ "parent": place.pod.path(), "containers": containers_of_record() }))
        .declaration();
    fs::write(place.root.join("vm.json"), config.to_string())?;
    let mut command =
        place.jailer(ctx, &["--netns", &place.netns.path(), "--cgroup-version", layout.version]);
    command.args([
        "--",
        "--config-file",
        "vm.json",
        "--api-sock",
        "/api.sock",
        "--exit-report",
        "/report",
        "--level",
        "info",
    ]);
    let mut vm = Running::spawn(command, place.caller.doors()?, false)?;
    for line in ["up cpus=2 ", "net ok ", "waiting"] {
        vm.wait_for_guest(line)?;
    }
    check!(place.pid()? == vm.pid(), "the PID file says {}, not {}", place.pid()?, vm.pid());
    walls(place, vm.pid())?;
    // Where the kernel says which modules it has, and has this one.
    if fs::read_to_string("/sys/kernel/security/lsm")
        .is_ok_and(|all| all.split(',').any(|one| one == "landlock"))
    {
        check!(vm.errors().contains("Landlock restricts the jail"), "{}", vm.errors());
    }
    let api = Api::connect(&place.root.join("api.sock"))?;
    groups(place, layout, &api, vm.pid())?;

    // Another jail by this name cannot be had, and what is missing is said to be missing in here.
    let second = place.jailer(ctx, &[]).output()?;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    check!(second.status.code() == Some(152) && said.contains("in use"), "{second:?}");
    let patch = json!({ "drive_id": "data", "path_on_host": disk });
    let fault = api.request("PATCH", "/drives/data", &patch.to_string())?.fault()?;
    let shown = format!("looked up in the root {} of the mount namespace mnt:[", place.root.display());
    check!(fault.contains(&shown), "{fault}");
    api.patch("/drives/data", &json!({ "drive_id": "data", "path_on_host": "/disk" }))?;

    vm.signal(libc::SIGKILL)?;
    // First the report: how it ended can be read as long as nobody has waited for it.
    vm.wait_errors_closed()?;
    let status = vm.wait_exit()?;
    check!(status.signal() == Some(libc::SIGKILL), "SIGKILL ended it with {status}");
    place.pod.expect_empty("SIGKILL")?;
    let report: Value = serde_json::from_str(&read(&place.root.join("report"))?)?;
    check!(report["pid"] == vm.pid() && report["signal"] == libc::SIGKILL, "{report}");
    let left = place.contents()?;
    let promised = [
        "api.sock",
        "dev",
        "disk",
        "initramfs",
        "pinfold",
        "pinfold.pid",
        "report",
        "run",
        "vm.json",
        "vmlinux",
    ];
    check!(left == promised.map(str::to_owned).into(), "the jail holds {left:?}");
    Ok(())
}

/// The process is nobody else's, and sees nothing else.
fn walls(place: &Place, pid: u32) -> Result<(), Failure> {
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let mut threads = 0;
    for entry in fs::read_dir(folder.join("task"))? {
        let status = read(&entry?.path().join("status"))?;
        let fields: BTreeMap<&str, Vec<&str>> = status
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(key, value)| (key, value.split_whitespace().collect()))
            .collect();
        let (uid, gid) = (UID.to_string(), GID.to_string());
        for (key, wanted) in [
            ("Uid", vec![uid.as_str(); 4]),
            ("Gid", vec![gid.as_str(); 4]),
            ("Groups", vec![]),
            ("NoNewPrivs", vec!["1"]),
            ("Seccomp", vec!["2"]),
        ] {
            check!(fields.get(key) == Some(&wanted), "{key} is {:?}: {status}", fields.get(key));
        }
        for key in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            check!(fields.get(key) == Some(&vec!["0000000000000000"]), "{key}: {status}");
        }
        threads += 1;
    }
    check!(threads >= 4, "of {threads} threads");
    let identity = |path: &Path| fs::metadata(path).map(|data| (data.dev(), data.ino()));
    check!(identity(&folder.join("root"))? == identity(&place.root)?, "another root");
    check!(identity(&folder.join("ns/net"))? == identity(place.netns.path().as_ref())?, "another network");
    let mounts = read(&folder.join("mountinfo"))?;
    check!(mounts.lines().count() == 1, "it sees {mounts}");
    let limits = read(&folder.join("limits"))?;
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap_or_default();
    check!(files.contains("2048"), "{limits}");
    Ok(())
}

/// What the API says and does about the groups, which are out of sight.
fn groups(place: &Place, layout: &Layout, api: &Api, pid: u32) -> Result<(), Failure> {
    let seen = scan(pid)?;
    let astray = strays(&seen, place.pod.child("kata-sandbox").path());
    check!(astray.is_empty(), "outside the tree: {astray:?}");
    let told = get_as_documented(api, "/cgroup/threads")?;
    check!(told["strays"] == json!([]), "strays: {told}");
    let told = told["threads"].as_array().cloned().unwrap_or_default();
    for thread in &seen {
        // The reaper is another process. What works for us may be a kernel thread, of which only the group is known.
        if thread.comm == "pinfold_reaper" || thread.role == crate::lab::Role::Kvm {
            continue;
        }
        let named = told.iter().find(|one| one["tid"] == thread.tid);
        let known = if thread.role == crate::lab::Role::Vhost { Value::Null } else { json!(thread.comm) };
        check!(named.is_some_and(|one| one["comm"] == known), "{thread:?} is not in {told:?}");
    }
    let stats = get_as_documented(api, "/cgroup/stats")?;
    check!(stats.pointer("/vcpus/cpu/usage_usec").and_then(Value::as_u64) > Some(0), "{stats}");
    check!(stats.pointer("/memory/current_bytes").and_then(Value::as_u64) > Some(32 << 20), "{stats}");
    check!(stats.pointer("/roles/vcpu/run_usec").and_then(Value::as_u64) > Some(0), "{stats}");
    get_as_documented(api, "/cgroup/events?since=0&timeout_ms=0")?;
    get_as_documented(api, "/cgroup/diagnosis?window_ms=100")?;
    let (group, file, [before, after]) = layout.quota;
    let found = place.pod.child(group).read(file)?;
    check!(found == before, "{file} is {found}");
    let third = json!({ "id": "third", "resources": { "cpu": { "quota": 50_000 }, "memory": { "limit": 100 << 20 } } });
    api.put("/cgroup/containers/third", &third)?;
    let found = place.pod.child(group).read(file)?;
    check!(found == after, "{file} is {found}");
    let all = get_as_documented(api, "/cgroup")?;
    check!(all.pointer("/in_force/unapplied") == Some(&json!([])), "{all}");
    api.request("DELETE", "/cgroup/containers/third", "")?;
    check!(place.pod.child(group).read(file)? == before, "the container is gone, and its CPUs are not");
    Ok(())
}

/// In namespaces of its own, and in groups by the jailer's own flags, behind the back of who started it.
fn in_a_pid_namespace(ctx: &Ctx, place: &Place, layout: &Layout) -> Result<(), Failure> {
    let around = Group::at("/pinfold-jails/a/vm1");
    let memory = format!("{}=1073741824", layout.memory);
    let flags = ["--new-pid-ns", "--daemonize", "--parent-cgroup", "pinfold-jails/a", "--cgroup", &memory];
    // Its standard streams end with it, as the microVM has none of them.
    let output = place.jailer(ctx, &flags).output()?;
    check!(output.status.success(), "{output:?}");
    let pid = place.pid()?;
    let api = Api::connect(&place.root.join("run/firecracker.socket"))?;
    let status = read(format!("/proc/{pid}/status").as_ref())?;
    check!(status.contains(&format!("NSpid:\t{pid}\t1\n")), "{status}");
    let stdout = fs::read_link(format!("/proc/{pid}/fd/1"))?;
    check!(stdout == Path::new("/dev/null"), "standard output is {stdout:?}");
    let found = around.read(layout.memory)?;
    check!(found == "1073741824", "{} is {found}", layout.memory);
    let threads = get_as_documented(&api, "/cgroup/threads")?;
    let named: Vec<_> = threads["threads"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|thread| (thread["tid"] == pid, thread["role"].as_str()))
        .collect();
    check!(
        named == [(true, Some("main")), (false, Some("api"))] && threads["strays"] == json!([]),
        "{threads}"
    );
    // SAFETY: kill touches no memory.
    check!(unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) } == 0, "cannot kill {pid}");
    Group::at("/pinfold-jails").wait_gone()
}

/// What cannot be jailed is said, and leaves nothing.
fn refused(ctx: &Ctx, place: &Place) -> Result<(), Failure> {
    let said = |command: &mut Command, code: i32, words: &[&str]| -> Result<(), Failure> {
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        check!(output.status.code() == Some(code), "{command:?}: {output:?}");
        check!(text.lines().count() == 1, "{text}");
        for word in words {
            check!(text.contains(word), "no {word:?} in {text}");
        }
        println!("{}", text.trim_end());
        Ok(())
    };
    let empty = ctx.scratch.join("empty");
    fs::create_dir(&empty)?;
    let fresh = || {
        let mut command = Command::new(&ctx.pinfold);
        command.args(["jail", "--id", "vm2", "--uid", "1", "--gid", "1", "--chroot-base-dir"]);
        command.arg(place.base.path());
        command
    };
    let own = |command: &mut Command| {
        command.arg("--exec-file").arg(&ctx.pinfold);
    };
    said(fresh().arg("--exec-file").arg(&empty), 152, &["--exec-file", "no regular file"])?;
    said(fresh().args(["--exec-file", "/bin/sh"]), 152, &["is not pinfold"])?;
    for (flags, words) in [
        (&["--netns", "/nowhere", "--", "--cgroup", r#"{"driver":"none"}"#][..], &["--netns /nowhere"][..]),
        (&["--cgroup", "memory.nonsense=1"], &["memory.nonsense"]),
        (&["--", "--config-file", "/nowhere"], &["/nowhere", "vm2/root"]),
    ] {
        let mut command = fresh();
        own(&mut command);
        said(command.args(flags), 152, words)?;
    }
    let mut command = fresh();
    own(&mut command);
    said(command.args(["--cgroup-version", "3"]), 153, &["--cgroup-version", "1 or 2"])?;
    check!(!place.base.path().join("pinfold/vm2").exists(), "a jail is left that was not made");
    check!(!Group::at("/pinfold/vm2").exists()?, "groups are left");

    let config = Machine::new(ctx)
        .set("/boot-source/kernel_image_path", json!("/vmlinux"))
        .set("/boot-source/initrd_path", json!("/initramfs"))
        .set("/fs", json!([{ "tag": "t", "shared_dir": "/run" }]))
        .declaration();
    fs::write(place.root.join("fs.json"), config.to_string())?;
    let mut command = place.jailer(ctx, &["--", "--no-api", "--config-file", "fs.json"]);
    said(&mut command, 152, &["shared_dir /run", "--share /run"])
}
