//! Where the threads of this process are, and the kernel threads that work for it: `GET /cgroup/threads`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use cgroup::{CpuSet, Groups, Place, Role, SchedStat, StatsError};
use rustix::fs::{CWD, Dir, Mode, OFlags};
use serde::Serialize;

use crate::jail::inside::{Jail, jail};

/// PF_IO_WORKER, PF_USER_WORKER (Linux 6.4 and later) and PF_KTHREAD: flags of threads that run kernel code only
/// (include/linux/sched.h).
const KERNEL_FLAGS: u64 = 0x10 | 0x4000 | 0x0020_0000;

/// The process id of kthreadd, the parent of all kernel threads.
const KTHREADD: u32 = 2;

/// 64-bit words of a mask of all CPUs that a [`CpuSet`] can hold.
const MASK_WORDS: usize = 8192 / 64;

/// A kernel's name of the worker that is cut before the id: older kernels show 15 bytes.
const NX_WORKER: &str = "kvm-nx-lpage-re";

/// A thread and its places. Of one that is only known to be in a group of ours nothing else is known: in a jail, where
/// there is no /proc, that is what there is of kernel threads.
#[derive(Clone, Debug, Serialize)]
pub struct Thread {
    /// As the host sees it.
    tid: u32,
    comm: Option<String>,
    role: Option<&'static str>,
    /// Whether it runs kernel code only.
    kernel: Option<bool>,
    /// Its group by controller; by `unified` on v2.
    cgroup: BTreeMap<String, String>,
    /// Its directory in /proc.
    #[serde(skip)]
    folder: Option<Folder>,
}

/// A directory in /proc.
#[derive(Clone, Debug)]
struct Folder {
    at: BorrowedFd<'static>,
    path: PathBuf,
}

impl Folder {
    fn new(path: &str) -> Self {
        Self { at: CWD, path: path.into() }
    }

    /// That of our threads. The ids in it are those that the host sees.
    fn tasks() -> Self {
        match jail() {
            Some(jail) => Self { at: jail.tasks(), path: ".".into() },
            None => Self::new("/proc/self/task"),
        }
    }

    fn join(&self, number: u32) -> Self {
        Self { at: self.at, path: self.path.join(number.to_string()) }
    }

    /// The text of one of its files.
    fn read(&self, name: &str) -> io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(self.at, self.path.join(name), flags, Mode::empty())?;
        let mut text = String::new();
        File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }

    /// The entries that are numbers.
    fn numbers(&self) -> Vec<u32> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let entries = rustix::fs::openat(self.at, &self.path, flags, Mode::empty()).and_then(Dir::new);
        let Ok(entries) = entries else { return Vec::new() };
        entries.flatten().filter_map(|entry| entry.file_name().to_str().ok()?.parse().ok()).collect()
    }

    /// What the thread of this directory did and waited for; `None` when it is gone or the kernel keeps no such figures.
    fn sched(&self) -> Result<Option<SchedStat>, StatsError> {
        let text = self.read("schedstat").ok();
        text.map(|text| SchedStat::parse(&text, &self.path.join("schedstat"))).transpose()
    }
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
    for (tid, comm, role, folder) in known() {
        let stat = folder.sched()?;
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
    for (tid, _, role, folder) in known() {
        let threads = if role == "vcpu" { &mut vcpus } else { &mut others };
        threads.extend(folder.sched()?.map(|stat| (tid, stat)));
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

/// The threads of which more than the group is known: id, name, role and directory.
fn known() -> impl Iterator<Item = (u32, String, &'static str, Folder)> {
    let threads = scan(None, &[]).threads.into_iter();
    threads.filter_map(|Thread { tid, comm, role, folder, .. }| Some((tid, comm?, role?, folder?)))
}

/// Looks at all threads. Those that end meanwhile are left out. Without groups of ours no thread is a stray.
///
/// Kernel threads are seen where there is a /proc of the root PID namespace. Elsewhere `others`, the ids of threads in the
/// overhead group, tell that they are there.
pub fn scan(groups: Option<&Groups>, others: &[u32]) -> Threads {
    let own = jail().map_or_else(std::process::id, Jail::pid);
    let folder = Folder::tasks();
    let tasks = folder.numbers();
    let mut found: Vec<(Thread, String)> =
        tasks.iter().filter_map(|tid| Entry::read(folder.join(*tid))?.thread(*tid, own)).collect();
    let all = Folder::new("/proc");
    for pid in all.numbers() {
        if let Some(entry) = Entry::read(all.join(pid))
            && entry.parent == KTHREADD
            && serves(&entry.comm, &tasks)
        {
            found.extend(entry.thread(pid, own));
        }
    }
    let belongs = |(thread, text): &(Thread, String)| {
        // The worker of another microVM, whose name was cut, is not ours to judge.
        thread.comm.as_deref() == Some(NX_WORKER)
            || groups.is_none_or(|groups| in_place(text, &groups.places, thread.role))
    };
    let strays = found.iter().filter(|found| !belongs(found)).map(|(thread, _)| thread.clone()).collect();
    let mut threads: Vec<Thread> = found.into_iter().map(|(thread, _)| thread).collect();
    let unknown: Vec<u32> =
        others.iter().copied().filter(|tid| threads.iter().all(|thread| thread.tid != *tid)).collect();
    threads.extend(unknown.into_iter().map(|tid| Thread {
        tid,
        comm: None,
        role: None,
        kernel: None,
        cgroup: groups.map_or_else(BTreeMap::new, overhead),
        folder: None,
    }));
    Threads { threads, strays }
}

/// Pins each vCPU thread to one of `cpus`, in order. Whenever the group's CPUs change the kernel forgets that.
pub fn pin_vcpus(cpus: &CpuSet) -> io::Result<()> {
    for (tid, comm, _, folder) in known() {
        let index = comm.strip_prefix("fc_vcpu ").and_then(|index| index.parse::<usize>().ok());
        let Some(cpu) = index.and_then(|index| cpus.iter().nth(index)) else { continue };
        // In a PID namespace of our own we call it otherwise than the host does.
        let tid = folder.read("status").ok().and_then(|status| innermost(&status)).unwrap_or(tid);
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
    folder: Folder,
}

impl Entry {
    fn read(folder: Folder) -> Option<Self> {
        let stat = folder.read("stat").ok()?;
        // The name may hold blanks and brackets.
        let (head, tail) = stat.rsplit_once(')')?;
        let mut fields = tail.split_whitespace();
        Some(Self {
            comm: head.split_once('(')?.1.to_owned(),
            parent: fields.nth(1)?.parse().ok()?,
            flags: fields.nth(4)?.parse().ok()?,
            folder,
        })
    }

    /// Of the many on a node only ours are asked for their groups, whose text comes second.
    fn thread(self, tid: u32, own: u32) -> Option<(Thread, String)> {
        let text = self.folder.read("cgroup").ok()?;
        let kernel = self.flags & KERNEL_FLAGS != 0;
        let role = if tid == own { "main" } else { role(&self.comm) };
        let cgroup = by_controller(&text);
        let (comm, folder) = (Some(self.comm), Some(self.folder));
        Some((Thread { tid, role: Some(role), kernel: Some(kernel), cgroup, comm, folder }, text))
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
fn in_place(text: &str, places: &[Place], role: Option<&str>) -> bool {
    let role = if role == Some("vcpu") { Role::Vcpu } else { Role::Overhead };
    places.iter().all(|place| {
        lines(text).any(|(names, path)| names == place.hierarchy && path == place.of(role).as_str())
    })
}

/// The overhead group by each controller whose file tells who is in it.
fn overhead(groups: &Groups) -> BTreeMap<String, String> {
    let place =
        groups.places.iter().find(|place| groups.v2 || place.hierarchy.split(',').any(|it| it == "cpu"));
    let lines = place.map(|place| format!("0:{}:{}", place.hierarchy, place.overhead.as_str()));
    lines.map_or_else(BTreeMap::new, |line| by_controller(&line))
}

/// A thread's id in the innermost PID namespace that it is in, from its `status` (proc_pid_status(5)).
fn innermost(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().next_back()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn place(hierarchy: &str, vcpus: &str, overhead: &str) -> Place {
        let path = |text: &str| text.parse().unwrap();
        Place { hierarchy: hierarchy.to_owned(), sandbox: None, vcpus: path(vcpus), overhead: path(overhead) }
    }

    #[test]
    fn our_own_threads_are_found() {
        let found = scan(None, &[]);
        let pid = std::process::id();
        assert!(found.threads.iter().any(|thread| {
            thread.tid == pid && thread.role == Some("main") && thread.kernel == Some(false)
        }));
        assert!(found.strays.is_empty());
    }

    #[test]
    fn a_thread_that_is_only_known_to_be_there_has_no_name() {
        let groups = Groups { v2: true, places: vec![place("", "/p/v", "/p/o")], created: Vec::new() };
        let pid = std::process::id();
        let found = scan(Some(&groups), &[pid, 4_000_000_000]).threads;
        assert_eq!(found.iter().filter(|thread| thread.tid == pid).count(), 1);
        let unknown = found.last().unwrap();
        assert_eq!((unknown.tid, &unknown.comm, unknown.kernel), (4_000_000_000, &None, None));
        assert_eq!(unknown.cgroup["unified"], "/p/o");
        assert_eq!(innermost("Name:\tx\nNSpid:\t4077\t12\nFDSize: 3\n"), Some(12));
        assert_eq!(innermost(&fs::read_to_string("/proc/self/status").unwrap()), Some(pid));
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
        assert!(in_place(text, &places, Some("vcpu")));
        assert!(!in_place(text, &places, Some("vhost")));
        assert!(!in_place(&text.replace("memory:/p/o", "memory:/"), &places, Some("vcpu")));
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
