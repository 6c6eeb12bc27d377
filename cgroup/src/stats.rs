//! What the groups used, and what they waited for. Times are microseconds on v1, too, where the kernel counts in
//! nanoseconds and ticks.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::counters::{self, DeviceTransfers, Pressure, StatsError, Transfers};
use crate::file::Files;
use crate::layout::Layout;
use crate::path::CgroupPath;
use crate::plan::Site;
use crate::settings::Scope;

/// Figures of all groups. `None` is what the kernel, or the group, does not have.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Whether it is cgroup v2.
    pub v2: bool,
    /// The group of everything. On v1 its CPU time is that of both groups of threads.
    pub sandbox: GroupStats,
    /// The vCPU threads.
    pub vcpus: GroupStats,
    /// All other threads.
    pub overhead: GroupStats,
    /// Memory of everything: it belongs to the process, not to a thread.
    pub memory: MemoryStats,
    /// Block I/O of everything.
    pub io: IoStats,
}

/// Figures of one group.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct GroupStats {
    /// The group; `None` where it is none of ours and not found.
    pub path: Option<CgroupPath>,
    /// CPU time.
    pub cpu: CpuStats,
    /// Waiting; v2 only.
    pub pressure: Pressures,
}

/// CPU time, in microseconds since the group was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct CpuStats {
    /// All of it.
    pub usage_usec: Option<u64>,
    /// In user mode, guest time included.
    pub user_usec: Option<u64>,
    /// In the kernel.
    pub system_usec: Option<u64>,
    /// Periods in which a quota applied.
    pub nr_periods: Option<u64>,
    /// Periods in which it was used up.
    pub nr_throttled: Option<u64>,
    /// Time for which CPUs were withheld because of it.
    pub throttled_usec: Option<u64>,
}

/// Waiting for each resource.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Pressures {
    /// For a CPU.
    pub cpu: Option<Pressure>,
    /// For memory.
    pub memory: Option<Pressure>,
    /// For I/O.
    pub io: Option<Pressure>,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct MemoryStats {
    /// In use, page cache included.
    pub current_bytes: Option<u64>,
    /// The most that ever was; v2 from Linux 5.19 on.
    pub peak_bytes: Option<u64>,
    /// What may be in use; `None` for no limit, too.
    pub limit_bytes: Option<u64>,
    /// Anonymous memory: the guest's, most of all.
    pub anon_bytes: Option<u64>,
    /// Page cache.
    pub file_bytes: Option<u64>,
    /// The kernel's own; v2 from Linux 5.18 on.
    pub kernel_bytes: Option<u64>,
}

/// Block I/O since the group was made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct IoStats {
    /// Of all devices; `None` without the controller.
    #[serde(flatten)]
    pub total: TotalTransfers,
    /// Of each device that was used.
    pub devices: Vec<DeviceTransfers>,
    /// Whether writes that go through the page cache are counted here. On v1 they are charged to the root group.
    pub counts_buffered_writes: bool,
}

/// A sum of [`Transfers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct TotalTransfers {
    /// Bytes read.
    pub read_bytes: Option<u64>,
    /// Bytes written.
    pub write_bytes: Option<u64>,
    /// Reads.
    pub read_operations: Option<u64>,
    /// Writes.
    pub write_operations: Option<u64>,
}

impl IoStats {
    fn new(devices: Option<Vec<DeviceTransfers>>, counts_buffered_writes: bool) -> Self {
        let Some(devices) = devices else { return Self { counts_buffered_writes, ..Self::default() } };
        let mut sum = Transfers::default();
        devices.iter().for_each(|device| sum.add(&device.transfers));
        let total = TotalTransfers {
            read_bytes: Some(sum.read_bytes),
            write_bytes: Some(sum.write_bytes),
            read_operations: Some(sum.read_operations),
            write_operations: Some(sum.write_operations),
        };
        Self { total, devices, counts_buffered_writes }
    }
}

impl Layout {
    /// Reads all figures.
    ///
    /// # Errors
    /// When a file that is there refuses or does not follow the kernel's format, naming it.
    pub fn stats(&self) -> Result<Stats, StatsError> {
        let sandbox = self.whole("memory");
        let memory = sandbox.map_or(Ok(MemoryStats::default()), |(site, group)| {
            memory(&self.reach, &site.dir(group), self.v2)
        })?;
        let mut stats = Stats {
            v2: self.v2,
            sandbox: GroupStats { path: sandbox.map(|(_, group)| group.clone()), ..GroupStats::default() },
            vcpus: self.group(Scope::Vcpus)?,
            overhead: self.group(Scope::Overhead)?,
            memory,
            io: self.io()?,
        };
        if self.v2 {
            if let Some((site, group)) = sandbox {
                let dir = site.dir(group);
                stats.sandbox.cpu = cpu_v2(&self.reach, &dir)?;
                stats.sandbox.pressure = pressures(&self.reach, &dir)?;
            }
        } else {
            let sum = |of: fn(&CpuStats) -> Option<u64>| {
                Some(of(&stats.vcpus.cpu)?.saturating_add(of(&stats.overhead.cpu)?))
            };
            stats.sandbox.cpu = CpuStats {
                usage_usec: sum(|cpu| cpu.usage_usec),
                user_usec: sum(|cpu| cpu.user_usec),
                system_usec: sum(|cpu| cpu.system_usec),
                ..CpuStats::default()
            };
        }
        Ok(stats)
    }

    /// The site with a controller, and the group of everything there, which may be the base.
    pub(crate) fn whole(&self, controller: &str) -> Option<(&Site, &CgroupPath)> {
        let site = self.site(controller)?;
        Some((site, site.sandbox.as_ref().unwrap_or(&site.base)))
    }

    pub(crate) fn group(&self, scope: Scope) -> Result<GroupStats, StatsError> {
        let Some((path, dir)) = self.place(scope, "cpu") else { return Ok(GroupStats::default()) };
        let pressure = if self.v2 { pressures(&self.reach, &dir)? } else { Pressures::default() };
        Ok(GroupStats { path: Some(path.clone()), cpu: self.cpu(scope)?, pressure })
    }

    /// CPU time of one of the two groups of threads.
    ///
    /// # Errors
    /// When a file that is there refuses or does not follow the kernel's format, naming it.
    pub fn cpu(&self, scope: Scope) -> Result<CpuStats, StatsError> {
        match self.place(scope, "cpu") {
            None => Ok(CpuStats::default()),
            Some((_, dir)) if self.v2 => cpu_v2(&self.reach, &dir),
            Some((_, dir)) => {
                let accounts = self.place(scope, "cpuacct").map(|(_, dir)| dir);
                cpu_v1(&self.reach, &dir, accounts.as_deref(), ticks_per_second())
            }
        }
    }

    /// One of the two groups of threads, and its directory with a controller's files.
    pub(crate) fn place(&self, scope: Scope, controller: &str) -> Option<(&CgroupPath, PathBuf)> {
        let site = self.site(controller)?;
        let group = if scope == Scope::Vcpus { &site.vcpus } else { &site.overhead };
        Some((group, site.dir(group)))
    }

    fn io(&self) -> Result<IoStats, StatsError> {
        let controller = if self.v2 { "io" } else { "blkio" };
        let Some((site, group)) = self.whole(controller) else { return Ok(IoStats::new(None, self.v2)) };
        let dir = site.dir(group);
        let devices = if self.v2 {
            counters::read(&self.reach, &dir.join("io.stat"), counters::io_stat)?
        } else {
            blkio(&self.reach, &dir)?
        };
        Ok(IoStats::new(devices, self.v2))
    }
}

pub(crate) fn cpu_v2(files: &dyn Files, dir: &Path) -> Result<CpuStats, StatsError> {
    let keys = ["usage_usec", "user_usec", "system_usec", "nr_periods", "nr_throttled", "throttled_usec"];
    let values = counters::read(files, &dir.join("cpu.stat"), |text| counters::keyed(text, keys))?;
    let [usage_usec, user_usec, system_usec, nr_periods, nr_throttled, throttled_usec] =
        values.unwrap_or_default();
    Ok(CpuStats { usage_usec, user_usec, system_usec, nr_periods, nr_throttled, throttled_usec })
}

/// `tick` is how many of `cpuacct.stat`'s units make a second (USER_HZ).
pub(crate) fn cpu_v1(
    files: &dyn Files,
    cpu: &Path,
    accounts: Option<&Path>,
    ticks: u64,
) -> Result<CpuStats, StatsError> {
    let keys = ["nr_periods", "nr_throttled", "throttled_time"];
    let [nr_periods, nr_throttled, throttled] =
        counters::read(files, &cpu.join("cpu.stat"), |text| counters::keyed(text, keys))?.unwrap_or_default();
    let throttled_usec = throttled.map(|ns| ns / 1000);
    let mut stats = CpuStats { nr_periods, nr_throttled, throttled_usec, ..CpuStats::default() };
    let Some(dir) = accounts else { return Ok(stats) };
    stats.usage_usec =
        counters::read(files, &dir.join("cpuacct.usage"), counters::number)?.map(|ns| ns / 1000);
    let [user, system] =
        counters::read(files, &dir.join("cpuacct.stat"), |text| counters::keyed(text, ["user", "system"]))?
            .unwrap_or_default();
    let usec = |count: u64| count.saturating_mul(1_000_000 / ticks.max(1));
    stats.user_usec = user.map(usec);
    stats.system_usec = system.map(usec);
    Ok(stats)
}

fn ticks_per_second() -> u64 {
    // SAFETY: sysconf takes an integer and touches no memory.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    // 100 on every Linux of x86_64.
    u64::try_from(ticks).ok().filter(|ticks| *ticks > 0).unwrap_or(100)
}

fn pressures(files: &dyn Files, dir: &Path) -> Result<Pressures, StatsError> {
    let of = |name: &str| counters::read(files, &dir.join(name), counters::pressure);
    Ok(Pressures { cpu: of("cpu.pressure")?, memory: of("memory.pressure")?, io: of("io.pressure")? })
}

fn memory(files: &dyn Files, dir: &Path, v2: bool) -> Result<MemoryStats, StatsError> {
    /// What v1 says for no limit: the largest multiple of a page's size in an i64.
    const NONE: u64 = 0x7fff_ffff_ffff_f000;
    let number = |name: &str| counters::read(files, &dir.join(name), counters::number);
    let keys = if v2 { ["anon", "file", "kernel"] } else { ["total_rss", "total_cache", ""] };
    let [anon_bytes, file_bytes, kernel] =
        counters::read(files, &dir.join("memory.stat"), |text| counters::keyed(text, keys))?
            .unwrap_or_default();
    let names = match v2 {
        true => ["memory.current", "memory.peak", "memory.max"],
        false => ["memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes"],
    };
    let limit = counters::read(files, &dir.join(names[2]), counters::limit)?.flatten();
    Ok(MemoryStats {
        current_bytes: number(names[0])?,
        peak_bytes: number(names[1])?,
        limit_bytes: limit.filter(|bytes| *bytes < NONE),
        anon_bytes,
        file_bytes,
        kernel_bytes: if v2 { kernel } else { number("memory.kmem.usage_in_bytes")? },
    })
}

fn blkio(files: &dyn Files, dir: &Path) -> Result<Option<Vec<DeviceTransfers>>, StatsError> {
    let mut devices = Vec::new();
    let mut add = |name: &str, place: fn(&mut Transfers, bool) -> &mut u64| {
        counters::read(files, &dir.join(name), |text| counters::blkio(text, &mut devices, place))
    };
    let bytes = add("blkio.throttle.io_service_bytes", |transfers, write| match write {
        true => &mut transfers.write_bytes,
        false => &mut transfers.read_bytes,
    })?;
    add("blkio.throttle.io_serviced", |transfers, write| match write {
        true => &mut transfers.write_operations,
        false => &mut transfers.read_operations,
    })?;
    Ok(bytes.map(|()| devices))
}

#[cfg(test)]
pub(crate) mod tests;
