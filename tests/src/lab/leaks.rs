//! What launches could leave behind, counted before and after.

use super::cgroups::roots;
use super::{PATIENCE, read, write};
use crate::case::Failure;
use crate::check;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How much less memory may be available afterwards, and how much more the kernel may hold: caches of its own, and what
/// the machine does beside. A launch that left 300 KiB would show after 200.
const MEMORY_KIB: u64 = 48 << 10;
/// Groups that are removed and not freed yet: the kernel's caches hold on to a few.
const DYING: u64 = 16;

/// Counts of what there is.
#[derive(Debug, Clone)]
pub struct Tally {
    descriptors: usize,
    threads: usize,
    groups: usize,
    interfaces: usize,
    /// Removed groups that the kernel keeps (v2).
    dying: u64,
    available_kib: u64,
    unreclaimable_kib: u64,
}

impl Tally {
    /// Counts now: the descriptors and threads of this process, and the host's cgroups, network interfaces and memory
    /// without caches.
    pub fn take() -> Result<Self, Failure> {
        // Clean pages of files and unused inodes count as neither used nor lost.
        // SAFETY: sync has no preconditions.
        unsafe { libc::sync() };
        write(Path::new("/proc/sys/vm/drop_caches"), "3")?;
        let mut groups = 0;
        let mut dying = 0;
        for root in roots()? {
            groups += folders(&root.mount)?;
            if root.unified {
                let stat = read(&root.mount.join("cgroup.stat"))?;
                dying = number(&stat, "nr_dying_descendants")?;
            }
        }
        let memory = read(Path::new("/proc/meminfo"))?;
        Ok(Self {
            descriptors: fs::read_dir("/proc/self/fd")?.count(),
            threads: fs::read_dir("/proc/self/task")?.count(),
            groups,
            interfaces: fs::read_dir("/sys/class/net")?.count(),
            dying,
            available_kib: number(&memory, "MemAvailable:")?,
            unreclaimable_kib: number(&memory, "SUnreclaim:")?,
        })
    }

    /// Waits until nothing is left of what came since: the kernel frees much of it a moment later.
    pub fn expect_restored(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = Self::take()?;
            let left = self.left(&now);
            if left.is_empty() {
                println!("before {self:?}\nafter  {now:?}");
                return Ok(());
            }
            check!(Instant::now() < deadline, "{left:?} is left: before {self:?}, after {now:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The names of what is more than it was.
    fn left(&self, now: &Self) -> Vec<&'static str> {
        [
            ("descriptors", now.descriptors > self.descriptors),
            ("threads", now.threads > self.threads),
            ("cgroups", now.groups > self.groups),
            ("network interfaces", now.interfaces > self.interfaces),
            ("dying cgroups", now.dying > self.dying + DYING),
            ("memory", now.available_kib + MEMORY_KIB < self.available_kib),
            ("slab", now.unreclaimable_kib > self.unreclaimable_kib + MEMORY_KIB),
        ]
        .into_iter()
        .filter_map(|(name, more)| more.then_some(name))
        .collect()
    }
}

/// Makes this process the parent of those below it whose parents end, so that [`expect_no_children`] sees them.
pub fn adopt_orphans() -> Result<(), Failure> {
    // SAFETY: the option takes a number.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error().into())
}

/// Waits for the end of every child, adopted ones included. Those that cases wait for are to have ended before.
pub fn expect_no_children() -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // SAFETY: waitpid with no status to store.
        match unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } {
            0 => {
                let children: BTreeSet<_> = super::scan(std::process::id())?
                    .into_iter()
                    .filter(|thread| !thread.kernel)
                    .map(|thread| thread.comm)
                    .collect();
                check!(Instant::now() < deadline, "there are still processes: {children:?}");
                std::thread::sleep(Duration::from_millis(2));
            }
            -1 => return Ok(()),
            _ => {}
        }
    }
}

/// How many folders there are below `folder`, which may change meanwhile.
fn folders(folder: &Path) -> std::io::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            count += 1 + folders(&entry.path()).unwrap_or_default();
        }
    }
    Ok(count)
}

/// The number after `name` in a file of lines that start with names.
fn number(text: &str, name: &str) -> Result<u64, Failure> {
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found =
        words.filter(|words| words.first() == Some(&name)).find_map(|words| words.get(1)?.parse().ok());
    found.ok_or_else(|| Failure(format!("no {name} in `{text}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_named() {
        let before = Tally {
            descriptors: 5,
            threads: 1,
            groups: 80,
            interfaces: 2,
            dying: 3,
            available_kib: 1 << 20,
            unreclaimable_kib: 1 << 14,
        };
        assert!(before.left(&before).is_empty());
        let after = Tally { groups: 81, available_kib: 0, ..before.clone() };
        assert_eq!(before.left(&after), ["cgroups", "memory"]);
        assert_eq!(
            before.left(&Tally { dying: 200, threads: 2, ..before.clone() }),
            ["threads", "dying cgroups"]
        );
    }
}
