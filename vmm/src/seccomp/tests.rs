use std::ffi::c_void;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output, Stdio};

use super::*;
use crate::console;

/// What a child process of these tests is told: a role, and the number of a case.
const ROLE: &str = "PINFOLD_TEST_SECCOMP_ROLE";
const CASE: &str = "PINFOLD_TEST_SECCOMP_CASE";

/// How to run the test `child` alone.
const CHILD: [&str; 5] = ["--exact", "seccomp::tests::child", "--nocapture", "--ignored", "--test-threads=1"];

/// A system call by name, number and arguments.
type Call = (&'static str, libc::c_long, [usize; 4]);

const EXEC: usize = (libc::PROT_READ | libc::PROT_EXEC) as usize;
const ANONYMOUS: usize = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
const INET: usize = libc::AF_INET as usize;
const STREAM: usize = libc::SOCK_STREAM as usize;
/// Not a descriptor.
const NO_FD: usize = usize::MAX;

/// What no role may do.
const FOR_NOBODY: [Call; 14] = [
    ("execve", libc::SYS_execve, [0; 4]),
    ("execveat", libc::SYS_execveat, [NO_FD, 0, 0, 0]),
    ("clone", libc::SYS_clone, [libc::CLONE_VM as usize, 0, 0, 0]),
    ("clone3", libc::SYS_clone3, [0; 4]),
    ("fork", libc::SYS_fork, [0; 4]),
    ("mmap", libc::SYS_mmap, [0, 4096, EXEC, ANONYMOUS]),
    ("mprotect", libc::SYS_mprotect, [0, 4096, EXEC, 0]),
    ("socket", libc::SYS_socket, [INET, STREAM, 0, 0]),
    ("ioctl", libc::SYS_ioctl, [NO_FD, 0x5413, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [0; 4]),
    ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as usize, 1, 0, 0]),
    ("seccomp", libc::SYS_seccomp, [0; 4]),
    ("tgkill", libc::SYS_tgkill, [1, 1, libc::SIGKILL as usize, 0]),
    ("setuid", libc::SYS_setuid, [0; 4]),
];

/// What a role may not do and another one may.
fn for_others(role: Role) -> Vec<Call> {
    let kvm_run = ("ioctl", libc::SYS_ioctl, [NO_FD, 0xae80, 0, 0]);
    let tun = ("ioctl", libc::SYS_ioctl, [NO_FD, 0x4004_54d0, 0, 0]);
    let set_owner = ("ioctl", libc::SYS_ioctl, [NO_FD, 0xaf01, 0, 0]);
    let open = ("openat", libc::SYS_openat, [NO_FD, 0, libc::O_RDONLY as usize, 0]);
    let unix = ("socket", libc::SYS_socket, [libc::AF_UNIX as usize, STREAM, 0, 0]);
    let ring = ("io_uring_setup", libc::SYS_io_uring_setup, [0; 4]);
    let unlink = ("unlinkat", libc::SYS_unlinkat, [NO_FD, 0, 0, 0]);
    match role {
        Role::Main => {
            let create = ("openat", libc::SYS_openat, [NO_FD, 0, libc::O_CREAT as usize, 0]);
            let create_vm = ("ioctl", libc::SYS_ioctl, [NO_FD, 0xae01, 0, 0]);
            let kill = ("kill", libc::SYS_kill, [1, libc::SIGSTOP as usize, 0, 0]);
            let netlink = ("socket", libc::SYS_socket, [libc::AF_NETLINK as usize, STREAM, 0, 0]);
            vec![kvm_run, create, create_vm, kill, netlink, unlink]
        }
        Role::Api => vec![kvm_run, tun, open, unix, ring],
        Role::Vcpu => vec![tun, set_owner, open, unix, ring],
        Role::Io => vec![kvm_run, tun, open, unix],
        Role::Reaper => {
            let write = ("openat", libc::SYS_openat, [NO_FD, 0, libc::O_WRONLY as usize, 0]);
            let signal = ("pidfd_send_signal", libc::SYS_pidfd_send_signal, [NO_FD, 9, 0, 0]);
            vec![kvm_run, tun, write, signal, unix, ring, unlink]
        }
    }
}

/// What a role may do, and what comes of it here: the calls reach the kernel, which refuses them.
fn allowed(role: Role) -> Vec<(Call, i32)> {
    let ioctl = |request| (("ioctl", libc::SYS_ioctl, [NO_FD, request, 0, 0]), libc::EBADF);
    let write = (("write", libc::SYS_write, [NO_FD, 0, 0, 0]), libc::EBADF);
    let epoll =
        (("epoll_ctl", libc::SYS_epoll_ctl, [NO_FD, libc::EPOLL_CTL_DEL as usize, 0, 0]), libc::EBADF);
    // Channels do it.
    let yielding = (("sched_yield", libc::SYS_sched_yield, [0; 4]), 0);
    // Anybody may panic, and leaves the terminal as it was. A wait by ppoll is a drive's.
    let mut all = vec![write, yielding, ioctl(0x5401), ioctl(0x5402)];
    if matches!(role, Role::Main | Role::Io) {
        all.push((("ppoll", libc::SYS_ppoll, [NO_FD, 1, 0, 0]), libc::EFAULT));
    }
    all.extend(match role {
        Role::Main => {
            let open = (("openat", libc::SYS_openat, [NO_FD, 0, 0, 0]), libc::EFAULT);
            vec![epoll, ioctl(0xaf01), ioctl(0x4004_54d0), open]
        }
        Role::Api => vec![epoll, (("accept4", libc::SYS_accept4, [NO_FD, 0, 0, 0]), libc::EBADF)],
        Role::Vcpu => {
            let options = [NO_FD, libc::SOL_SOCKET as usize, libc::SO_RCVTIMEO as usize, 0];
            let patience = (("setsockopt", libc::SYS_setsockopt, options), libc::EBADF);
            vec![ioctl(0xae80), ioctl(0x4008_ae6a), patience]
        }
        Role::Io => {
            let preadv = (("preadv", libc::SYS_preadv, [NO_FD, 0, 0, 0]), libc::EBADF);
            let pread = (("pread64", libc::SYS_pread64, [NO_FD, 0, 0, 0]), libc::EBADF);
            vec![epoll, preadv, pread, ioctl(0x1277)]
        }
        Role::Reaper => {
            let rmdir = [NO_FD, 0, libc::AT_REMOVEDIR as usize, 0];
            let ask = (("pidfd_send_signal", libc::SYS_pidfd_send_signal, [NO_FD, 0, 0, 0]), libc::EBADF);
            let open = (("openat", libc::SYS_openat, [NO_FD, 0, 0, 0]), libc::EFAULT);
            let datagrams = [libc::AF_UNIX as usize, libc::SOCK_DGRAM as usize, NO_FD, 0];
            let probe = (("socket", libc::SYS_socket, datagrams), libc::EPROTONOSUPPORT);
            let connect = (("connect", libc::SYS_connect, [NO_FD, 0, 0, 0]), libc::EBADF);
            vec![
                probe,
                connect,
                (("unlinkat", libc::SYS_unlinkat, rmdir), libc::EFAULT),
                ask,
                open,
                ioctl(0xc040_ff0b),
            ]
        }
    });
    all
}

fn forbidden(role: Role) -> Vec<Call> {
    FOR_NOBODY.into_iter().chain(for_others(role)).collect()
}

/// Runs the test `child` in a process of its own, which gets the filter of `role` and makes the calls.
fn child_of(role: Role, case: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(CHILD).env(ROLE, role.name()).env(CASE, case);
    command.stdin(Stdio::null()).env_remove("RUST_BACKTRACE").output().unwrap()
}

fn make((_, number, [a, b, c, d]): Call) -> i32 {
    // SAFETY: a filter stops the call, or its arguments are such that the kernel refuses it: it has no descriptor, and
    // no address to read from or write to.
    match unsafe { libc::syscall(number, a, b, c, d) } {
        -1 => io::Error::last_os_error().raw_os_error().unwrap(),
        _ => 0,
    }
}

/// Reads from an address that is there and that nobody may read from.
fn fault() {
    let (length, flags) = (4096, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, which is not memory to the compiler; the process ends of reading it, as it should.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0);
        page.cast::<u8>().read_volatile();
    }
}

/// The child's part: not for running by itself.
#[test]
#[ignore = "run by the other tests, in a process of its own"]
fn child() {
    let (Ok(role), Ok(case)) = (std::env::var(ROLE), std::env::var(CASE)) else { return };
    let role = Role::ALL.into_iter().find(|known| known.name() == role).unwrap();
    // As at a launch: before there is another thread.
    crate::footprint::share_heap();
    crate::logger::init("test", log::LevelFilter::Warn);
    let terminal = console::RawTerminal::enter().unwrap();
    if let Some(settings) = console::terminal_settings(io::stdin().as_fd()) {
        assert_eq!(settings.c_oflag & libc::OPOST, 0);
    }
    let thread = Filters::BuiltIn.spawn(role, format!("role {}", role.name()), move || {
        for (call, outcome) in allowed(role) {
            assert_eq!(make(call), outcome, "{call:?}");
        }
        // Memory of every size comes and goes, and grows.
        let mut block: Vec<u8> = vec![1; 64];
        (0..16).for_each(|_| block.extend_from_within(..));
        drop(block);
        log::error!("a line");
        match case.as_str() {
            // A panic in a release build: the hook's line, and abort.
            "panic" => {
                let _ = std::panic::catch_unwind(|| panic!("a panic"));
                std::process::abort();
            }
            "fault" => fault(),
            "" => {}
            index => _ = make(forbidden(role)[index.parse::<usize>().unwrap()]),
        }
        // These two are no threads that end before their process.
        if matches!(role, Role::Main | Role::Reaper) {
            std::process::exit(0);
        }
    });
    thread.unwrap().join().unwrap();
    drop(terminal);
}

#[test]
fn what_a_role_may_do_it_can() {
    for role in Role::ALL {
        let output = child_of(role, "");
        assert!(output.status.success(), "{role:?}: {output:?}");
    }
}

#[test]
fn what_a_role_may_not_do_ends_the_process_with_148_and_a_line_that_names_it() {
    for role in Role::ALL {
        for (index, (name, number, [a, b, c, _])) in forbidden(role).into_iter().enumerate() {
            let output = child_of(role, &index.to_string());
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(148), "{role:?}, {name}: {stderr}");
            let line = stderr.lines().find(|line| line.starts_with("pinfold: the thread")).unwrap();
            let wanted = format!(
                "pinfold: the thread \"role {}\" made the system call {number} ({name}), which its seccomp filter \
                 forbids, at 0x",
                role.name()
            );
            assert!(line.starts_with(&wanted), "{line}");
            assert!(line.contains(&format!("with the arguments {a:#x} {b:#x} {c:#x};")), "{line}");
        }
    }
}

#[test]
fn a_panic_and_a_fault_end_the_process_as_without_a_filter() {
    for role in Role::ALL {
        for (case, signal, says) in [("panic", libc::SIGABRT, "a panic"), ("fault", libc::SIGSEGV, "a line")]
        {
            let output = child_of(role, case);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(signal), "{role:?}, {case}: {stderr}");
            assert!(stderr.contains(says) && !stderr.contains("system call"), "{role:?}, {case}: {stderr}");
        }
    }
}

/// A terminal's two ends: ours, and that of who runs in it.
fn terminal() -> (OwnedFd, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: openpty writes two descriptors, which are nobody else's; the rest is not asked for.
    unsafe {
        assert_eq!(libc::openpty(&raw mut ours, &raw mut theirs, null, null.cast(), null.cast()), 0);
        (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
    }
}

#[test]
fn a_panic_and_a_violation_leave_the_terminal_as_it_was() {
    for role in Role::ALL {
        for (case, code) in [("panic", 128 + libc::SIGABRT), ("0", 148)] {
            // When the leader of its session ends, a terminal is reset. So that is the shell.
            let (_ours, theirs) = terminal();
            let mut shell = Command::new("sh");
            shell.args(["-c", r#""$0" "$@"; echo "ended with $?"; stty -a"#]);
            shell.arg(std::env::current_exe().unwrap()).args(CHILD);
            shell.env(ROLE, role.name()).env(CASE, case);
            shell.stdin(theirs).env_remove("RUST_BACKTRACE");
            // SAFETY: both calls may be made between fork and exec.
            unsafe {
                shell.pre_exec(|| {
                    assert!(libc::setsid() > 0 && libc::ioctl(0, libc::TIOCSCTTY, 0) == 0);
                    Ok(())
                })
            };
            let output = shell.output().unwrap();
            let stdout = String::from_utf8_lossy(&output.stdout);
            assert!(stdout.contains(&format!("ended with {code}\n")), "{role:?}, {case}: {output:?}");
            assert!(stdout.split_whitespace().any(|word| word == "opost"), "{role:?}, {case}: {stdout}");
        }
    }
}

#[test]
fn a_policy_that_is_wrong_is_refused_with_a_reason() {
    let filter = |rules: &str| {
        format!(r#"{{"mismatch_action": "trap", "match_action": "allow", "filter": [{rules}]}}"#)
    };
    let policy = |rules: &str, rest: &str| {
        let roles = Role::ALL.map(|role| format!(r#""{}": {}"#, role.name(), filter(rules)));
        format!("{{{}{rest}}}", roles.join(", "))
    };
    let plain = r#"{"syscall": "read"}"#;
    let args = r#"{"syscall": "read", "args": [{"index": 0, "type": "dword", "op": "eq", "val": 1}]}"#;
    assert!(matches!(Filters::custom(&policy(plain, "")), Ok(Filters::Custom(_))));
    for (json, reason) in [
        ("{".to_owned(), "no JSON"),
        (format!(r#"{{"main": {}}}"#, filter(plain)), "no filter for the role \"api\""),
        (policy(plain, &format!(r#", "vmm": {}"#, filter(plain))), "no role \"vmm\""),
        (policy(&format!("{plain}, {args}"), ""), "\"read\" has a rule without args"),
        (policy(r#"{"syscall": "raed"}"#, ""), "raed"),
        (policy(r#"{"syscall": "read", "arg": []}"#, ""), "arg"),
        (policy(plain, "").replace("allow", "trap"), "equal"),
    ] {
        let error = Filters::custom(&json).unwrap_err();
        assert!(resources::chain(&error).contains(reason), "{error}");
    }
}

#[test]
fn the_built_in_policy_is_what_its_file_says_and_traps_what_it_does_not_list() {
    let json = include_str!("../../../resources/assets/seccomp/x86_64.json");
    let Filters::Custom(programs) = Filters::custom(json).unwrap() else { panic!("it is not custom") };
    for (compiled, built_in) in programs.iter().zip(BUILT_IN) {
        assert!(compiled == built_in);
    }
    let policy: serde_json::Value = serde_json::from_str(json).unwrap();
    for role in Role::ALL {
        let filter = &policy[role.name()];
        assert_eq!(
            (filter["mismatch_action"].as_str(), filter["match_action"].as_str()),
            (Some("trap"), Some("allow"))
        );
        for rule in filter["filter"].as_array().unwrap() {
            let said = |value: &serde_json::Value| value["comment"].is_string();
            let arguments = rule["args"].as_array();
            assert!(said(rule) || arguments.is_some_and(|all| all.iter().all(said)), "why {rule}?");
        }
    }
}

#[test]
fn no_filter_is_none() {
    Filters::Off.install(Role::Reaper).unwrap();
    // SAFETY: PR_GET_SECCOMP takes no argument.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_SECCOMP, std::ptr::null_mut::<c_void>()) }, 0);
}
