//! Where the threads of this process are, and the kernel threads that work for it: `GET /cgroup/threads`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cgroup::{CpuSet, Groups, Place, Role, SchedStat, StatsError};
use serde::Serialize;

/// PF_IO_WORKER, PF_USER_WORKER (Linux 6.4 and later) and PF_KTHREAD: flags of threads that run kernel code only
/// (include/linux/sched.h).
const KERNEL_FLAGS: u64 = 0x10 | 0x4000 | 0x0020_0000;

/// The process id of kthreadd, the parent of all kernel threads.
const KTHREADD: u32 = 2;

/// 64-bit words of a mask of all CPUs that a [`CpuSet`] can hold.
const MASK_WORDS: usize = 8192 / 64;

/// A kernel's name of the worker that is cut before the id: older kernels show 15 bytes.
const NX_WORKER: &str = "kvm-nx-lpage-re";

/// A thread and its places.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Thread {
    tid: u32,
    comm: String,
    role: &'static str,
    /// Whether it runs kernel code only.
    kernel: bool,
    /// Its group by controller; by `unified` on v2.
    cgroup: BTreeMap<String, String>,
    /// Its directory in /proc.
    #[serde(skip)]
    folder: PathBuf,
}

/// What a thread did and waited for.
#[derive(Debug, Serialize)]
pub struct Load {
    tid: u32,
    comm: String,
    role: &'static str,
    /// `None` when the kernel keeps no such figures.
    #[serde(flatten)]
    sched: Figures,
}

/// See [`SchedStat`].
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Figures {
    run_usec: Option<u64>,
    wait_usec: Option<u64>,
    timeslices: Option<u64>,
}

/// The same of all threads of a role.
#[derive(Debug, Default, Serialize)]
pub struct RoleLoad {
    threads: usize,
    /// See [`SchedStat`].
    pub run_usec: u64,
    /// See [`SchedStat`].
    pub wait_usec: u64,
}

/// What all threads did and waited for, one by one and by role.
pub fn loads() -> Result<(Vec<Load>, BTreeMap<&'static str, RoleLoad>), StatsError> {
    let (mut loads, mut roles) = (Vec::new(), BTreeMap::<_, RoleLoad>::new());
    for Thread { tid, comm, role, folder, .. } in scan(None).threads {
        let stat = SchedStat::of(&folder)?;
        let sched = stat.map_or_else(Figures::default, |stat| Figures {
            run_usec: Some(stat.run_usec),
            wait_usec: Some(stat.wait_usec),
            timeslices: Some(stat.timeslices),
        });
        let SchedStat { run_usec, wait_usec, .. } = stat.unwrap_or_default();
        let sum = roles.entry(role).or_default();
        sum.threads += 1;
        sum.run_usec = sum.run_usec.saturating_add(run_usec);
        sum.wait_usec = sum.wait_usec.saturating_add(wait_usec);
        loads.push(Load { tid, comm, role, sched });
    }
    Ok((loads, roles))
}

/// What each thread did and waited for by its id: vCPUs', and all others'.
pub fn scheds() -> Result<(cgroup::Threads, cgroup::Threads), StatsError> {
    let (mut vcpus, mut others) = (cgroup::Threads::new(), cgroup::Threads::new());
    for Thread { tid, role, folder, .. } in scan(None).threads {
        let threads = if role == "vcpu" { &mut vcpus } else { &mut others };
        threads.extend(SchedStat::of(&folder)?.map(|stat| (tid, stat)));
    }
    Ok((vcpus, others))
}

/// All threads, and those of them that are not where they belong.
#[derive(Debug, Serialize)]
pub struct Threads {
    threads: Vec<Thread>,
    /// What of them is elsewhere.
    pub strays: Vec<Thread>,
}

/// Looks at all threads. Those that end meanwhile are left out. Kernel threads are seen from the root PID
/// namespace only. Without groups of ours no thread is a stray.
pub fn scan(groups: Option<&Groups>) -> Threads {
    let own = std::process::id();
    let tasks = numbers(Path::new("/proc/self/task"));
    let mut found: Vec<(Thread, String)> = tasks
        .iter()
        .filter_map(|tid| Entry::read(&Path::new("/proc/self/task").join(tid.to_string()))?.thread(*tid, own))
        .collect();
    for pid in numbers(Path::new("/proc")) {
        let folder = Path::new("/proc").join(pid.to_string());
        if let Some(entry) = Entry::read(&folder)
            && entry.parent == KTHREADD
            && serves(&entry.comm, &tasks)
        {
            found.extend(entry.thread(pid, own));
        }
    }
    let belongs = |(thread, text): &(Thread, String)| {
        // The worker of another microVM, whose name was cut, is not ours to judge.
        thread.comm == NX_WORKER || groups.is_none_or(|groups| in_place(text, &groups.places, thread.role))
    };
    let strays = found.iter().filter(|found| !belongs(found)).map(|(thread, _)| thread.clone()).collect();
    Threads { threads: found.into_iter().map(|(thread, _)| thread).collect(), strays }
}

/// Pins each vCPU thread to one of `cpus`, in order. Whenever the group's CPUs change the kernel forgets that.
pub fn pin_vcpus(cpus: &CpuSet) -> io::Result<()> {
    for Thread { tid, comm, .. } in scan(None).threads {
        let index = comm.strip_prefix("fc_vcpu ").and_then(|index| index.parse::<usize>().ok());
        let Some(cpu) = index.and_then(|index| cpus.iter().nth(index)) else { continue };
        let mut mask = [0u64; MASK_WORDS];
        mask[usize::from(cpu / 64)] |= 1 << (cpu % 64);
        let tid = libc::pid_t::try_from(tid).map_err(io::Error::other)?;
        // SAFETY: the mask lives through the call, which reads as many bytes as it is told.
        let rc = unsafe { libc::sched_setaffinity(tid, size_of_val(&mask), mask.as_ptr().cast()) };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What /proc says of a thread.
struct Entry {
    comm: String,
    parent: u32,
    flags: u64,
    folder: PathBuf,
}

impl Entry {
    fn read(folder: &Path) -> Option<Self> {
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        // The name may hold blanks and brackets.
        let (head, tail) = stat.rsplit_once(')')?;
        let mut fields = tail.split_whitespace();
        Some(Self {
            comm: head.split_once('(')?.1.to_owned(),
            parent: fields.nth(1)?.parse().ok()?,
            flags: fields.nth(4)?.parse().ok()?,
            folder: folder.to_owned(),
        })
    }

    /// Of the many on a node only ours are asked for their groups, whose text comes second.
    fn thread(self, tid: u32, own: u32) -> Option<(Thread, String)> {
        let text = fs::read_to_string(self.folder.join("cgroup")).ok()?;
        let kernel = self.flags & KERNEL_FLAGS != 0;
        let role = if tid == own { "main" } else { role(&self.comm) };
        let cgroup = by_controller(&text);
        Some((Thread { tid, role, kernel, cgroup, comm: self.comm, folder: self.folder }, text))
    }
}

fn role(comm: &str) -> &'static str {
    const PREFIXES: [(&str, &str); 7] = [
        ("fc_vcpu ", "vcpu"),
        ("pinfold_api", "api"),
        ("pinfold_io", "io"),
        ("vhost-", "vhost"),
        ("kvm-", "kvm"),
        ("iou-wrk-", "iou"),
        ("iou-sqp-", "iou"),
    ];
    PREFIXES.iter().find(|(prefix, _)| comm.starts_with(prefix)).map_or("other", |(_, role)| role)
}

/// Whether a kernel thread of this name works for one of the threads `tids`.
fn serves(comm: &str, tids: &[u32]) -> bool {
    comm == NX_WORKER
        || ["vhost-", "kvm-pit/", "kvm-nx-lpage-recovery-"]
            .iter()
            .find_map(|prefix| comm.strip_prefix(prefix)?.parse().ok())
            .is_some_and(|tid: u32| tids.contains(&tid))
}

/// The lines of a `cgroup` file as hierarchy and path.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'))
}

/// The group by each controller that accounts or limits.
fn by_controller(text: &str) -> BTreeMap<String, String> {
    let v1: BTreeMap<_, _> = lines(text)
        .filter(|(names, _)| !names.is_empty() && !names.starts_with("name="))
        .flat_map(|(names, path)| names.split(',').map(|name| (name.to_owned(), path.to_owned())))
        .collect();
    if v1.is_empty() {
        lines(text).map(|(_, path)| ("unified".to_owned(), path.to_owned())).collect()
    } else {
        v1
    }
}

/// Whether a thread of this role is where it belongs in every hierarchy in which threads are placed.
fn in_place(text: &str, places: &[Place], role: &str) -> bool {
    let role = if role == "vcpu" { Role::Vcpu } else { Role::Overhead };
    places.iter().all(|place| {
        lines(text).any(|(names, path)| names == place.hierarchy && path == place.of(role).as_str())
    })
}

/// The entries of a folder that are numbers.
fn numbers(folder: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(hierarchy: &str, vcpus: &str, overhead: &str) -> Place {
        let path = |text: &str| text.parse().unwrap();
        Place { hierarchy: hierarchy.to_owned(), sandbox: None, vcpus: path(vcpus), overhead: path(overhead) }
    }

    #[test]
    fn our_own_threads_are_found() {
        let found = scan(None);
        let pid = std::process::id();
        assert!(
            found.threads.iter().any(|thread| thread.tid == pid && thread.role == "main" && !thread.kernel)
        );
        assert!(found.strays.is_empty());
    }

    #[test]
    fn our_own_load_is_seen() {
        let (loads, roles) = loads().unwrap();
        let own = loads.iter().find(|load| load.tid == std::process::id()).unwrap();
        assert!(own.sched.run_usec.is_some(), "{own:?}");
        assert_eq!(roles["main"].threads, 1);
        assert_eq!(roles.values().map(|role| role.threads).sum::<usize>(), loads.len());
    }

    #[test]
    fn threads_of_vcpus_are_pinned_by_their_number() {
        let allowed = |folder: &str| -> CpuSet {
            let status = fs::read_to_string(Path::new(folder).join("status")).unwrap();
            let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
            list.parse().unwrap()
        };
        let all = allowed("/proc/thread-self");
        let last: CpuSet = all.iter().last().into_iter().collect();
        let (ready, go) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            let vcpu = std::thread::Builder::new().name("fc_vcpu 0".to_owned()).spawn_scoped(scope, || {
                ready.wait();
                go.wait();
                allowed("/proc/thread-self")
            });
            ready.wait();
            pin_vcpus(&last).unwrap();
            go.wait();
            assert_eq!(vcpu.unwrap().join().unwrap(), last);
        });
        assert_eq!(allowed("/proc/thread-self"), all, "the others are not");
    }

    #[test]
    fn a_thread_is_a_stray_by_any_hierarchy_in_which_it_is_elsewhere() {
        let places = [place("cpu,cpuacct", "/p/v", "/p/o"), place("memory", "/p/o", "/p/o")];
        let text = "9:name=systemd:/x\n4:memory:/p/o\n3:cpu,cpuacct:/p/v\n0::/\n";
        assert!(in_place(text, &places, "vcpu"));
        assert!(!in_place(text, &places, "vhost"));
        assert!(!in_place(&text.replace("memory:/p/o", "memory:/"), &places, "vcpu"));
        assert_eq!(by_controller(text)["cpuacct"], "/p/v");
        assert_eq!(by_controller("0::/a:b\n")["unified"], "/a:b");
    }

    #[test]
    fn kernel_threads_are_known_by_whom_they_serve() {
        for (comm, wanted) in
            [("vhost-42", true), ("vhost-421", false), (NX_WORKER, true), ("kworker/42", false)]
        {
            assert_eq!(serves(comm, &[41, 42]), wanted, "{comm}");
        }
    }
}
