//! A folder of the host's in the guest of a jail: its virtiofsd is outside, and nothing but what was named is shared.

use super::fs::{in_group, virtiofsds};
use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use crate::lab::{Api, Machine, PATIENCE, Pod, Running, get_as_documented, read};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The cases of this file.
pub const CASES: &[Case] = &[Case {
    name: "fs_in_a_jail",
    // Debian 12 has no virtiofsd.
    needs: Needs { cgroup: Some(CgroupVersion::V2), kernel: Some(Kernel::V7), ..Needs::VM },
    timeout: Duration::from_secs(900),
    run: in_a_jail,
}];

const UID: u32 = 12_345;
const GID: u32 = 23_456;

/// A folder for jails, and one to share.
struct Place {
    base: TempDir,
    root: PathBuf,
    shared: PathBuf,
    pod: Pod,
}

impl Place {
    fn jailer(&self, ctx: &Ctx, flags: &[&str]) -> Command {
        let mut command = Command::new(&ctx.pinfold);
        command.args(["jail", "--id", "vm1", "--uid", &UID.to_string(), "--gid", &GID.to_string()]);
        command.arg("--exec-file").arg(&ctx.pinfold).arg("--chroot-base-dir").arg(self.base.path());
        command.args(flags);
        command
    }

    /// What a microVM with the shared folder is declared as, in here.
    fn declaration(&self, ctx: &Ctx) -> Value {
        Machine::new(ctx)
            .steps("hello+wait")
            .set("/boot-source/kernel_image_path", json!("/vmlinux"))
            .set("/boot-source/initrd_path", json!("/initramfs"))
            .set("/fs", json!([self.section()]))
            .cgroup(json!({ "parent": self.pod.path() }))
            .declaration()
    }

    fn section(&self) -> Value {
        json!({ "tag": "shared", "shared_dir": self.shared })
    }

    /// The guest reads and writes in the folder, by servers that nothing of ours confines.
    fn is_shared(&self, vm: &mut Running) -> Result<(), Failure> {
        let answer = self.shared.join("answer");
        drop(fs::remove_file(&answer));
        let line = vm.ask("fs shared")?;
        check!(line == "fs shared hello from the host", "the guest says `{line}`");
        check!(read(&answer)? == "the guest was here\n", "the guest wrote {:?}", read(&answer)?);
        check!(fs::metadata(&answer)?.uid() == 0, "it is root of the guest who writes");
        let overhead = self.pod.child("kata-sandbox/kata-sandbox-overhead");
        let servers = virtiofsds()?;
        for pid in &servers {
            in_group(*pid, &overhead)?;
            check!(identity(format!("/proc/{pid}/root"))? != identity(&self.root)?, "{pid} is in the jail");
        }
        // The one that was started; the other one is its child, in a PID namespace of its own.
        let parents = servers.iter().map(|pid| Ok((*pid, field(*pid, "PPid")?.parse()?)));
        let parents = parents.collect::<Result<Vec<(libc::pid_t, libc::pid_t)>, Failure>>()?;
        let Some((server, starter)) = parents.iter().find(|(_, parent)| !servers.contains(parent)) else {
            return Err(Failure(format!("of {parents:?} none was started")));
        };
        check!(read(format!("/proc/{starter}/comm").as_ref())? == "pinfold_starter\n", "{starter}");
        in_group(*starter, &overhead)?;
        // The mounts and the network of virtiofsd are those of its own sandbox: where it came from is the host.
        for (pid, files) in [(starter, &["root", "ns/mnt", "ns/pid", "ns/net"][..]), (server, &["ns/pid"])] {
            for (key, wanted) in [("Uid", "0"), ("NoNewPrivs", "0"), ("Seccomp", "0")] {
                let found = field(*pid, key)?;
                check!(found == wanted, "{key} of {pid} is {found}");
            }
            for file in files {
                let (found, own) = (format!("/proc/{pid}/{file}"), format!("/proc/self/{file}"));
                check!(identity(&found)? == identity(&own)?, "{found} is not the host's");
            }
        }
        // With a guest there is nobody any more whom it would listen to.
        let deadline = Instant::now() + PATIENCE;
        while sockets(*starter)? > 0 {
            check!(Instant::now() < deadline, "{starter} still has a link");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// After its end, however that came.
    fn is_over(&self, vm: &Running, how: &str) -> Result<(), Failure> {
        vm.wait_errors_closed()?;
        check!(virtiofsds()?.is_empty(), "after {how} there is a virtiofsd");
        self.pod.expect_empty(how)
    }
}

/// What tells two files apart.
fn identity(path: impl AsRef<Path>) -> Result<(u64, u64), Failure> {
    let data = fs::metadata(path)?;
    Ok((data.dev(), data.ino()))
}

/// The first word of a line of a process's status.
fn field(pid: libc::pid_t, key: &str) -> Result<String, Failure> {
    let status = read(format!("/proc/{pid}/status").as_ref())?;
    let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    Ok(value.and_then(|value| value.split_whitespace().next()).unwrap_or_default().to_owned())
}

/// How many sockets a process has.
fn sockets(pid: libc::pid_t) -> Result<usize, Failure> {
    let mut count = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // It may be closed meanwhile.
        let link = fs::read_link(entry?.path()).unwrap_or_default();
        count += usize::from(link.to_string_lossy().starts_with("socket:"));
    }
    Ok(count)
}

fn in_a_jail(ctx: &Ctx) -> Result<(), Failure> {
    // Folders like /tmp may be on a file system without devices.
    let base = tempfile::Builder::new().prefix("pinfold-jails-").tempdir_in("/var/tmp")?;
    let root = base.path().join("pinfold/vm1/root");
    fs::create_dir_all(&root)?;
    for (file, name) in [(&ctx.vmlinux, "vmlinux"), (&ctx.initramfs, "initramfs")] {
        fs::copy(file, root.join(name))?;
    }
    let shared = ctx.scratch.join("shared");
    fs::create_dir(&shared)?;
    fs::write(shared.join("hello"), "hello from the host\n")?;
    let place = Place { base, root, shared, pod: Pod::create("jail")? };
    by_a_file(ctx, &place)?;
    by_the_api(ctx, &place)
}

/// With a configuration file, until a SIGKILL. Nobody shares what the command line does not name.
fn by_a_file(ctx: &Ctx, place: &Place) -> Result<(), Failure> {
    fs::write(place.root.join("vm.json"), place.declaration(ctx).to_string())?;
    let shared = place.shared.to_string_lossy();
    let launch = ["--", "--api-sock", "/file.sock", "--config-file", "/vm.json"];
    let root = place.root.to_string_lossy();
    for (flags, words) in [
        (&[][..], &["--share", &*shared][..]),
        (&["--share", "/var/empty", "--share", "/etc"], &["/var/empty", "No such file"]),
        (&["--share", "/etc"], &["--share", &*shared]),
        (&["--share", &*root], &["devices", &*root]),
    ] {
        let output = place.jailer(ctx, flags).args(launch).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        check!(output.status.code() == Some(152), "{flags:?}: {output:?}");
        check!(words.iter().all(|word| text.contains(word)), "{flags:?}: {text}");
        check!(virtiofsds()?.is_empty(), "{flags:?}: there is a virtiofsd");
        place.pod.expect_empty("a refusal")?;
    }
    let mut command = place.jailer(ctx, &["--share", &shared]);
    command.args(launch);
    let mut vm = Running::spawn(command, Vec::new(), false)?;
    vm.wait_for_guest("waiting")?;
    place.is_shared(&mut vm)?;
    let threads = get_as_documented(&Api::connect(&place.root.join("file.sock"))?, "/cgroup/threads")?;
    check!(threads["strays"] == json!([]), "{threads}");
    vm.signal(libc::SIGKILL)?;
    place.is_over(&vm, "SIGKILL")?;
    vm.wait_exit().map(drop)
}

/// By the API in a PID namespace, with a start that fails after the server was there, until the guest powers off.
fn by_the_api(ctx: &Ctx, place: &Place) -> Result<(), Failure> {
    let shared = place.shared.to_string_lossy();
    let section = json!({ "parent": place.pod.path() }).to_string();
    let mut command = place.jailer(ctx, &["--new-pid-ns", "--share", "/etc", "--share", &shared]);
    command.args(["--", "--cgroup", &section, "--api-sock", "/api.sock"]);
    let mut vm = Running::spawn(command, Vec::new(), false)?;
    vm.expect_exit(0)?;
    let api = Api::connect(&place.root.join("api.sock"))?;
    for other in ["/", "/usr", "/etc/..", "shared"] {
        let body = json!({ "tag": "other", "shared_dir": other }).to_string();
        let fault = api.request("PUT", "/fs/other", &body)?.fault()?;
        check!(fault.contains(&format!("--share {other}")), "{fault}");
    }
    check!(virtiofsds()?.is_empty(), "there is a virtiofsd before there is a microVM");
    api.put("/fs/shared", &place.section())?;
    let mut declared = place.declaration(ctx);
    let kernel = declared["boot-source"]["kernel_image_path"].take();
    declared["boot-source"]["kernel_image_path"] = json!("/initramfs");
    let refused = api.start(&declared).err().map(|error| error.to_string()).unwrap_or_default();
    check!(refused.contains("/initramfs"), "the start: {refused}");
    declared["boot-source"]["kernel_image_path"] = kernel;
    api.start(&declared)?;
    vm.wait_for_guest("waiting")?;
    place.is_shared(&mut vm)?;
    vm.send_line("poweroff")?;
    place.is_over(&vm, "a power-off")
}
