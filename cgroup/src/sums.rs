//! From what each container and the overhead ask for to what each group gets. Pure arithmetic: it is exact,
//! does not depend on the order of the containers, and cannot overflow. `None` is "no limit" throughout.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::resources::{Cpu, Resources};

/// The one period, in microseconds, over which every quota is expressed.
pub const PERIOD: u64 = 100_000;
/// What a container without shares counts.
const DEFAULT_SHARES: u64 = 1024;
/// The kernel refuses quotas below 1 ms ...
pub(crate) const MIN_QUOTA: u64 = 1_000;
/// ... and above 2^44 - 1 us (kernel/sched: max_bw_runtime_us), which no machine can use up anyhow.
pub(crate) const MAX_QUOTA: u64 = (1 << 44) - 1;

/// CPU limits of one group.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuLimits {
    /// Relative weight in v1's unit; see [`weight_from_shares`] for v2.
    pub shares: Option<u64>,
    /// Microseconds of CPU time in each [`PERIOD`], 1000 or more.
    pub quota: Option<u64>,
    /// CPUs to run on, never empty.
    pub cpus: Option<CpuSet>,
    /// Memory nodes to allocate from, never empty.
    pub mems: Option<CpuSet>,
}

/// What the groups get, summed over the containers and the overhead.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sums {
    /// The workload: what the vCPU threads get.
    pub vcpus: CpuLimits,
    /// The pod overhead: what all other threads get.
    pub overhead: CpuLimits,
    /// Bytes for everything together: the containers' sum and the overhead.
    pub memory: Option<u64>,
    /// Tasks in everything together, from the overhead's `pids.limit`: the containers' tasks are the guest's.
    pub pids: Option<u64>,
}

impl Sums {
    /// Sums up. Without containers nothing is known about the workload, so it is not limited.
    #[must_use]
    pub fn of<'a>(
        containers: impl IntoIterator<Item = &'a Resources>,
        overhead: Option<&'a Resources>,
    ) -> Self {
        let containers: Vec<&Resources> = containers.into_iter().collect();
        let cpus: Vec<Cpu> = containers.iter().map(|c| c.cpu.clone().unwrap_or_default()).collect();
        let own = overhead.and_then(|o| o.cpu.clone()).unwrap_or_default();
        Self {
            vcpus: CpuLimits {
                shares: cpus
                    .iter()
                    .map(|cpu| shares(cpu).unwrap_or(DEFAULT_SHARES))
                    .reduce(u64::saturating_add),
                quota: quota(&cpus),
                cpus: union(cpus.iter().map(|cpu| cpu.cpus.as_ref())),
                mems: union(cpus.iter().map(|cpu| cpu.mems.as_ref())),
            },
            memory: memory(&containers, overhead),
            pids: overhead.and_then(|o| positive(o.pids.as_ref()?.limit)),
            overhead: CpuLimits {
                shares: shares(&own),
                quota: quota(std::slice::from_ref(&own)),
                cpus: union([own.cpus.as_ref()]),
                mems: union([own.mems.as_ref()]),
            },
        }
    }

    /// The quota of both groups together, in microseconds for each [`PERIOD`]: bounded only when both are.
    #[must_use]
    pub fn sandbox_quota(&self) -> Option<u64> {
        let sum = self.vcpus.quota?.saturating_add(self.overhead.quota?);
        (sum <= MAX_QUOTA).then_some(sum)
    }

    /// The CPUs left to the overhead group, of those that the base may use: those given, else the base's
    /// without the workload's when something remains, else `None` for all of the base's.
    #[must_use]
    pub fn overhead_cpus(&self, base: &CpuSet) -> Option<CpuSet> {
        if self.overhead.cpus.is_some() {
            return self.overhead.cpus.clone();
        }
        let workload = self.vcpus.cpus.as_ref()?;
        let rest = base.difference(workload);
        (workload.is_subset(base) && !rest.is_empty()).then_some(rest)
    }
}

/// cpu.weight (v2) for cpu.shares (v1), by the formula of runc 1.3.2, which maps the smallest to the smallest,
/// the default to the default, and the largest to the largest: 2 to 1, 1024 to 100, 262144 to 10000.
#[must_use]
pub fn weight_from_shares(shares: u64) -> u64 {
    let l = f64::from(u32::try_from(shares.clamp(2, 262_144)).unwrap_or(262_144)).log2();
    let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
    // Searched rather than converted: an integer of 1 to 10000 without a cast. 10^exponent is not quite exact
    // at the fixed points, so as much as that error is forgiven before rounding up.
    let weight = 10f64.powf(exponent) - 1e-9;
    let (mut low, mut high) = (1u16, 10_000u16);
    while low < high {
        let middle = low.midpoint(high);
        if f64::from(middle) < weight { low = middle + 1 } else { high = middle }
    }
    u64::from(low)
}

fn positive(value: Option<i64>) -> Option<u64> {
    u64::try_from(value?).ok().filter(|v| *v > 0)
}

fn shares(cpu: &Cpu) -> Option<u64> {
    cpu.shares.filter(|shares| *shares > 0)
}

/// The sum of quota/period, in microseconds for each [`PERIOD`], rounded up. `None` when one has no quota, or
/// there are none at all.
fn quota(cpus: &[Cpu]) -> Option<u64> {
    let mut by_period: BTreeMap<u64, u128> = BTreeMap::new();
    for cpu in cpus {
        let quota = u128::from(positive(cpu.quota)?);
        let period = cpu.period.filter(|period| *period > 0).unwrap_or(PERIOD);
        // At most 2^64 containers of less than 2^63 each.
        *by_period.entry(period).or_default() += quota;
    }
    let (mut whole, mut numerator, mut denominator) = (0u128, 0u128, 1u128);
    for (period, quota) in by_period {
        let period = u128::from(period);
        let scaled = quota.saturating_mul(u128::from(PERIOD));
        whole = whole.saturating_add(scaled / period);
        // Keep the remainders as one exact fraction. Only periods without a common multiple below 2^128 can
        // defeat that; then this period's remainder counts as one whole microsecond, whatever the order.
        match add_fractions((numerator, denominator), (scaled % period, period)) {
            Some(sum) => (numerator, denominator) = sum,
            None => whole = whole.saturating_add(1),
        }
    }
    let sum = whole.saturating_add(numerator.div_ceil(denominator));
    let sum = u64::try_from(sum).unwrap_or(u64::MAX);
    (1..=MAX_QUOTA).contains(&sum).then_some(sum.max(MIN_QUOTA))
}

fn add_fractions((a, b): (u128, u128), (c, d): (u128, u128)) -> Option<(u128, u128)> {
    let common = b.checked_mul(d / gcd(b, d))?;
    let sum = a.checked_mul(common / b)?.checked_add(c.checked_mul(common / d)?)?;
    let shared = gcd(sum, common);
    Some((sum / shared, common / shared))
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn union<'a>(sets: impl IntoIterator<Item = Option<&'a CpuSet>>) -> Option<CpuSet> {
    // One that may run anywhere makes the union anywhere.
    let sets: Option<Vec<&CpuSet>> = sets.into_iter().map(|set| set.filter(|set| !set.is_empty())).collect();
    sets?.into_iter().cloned().reduce(|all, set| all.union(&set))
}

fn memory(containers: &[&Resources], overhead: Option<&Resources>) -> Option<u64> {
    let limit = |r: &Resources| r.memory.as_ref().and_then(|memory| memory.limit);
    let workload: Option<Vec<u64>> = containers.iter().map(|c| positive(limit(c))).collect();
    let workload = workload?.into_iter().reduce(u64::saturating_add)?;
    let overhead = match overhead.and_then(limit) {
        None => 0,
        given => positive(given)?,
    };
    let sum = workload.saturating_add(overhead);
    // Beyond that the kernel has no number; and no machine has the memory.
    i64::try_from(sum).is_ok().then_some(sum)
}

#[cfg(test)]
mod tests;
