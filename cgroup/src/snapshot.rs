//! What a diagnosis compares: figures of one moment.

use std::collections::BTreeMap;
use std::path::Path;

use crate::bandwidth::Bandwidth;
use crate::counters::{self, HostTime, SchedStat, StatsError};
use crate::file::Files;
use crate::layout::Layout;
use crate::path::CgroupPath;
use crate::settings::Scope;
use crate::stats::{CpuStats, Pressures, cpu_v1, cpu_v2};

/// Figures of one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// When, in microseconds since any moment.
    pub time_usec: u64,
    /// Whether it is cgroup v2.
    pub v2: bool,
    /// The vCPU threads' group.
    pub vcpus: Load,
    /// That of all other threads.
    pub overhead: Load,
    /// The groups above both, innermost first, as far as they can be seen and have a quota or could have one.
    pub above: Vec<(CgroupPath, CpuStats)>,
    /// What the host's CPUs did.
    pub host: Option<HostTime>,
}

/// Figures of one group.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// CPU time and throttling.
    pub cpu: CpuStats,
    /// Waiting; v2 only.
    pub pressure: Pressures,
    /// Its quota.
    pub bandwidth: Option<Bandwidth>,
    /// How many CPUs it may run on.
    pub cpus: Option<usize>,
    /// Its threads by their ids. Those of which the kernel keeps no figures are not there.
    pub threads: Threads,
}

/// What threads did and waited for, by their ids.
pub type Threads = BTreeMap<u32, SchedStat>;

impl Layout {
    /// Reads all that a diagnosis needs. The threads' figures are read by who knows which they are.
    ///
    /// # Errors
    /// When a file that is there refuses or does not follow the kernel's format, naming it. Of groups above ours that
    /// is no error: they are left out.
    pub fn snapshot(
        &self,
        time_usec: u64,
        vcpus: Threads,
        overhead: Threads,
    ) -> Result<Snapshot, StatsError> {
        Ok(Snapshot {
            time_usec,
            v2: self.v2,
            vcpus: self.load(Scope::Vcpus, vcpus)?,
            overhead: self.load(Scope::Overhead, overhead)?,
            above: self.above(),
            host: counters::read(&self.reach, Path::new("/proc/stat"), counters::host_time)?,
        })
    }

    /// The ids of all threads in one of the two groups of threads, whoever's they are; none when that cannot be read. Those
    /// of another PID namespace than ours have none.
    #[must_use]
    pub fn thread_ids(&self, scope: Scope) -> Vec<u32> {
        let Some((_, dir)) = self.place(scope, "cpu") else { return Vec::new() };
        let text = self.reach.read(&dir.join(if self.v2 { "cgroup.threads" } else { "tasks" }));
        let ids = text.unwrap_or_default();
        ids.lines().filter_map(|id| id.parse().ok()).filter(|id| *id != 0).collect()
    }

    fn load(&self, scope: Scope, threads: Threads) -> Result<Load, StatsError> {
        let group = self.group(scope)?;
        let cpus = self.cpus(scope).map(|cpus| cpus.len());
        Ok(Load {
            cpu: group.cpu,
            pressure: group.pressure,
            bandwidth: self.bandwidth(scope)?,
            cpus,
            threads,
        })
    }

    fn above(&self) -> Vec<(CgroupPath, CpuStats)> {
        let Some(site) = self.site("cpu") else { return Vec::new() };
        let above = std::iter::successors(site.vcpus.parent(), CgroupPath::parent);
        let seen = above.take_while(|path| !path.is_root()).filter_map(|path| {
            let dir = site.hierarchy.dir(&path)?;
            let cpu = if self.v2 { cpu_v2(&self.reach, &dir) } else { cpu_v1(&self.reach, &dir, None, 1) };
            Some((path, cpu.ok().filter(|cpu| cpu.throttled_usec.is_some())?))
        });
        seen.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::tests::{fake, layout};

    #[test]
    fn a_snapshot_has_the_groups_and_those_above() {
        let throttled =
            |usec: u64| format!("usage_usec 9\nnr_periods 4\nnr_throttled 2\nthrottled_usec {usec}\n");
        let (own, pod) = (throttled(5), throttled(7));
        let dir = fake(&[
            ("p/cpu.stat", &pod),
            ("p/box/cpu.stat", "usage_usec 9\n"),
            ("p/box/v/cpu.stat", &own),
            ("p/box/v/cpu.max", "1000 2000\n"),
            ("p/cpuset.cpus.effective", "0-1\n"),
        ]);
        let threads = Threads::from([(7, SchedStat { run_usec: 1, wait_usec: 2, timeslices: 3 })]);
        let all =
            layout(dir.path(), &[], Some("/p/box")).snapshot(5, threads.clone(), Threads::new()).unwrap();
        assert_eq!((all.time_usec, all.v2, all.vcpus.cpus), (5, true, Some(2)));
        assert_eq!(all.vcpus.threads, threads);
        assert_eq!(all.vcpus.bandwidth, Some(Bandwidth { quota: Some(1000), period: 2000 }));
        let above: Vec<_> = all.above.iter().map(|(path, cpu)| (path.as_str(), cpu.throttled_usec)).collect();
        assert_eq!(above, [("/p", Some(7))]);
        assert!(all.host.is_some());
    }
}
