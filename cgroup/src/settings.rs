//! From sums to the files that hold them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::layout::Layout;
use crate::path::CgroupPath;
use crate::plan::Site;
use crate::sums::{CpuLimits, PERIOD, Sums, weight_from_shares};

/// Which of our groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// That of everything. Memory and number of tasks belong to it as a whole.
    Sandbox,
    /// That of the vCPU threads.
    Vcpus,
    /// That of all other threads.
    Overhead,
}

/// A value that one file of one group is to have.
#[derive(Debug)]
pub(crate) struct Setting {
    pub(crate) scope: Scope,
    /// The group and its directory, or why there is none that could take the limit.
    pub(crate) place: Result<(CgroupPath, PathBuf), &'static str>,
    pub(crate) file: &'static str,
    /// `None` for no limit.
    pub(crate) value: Option<String>,
    pub(crate) unlimited: Unlimited,
}

/// What stands for "no limit" in a file.
#[derive(Debug)]
pub(crate) enum Unlimited {
    /// This text.
    Text(&'static str),
    /// What this file says: a v1 cpuset must not be empty, so it is that of the group around ours.
    Of(PathBuf),
}

/// All settings, each with its value or without.
pub(crate) fn settings(layout: &Layout, sums: &Sums, overhead_cpus: Option<&CpuSet>) -> Vec<Setting> {
    let v2 = layout.v2;
    let mut all = Builder { layout, settings: Vec::new() };
    let overhead = CpuLimits { cpus: overhead_cpus.cloned(), ..sums.overhead.clone() };
    all.cpu(Scope::Vcpus, &sums.vcpus);
    all.cpu(Scope::Overhead, &overhead);
    // In our own group's stead there is none of ours to bound both together, and the two are bounded.
    if v2 && all.place(Scope::Sandbox, "cpu").is_ok() {
        all.add(Scope::Sandbox, "cpu.max", sums.sandbox_quota().map(max), UNLIMITED_MAX);
    }
    all.add(Scope::Sandbox, "pids.max", sums.pids.map(|tasks| tasks.to_string()), "max");
    let (file, unlimited) = if v2 { ("memory.max", "max") } else { ("memory.limit_in_bytes", "-1") };
    all.add(Scope::Sandbox, file, sums.memory.map(|bytes| bytes.to_string()), unlimited);
    all.settings
}

/// v1's files of a quota, of which the kernel takes each only if it makes sense with the other.
pub(crate) const PERIOD_FILE: &str = "cpu.cfs_period_us";
pub(crate) const QUOTA_FILE: &str = "cpu.cfs_quota_us";
const UNLIMITED_MAX: &str = "max 100000";

fn max(quota: u64) -> String {
    format!("{quota} {PERIOD}")
}

struct Builder<'a> {
    layout: &'a Layout,
    settings: Vec<Setting>,
}

impl Builder<'_> {
    fn cpu(&mut self, scope: Scope, limits: &CpuLimits) {
        if self.layout.v2 {
            let weight = limits.shares.map(|shares| weight_from_shares(shares).to_string());
            self.add(scope, "cpu.weight", weight, "100");
            self.add(scope, "cpu.max", limits.quota.map(max), UNLIMITED_MAX);
        } else {
            self.add(scope, "cpu.shares", limits.shares.map(|shares| shares.to_string()), "1024");
            self.add(scope, PERIOD_FILE, limits.quota.map(|_| PERIOD.to_string()), "100000");
            self.add(scope, QUOTA_FILE, limits.quota.map(|us| us.to_string()), "-1");
        }
        for (file, set) in [("cpuset.cpus", &limits.cpus), ("cpuset.mems", &limits.mems)] {
            let unlimited = match self.site("cpuset") {
                Ok(site) if !self.layout.v2 => Unlimited::Of(site.around().join(file)),
                // An empty set means the parent's. An empty write would not reach the kernel.
                _ => Unlimited::Text("\n"),
            };
            let place = self.place(scope, "cpuset");
            let value = set.as_ref().map(ToString::to_string);
            self.settings.push(Setting { scope, place, file, value, unlimited });
        }
    }

    fn add(&mut self, scope: Scope, file: &'static str, value: Option<String>, unlimited: &'static str) {
        let controller = controller(file);
        let place = self.place(scope, controller);
        self.settings.push(Setting { scope, place, file, value, unlimited: Unlimited::Text(unlimited) });
    }

    fn site(&self, controller: &str) -> Result<&Site, &'static str> {
        self.layout.site(controller).ok_or("our groups are in no such hierarchy")
    }

    fn place(&self, scope: Scope, controller: &str) -> Result<(CgroupPath, PathBuf), &'static str> {
        let site = self.site(controller)?;
        let group = match scope {
            Scope::Vcpus => &site.vcpus,
            Scope::Overhead => &site.overhead,
            Scope::Sandbox => {
                site.sandbox.as_ref().ok_or("the group that holds everything is not ours: its limits stay")?
            }
        };
        Ok((group.clone(), site.dir(group)))
    }
}

/// The controller that brings a file.
pub(crate) fn controller(file: &str) -> &str {
    file.split('.').next().unwrap_or(file)
}
