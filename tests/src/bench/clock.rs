//! Instructions or time, and how much of it was work.

use crate::case::Failure;
use crate::lab::read;
use std::path::Path;

/// A point in time.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// CLOCK_MONOTONIC, in ns.
    pub now: u64,
    /// What all CPUs together have spent on tasks so far, in ns; up to the last switch of tasks.
    busy: u64,
}

/// What passed between two moments, in ns.
#[derive(Debug, Clone, Copy)]
pub struct Interval {
    /// On the clock.
    pub elapsed: u64,
    /// Of all CPUs together.
    pub busy: u64,
}

impl Moment {
    /// Now.
    pub fn now() -> Result<Self, Failure> {
        let now = monotonic();
        // Documentation/scheduler/sched-stats.rst: the seventh number of a CPU's line.
        let stat = read(Path::new("/proc/schedstat"))?;
        let busy = stat
            .lines()
            .filter(|line| line.starts_with("cpu"))
            .filter_map(|line| line.split_whitespace().nth(7)?.parse::<u64>().ok())
            .sum();
        Ok(Self { now, busy })
    }

    /// From `earlier` to here.
    pub fn since(&self, earlier: &Self) -> Interval {
        Interval {
            elapsed: self.now.saturating_sub(earlier.now),
            busy: self.busy.saturating_sub(earlier.busy),
        }
    }
}

impl Interval {
    /// The share in which the one CPU of a counting host was idle.
    pub fn idle(&self) -> f64 {
        if self.elapsed == 0 { 0.0 } else { 1.0 - ns(self.busy.min(self.elapsed)) / ns(self.elapsed) }
    }
}

/// CLOCK_MONOTONIC in ns.
pub fn monotonic() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, which is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    // The clock starts with the host and is never negative.
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// A number of ns (or of bytes) to calculate with.
#[expect(clippy::cast_precision_loss, reason = "2^53 ns are 104 days")]
pub fn ns(count: u64) -> f64 {
    count as f64
}

/// The median of `values`, which are sorted by it.
pub fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 { Some(upper) } else { Some(f64::midpoint(values[middle - 1], upper)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&mut []), None);
    }

    #[test]
    fn an_interval_knows_how_much_was_idle() {
        let start = Moment { now: 100, busy: 10 };
        let interval = Moment { now: 300, busy: 160 }.since(&start);
        assert_eq!((interval.elapsed, interval.busy), (200, 150));
        assert!((interval.idle() - 0.25).abs() < 1e-9);
    }
}
