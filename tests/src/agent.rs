//! The agent inside the emulated host, and how a case's process is run there and here.
//!
//! The harness sends one JSON object a line over the host's virtio port and reads others back:
//!
//! | request | replies |
//! | --- | --- |
//! | - | `{"hello": "<kernel release>"}`, once |
//! | `{"run": "<case>", "arguments": [..], "timeout_s": N}` | any number of `{"out": "<text>"}`, then `{"done": {"ok": bool, "detail": "<text>"}}` |
//! | `{"poweroff": true}` | - |

use crate::case::{Ctx, Failure};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// A line to the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run a case.
    Run {
        /// Its name.
        case: String,
        /// After how many seconds it counts as hung.
        timeout_s: u64,
    },
    /// End the host.
    Poweroff,
}

/// A line from the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The agent is there; the kernel's release.
    Hello(String),
    /// Output of the running case.
    Out(String),
    /// The running case has ended.
    Done {
        /// Whether it passed.
        ok: bool,
        /// How it ended, when it did not pass.
        detail: String,
    },
}

/// The folder into which the host unpacks its job.
pub const JOB_FOLDER: &str = "/run/pinfold";
/// The host's disk that cases may overwrite.
pub const SCRATCH_DISK: &str = "/dev/vdc";
/// Where a case's process finds its [`Ctx`].
const CONTEXT_VARIABLE: &str = "PINFOLD_TEST_CONTEXT";

/// Serves requests from the virtio port `port` until it closes.
pub fn serve(port: &Path) -> Result<(), Failure> {
    let read_end = File::options().read(true).write(true).open(port)?;
    let mut write_end = read_end.try_clone()?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    send(&mut write_end, &Reply::Hello(release.trim().to_owned()))?;
    for line in BufReader::new(read_end).lines() {
        match serde_json::from_str(&line?)? {
            Request::Run { case, timeout_s } => {
                let ended = run_case(
                    &case,
                    Path::new(JOB_FOLDER),
                    Some(PathBuf::from(SCRATCH_DISK)),
                    Duration::from_secs(timeout_s),
                    &mut |text| {
                        // A broken port shows at the next request.
                        drop(send(&mut write_end, &Reply::Out(text.to_owned())));
                    },
                );
                let reply = match ended {
                    Ok(()) => Reply::Done { ok: true, detail: String::new() },
                    Err(failure) => Reply::Done { ok: false, detail: failure.0 },
                };
                send(&mut write_end, &reply)?;
            }
            Request::Poweroff => {
                Command::new("systemctl").args(["poweroff", "--force", "--force"]).status()?;
            }
        }
    }
    Ok(())
}

/// Runs the case `name` in a process of its own with the job in `job`, handing its output to `out`.
pub fn run_case(
    name: &str,
    job: &Path,
    scratch_disk: Option<PathBuf>,
    timeout: Duration,
    out: &mut dyn FnMut(&str),
) -> Result<(), Failure> {
    let scratch = tempfile::Builder::new().prefix("pinfold-case-").tempdir()?;
    let context = Ctx::of_job(job, scratch.path(), scratch_disk);
    let (reader, writer) = std::io::pipe()?;
    let mut child = Command::new(job.join("pinfold-suite"))
        .args(["run", name])
        .env(CONTEXT_VARIABLE, serde_json::to_string(&context)?)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        // A group of its own, so that whatever it started can be ended with it.
        .process_group(0)
        .spawn()?;
    let ended = follow(&mut child, reader, timeout, out);
    end_group(&child);
    let status = child.wait()?;
    ended?;
    if status.success() { Ok(()) } else { Err(Failure::new(format!("the case ended with {status}"))) }
}

/// Hands on output until the case's process has ended or `timeout` has passed.
fn follow(
    child: &mut Child,
    mut reader: impl Read + Send + 'static,
    timeout: Duration,
    out: &mut dyn FnMut(&str),
) -> Result<(), Failure> {
    // How long output may still come after the process is gone: its children may hold the pipe.
    const LINGER: Duration = Duration::from_millis(300);
    let (sender, chunks) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count) = reader.read(&mut buffer) {
            if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + timeout;
    loop {
        match chunks.recv_timeout(LINGER) {
            Ok(chunk) => out(&String::from_utf8_lossy(&chunk)),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) if child.try_wait()?.is_some() => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() > deadline {
            return Err(Failure::new(format!("the case was still running after {} s", timeout.as_secs())));
        }
    }
}

/// Kills what is left of the process group of `child`, which has not been waited for yet or just ended.
fn end_group(child: &Child) {
    if let Ok(group) = libc::pid_t::try_from(child.id()) {
        // SAFETY: kill touches no memory. The group is that of a child of ours, made by process_group(0).
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
}

/// In the case's own process: the context that [`run_case`] made.
pub fn context() -> Result<Ctx, Failure> {
    let text = std::env::var(CONTEXT_VARIABLE)
        .map_err(|_| Failure::new(format!("{CONTEXT_VARIABLE} is not set: cases are run by the harness")))?;
    Ok(serde_json::from_str(&text)?)
}

fn send(port: &mut File, reply: &Reply) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    Ok(port.write_all(&line)?)
}
