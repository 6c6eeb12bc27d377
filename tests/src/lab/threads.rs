//! Where the threads of a VM are, user and kernel ones, read from /proc.

use crate::case::Failure;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

/// What a thread is for, told by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The process's first thread.
    Main,
    /// HTTP.
    Api,
    /// A vCPU.
    Vcpu,
    /// A device's own thread.
    Io,
    /// A vhost worker.
    Vhost,
    /// A worker of KVM.
    Kvm,
    /// A worker of io_uring.
    Iou,
    /// Something that the design does not name.
    Other,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main => "main",
            Self::Api => "api",
            Self::Vcpu => "vcpu",
            Self::Io => "io",
            Self::Vhost => "vhost",
            Self::Kvm => "kvm",
            Self::Iou => "iou",
            Self::Other => "other",
        })
    }
}

/// A thread and its places.
#[derive(Debug, Clone)]
pub struct Thread {
    /// Its id.
    pub tid: u32,
    /// Its name.
    pub comm: String,
    /// What it is for.
    pub role: Role,
    /// Whether it runs kernel code only.
    pub kernel: bool,
    /// Its cgroup by controller; on v2 the one key is `unified`.
    pub groups: BTreeMap<String, String>,
}

/// Controllers that account or limit, so that a thread in the wrong place costs the wrong one, and the hierarchy
/// by which systemd knows what is a unit's. `devices`, `freezer` and the like are nobody's bill.
pub(super) const BILLING: [&str; 9] =
    ["unified", "cpu", "cpuacct", "cpuset", "memory", "blkio", "pids", "hugetlb", "name=systemd"];

/// Lists the threads of process `pid`, of the processes below it, and the kernel threads that work for them.
/// Threads that end meanwhile are left out.
pub fn scan(pid: u32) -> Result<Vec<Thread>, Failure> {
    let processes: Vec<Process> =
        numbers(Path::new("/proc"))?.into_iter().filter_map(Process::read).collect();
    let mut family = BTreeSet::from([pid]);
    loop {
        let before = family.len();
        family.extend(
            processes
                .iter()
                .filter(|one| family.contains(&one.parent))
                .map(|one| one.pid)
                .collect::<Vec<_>>(),
        );
        if family.len() == before {
            break;
        }
    }
    let mut threads = Vec::new();
    for process in &family {
        let Ok(tids) = numbers(&Path::new("/proc").join(process.to_string()).join("task")) else { continue };
        threads.extend(tids.into_iter().filter_map(|tid| thread(tid, tid == pid)));
    }
    if threads.is_empty() {
        return Err(Failure(format!("process {pid} is gone")));
    }
    let tids: BTreeSet<u32> = threads.iter().map(|thread| thread.tid).collect();
    // Kernel threads are children of kthreadd, whose id is 2, and carry the id of the thread they serve.
    threads.extend(
        processes
            .iter()
            .filter(|one| one.parent == 2 && serves(&one.comm, &tids))
            .filter_map(|one| thread(one.pid, false)),
    );
    Ok(threads)
}

/// Those of `threads` that are outside the groups whose paths start with `sandbox`, in a hierarchy that bills.
pub fn strays<'a>(threads: &'a [Thread], sandbox: &str) -> Vec<&'a Thread> {
    let inside = |path: &str| {
        path.strip_prefix(sandbox).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '-']))
    };
    threads
        .iter()
        .filter(|thread| {
            !thread
                .groups
                .iter()
                .filter(|(name, _)| BILLING.contains(&name.as_str()))
                .all(|(_, path)| inside(path))
        })
        .collect()
}

/// Whether a kernel thread of this name works for one of `tids`.
fn serves(comm: &str, tids: &BTreeSet<u32>) -> bool {
    const CUT: &str = "kvm-nx-lpage-re";
    if comm == CUT {
        // Cut at 15 bytes, as older kernels show it: whose it is cannot be told. Cases run one VM at a time.
        return true;
    }
    ["vhost-", "kvm-pit/", "kvm-nx-lpage-recovery-"]
        .iter()
        .find_map(|prefix| comm.strip_prefix(prefix)?.parse().ok())
        .is_some_and(|tid| tids.contains(&tid))
}

fn thread(tid: u32, main: bool) -> Option<Thread> {
    // PF_IO_WORKER, PF_USER_WORKER (6.4 and later) and PF_KTHREAD in include/linux/sched.h.
    const KERNEL_FLAGS: u64 = 0x10 | 0x4000 | 0x0020_0000;
    let folder = Path::new("/proc").join(tid.to_string());
    let comm = fs::read_to_string(folder.join("comm")).ok()?.trim_end().to_owned();
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    let groups = groups(&fs::read_to_string(folder.join("cgroup")).ok()?);
    let flags: u64 = after_comm(&stat)?.nth(6)?.parse().ok()?;
    Some(Thread { tid, role: role(&comm, main), comm, kernel: flags & KERNEL_FLAGS != 0, groups })
}

fn role(comm: &str, main: bool) -> Role {
    const PREFIXES: [(&str, Role); 7] = [
        ("fc_vcpu ", Role::Vcpu),
        ("pinfold_api", Role::Api),
        ("pinfold_io", Role::Io),
        ("vhost-", Role::Vhost),
        ("kvm-", Role::Kvm),
        ("iou-wrk-", Role::Iou),
        ("iou-sqp-", Role::Iou),
    ];
    if main {
        return Role::Main;
    }
    PREFIXES.iter().find(|(prefix, _)| comm.starts_with(prefix)).map_or(Role::Other, |(_, role)| *role)
}

/// Reads `/proc/<tid>/cgroup`. With v1 hierarchies mounted the unified one is left out.
fn groups(text: &str) -> BTreeMap<String, String> {
    let lines: Vec<(&str, &str, &str)> = text
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            Some((parts.next()?, parts.next()?, parts.next()?))
        })
        .collect();
    let v1: BTreeMap<String, String> = lines
        .iter()
        .filter(|(_, names, _)| !names.is_empty())
        .flat_map(|(_, names, path)| names.split(',').map(|name| (name.to_owned(), (*path).to_owned())))
        .collect();
    if !v1.is_empty() {
        return v1;
    }
    lines.iter().map(|(_, _, path)| ("unified".to_owned(), (*path).to_owned())).collect()
}

struct Process {
    pid: u32,
    parent: u32,
    comm: String,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let folder = Path::new("/proc").join(pid.to_string());
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        let parent = after_comm(&stat)?.nth(1)?.parse().ok()?;
        let comm = fs::read_to_string(folder.join("comm")).ok()?.trim_end().to_owned();
        Some(Self { pid, parent, comm })
    }
}

/// The fields of a stat line after the name, which may hold blanks and brackets: state, parent, ...
fn after_comm(stat: &str) -> Option<impl Iterator<Item = &str>> {
    Some(stat.rsplit_once(')')?.1.split_whitespace())
}

/// The entries of a folder that are numbers.
fn numbers(folder: &Path) -> std::io::Result<Vec<u32>> {
    Ok(fs::read_dir(folder)?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Thread {
        let groups = BTreeMap::from([("unified".to_owned(), path.to_owned())]);
        Thread { tid: 1, comm: String::new(), role: Role::Other, kernel: false, groups }
    }

    #[test]
    fn strays_are_told_from_residents() {
        let threads = [
            at("/kubepods/pod1/kata-sandbox/kata-sandbox-vcpus"),
            at("/kubepods/pod1/kata-sandbox-vcpus"),
            at("/kubepods/pod1/kata-sandbox"),
            at("/kubepods/pod1"),
            at("/kubepods/pod1/kata-sandboxes"),
            at("/"),
        ];
        assert_eq!(strays(&threads, "/kubepods/pod1/kata-sandbox").len(), 3);
    }

    #[test]
    fn kernel_threads_are_matched_by_the_thread_they_serve() {
        let tids = BTreeSet::from([41, 42]);
        for name in ["vhost-42", "kvm-pit/41", "kvm-nx-lpage-re", "kvm-nx-lpage-recovery-41"] {
            assert!(serves(name, &tids), "{name}");
        }
        for name in ["vhost-421", "vhost-", "kworker/u4:42", "kvm-nx-lpage-recovery-7"] {
            assert!(!serves(name, &tids), "{name}");
        }
    }

    #[test]
    fn cgroup_files_of_both_versions_are_read() {
        assert_eq!(groups("0::/a/b\n")["unified"], "/a/b");
        let v1 = groups("9:name=systemd:/s\n4:cpu,cpuacct:/x:y\n3:memory:/m\n0::/u\n");
        assert_eq!(v1["cpuacct"], "/x:y");
        assert_eq!(v1["memory"], "/m");
        assert_eq!(v1["name=systemd"], "/s");
        assert_eq!(v1.len(), 4);
    }

    #[test]
    fn our_own_threads_are_found() {
        let pid = std::process::id();
        let threads = scan(pid).unwrap();
        assert!(
            threads.iter().any(|thread| thread.tid == pid && thread.role == Role::Main && !thread.kernel)
        );
    }
}
