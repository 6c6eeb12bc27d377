//! Why the microVM is slow: two snapshots are compared, and what held its threads back most is named.
//!
//! The time in which threads wanted to run is that on a CPU and that on a run queue (schedstat). On a run queue are,
//! beside those that wait because others run, those whose group is throttled: they are told apart by the groups' own
//! counters. Those count for each CPU, a thread's wait counts for itself; so where more threads wanted to run than
//! there are CPUs, as many of them waited for each throttled CPU, on average.

use serde::Serialize;

use crate::counters::Pressure;
use crate::settings::Scope;
use crate::snapshot::{Load, Snapshot};

/// What is less than this, in percent, is not named as a cause.
const NOTABLE: f64 = 10.0;

/// Threads that wanted to run for less than this, in percent of the time, were not held back worth a word.
const BUSY: f64 = 5.0;

/// Above this share of its CPUs, in percent, a microVM itself is who its threads wait for.
const FILLED: f64 = 80.0;

/// What held threads back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The quota of their group.
    OwnQuota,
    /// The quota of a group above.
    QuotaAbove,
    /// They want more CPUs than they may run on.
    TooFewCpus,
    /// Others ran on their CPUs.
    HostContention,
    /// The host is a guest, and its own host ran others.
    Stolen,
    /// Memory was being reclaimed or read back.
    Memory,
    /// Block I/O of the host.
    Io,
    /// Nothing worth a word.
    Nothing,
}

/// What held the microVM back most.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// What.
    pub cause: Cause,
    /// Whose threads; `None` when nothing did.
    pub group: Option<Scope>,
    /// The same as a sentence.
    pub sentence: String,
    /// The figures behind it, a sentence each.
    pub evidence: Vec<String>,
}

/// What held the threads of one group back. Percents are of the time in which its threads wanted to run, unless
/// they are said to be of the whole time. `None` is what nobody knows; `unknown` says why.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct GroupDiagnosis {
    /// Threads that were there all the time.
    pub threads: usize,
    /// CPUs that they may run on.
    pub cpus: Option<usize>,
    /// Their time on a CPU, in microseconds.
    pub run_usec: u64,
    /// Their time on a run queue, throttled time included.
    pub wait_usec: Option<u64>,
    /// Periods of the quota.
    pub nr_periods: Option<u64>,
    /// Periods in which it was used up.
    pub nr_throttled: Option<u64>,
    /// Time for which it withheld CPUs.
    pub throttled_usec: Option<u64>,
    /// On a CPU, stolen time included.
    pub running_percent: Option<f64>,
    /// Throttled by its own quota.
    pub own_quota_percent: Option<f64>,
    /// Throttled by the quota of a group above.
    pub quota_above_percent: Option<f64>,
    /// Waiting while others ran.
    pub cpu_wait_percent: Option<f64>,
    /// Seemingly on a CPU, which ran others.
    pub stolen_percent: Option<f64>,
    /// Of the whole time: some thread waited for memory.
    pub memory_percent: Option<f64>,
    /// Of the whole time: some thread waited for block I/O.
    pub io_percent: Option<f64>,
    /// Why figures are missing.
    pub unknown: Vec<&'static str>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Diagnosis {
    /// The time between the snapshots.
    pub window_usec: u64,
    /// What held the microVM back most.
    pub verdict: Verdict,
    /// What held the vCPU threads back.
    pub vcpus: GroupDiagnosis,
    /// What held all other threads back.
    pub overhead: GroupDiagnosis,
}

/// Compares two snapshots, `before` and `after`.
#[must_use]
pub fn diagnose(before: &Snapshot, after: &Snapshot) -> Diagnosis {
    let window = Window::new(before, after);
    let (vcpus, overhead) =
        (window.group(&before.vcpus, &after.vcpus), window.group(&before.overhead, &after.overhead));
    let used = vcpus.run_usec.saturating_add(overhead.run_usec);
    let verdict = [(Scope::Vcpus, &vcpus, &after.vcpus), (Scope::Overhead, &overhead, &after.overhead)]
        .into_iter()
        .find_map(|(scope, group, load)| window.verdict(scope, group, load, used))
        .unwrap_or_else(|| nothing(&vcpus));
    Diagnosis { window_usec: window.usec, verdict, vcpus, overhead }
}

/// What is the same for both groups.
struct Window {
    usec: u64,
    v2: bool,
    /// The group above that withheld CPUs longest, and for how long.
    above: Option<(String, u64)>,
    /// Of the time in which the host's CPUs had something to run, the share in which they did not.
    stolen: Option<f64>,
}

impl Window {
    fn new(before: &Snapshot, after: &Snapshot) -> Self {
        let above = after.above.iter().filter_map(|(path, now)| {
            let (_, then) = before.above.iter().find(|(old, _)| old == path)?;
            Some((path.to_string(), grown(then.throttled_usec, now.throttled_usec)?))
        });
        let stolen = before.host.zip(after.host).map(|(before, after)| {
            let stolen = after.stolen.saturating_sub(before.stolen);
            let busy = after.busy.saturating_sub(before.busy).saturating_add(stolen);
            if busy == 0 { 0.0 } else { stolen as f64 / busy as f64 }
        });
        Self {
            usec: after.time_usec.saturating_sub(before.time_usec).max(1),
            v2: after.v2,
            above: above.max_by_key(|(_, usec)| *usec),
            stolen,
        }
    }

    fn group(&self, before: &Load, after: &Load) -> GroupDiagnosis {
        let both = || after.threads.iter().filter_map(|(tid, now)| Some((before.threads.get(tid)?, now)));
        let sum = |of: fn(&crate::SchedStat) -> u64| {
            both().map(|(then, now)| of(now).saturating_sub(of(then))).fold(0, u64::saturating_add)
        };
        let mut group = GroupDiagnosis {
            threads: both().count(),
            cpus: after.cpus,
            nr_periods: grown(before.cpu.nr_periods, after.cpu.nr_periods),
            nr_throttled: grown(before.cpu.nr_throttled, after.cpu.nr_throttled),
            throttled_usec: grown(before.cpu.throttled_usec, after.cpu.throttled_usec),
            ..GroupDiagnosis::default()
        };
        if group.threads > 0 {
            group.run_usec = sum(|stat| stat.run_usec);
            group.wait_usec = Some(sum(|stat| stat.wait_usec));
        } else {
            group.run_usec = grown(before.cpu.usage_usec, after.cpu.usage_usec).unwrap_or_default();
            group.unknown.push("there is no thread of which the kernel keeps scheduling statistics");
        }
        self.share_out(&mut group);
        let pressure = |before: Option<Pressure>, after: Option<Pressure>| {
            let total = |pressure: Option<Pressure>| Some(pressure?.some.total_usec);
            Some(percent(grown(total(before), total(after))? as f64, self.usec as f64))
        };
        group.memory_percent = pressure(before.pressure.memory, after.pressure.memory);
        group.io_percent = pressure(before.pressure.io, after.pressure.io);
        if group.memory_percent.is_none() || group.io_percent.is_none() {
            group.unknown.push(match self.v2 {
                true => "the kernel tells nothing about waiting for memory and I/O (pressure stall information is off)",
                false => "cgroup v1 tells nothing about waiting for memory and I/O",
            });
        }
        group
    }

    /// Says for each part of the time in which threads wanted to run what they did.
    fn share_out(&self, group: &mut GroupDiagnosis) {
        let (own, above) =
            (group.throttled_usec.unwrap_or_default(), self.above.as_ref().map_or(0, |(_, usec)| *usec));
        let run = group.run_usec as f64;
        // What withheld a CPU withheld it from one thread at least.
        let wait = group.wait_usec.map_or_else(|| own.saturating_add(above) as f64, |wait| wait as f64);
        let wanted = run + wait;
        if wanted <= 0.0 {
            return;
        }
        let at_once = wanted / self.usec as f64;
        let of_each = group.cpus.map_or(1.0, |cpus| (at_once / cpus.max(1) as f64).max(1.0));
        let by_own = (own as f64 * of_each).min(wait);
        let by_above = (above as f64 * of_each).min(wait - by_own);
        group.running_percent = Some(percent(run, wanted));
        group.own_quota_percent = group.throttled_usec.map(|_| percent(by_own, wanted));
        group.quota_above_percent = self.above.as_ref().map(|_| percent(by_above, wanted));
        group.cpu_wait_percent = group.wait_usec.map(|_| percent(wait - by_own - by_above, wanted));
        group.stolen_percent = self.stolen.map(|stolen| percent(run * stolen, wanted));
    }

    /// What held the group back most, if anything did. `used` is the CPU time of both groups.
    fn verdict(&self, scope: Scope, group: &GroupDiagnosis, load: &Load, used: u64) -> Option<Verdict> {
        let wanted = group.run_usec.saturating_add(group.wait_usec.unwrap_or_default());
        let busy = percent(wanted as f64, self.usec as f64) >= BUSY;
        let filled =
            group.cpus.is_some_and(|cpus| percent(used as f64, cpus as f64 * self.usec as f64) >= FILLED);
        let waiting = if filled { Cause::TooFewCpus } else { Cause::HostContention };
        let (cause, share) = [
            (Cause::OwnQuota, group.own_quota_percent.filter(|_| busy || group.wait_usec.is_none())),
            (Cause::QuotaAbove, group.quota_above_percent.filter(|_| busy || group.wait_usec.is_none())),
            (waiting, group.cpu_wait_percent.filter(|_| busy)),
            (Cause::Stolen, group.stolen_percent.filter(|_| busy)),
            (Cause::Memory, group.memory_percent),
            (Cause::Io, group.io_percent),
        ]
        .into_iter()
        .filter_map(|(cause, share)| Some((cause, share.filter(|share| *share >= NOTABLE)?)))
        .max_by(|(_, one), (_, other)| one.total_cmp(other))?;
        let evidence = self.evidence(cause, group, load);
        Some(Verdict { cause, group: Some(scope), sentence: sentence(cause, scope, share), evidence })
    }

    fn evidence(&self, cause: Cause, group: &GroupDiagnosis, load: &Load) -> Vec<String> {
        let mut all = Vec::new();
        let ms = |usec: u64| usec / 1000;
        if let (Cause::OwnQuota, Some(bandwidth)) = (cause, load.bandwidth) {
            let quota =
                bandwidth.quota.map_or_else(|| "no limit now".to_owned(), |quota| format!("{quota} us"));
            all.push(format!("its quota is {quota} in each {} us", bandwidth.period));
        }
        if let (Cause::OwnQuota, Some(throttled), Some(periods)) =
            (cause, group.nr_throttled, group.nr_periods)
        {
            all.push(format!("the quota was used up in {throttled} of {periods} periods"));
        }
        if let (Cause::OwnQuota, Some(usec)) = (cause, group.throttled_usec) {
            all.push(format!("it withheld CPUs for {} ms", ms(usec)));
        }
        if let (Cause::QuotaAbove, Some((path, usec))) = (cause, &self.above) {
            all.push(format!("the quota of {path} withheld CPUs for {} ms", ms(*usec)));
        }
        if let (Cause::Stolen, Some(stolen)) = (cause, self.stolen) {
            all.push(format!(
                "of the time in which the host's CPUs had work {:.1}% was stolen",
                stolen * 100.0
            ));
        }
        let waited = group.wait_usec.map_or_else(String::new, |usec| {
            format!(" and waited on run queues for {} ms, throttled time included", ms(usec))
        });
        let cpus =
            group.cpus.map_or_else(String::new, |cpus| format!(", which may use {},", count(cpus, "CPU")));
        all.push(format!(
            "in {} ms its {}{cpus} ran for {} ms{waited}",
            ms(self.usec),
            count(group.threads, "thread"),
            ms(group.run_usec)
        ));
        all
    }
}

fn sentence(cause: Cause, scope: Scope, share: f64) -> String {
    let who = if scope == Scope::Vcpus { "The vCPUs" } else { "Pinfold's other threads" };
    let wanted = format!("for {share:.1}% of the time in which they wanted to run");
    let whole = format!("for {share:.1}% of the time");
    match cause {
        Cause::OwnQuota => format!("{who} are throttled by their own quota {wanted}."),
        Cause::QuotaAbove => format!("{who} are throttled by the quota of a group above {wanted}."),
        Cause::TooFewCpus => {
            format!("{who} want more CPUs than they may use and wait for each other {wanted}.")
        }
        Cause::HostContention => {
            format!("{who} wait for a CPU, as others run on theirs (host contention), {wanted}.")
        }
        Cause::Stolen => format!("{who} run on CPUs that the host's own host gives to others {wanted}."),
        Cause::Memory => format!("{who} wait for memory that is being reclaimed or read back {whole}."),
        Cause::Io => format!("{who} wait for the host's block I/O {whole}."),
        Cause::Nothing => "Nothing holds the microVM back.".to_owned(),
    }
}

fn nothing(vcpus: &GroupDiagnosis) -> Verdict {
    let evidence = match vcpus.running_percent {
        None => "no vCPU wanted to run".to_owned(),
        Some(percent) => format!("the vCPUs ran for {percent:.1}% of the time in which they wanted to"),
    };
    let sentence = sentence(Cause::Nothing, Scope::Vcpus, 0.0);
    Verdict { cause: Cause::Nothing, group: None, sentence, evidence: vec![evidence] }
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn grown(before: Option<u64>, after: Option<u64>) -> Option<u64> {
    Some(after?.saturating_sub(before?))
}

/// To one decimal.
fn percent(part: f64, whole: f64) -> f64 {
    (part / whole * 1000.0).round() / 10.0
}

#[cfg(test)]
mod tests;
