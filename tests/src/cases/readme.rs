//! What the README says under "The API" works as it stands there.

use crate::case::{Case, Ctx, Failure, Needs};
use crate::check;
use crate::lab::{Api, Pod, Running};
use serde_json::{Value, json};
use std::process::Command;

/// The cases of this file.
pub const CASES: &[Case] = &[Case {
    name: "readme_api",
    needs: Needs { kvm: true, ..Needs::NOTHING },
    timeout: Case::TIMEOUT,
    run: the_api,
}];

fn the_api(ctx: &Ctx) -> Result<(), Failure> {
    let pod = Pod::create("readme")?;
    let socket = ctx.scratch.join("pinfold.sock");
    let here = |line: &str| {
        line.replace("/tmp/pinfold.sock", &socket.display().to_string())
            .replace("/kubepods/pod1", pod.path())
            // So that it is still there when it is asked about.
            .replace("panic=1\"", "panic=1 pinfold.run=hello+wait\"")
            .replace("\"vmlinux\"", &json!(ctx.vmlinux).to_string())
            .replace("\"initrd\"", &json!(ctx.initramfs).to_string())
    };
    let lines = block(include_str!("../../../README.md"))?;
    let [launch, requests @ ..] = lines.as_slice() else { return Err(Failure::new("no lines")) };
    let launch = launch
        .strip_prefix("pinfold ")
        .and_then(|line| line.strip_suffix(" &"))
        .ok_or_else(|| Failure(format!("`{launch}` does not launch pinfold")))?;
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("exec {} {}", ctx.pinfold.display(), here(launch)));
    let mut vm = Running::spawn(command, Vec::new(), false)?;
    Api::connect(&socket)?;
    check!(requests.len() >= 3 && requests.iter().all(|line| line.starts_with("curl ")), "{requests:?}");
    let mut last = String::new();
    for line in requests {
        let output = Command::new("sh").arg("-c").arg(here(line)).output()?;
        last = String::from_utf8(output.stdout)?;
        check!(output.status.success() && !last.contains("fault_message"), "`{line}` got `{last}`");
    }
    let threads: Value = serde_json::from_str(&last)?;
    check!(threads["strays"] == json!([]) && threads["threads"].is_array(), "{threads}");
    if let Err(failure) = vm.wait_for_guest("waiting") {
        return Err(Failure(format!("{failure}; it ended with {}", vm.wait_exit()?)));
    }
    vm.send_line("poweroff")?;
    vm.expect_exit(0)
}

/// The lines of the first block under the heading, continued ones put together.
fn block(readme: &str) -> Result<Vec<String>, Failure> {
    let (_, section) =
        readme.split_once("\n## The API\n").ok_or_else(|| Failure::new("the README has no such heading"))?;
    let text: String = section
        .lines()
        .skip_while(|line| !line.starts_with("    "))
        .take_while(|line| line.starts_with("    "))
        .map(|line| format!("{}\n", line.trim()))
        .collect();
    Ok(text.replace("\\\n", "").lines().map(str::to_owned).collect())
}
