use super::*;
use crate::numbers::Numbers;

fn resources(json: &str) -> Resources {
    serde_json::from_str(json).unwrap()
}

impl Numbers {
    fn container(&mut self) -> Resources {
        let periods = [10_000, 33_333, 70_001, 100_000, 999_983, 0];
        let cpu = Cpu {
            shares: (self.below(4) > 0).then(|| self.below(5000)),
            quota: (self.below(8) > 0).then(|| i64::try_from(self.below(1_000_000)).unwrap() + 1),
            period: Some(periods[usize::try_from(self.below(6)).unwrap()]),
            cpus: Some([u16::try_from(self.below(64)).unwrap()].into_iter().collect()),
            ..Cpu::default()
        };
        let limit = (self.below(8) > 0).then(|| i64::try_from(self.below(1 << 40)).unwrap() + 1);
        let memory = crate::Memory { limit, ..Default::default() };
        Resources { cpu: Some(cpu), memory: Some(memory), ..Resources::default() }
    }
}

#[test]
fn the_example_of_record() {
    let two =
        resources(r#"{"cpu":{"shares":2048,"quota":200000,"period":100000},"memory":{"limit":419430400}}"#);
    let three =
        resources(r#"{"cpu":{"shares":3072,"quota":300000,"period":100000},"memory":{"limit":209715200}}"#);
    let sums = Sums::of([&two, &three], None);
    assert_eq!(sums.vcpus.shares, Some(5120));
    assert_eq!(sums.vcpus.quota, Some(500_000));
    assert_eq!(sums.memory, Some(629_145_600));
    assert_eq!(weight_from_shares(5120), 363);
    // No overhead given: it is unlimited, and so is the sandbox's CPU time.
    assert_eq!(sums.overhead, CpuLimits::default());
    assert_eq!(sums.sandbox_quota(), None);
}

#[test]
fn nothing_known_means_no_limit() {
    assert_eq!(Sums::of([], None), Sums::default());
    let overhead = resources(r#"{"cpu":{"quota":50000},"memory":{"limit":1048576},"pids":{"limit":50}}"#);
    let sums = Sums::of([], Some(&overhead));
    assert_eq!((sums.memory, sums.vcpus), (None, CpuLimits::default()));
    assert_eq!((sums.overhead.quota, sums.pids), (Some(50_000), Some(50)));
}

#[test]
fn overhead_is_added_to_memory_and_to_the_sandbox_quota() {
    let container = resources(r#"{"cpu":{"quota":100000},"memory":{"limit":1000}}"#);
    let overhead = resources(r#"{"cpu":{"quota":25000,"period":50000,"shares":512},"memory":{"limit":24}}"#);
    let sums = Sums::of([&container], Some(&overhead));
    assert_eq!(sums.memory, Some(1024));
    assert_eq!(sums.overhead.quota, Some(50_000));
    assert_eq!(sums.sandbox_quota(), Some(150_000));
    assert_eq!(sums.overhead.shares, Some(512));
    assert_eq!(sums.vcpus.shares, Some(1024));
    assert_eq!(Sums::of([&container], Some(&resources("{}"))).memory, Some(1000));
    assert_eq!(Sums::of([&container], Some(&resources(r#"{"memory":{"limit":-1}}"#))).memory, None);
}

#[test]
fn unlimited_absorbs() {
    let bounded = resources(r#"{"cpu":{"quota":1000,"cpus":"0"},"memory":{"limit":1000}}"#);
    for unlimited in [
        "{}",
        r#"{"cpu":{"quota":-1,"cpus":""},"memory":{"limit":-1}}"#,
        r#"{"cpu":{"quota":0},"memory":{"limit":0}}"#,
    ] {
        let unlimited = resources(unlimited);
        for sums in [Sums::of([&bounded, &unlimited], None), Sums::of([&unlimited, &bounded], None)] {
            assert_eq!((sums.memory, sums.vcpus.quota, sums.vcpus.cpus), (None, None, None));
            assert_eq!(sums.vcpus.shares, Some(2048));
        }
    }
}

#[test]
fn quotas_are_summed_exactly() {
    let third = |quota, period| resources(&format!(r#"{{"cpu":{{"quota":{quota},"period":{period}}}}}"#));
    let thirds = [third(10_000, 30_000), third(20_000, 60_000), third(30_000, 90_000)];
    assert_eq!(Sums::of(&thirds, None).vcpus.quota, Some(100_000));
    assert_eq!(Sums::of(&thirds[..2], None).vcpus.quota, Some(66_667));
    // Smaller than the kernel takes.
    assert_eq!(Sums::of([&third(1000, 1_000_000)], None).vcpus.quota, Some(1000));
    // Many periods without a common multiple in 128 bits: still the same in any order, and close.
    let odd: Vec<Resources> = (0..200).map(|i| third(1000 + i, 999_000 - i)).collect();
    let exact: f64 = (0..200).map(|i| f64::from(1000 + i) * 1e5 / f64::from(999_000 - i)).sum();
    let forward = Sums::of(&odd, None).vcpus.quota.unwrap();
    assert_eq!(Sums::of(odd.iter().rev(), None).vcpus.quota, Some(forward));
    assert!((f64::from(u32::try_from(forward).unwrap()) - exact).abs() < 200.0);
}

#[test]
fn nothing_overflows() {
    let huge = Resources {
        cpu: Some(Cpu {
            shares: Some(u64::MAX),
            quota: Some(i64::MAX),
            period: Some(u64::MAX),
            ..Cpu::default()
        }),
        memory: Some(crate::Memory { limit: Some(i64::MAX), ..Default::default() }),
        pids: Some(crate::Pids { limit: Some(i64::MAX) }),
        ..Resources::default()
    };
    let mut fast = huge.clone();
    fast.cpu.as_mut().unwrap().period = Some(1);
    let sums = Sums::of([&huge, &huge, &fast, &fast], Some(&fast));
    assert_eq!((sums.memory, sums.vcpus.quota), (None, None));
    assert_eq!(sums.vcpus.shares, Some(u64::MAX));
    assert_eq!(weight_from_shares(u64::MAX), 10_000);
}

#[test]
fn order_does_not_matter_and_removal_undoes_addition() {
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    for _ in 0..500 {
        let count = numbers.below(6);
        let mut all: Vec<Resources> = (0..count).map(|_| numbers.container()).collect();
        let overhead = numbers.container();
        let sums = Sums::of(&all, Some(&overhead));
        assert_eq!(Sums::of(all.iter().rev(), Some(&overhead)), sums);
        all.push(numbers.container());
        let more = Sums::of(&all, Some(&overhead));
        // One more never lowers a limit, except from "nothing known".
        if count > 0 {
            assert!(more.memory.is_none() || more.memory >= sums.memory);
            assert!(more.vcpus.quota.is_none() || more.vcpus.quota >= sums.vcpus.quota);
        }
        all.pop();
        assert_eq!(Sums::of(&all, Some(&overhead)), sums);
    }
}

#[test]
fn weights_follow_runc() {
    // Pairs computed apart from this code with the same formula, and the clamped ends.
    for (shares, weight) in
        [(0, 1), (1, 1), (2, 1), (100, 17), (1024, 100), (2048, 174), (262_144, 10_000), (262_145, 10_000)]
    {
        assert_eq!(weight_from_shares(shares), weight, "{shares}");
    }
    let mut last = 0;
    for shares in 2..=262_144 {
        let weight = weight_from_shares(shares);
        assert!((last..=last + 1).contains(&weight), "{shares}: {last} then {weight}");
        last = weight;
    }
}

#[test]
fn overhead_takes_the_remaining_cpus() {
    let base: CpuSet = "0-7".parse().unwrap();
    let on = |cpus: &str| resources(&format!(r#"{{"cpu":{{"cpus":"{cpus}"}}}}"#));
    let rest = |sums: Sums| sums.overhead_cpus(&base).map(|set| set.to_string());
    let (two, four) = (on("2"), on("4-5"));
    assert_eq!(Sums::of([&two, &four], None).vcpus.cpus.unwrap().to_string(), "2,4-5");
    assert_eq!(rest(Sums::of([&two, &four], None)).as_deref(), Some("0-1,3,6-7"));
    assert_eq!(rest(Sums::of([&two], Some(&on("2-3")))).as_deref(), Some("2-3"));
    assert_eq!(rest(Sums::of([&on("0-7")], None)), None);
    assert_eq!(rest(Sums::of([&on("7-8")], None)), None);
    assert_eq!(rest(Sums::of([], None)), None);
}
