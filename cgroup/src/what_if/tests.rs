use super::*;
use crate::numbers::Numbers;

/// Counters after each of these pieces of 100 ms: CPU time used and withheld, in milliseconds.
fn samples(pieces: &[(u64, u64)]) -> Vec<Sample> {
    let mut all = vec![Sample::default()];
    for (used, withheld) in pieces {
        let Sample { time_usec, usage_usec, nr_periods, nr_throttled, throttled_usec } = all[all.len() - 1];
        all.push(Sample {
            time_usec: time_usec + 100_000,
            usage_usec: usage_usec + used * 1000,
            nr_periods: nr_periods + 1,
            nr_throttled: nr_throttled + u64::from(*withheld > 0),
            throttled_usec: throttled_usec + withheld * 1000,
        });
    }
    all
}

fn limits(quota: Option<u64>, cpus: &str) -> Hypothesis {
    Hypothesis { bandwidth: Bandwidth { quota, period: 100_000 }, cpus: Some(cpus.parse().unwrap()) }
}

fn ask(pieces: &[(u64, u64)], threads: usize, quota: Option<u64>, cpus: &str) -> WhatIf {
    what_if(&samples(pieces), threads, limits(Some(20_000), "0-7"), limits(quota, cpus)).unwrap()
}

fn range(lower: f64, upper: f64) -> Range {
    Range { lower, upper }
}

#[test]
fn what_was_not_cut_off_gives_one_answer() {
    let steady = [(50, 0); 10];
    for (quota, throttled, used, unmet) in [
        (None, range(0.0, 0.0), 0.5, 0.0),
        // As much as there are CPUs is no limit.
        (Some(100_000), range(0.0, 0.0), 0.5, 0.0),
        (Some(10_000), range(100.0, 100.0), 0.1, 0.4),
    ] {
        let answer = ask(&steady, 1, quota, "0-7");
        assert_eq!(answer.predicted.throttled_percent, throttled, "{quota:?}");
        assert_eq!(answer.predicted.cpus_used, range(used, used), "{quota:?}");
        assert_eq!(answer.predicted.cpus_unmet, range(unmet, unmet), "{quota:?}");
        assert!(!answer.cut_off && !answer.sentence.contains("guess"), "{}", answer.sentence);
        assert_eq!((answer.recorded.cpus_used, answer.recorded.throttled_percent), (0.5, Some(0.0)));
    }
    // Whether bursts of less than a sample's length use up a quota that is above the average is not known.
    assert_eq!(ask(&steady, 1, Some(80_000), "0-7").predicted.throttled_percent, range(0.0, 62.5));
}

#[test]
fn what_was_cut_off_gives_a_range() {
    let cut = [(20, 80); 10];
    let answer = ask(&cut, 1, Some(60_000), "0");
    assert_eq!(answer.predicted.throttled_percent, range(0.0, 100.0));
    assert_eq!(answer.predicted.cpus_used, range(0.2, 0.6));
    assert!(answer.cut_off && answer.sentence.contains("0.20 to 0.60 CPUs"), "{}", answer.sentence);
    // Less than was used is less for sure.
    let answer = ask(&cut, 1, Some(10_000), "0");
    assert_eq!(answer.predicted.throttled_percent, range(100.0, 100.0));
    assert_eq!(answer.predicted.cpus_used, range(0.1, 0.1));
    assert_eq!(
        answer.recorded,
        Recorded { cpus_used: 0.2, throttled_percent: Some(100.0), throttled_usec: 800_000 }
    );
    // Two threads that shared a CPU may want two; one thread does not.
    assert_eq!(ask(&cut, 2, None, "0-1").predicted.cpus_used.upper, 1.8);
    assert_eq!(ask(&cut, 1, None, "0-1").predicted.cpus_used.upper, 1.0);
    assert_eq!(ask(&cut, 2, None, "5").predicted.cpus_used.upper, 1.0);
}

#[test]
fn withheld_time_counts_where_it_passed() {
    // The kernel counts 150 ms when they are over.
    let answer = ask(&[(20, 0), (20, 150)], 1, None, "0");
    assert_eq!(answer.predicted.cpus_used, range(0.2, 0.85));
}

#[test]
fn fewer_cpus_are_a_limit_without_a_quota() {
    let answer = ask(&[(400, 0); 10], 4, None, "0-1");
    assert_eq!(answer.predicted.cpus_used, range(2.0, 2.0));
    assert_eq!(answer.predicted.cpus_unmet, range(2.0, 2.0));
    assert_eq!(answer.predicted.throttled_percent, range(0.0, 0.0));
}

#[test]
fn nothing_follows_from_no_time() {
    let one = limits(None, "0");
    for few in [&[][..], &[Sample::default()], &[Sample::default(); 3]] {
        assert_eq!(what_if(few, 1, one.clone(), one.clone()), None);
    }
    let unknown = Hypothesis { bandwidth: Bandwidth::default(), cpus: None };
    assert!(what_if(&samples(&[(0, 0)]), 0, one, unknown).is_some(), "not started");
}

#[test]
fn more_is_never_worse_and_ranges_are_ranges() {
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    for _ in 0..2000 {
        let threads = 1 + numbers.below(4);
        let pieces: Vec<_> = (0..1 + numbers.below(20))
            .map(|_| {
                (numbers.below(100 * threads), [0, numbers.below(250)][usize::from(numbers.below(2) == 1)])
            })
            .collect();
        let threads = usize::try_from(threads).unwrap();
        let (less, more) = (1000 + numbers.below(400_000), numbers.below(400_000));
        let quotas = [Some(less), Some(less + more), None];
        let answers = quotas.map(|quota| ask(&pieces, threads, quota, "0-2").predicted);
        for all in &answers {
            for Range { lower, upper } in [all.throttled_percent, all.cpus_used, all.cpus_unmet] {
                assert!(0.0 <= lower && lower <= upper, "{pieces:?} {quotas:?}: {all:?}");
            }
            assert!(all.throttled_percent.upper <= 100.0 && all.cpus_used.upper <= 4.0, "{all:?}");
        }
        for pair in answers.windows(2) {
            let [tight, loose] = pair else { unreachable!() };
            for (tight, loose) in [
                (tight.throttled_percent, loose.throttled_percent),
                (tight.cpus_unmet, loose.cpus_unmet),
                (loose.cpus_used, tight.cpus_used),
            ] {
                assert!(loose.lower <= tight.lower && loose.upper <= tight.upper, "{pieces:?} {quotas:?}");
            }
        }
        let [few, many] =
            ["0", "0-3"].map(|cpus| ask(&pieces, threads, Some(less), cpus).predicted.cpus_used);
        assert!(few.lower <= many.lower && few.upper <= many.upper, "{pieces:?} {less}");
    }
}

#[test]
fn huge_counters_do_not_overflow() {
    let huge = Sample {
        time_usec: u64::MAX,
        usage_usec: u64::MAX,
        throttled_usec: u64::MAX,
        nr_periods: 5,
        nr_throttled: 9,
    };
    let asked = Hypothesis { bandwidth: Bandwidth { quota: Some(u64::MAX), period: 1 }, cpus: None };
    for bandwidth in [asked.bandwidth, Bandwidth { quota: Some(1), period: 1_000_000 }] {
        let asked = Hypothesis { bandwidth, ..asked.clone() };
        assert!(what_if(&[Sample::default(), huge, Sample::default()], 32, asked.clone(), asked).is_some());
    }
}
