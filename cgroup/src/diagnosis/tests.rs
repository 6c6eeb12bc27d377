use super::*;
use crate::counters::{HostTime, SchedStat, Share};
use crate::snapshot::Threads;
use crate::stats::CpuStats;

/// One second in which things happened, in milliseconds.
#[derive(Clone, Copy, Default)]
struct Second {
    /// Of each vCPU: run and waited.
    vcpus: &'static [(u64, u64)],
    /// Of the main thread.
    main: (u64, u64),
    cpus: usize,
    own: u64,
    overheads: u64,
    pod: u64,
    /// Ticks.
    busy: u64,
    stolen: u64,
    memory: u64,
    io: u64,
}

fn load(threads: &[(u64, u64)], first: u32, cpus: usize, throttled_ms: u64, waits: (u64, u64)) -> Load {
    let stat =
        |&(run, wait): &(u64, u64)| SchedStat { run_usec: run * 1000, wait_usec: wait * 1000, timeslices: 1 };
    let share = |ms: u64| Share { avg10: 0.0, avg60: 0.0, avg300: 0.0, total_usec: ms * 1000 };
    let pressure = |ms: u64| Some(Pressure { some: share(ms), full: None });
    let mut load = Load {
        cpu: CpuStats {
            usage_usec: Some(threads.iter().map(|(run, _)| run * 1000).sum()),
            nr_periods: Some(10),
            nr_throttled: Some(throttled_ms / 100),
            throttled_usec: Some(throttled_ms * 1000),
            ..CpuStats::default()
        },
        cpus: Some(cpus),
        threads: (first..).zip(threads.iter().map(stat)).collect::<Threads>(),
        ..Load::default()
    };
    (load.pressure.memory, load.pressure.io) = (pressure(waits.0), pressure(waits.1));
    load
}

impl Second {
    fn snapshot(&self, time_usec: u64) -> Snapshot {
        let cpu = CpuStats { throttled_usec: Some(self.pod * 1000), ..CpuStats::default() };
        Snapshot {
            time_usec,
            v2: true,
            vcpus: load(self.vcpus, 10, self.cpus, self.own, (self.memory, self.io)),
            overhead: load(&[self.main], 1, self.cpus, self.overheads, (0, 0)),
            above: vec![("/p".parse().unwrap(), cpu)],
            host: Some(HostTime { busy: self.busy, stolen: self.stolen }),
        }
    }

    fn diagnose(&self) -> Diagnosis {
        let zeros: &'static [(u64, u64)] = &[(0, 0); 4][..self.vcpus.len()];
        let before = Self { vcpus: zeros, cpus: self.cpus, ..Self::default() };
        diagnose(&before.snapshot(5), &self.snapshot(1_000_005))
    }
}

#[test]
fn what_holds_back_most_is_named() {
    use Cause::*;
    let idle = Second { cpus: 4, ..Second::default() };
    let vcpus = Some(Scope::Vcpus);
    for (what, second, cause, group) in [
        ("not started", idle, Nothing, None),
        ("idle", Second { vcpus: &[(10, 0), (5, 1)], ..idle }, Nothing, None),
        ("free", Second { vcpus: &[(990, 10), (950, 50)], ..idle }, Nothing, None),
        (
            "quota, a CPU each",
            Second { vcpus: &[(100, 900), (100, 900)], own: 1800, ..idle },
            OwnQuota,
            vcpus,
        ),
        // The kernel counts the one CPU, and both wait for it.
        (
            "quota, one CPU",
            Second { vcpus: &[(100, 900), (100, 900)], own: 800, cpus: 1, ..idle },
            OwnQuota,
            vcpus,
        ),
        // One of two is idle: the others' waiting is not the quota's.
        (
            "some quota, more contention",
            Second { vcpus: &[(200, 800), (0, 0)], own: 100, cpus: 1, ..idle },
            HostContention,
            vcpus,
        ),
        ("quota of the pod", Second { vcpus: &[(300, 700)], pod: 700, ..idle }, QuotaAbove, vcpus),
        // Each explains as much as there is.
        ("both quotas", Second { vcpus: &[(300, 700)], own: 500, pod: 900, ..idle }, OwnQuota, vcpus),
        ("contention", Second { vcpus: &[(500, 500), (500, 500)], ..idle }, HostContention, vcpus),
        ("themselves", Second { vcpus: &[(490, 500), (490, 500)], cpus: 1, ..idle }, TooFewCpus, vcpus),
        ("with main", Second { vcpus: &[(500, 400)], main: (400, 500), cpus: 1, ..idle }, TooFewCpus, vcpus),
        ("steal", Second { vcpus: &[(1000, 0)], busy: 50, stolen: 50, ..idle }, Stolen, vcpus),
        ("little steal", Second { vcpus: &[(1000, 0)], busy: 98, stolen: 2, ..idle }, Nothing, None),
        ("memory", Second { vcpus: &[(100, 0)], memory: 400, io: 300, ..idle }, Memory, vcpus),
        ("io", Second { vcpus: &[(10, 0)], memory: 200, io: 300, ..idle }, Io, vcpus),
        ("hardly anything, much of it waiting", Second { vcpus: &[(1, 9)], ..idle }, Nothing, None),
        (
            "overhead's quota",
            Second { vcpus: &[(100, 0)], main: (100, 900), overheads: 900, ..idle },
            OwnQuota,
            Some(Scope::Overhead),
        ),
    ] {
        let found = second.diagnose();
        assert_eq!((found.verdict.cause, found.verdict.group), (cause, group), "{what}: {found:?}");
        assert!(found.verdict.sentence.ends_with('.') && !found.verdict.evidence.is_empty(), "{what}");
    }
}

#[test]
fn shares_add_up_and_have_their_evidence() {
    let second = Second { vcpus: &[(200, 800)], cpus: 1, own: 500, pod: 200, ..Second::default() };
    let found = second.diagnose();
    assert_eq!(found.window_usec, 1_000_000);
    let vcpus = &found.vcpus;
    assert_eq!(
        (vcpus.run_usec, vcpus.wait_usec, vcpus.throttled_usec),
        (200_000, Some(800_000), Some(500_000))
    );
    let shares =
        [vcpus.running_percent, vcpus.own_quota_percent, vcpus.quota_above_percent, vcpus.cpu_wait_percent];
    assert_eq!(shares, [Some(20.0), Some(50.0), Some(20.0), Some(10.0)]);
    assert_eq!((vcpus.io_percent, vcpus.stolen_percent), (Some(0.0), Some(0.0)));
    let text = found.verdict.evidence.join("\n");
    assert!(text.contains("5 of 0 periods") && text.contains("500 ms"), "{text}");
    assert!(text.contains("its 1 thread,") && text.contains("1000 ms"), "{text}");
    assert!(found.verdict.sentence.contains("50.0%"), "{}", found.verdict.sentence);
}

#[test]
fn what_is_not_known_is_said() {
    let snapshot = |time_usec, throttled| {
        let mut all = Second { vcpus: &[(0, 0)], own: throttled, ..Second::default() }.snapshot(time_usec);
        all.v2 = false;
        all.host = None;
        all.above.clear();
        for load in [&mut all.vcpus, &mut all.overhead] {
            load.threads.clear();
            (load.pressure, load.cpus) = (Default::default(), None);
        }
        all
    };
    let found = diagnose(&snapshot(0, 0), &snapshot(1_000_000, 700));
    let vcpus = &found.vcpus;
    assert_eq!(
        [vcpus.cpu_wait_percent, vcpus.stolen_percent, vcpus.quota_above_percent, vcpus.io_percent],
        [None; 4]
    );
    assert!(vcpus.unknown.iter().any(|why| why.contains("v1")), "{vcpus:?}");
    assert!(vcpus.unknown.iter().any(|why| why.contains("scheduling statistics")), "{vcpus:?}");
    assert_eq!(found.verdict.cause, Cause::OwnQuota);
}

#[test]
fn counters_that_run_backwards_are_no_panic() {
    let busy = Second { vcpus: &[(5, 5)], own: 5, pod: 5, busy: 5, stolen: 5, io: 5, ..Second::default() };
    let none = Second { vcpus: &[(0, 0)], ..Second::default() };
    let found = diagnose(&busy.snapshot(9), &none.snapshot(3));
    assert_eq!((found.window_usec, found.verdict.cause), (1, Cause::Nothing));
}
