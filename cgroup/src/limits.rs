//! Writing the limits into the groups, through the controllers of the crate cgroups-rs.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};

use cgroups_rs::fs::MaxValue;
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::cpuset::CpuSetController;
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::pid::PidController;

use crate::file::{self, FileError};
use crate::plan::Plan;
use crate::sums::{CpuLimits, PERIOD, weight_from_shares};

/// What a memory limit leaves above what is in use, in bytes.
const MEMORY_MARGIN: u64 = 16 << 20;

/// Writes limits and notes those that could not be had.
pub(crate) struct Limiter {
    /// Groups that existed before: they may hold old limits, so "no limit" is written to them too.
    pub(crate) reused: BTreeSet<PathBuf>,
    /// Why a controller is not available (v2), for the notes.
    pub(crate) refused: BTreeMap<String, String>,
    /// Limits that could not be applied, and why.
    pub(crate) unapplied: Vec<String>,
    /// Limits lower than what is in use.
    pub(crate) pending: Vec<String>,
}

/// The group whose files take a limit, or why there is none.
type Dir = Result<PathBuf, &'static str>;
type Answer = Result<(), cgroups_rs::fs::error::Error>;

impl Limiter {
    /// Writes all limits of the plan to its groups, which exist.
    pub(crate) fn apply(&mut self, plan: &Plan) -> Result<(), FileError> {
        let site = |controller: &str| {
            let mut sites = plan.sites.iter();
            sites
                .find(|site| plan.v2 || site.hierarchy.has(controller))
                .ok_or("our groups are in no such hierarchy")
        };
        let sums = &plan.sums;
        let overhead = CpuLimits { cpus: plan.overhead_cpus.clone(), ..sums.overhead.clone() };
        for (limits, vcpus) in [(&sums.vcpus, true), (&overhead, false)] {
            let of = |controller| {
                site(controller).map(|site| site.dir(if vcpus { &site.vcpus } else { &site.overhead }))
            };
            self.cpu(of("cpu"), limits, plan.v2)?;
            self.cpuset(of("cpuset"), limits, plan.v2)?;
        }
        let of = |controller| {
            let site = site(controller)?;
            let group = site.sandbox.as_ref();
            group
                .map(|group| site.dir(group))
                .ok_or("the group that holds everything is not ours: its limits stay")
        };
        // In our own group's stead there is none of ours to bound both together, and the two are bounded.
        if plan.v2 && of("cpu").is_ok() {
            self.cpu_max(of("cpu"), sums.sandbox_quota())?;
        }
        self.memory(of("memory"), sums.memory, plan.v2)?;
        self.pids(of("pids"), sums.pids)
    }

    fn cpu(&mut self, dir: Dir, limits: &CpuLimits, v2: bool) -> Result<(), FileError> {
        if v2 {
            let weight = limits.shares.map(weight_from_shares);
            self.set(&dir, "cpu.weight", weight, 100, |dir, weight| {
                CpuController::new(dir, PathBuf::new(), true).set_shares(weight)
            })?;
            return self.cpu_max(dir, limits.quota);
        }
        self.set(&dir, "cpu.shares", limits.shares, 1024, |dir, shares| {
            CpuController::new(dir, PathBuf::new(), false).set_shares(shares)
        })?;
        // A period is refused when the old quota makes no sense in it: first without quota.
        let quota = limits.quota.and_then(|us| i64::try_from(us).ok());
        self.set(&dir, "cpu.cfs_quota_us", None, -1, |dir, quota| {
            CpuController::new(dir, PathBuf::new(), false).set_cfs_quota(quota)
        })?;
        self.set(&dir, "cpu.cfs_period_us", quota.map(|_| PERIOD), PERIOD, |dir, period| {
            CpuController::new(dir, PathBuf::new(), false).set_cfs_period(period)
        })?;
        self.set(&dir, "cpu.cfs_quota_us", quota, -1, |dir, quota| {
            CpuController::new(dir, PathBuf::new(), false).set_cfs_quota(quota)
        })
    }

    fn cpu_max(&mut self, dir: Dir, quota: Option<u64>) -> Result<(), FileError> {
        let quota = quota.and_then(|us| i64::try_from(us).ok());
        self.set(&dir, "cpu.max", quota, -1, |dir, quota| {
            CpuController::new(dir, PathBuf::new(), true).set_cfs_quota_and_period(Some(quota), Some(PERIOD))
        })
    }

    fn cpuset(&mut self, dir: Dir, limits: &CpuLimits, v2: bool) -> Result<(), FileError> {
        for (file, set, which) in [
            (
                "cpuset.cpus",
                &limits.cpus,
                CpuSetController::set_cpus as fn(&CpuSetController, &str) -> Answer,
            ),
            ("cpuset.mems", &limits.mems, CpuSetController::set_mems),
        ] {
            let list = set.as_ref().map(ToString::to_string);
            // An empty v2 set means the parent's; an empty v1 set means none at all, so there the parent's
            // value that was copied on creation stays.
            if v2 || list.is_some() {
                self.set(&dir, file, list, "\n".to_owned(), |dir, list| {
                    which(&CpuSetController::new(dir, PathBuf::new(), v2), &list)
                })?;
            }
        }
        Ok(())
    }

    fn memory(&mut self, dir: Dir, limit: Option<u64>, v2: bool) -> Result<(), FileError> {
        let (file, usage) = if v2 {
            ("memory.max", "memory.current")
        } else {
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
        };
        let mut limit = limit;
        if let (Ok(dir), Some(wanted)) = (&dir, limit) {
            // A reused group may still be charged for page cache.
            let used = match dir.join(usage) {
                path if path.exists() => file::read(&path)?.trim().parse().unwrap_or(0),
                _ => 0u64,
            };
            let floor = used.saturating_add(MEMORY_MARGIN);
            if used > 0 && wanted < floor {
                self.pending.push(format!(
                    "{file} = {wanted} of {}: {used} bytes are in use, {floor} was written",
                    dir.display()
                ));
                limit = Some(floor);
            }
        }
        let limit = limit.and_then(|bytes| i64::try_from(bytes).ok());
        self.set(&dir, file, limit, -1, |dir, limit| {
            MemController::new(dir, PathBuf::new(), v2).set_limit(limit)
        })
    }

    fn pids(&mut self, dir: Dir, limit: Option<u64>) -> Result<(), FileError> {
        let limit = limit.and_then(|tasks| i64::try_from(tasks).ok()).map(MaxValue::Value);
        self.set(&dir, "pids.max", limit, MaxValue::Max, |dir, limit| {
            PidController::new(dir, PathBuf::new(), false).set_pid_max(limit)
        })
    }

    /// Writes one limit. `None` is `default`, which a fresh group has already.
    fn set<T: ToString>(
        &mut self,
        dir: &Dir,
        file: &'static str,
        limit: Option<T>,
        default: T,
        write: impl FnOnce(PathBuf, T) -> Answer,
    ) -> Result<(), FileError> {
        let controller = file.split('.').next().unwrap_or(file);
        let dir = match dir {
            Ok(dir) => dir,
            Err(why) => {
                self.unapplied.extend(limit.map(|limit| format!("{file} = {}: {why}", limit.to_string())));
                return Ok(());
            }
        };
        let path = dir.join(file);
        if !path.exists() {
            if let Some(limit) = limit {
                let why = self.refused.get(controller).map_or_else(String::new, |why| format!(" ({why})"));
                self.unapplied.push(format!(
                    "{file} = {} of {}: the controller {controller} is not available there{why}",
                    limit.to_string(),
                    dir.display()
                ));
            }
            return Ok(());
        }
        if limit.is_none() && !self.reused.contains(dir) {
            return Ok(());
        }
        let limit = limit.unwrap_or(default);
        let shown = limit.to_string();
        write(dir.to_owned(), limit)
            .map_err(|error| FileError::new(format!("write `{}` to", shown.trim()), &path, cause(&error)))
    }
}

/// Gives a group of a v1 cpuset hierarchy the CPUs and memory nodes of the group above, without which no
/// thread can join; `anew` also when it has some of old.
pub(crate) fn seed_cpuset(dir: &Path, anew: bool) -> Result<(), FileError> {
    use cgroups_rs::fs::Controller as _;
    // On a directory that exists this does nothing but copy. It only logs when it fails, so look.
    CpuSetController::new(dir.to_owned(), PathBuf::new(), false)
        .create()
        .map_err(|error| FileError::new("set up the cpuset of", dir, cause(&error)))?;
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let path = dir.join(name);
        if let Some(above) = dir.parent().filter(|_| anew) {
            file::write(&path, file::read(&above.join(name))?.trim())?;
        }
        if file::read(&path)?.trim().is_empty() {
            let answer = io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(FileError::new("copy the parent's value to", &path, answer));
        }
    }
    Ok(())
}

/// The kernel's answer in an error of cgroups-rs.
fn cause(error: &cgroups_rs::fs::error::Error) -> io::Error {
    match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(io) => io.raw_os_error().map_or_else(|| io.kind().into(), io::Error::from_raw_os_error),
        None => io::Error::other(error.to_string()),
    }
}
