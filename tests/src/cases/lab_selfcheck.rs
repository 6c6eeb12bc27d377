//! The lab sees what it is there to see.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Pod, Running, Tap, caller, scan, strays};
use std::process::Command;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "lab_selfcheck_v1",
        needs: Needs { cgroup: Some(CgroupVersion::V1), ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: finds_strays,
    },
    Case {
        name: "lab_selfcheck_v2",
        needs: Needs { cgroup: Some(CgroupVersion::V2), ..Needs::NOTHING },
        timeout: Case::TIMEOUT,
        run: finds_strays,
    },
    Case { name: "lab_makes_taps", needs: Needs::VM, timeout: Case::TIMEOUT, run: makes_taps },
];

fn finds_strays(_: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("labcheck")?;
    let sandbox = crate::lab::Group::create(&format!("{}/kata-sandbox", pod.path()))?;
    let caller = caller()?;
    let used = caller.cpu_usec()?;
    let mut command = Command::new("sh");
    // Uses some CPU, then waits.
    command.args(["-c", "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done; echo burnt; read line; echo bye"]);
    let mut process = Running::spawn(command, caller.doors()?, false)?;
    process.wait_for_line("burnt")?;
    check!(caller.cpu_usec()? > used, "the caller was not charged for its child");

    let threads = scan(process.pid())?;
    check!(strays(&threads, sandbox.path()).len() == threads.len(), "not all are strays: {threads:?}");
    check!(
        threads.iter().all(|thread| thread.groups.values().any(|path| path == caller.path())),
        "{threads:?}"
    );
    sandbox.adopt(process.pid())?;
    let threads = scan(process.pid())?;
    check!(strays(&threads, sandbox.path()).is_empty(), "still strays: {threads:?}");
    let anon = sandbox.anon_bytes()?;
    println!("anon of the sandbox: {anon}");

    process.send_line("")?;
    process.wait_for_line("bye")?;
    process.expect_exit(0)?;
    let gone = pod.child("kata-sandbox");
    drop(pod);
    check!(!gone.exists()?, "{} is still there", gone.path());
    Ok(())
}

fn makes_taps(_: &Ctx) -> Result<(), Failure> {
    let tap = Tap::create("pflab0", "172.30.9.1/24")?;
    check!(std::path::Path::new("/sys/class/net").join(tap.name()).exists(), "no such device");
    check!(tap.packets()? == 0, "packets came from nowhere");
    drop(tap);
    check!(!std::path::Path::new("/sys/class/net/pflab0").exists(), "the TAP is still there");
    Ok(())
}
