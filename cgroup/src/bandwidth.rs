//! How much CPU time a group may use: the kernel's CFS bandwidth (Documentation/scheduler/sched-bwc.rst).

use serde::{Deserialize, Serialize};

use crate::counters::{self, StatsError};
use crate::cpuset::CpuSet;
use crate::layout::Layout;
use crate::plan::effective_cpus;
use crate::resources::PERIODS;
use crate::settings::{PERIOD_FILE, QUOTA_FILE, Scope};
use crate::sums::{MAX_QUOTA, MIN_QUOTA, PERIOD};

/// A quota, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// CPU time in each period; `None` for no limit.
    pub quota: Option<u64>,
    /// The period.
    pub period: u64,
}

/// Why the kernel would not take a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BandwidthError {
    /// The quota.
    #[error("the quota {0} is out of the kernel's range: {MIN_QUOTA} to {MAX_QUOTA} microseconds, or max")]
    Quota(u64),
    /// The period.
    #[error(
        "the period {0} is out of the kernel's range: {low} to {high} microseconds",
        low = PERIODS.start(),
        high = PERIODS.end()
    )]
    Period(u64),
}

impl Default for Bandwidth {
    /// No limit.
    fn default() -> Self {
        Self { quota: None, period: PERIOD }
    }
}

impl Bandwidth {
    /// A quota that the kernel takes.
    ///
    /// # Errors
    /// When either number is out of its range.
    pub fn new(quota: Option<u64>, period: u64) -> Result<Self, BandwidthError> {
        if !PERIODS.contains(&period) {
            return Err(BandwidthError::Period(period));
        }
        match quota {
            Some(quota) if !(MIN_QUOTA..=MAX_QUOTA).contains(&quota) => Err(BandwidthError::Quota(quota)),
            quota => Ok(Self { quota, period }),
        }
    }
}

impl Layout {
    /// The quota in force of one of the two groups of threads; `None` where there is no such controller.
    ///
    /// # Errors
    /// When a file that is there refuses or does not follow the kernel's format, naming it.
    pub fn bandwidth(&self, scope: Scope) -> Result<Option<Bandwidth>, StatsError> {
        let Some((_, dir)) = self.place(scope, "cpu") else { return Ok(None) };
        if self.v2 {
            let max = counters::read(&self.reach, &dir.join("cpu.max"), counters::cpu_max)?;
            return Ok(max.map(|(quota, period)| Bandwidth { quota, period }));
        }
        let period = counters::read(&self.reach, &dir.join(PERIOD_FILE), counters::number)?;
        let quota = counters::read(&self.reach, &dir.join(QUOTA_FILE), |text| match text.trim() {
            "-1" => Ok(None),
            quota => counters::number(quota).map(Some),
        })?;
        Ok(period.zip(quota).map(|(period, quota)| Bandwidth { quota, period }))
    }

    /// The CPUs that one of the two groups of threads may run on; `None` where nobody says.
    #[must_use]
    pub fn cpus(&self, scope: Scope) -> Option<CpuSet> {
        effective_cpus(&self.reach, &self.place(scope, "cpuset")?.1)
    }

    /// The CPUs of the group around ours, which are those that ours can be given.
    #[must_use]
    pub fn base_cpus(&self) -> Option<CpuSet> {
        let site = self.site("cpuset")?;
        effective_cpus(&self.reach, &site.around())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::tests::{fake, layout};

    #[test]
    fn what_the_kernel_refuses_is_refused() {
        for (quota, period, wanted) in [
            (Some(1000), 1000, None),
            (None, 1_000_000, None),
            (Some(MAX_QUOTA), 100_000, None),
            (Some(999), 100_000, Some(BandwidthError::Quota(999))),
            (Some(MAX_QUOTA + 1), 100_000, Some(BandwidthError::Quota(MAX_QUOTA + 1))),
            (Some(0), 100_000, Some(BandwidthError::Quota(0))),
            (Some(5000), 999, Some(BandwidthError::Period(999))),
            (None, 1_000_001, Some(BandwidthError::Period(1_000_001))),
        ] {
            assert_eq!(Bandwidth::new(quota, period).err(), wanted, "{quota:?} {period}");
        }
    }

    #[test]
    fn what_is_in_force_is_read_in_both_forms() {
        let dir = fake(&[
            ("p/box/v/cpu.max", "20000 50000\n"),
            ("p/box/o/cpu.max", "max 100000\n"),
            ("p/cpuset.cpus.effective", "0-3\n"),
            ("p/box/v/cpuset.cpus.effective", "1\n"),
        ]);
        let v2 = layout(dir.path(), &[], Some("/p/box"));
        let given = Bandwidth { quota: Some(20_000), period: 50_000 };
        assert_eq!(v2.bandwidth(Scope::Vcpus).unwrap(), Some(given));
        assert_eq!(v2.bandwidth(Scope::Overhead).unwrap(), Some(Bandwidth::default()));
        assert_eq!(v2.cpus(Scope::Vcpus).map(|cpus| cpus.to_string()), Some("1".to_owned()));
        assert_eq!(v2.cpus(Scope::Overhead), v2.base_cpus());
        assert_eq!(v2.base_cpus().map(|cpus| cpus.len()), Some(4));

        let dir = fake(&[
            ("cpu/p/v/cpu.cfs_quota_us", "20000\n"),
            ("cpu/p/v/cpu.cfs_period_us", "50000\n"),
            ("cpu/p/box/cpu.cfs_quota_us", "-1\n"),
            ("cpu/p/box/cpu.cfs_period_us", "100000\n"),
        ]);
        let v1 = layout(dir.path(), &["cpu"], Some("/p/box"));
        assert_eq!(v1.bandwidth(Scope::Vcpus).unwrap(), Some(given));
        assert_eq!(v1.bandwidth(Scope::Overhead).unwrap(), Some(Bandwidth::default()));
        assert_eq!(v1.cpus(Scope::Vcpus), None);
    }
}
