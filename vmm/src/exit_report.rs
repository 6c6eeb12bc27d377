//! The last report: how the process ended, and what its groups used. The reaper writes it, since nobody else is left
//! after a kill.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use cgroup::{Account, Totals};
use serde::Serialize;

use crate::exit::chain;
use crate::sink::Sink;

/// A report that is to be written.
pub struct Pending {
    /// Where it goes, opened by [`crate::sink::open`].
    pub file: OwnedFd,
    /// What was used before the process joined its groups; `None` when that could not be read.
    pub account: Option<Account>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this code.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// Nobody could tell.
    Unknown,
}

/// A line of JSON.
#[derive(Debug, Serialize)]
struct Report<'a> {
    id: &'a str,
    pid: i32,
    /// Both are `None` when it is not known how it ended.
    exit_code: Option<i32>,
    signal: Option<i32>,
    oom_killed: Option<bool>,
    oom_kills: Option<u64>,
    memory_peak_bytes: Option<u64>,
    cpu: Cpu,
}

#[derive(Debug, Serialize)]
struct Cpu {
    usage_usec: Option<u64>,
    user_usec: Option<u64>,
    system_usec: Option<u64>,
}

impl Pending {
    /// Writes the report of the process `pid` of the microVM `id`. Its groups still exist.
    pub fn write(self, id: &str, pid: i32, ending: Ending) {
        let used = self.account.and_then(|account| {
            account.used().inspect_err(|error| log::warn!("exit report: {}", chain(error))).ok()
        });
        let report = report(id, pid, ending, &used.unwrap_or_default());
        let written = serde_json::to_string(&report)
            .map_err(io::Error::from)
            .and_then(|line| Sink::from(File::from(self.file)).write_line(format!("{line}\n").as_bytes()));
        if let Err(error) = written {
            log::warn!("the exit report could not be written: {error}");
        }
    }
}

fn report<'a>(id: &'a str, pid: i32, ending: Ending, used: &Totals) -> Report<'a> {
    let oom_killed = used.oom_kills.map(|kills| kills > 0);
    let (exit_code, signal) = match ending {
        Ending::Exit(code) => (Some(code), None),
        Ending::Signal(signal) => (None, Some(signal)),
        // That is how the kernel does it.
        Ending::Unknown if oom_killed == Some(true) => (None, Some(libc::SIGKILL)),
        Ending::Unknown => (None, None),
    };
    let Totals { oom_kills, memory_peak_bytes, usage_usec, user_usec, system_usec } = *used;
    let cpu = Cpu { usage_usec, user_usec, system_usec };
    Report { id, pid, exit_code, signal, oom_killed, oom_kills, memory_peak_bytes, cpu }
}

impl Ending {
    /// Of a status as waitpid(2) gives it.
    fn of_status(status: i32) -> Self {
        if libc::WIFEXITED(status) {
            Self::Exit(libc::WEXITSTATUS(status))
        } else if libc::WIFSIGNALED(status) {
            Self::Signal(libc::WTERMSIG(status))
        } else {
            Self::Unknown
        }
    }

    /// Of a process that has ended, and that is no child of ours: as /proc tells while its parent has not waited for
    /// it, and afterwards as the pidfd does, from Linux 6.15 on.
    pub fn of(pid: i32, pidfd: BorrowedFd<'_>) -> Self {
        let status = zombie_status(pid, pidfd).or_else(|| reaped_status(pidfd));
        status.map_or(Self::Unknown, Self::of_status)
    }
}

/// The last field of /proc/PID/stat (proc_pid_stat(5)), if the process is a zombie.
fn zombie_status(pid: i32, pidfd: BorrowedFd<'_>) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold blanks and brackets.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?;
    let status = fields.next_back()?.parse().ok()?;
    // The number is nobody else's as long as it has not been waited for.
    // SAFETY: signal 0 only asks; there is no information to read.
    let ours = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            0,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    } == 0;
    (ours && state == "Z").then_some(status)
}

/// What PIDFD_GET_INFO writes (include/uapi/linux/pidfd.h), as of its first version.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroupid: u64,
    /// Ids and credentials.
    ids: [u32; 11],
    exit_code: i32,
}

fn reaped_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    /// `_IOWR(0xFF, 11, struct pidfd_info)`.
    const PIDFD_GET_INFO: libc::Ioctl = 0xc040_ff0b;
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the kernel writes as many bytes as the request's number says: those of the structure, which lives through
    // the call.
    let rc = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    (rc == 0 && info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::path::Path;
    use std::process::{Command, Stdio};

    use serde_json::{Value, json};

    use super::*;
    use crate::reaper::{pidfd_open, wait};
    use crate::sink::{self, tests::fifo, tests::reader};

    #[test]
    fn how_a_process_ended_is_read_while_its_parent_has_not_waited_for_it() {
        for (command, ending) in [
            ("exit 0", Ending::Exit(0)),
            ("exit 152", Ending::Exit(152)),
            ("kill -KILL $$", Ending::Signal(libc::SIGKILL)),
        ] {
            let mut child = Command::new("sh")
                .args(["-c", &format!("read x; {command}")])
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            let pid = child.id().cast_signed();
            let pidfd = pidfd_open(pid).unwrap();
            assert_eq!(Ending::of(pid, pidfd.as_fd()), Ending::Unknown, "it lives");
            drop(child.stdin.take());
            wait(pidfd.as_fd());
            assert_eq!(Ending::of(pid, pidfd.as_fd()), ending);
            child.wait().unwrap();
            let late = Ending::of(pid, pidfd.as_fd());
            assert!([ending, Ending::Unknown].contains(&late), "{late:?}, as the kernel can tell or not");
        }
    }

    #[test]
    fn a_report_says_how_it_ended_and_what_was_used() {
        let used = Totals { oom_kills: Some(1), usage_usec: Some(7), ..Totals::default() };
        for (ending, used, code, signal, killed) in [
            (Ending::Exit(0), Totals::default(), json!(0), json!(null), json!(null)),
            (Ending::Exit(152), Totals { oom_kills: Some(0), ..used }, json!(152), json!(null), json!(false)),
            (Ending::Signal(15), used, json!(null), json!(15), json!(true)),
            (Ending::Unknown, used, json!(null), json!(9), json!(true)),
            (Ending::Unknown, Totals { oom_kills: Some(0), ..used }, json!(null), json!(null), json!(false)),
        ] {
            let value = serde_json::to_value(report("a", 5, ending, &used)).unwrap();
            assert_eq!(
                [&value["exit_code"], &value["signal"], &value["oom_killed"]],
                [&code, &signal, &killed]
            );
            assert_eq!(value["cpu"]["usage_usec"], json!(used.usage_usec));
        }
    }

    #[test]
    fn nobody_need_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, file) = (fifo(dir.path()), dir.path().join("file"));
        let write = |path: &Path| {
            let file = sink::open(path).unwrap().into();
            Pending { file, account: None }.write("a", 5, Ending::Exit(0));
        };
        write(&fifo);
        // Who reads gets it, after the end of who wrote.
        let mut early = reader(&fifo);
        for path in [&fifo, &file] {
            write(path);
        }
        let mut text = String::new();
        early.read_to_string(&mut text).unwrap();
        for text in [text, fs::read_to_string(file).unwrap()] {
            let report: Value = serde_json::from_str(&text).unwrap();
            assert_eq!((&report["id"], &report["exit_code"]), (&json!("a"), &json!(0)));
            assert!(text.ends_with('\n'));
        }
    }
}
