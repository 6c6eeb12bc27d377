//! What other limits would do to the vCPUs: the CPU time that they used, sampled over a while, is run through a
//! quota again.
//!
//! What was used is what was wanted, as long as nothing cut it off. Where the quota in force did, more may have been
//! wanted: all threads all the time for which it withheld CPUs. So there are two demands, a lower and an upper one, and
//! what follows from each. What is not served in one sample's time is wanted again in the next.
//!
//! Samples are as long as a period or longer, and begin when they like. When within them CPU time was wanted is not
//! known; so fewer periods may be throttled (the demand came late, in one of them) or more (it came in bursts, each of
//! which uses up a quota).

use serde::Serialize;

use crate::bandwidth::Bandwidth;
use crate::cpuset::CpuSet;

/// Counters of the vCPUs' group at one moment, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sample {
    /// When.
    pub time_usec: u64,
    /// CPU time used.
    pub usage_usec: u64,
    /// Periods of the quota.
    pub nr_periods: u64,
    /// Those in which it was used up.
    pub nr_throttled: u64,
    /// Time for which it withheld CPUs.
    pub throttled_usec: u64,
}

/// Limits of the vCPUs' group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hypothesis {
    /// The quota.
    #[serde(flatten)]
    pub bandwidth: Bandwidth,
    /// The CPUs; `None` where nobody says which.
    pub cpus: Option<CpuSet>,
}

/// What is between two bounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Range {
    /// Not less than this.
    pub lower: f64,
    /// Not more than this.
    pub upper: f64,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Recorded {
    /// CPUs that were used, on average.
    pub cpus_used: f64,
    /// Percent of the periods in which the quota was used up; `None` when no quota applied.
    pub throttled_percent: Option<f64>,
    /// Microseconds for which it withheld CPUs.
    pub throttled_usec: u64,
}

/// What would have happened.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// Percent of the periods in which the quota would have been used up.
    pub throttled_percent: Range,
    /// CPUs that would have been used, on average.
    pub cpus_used: Range,
    /// CPUs that would still have been wanted and not had, on average.
    pub cpus_unmet: Range,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WhatIf {
    /// How long was recorded.
    pub window_usec: u64,
    /// In how many pieces.
    pub samples: usize,
    /// vCPU threads.
    pub threads: usize,
    /// What was in force.
    pub in_force: Hypothesis,
    /// What is asked about.
    pub asked: Hypothesis,
    /// What happened.
    pub recorded: Recorded,
    /// What would have happened.
    pub predicted: Prediction,
    /// Whether the quota in force cut off what was wanted, so that it is not known how much that was.
    pub cut_off: bool,
    /// The same as sentences.
    pub sentence: String,
}

/// Says what `asked` would have done to `threads` vCPUs. `None` without two samples of different times.
#[must_use]
pub fn what_if(
    samples: &[Sample],
    threads: usize,
    in_force: Hypothesis,
    asked: Hypothesis,
) -> Option<WhatIf> {
    let slots = slots(samples);
    let (first, last) = (samples.first()?, samples.last()?);
    let window_usec = slots.iter().map(|slot| slot.usec).sum::<u64>();
    if window_usec == 0 {
        return None;
    }
    let per_window = |usec: u64| thousandths(usec as f64 / window_usec as f64);
    let periods = last.nr_periods.saturating_sub(first.nr_periods);
    let throttled = last.nr_throttled.saturating_sub(first.nr_throttled);
    let recorded = Recorded {
        cpus_used: per_window(slots.iter().map(|slot| slot.used).sum()),
        throttled_percent: (periods > 0).then(|| tenths(throttled as f64 / periods as f64 * 100.0)),
        throttled_usec: last.throttled_usec.saturating_sub(first.throttled_usec),
    };
    let at_once = asked.cpus.as_ref().map_or(threads, |cpus| cpus.len().min(threads)).max(1) as u64;
    let limits = Limits { bandwidth: asked.bandwidth, at_once };
    let (lower, upper) = (limits.run(&slots, Slot::least), limits.run(&slots, Slot::most));
    let range =
        |of: fn(&Outcome) -> u64| Range { lower: per_window(of(&lower)), upper: per_window(of(&upper)) };
    let predicted = Prediction {
        throttled_percent: Range { lower: tenths(lower.surely * 100.0), upper: tenths(upper.maybe * 100.0) },
        cpus_used: range(|outcome| outcome.used),
        cpus_unmet: range(|outcome| outcome.unmet),
    };
    let cut_off = slots.iter().any(|slot| slot.withheld > 0);
    let sentence = sentence(&asked, &recorded, &predicted, cut_off);
    Some(WhatIf {
        window_usec,
        samples: slots.len(),
        threads,
        in_force,
        asked,
        recorded,
        predicted,
        cut_off,
        sentence,
    })
}

/// What happened between two samples.
#[derive(Debug, Clone, Copy)]
struct Slot {
    usec: u64,
    used: u64,
    /// Wall-clock time for which CPUs were withheld.
    withheld: u64,
}

impl Slot {
    /// CPU time that was wanted at least.
    fn least(&self, _at_once: u64) -> u64 {
        self.used
    }

    /// CPU time that was wanted at most, by threads of which so many can run at once.
    fn most(&self, at_once: u64) -> u64 {
        let more = self.used.saturating_add(self.withheld.saturating_mul(at_once));
        more.min(self.usec.saturating_mul(at_once)).max(self.used)
    }
}

fn slots(samples: &[Sample]) -> Vec<Slot> {
    let pairs = samples.windows(2).map(|pair| Slot {
        usec: pair[1].time_usec.saturating_sub(pair[0].time_usec),
        used: pair[1].usage_usec.saturating_sub(pair[0].usage_usec),
        withheld: pair[1].throttled_usec.saturating_sub(pair[0].throttled_usec),
    });
    let mut slots: Vec<_> = pairs.filter(|slot| slot.usec > 0).collect();
    // The kernel counts at the end of a throttled time, which may have begun in an earlier sample's.
    let mut rest = 0u64;
    for slot in slots.iter_mut().rev() {
        let withheld = slot.withheld.saturating_add(rest);
        slot.withheld = withheld.min(slot.usec);
        rest = withheld - slot.withheld;
    }
    slots
}

struct Limits {
    bandwidth: Bandwidth,
    /// Threads that can run at the same time.
    at_once: u64,
}

/// What came of one demand. Shares are of all periods.
#[derive(Debug, Clone, Copy, Default)]
struct Outcome {
    used: u64,
    unmet: u64,
    /// Share of the periods in which the quota is used up whenever the demand comes.
    surely: f64,
    /// Share of those in which it may be.
    maybe: f64,
}

impl Limits {
    fn run(&self, slots: &[Slot], demand: fn(&Slot, u64) -> u64) -> Outcome {
        let mut outcome = Outcome::default();
        let total = slots.iter().map(|slot| slot.usec).sum::<u64>().max(1) as f64;
        for slot in slots {
            let (backlog, room) = (outcome.unmet, slot.usec.saturating_mul(self.at_once));
            let wanted = backlog.saturating_add(demand(slot, self.at_once));
            let quota = self.quota_in(slot.usec).filter(|quota| *quota < room);
            let used = wanted.min(quota.unwrap_or(room));
            outcome.used = outcome.used.saturating_add(used);
            outcome.unmet = wanted - used;
            let Some(quota) = quota else { continue };
            let weight = slot.usec as f64 / total;
            if backlog >= quota {
                outcome.surely += weight;
            } else if wanted > quota {
                // In one period at least.
                outcome.surely += weight * (self.bandwidth.period as f64 / slot.usec as f64).min(1.0);
            }
            outcome.maybe += weight * (wanted as f64 / quota.max(1) as f64).min(1.0);
        }
        outcome
    }

    /// The CPU time that the quota gives in `usec`.
    fn quota_in(&self, usec: u64) -> Option<u64> {
        let Bandwidth { quota, period } = self.bandwidth;
        let given = u128::from(quota?) * u128::from(usec) / u128::from(period.max(1));
        Some(u64::try_from(given).unwrap_or(u64::MAX))
    }
}

fn sentence(asked: &Hypothesis, recorded: &Recorded, predicted: &Prediction, cut_off: bool) -> String {
    let quota = match asked.bandwidth {
        Bandwidth { quota: Some(quota), period } => format!("{quota} us in each {period} us"),
        Bandwidth { quota: None, .. } => "no quota".to_owned(),
    };
    let cpus = asked.cpus.as_ref().map_or_else(String::new, |cpus| format!(" on the CPUs {cpus}"));
    let between = |range: Range, digits: usize| match range {
        Range { lower, upper } if lower >= upper => format!("{lower:.digits$}"),
        Range { lower, upper } => format!("{lower:.digits$} to {upper:.digits$}"),
    };
    let now =
        recorded.throttled_percent.map_or_else(|| "no quota".to_owned(), |percent| format!("{percent:.1}%"));
    let why = match cut_off {
        true => {
            " The quota in force cut off what the vCPUs wanted, so that more than what they used is a guess."
        }
        false => "",
    };
    format!(
        "With {quota}{cpus} the vCPUs would be throttled in {}% of the periods (now: {now}) and use {} CPUs (now: \
         {:.2}).{why}",
        between(predicted.throttled_percent, 1),
        between(predicted.cpus_used, 2),
        recorded.cpus_used,
    )
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn thousandths(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests;
