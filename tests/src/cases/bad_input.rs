//! What is wrong with a configuration is said in one line, and nothing is left of the attempt.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Group, Machine, Pod, Running, Tap, caller};
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "bad_input_v1",
        needs: Needs { kvm: true, cgroup: Some(CgroupVersion::V1), ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: |ctx| configurations(ctx, None),
    },
    Case {
        name: "bad_input_v2",
        needs: Needs { kvm: true, cgroup: Some(CgroupVersion::V2), ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: |ctx| with_invalid_domain(|invalid| configurations(ctx, Some(invalid))),
    },
    Case { name: "bad_arguments", needs: Needs::NOTHING, timeout: Case::TIMEOUT, run: arguments },
];

/// Exit codes (Firecracker's).
const BAD_CONFIGURATION: i32 = 152;
const BAD_ARGUMENTS: i32 = 153;

const KERNEL: &str = "boot-source.kernel_image_path";
const MEMORY: &str = "machine-config.mem_size_mib";

/// Tries each wrong configuration; `invalid` is a group of type `domain invalid`, which only v2 has.
fn configurations(ctx: &Ctx, invalid: Option<&Group>) -> Result<(), Failure> {
    let pod = Pod::create("badinput")?;
    let caller = caller()?;
    let tap = Tap::create("pfbad0", "172.30.3.1/24")?;
    let holder = tap.hold()?;
    let files = Files::make(ctx)?;
    let before = interfaces()?;

    let new = || Machine::new(ctx).silent().cgroup(json!({ "parent": pod.path() }));
    let kernel = |path: &Path| new().kernel(path);
    let parent = |path: &str| new().cgroup(json!({ "parent": path }));
    let interface = json!([{ "iface_id": "eth0", "host_dev_name": "pfnone0" }]);
    // What the line must hold, and the configuration.
    let mut table: Vec<(Vec<&str>, Machine)> = vec![
        (vec![KERNEL, "no-such-kernel"], kernel(&ctx.scratch.join("no-such-kernel"))),
        // Root can read any file, but nobody reads a folder.
        (vec![KERNEL], kernel(&ctx.scratch)),
        (vec![KERNEL, "empty"], kernel(&files.empty)),
        (vec![KERNEL, "text"], kernel(&files.text)),
        (vec![KERNEL, "short-vmlinux", "truncated"], kernel(&files.short_vmlinux)),
        (vec![KERNEL, "short-bzimage", "truncated"], kernel(&files.short_bzimage)),
        (
            vec!["boot-source.initrd_path", "no-such-initrd"],
            new().set("/boot-source/initrd_path", json!("/no-such-initrd")),
        ),
        (vec!["drives", "no-such-disk"], new().drive("root", Path::new("/no-such-disk"), false)),
        (vec![MEMORY], new().mem_mib(0)),
        (vec![MEMORY], new().mem_mib(1)),
        (vec![MEMORY], new().mem_mib(1 << 40)),
        (vec![MEMORY], new().mem_mib(u64::MAX)),
        (vec!["machine-config.vcpu_count"], new().vcpus(0)),
        (vec!["network-interfaces", "pfnone0"], new().set("/network-interfaces", interface)),
        (vec!["network-interfaces", "pfbad0", "busy"], new().net(&tap, "172.30.3.2/24", "172.30.3.1")),
        (vec!["cgroup.parent", "/kubepods/no-such-pod"], parent("/kubepods/no-such-pod")),
        (vec!["colour"], new().set("/colour", json!("red"))),
        (vec!["machine-config", "colour"], new().set("/machine-config/colour", json!("red"))),
        (vec!["cgroup", "colour"], new().set("/cgroup/colour", json!("red"))),
        (vec!["machine-config.vcpu_count"], new().set("/machine-config/vcpu_count", json!("two"))),
        (vec!["drives"], new().set("/drives", json!({}))),
    ];
    if let Some(invalid) = invalid {
        table.push((vec![invalid.path(), "domain invalid", "cgroup.parent"], parent(invalid.path())));
    }
    // Each is tried, so that one run shows all that is wrong.
    let mut faults = Vec::new();
    for (words, machine) in table {
        let mut vm = machine.from_caller(&caller)?.start()?;
        let mut fault = refused(&mut vm, BAD_CONFIGURATION, &words);
        let left = pod.children()?;
        if !left.is_empty() {
            fault = fault.and(Err(Failure(format!("{left:?} is left below {}", pod.path()))));
        }
        if interfaces()? != before {
            fault = fault.and(Err(Failure::new("there are other network interfaces than before")));
        }
        if let Err(failure) = fault {
            faults.push(format!("{words:?}: {failure}"));
        }
    }
    drop(holder);
    check!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

/// Command lines that make no sense, and configuration files that cannot be read.
fn arguments(ctx: &Ctx) -> Result<(), Failure> {
    let garbage = ctx.scratch.join("garbage.json");
    fs::write(&garbage, "{ \"boot-source\": ")?;
    let garbage = garbage.to_string_lossy();
    for (code, word, line) in [
        (BAD_ARGUMENTS, "--colour", &["--no-api", "--colour"][..]),
        (BAD_ARGUMENTS, "--config-file", &["--no-api"]),
        (BAD_ARGUMENTS, "--level", &["--no-api", "--config-file", &garbage, "--level", "loud"]),
        (BAD_CONFIGURATION, "/no-such-file", &["--no-api", "--config-file", "/no-such-file"]),
        (BAD_CONFIGURATION, "garbage.json", &["--no-api", "--config-file", &garbage]),
        (BAD_CONFIGURATION, "--seccomp-filter", &["--seccomp-filter", &garbage]),
    ] {
        let mut command = Command::new(&ctx.pinfold);
        command.args(line);
        let mut process = Running::spawn(command, Vec::new(), false)?;
        refused(&mut process, code, &[word]).map_err(|failure| Failure(format!("{line:?}: {failure}")))?;
    }
    Ok(())
}

/// The process ends with `code` and one line on standard error that holds each of `words`.
fn refused(process: &mut Running, code: i32, words: &[&str]) -> Result<(), Failure> {
    process.expect_exit(code)?;
    process.wait_errors_closed()?;
    let text = process.errors();
    println!("{}", text.trim_end());
    check!(text.starts_with("pinfold: ") && text.ends_with('\n'), "it says `{text}`");
    check!(text.lines().count() == 1, "it says more than one line: `{text}`");
    for word in words {
        check!(text.contains(word), "it does not name {word}: `{text}`");
    }
    Ok(())
}

/// Calls `run` with a group of type `domain invalid`: one beside a threaded group.
fn with_invalid_domain(run: impl FnOnce(&Group) -> Result<(), Failure>) -> Result<(), Failure> {
    let root = Group::create("/pinfold-threaded")?;
    let (threaded, invalid) = (root.child("threaded"), root.child("invalid"));
    let prepared = || {
        fs::create_dir(threaded.dir("")?)?;
        threaded.write("cgroup.type", "threaded")?;
        fs::create_dir(invalid.dir("")?)?;
        let kind = invalid.read("cgroup.type")?;
        check!(kind == "domain invalid", "its type is {kind}");
        Ok(())
    };
    let ended = prepared().and_then(|()| run(&invalid));
    ended.and(root.remove())
}

/// Files that are no kernels.
struct Files {
    empty: PathBuf,
    text: PathBuf,
    short_vmlinux: PathBuf,
    short_bzimage: PathBuf,
}

impl Files {
    fn make(ctx: &Ctx) -> Result<Self, Failure> {
        let files = Self {
            empty: ctx.scratch.join("empty"),
            text: ctx.scratch.join("text"),
            short_vmlinux: ctx.scratch.join("short-vmlinux"),
            short_bzimage: ctx.scratch.join("short-bzimage"),
        };
        File::create(&files.empty)?;
        fs::write(&files.text, "this is no kernel\n".repeat(1000))?;
        for (whole, short) in [(&ctx.vmlinux, &files.short_vmlinux), (&ctx.bzimage, &files.short_bzimage)] {
            let mut start = Vec::new();
            File::open(whole)?.take(1 << 20).read_to_end(&mut start)?;
            fs::write(short, start)?;
        }
        Ok(files)
    }
}

fn interfaces() -> Result<BTreeSet<String>, Failure> {
    let names = fs::read_dir("/sys/class/net")?.flatten();
    Ok(names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}
