use std::fs;

use super::*;
use crate::hierarchy::{Chosen, Hierarchies, VersionChoice};
use crate::reach::Reach;

/// Groups made of ordinary files.
pub fn fake(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

pub fn layout(dir: &Path, v1: &[&str], sandbox: Option<&str>) -> Layout {
    let point = dir.display();
    let all = match v1 {
        [] => Hierarchies::parse(&format!("1 2 0:3 / {point} rw - cgroup2 c rw"), "0::/"),
        names => {
            let mounts: String =
                names.iter().map(|c| format!("1 2 0:3 / {point}/{c} rw - cgroup c rw,{c}\n")).collect();
            Hierarchies::parse(&mounts, &names.iter().map(|c| format!("1:{c}:/\n")).collect::<String>())
        }
    };
    let v2 = v1.is_empty();
    let found = match all.choose(if v2 { VersionChoice::V2 } else { VersionChoice::V1 }).unwrap() {
        Chosen::V2(one) => vec![one],
        Chosen::V1(all) => all,
    };
    let sites = found.into_iter().map(|hierarchy| Site {
        hierarchy: hierarchy.clone(),
        base: "/p".parse().unwrap(),
        between: Vec::new(),
        sandbox: sandbox.map(|path| path.parse().unwrap()),
        vcpus: if v2 { "/p/box/v" } else { "/p/v" }.parse().unwrap(),
        overhead: if v2 { "/p/box/o" } else { "/p/box" }.parse().unwrap(),
    });
    Layout { v2, sites: sites.collect(), reach: Reach::default() }
}

#[test]
fn v2() {
    let psi =
        "some avg10=0.10 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n";
    let dir = fake(&[
        ("p/box/cpu.stat", "usage_usec 90\nuser_usec 60\nsystem_usec 30\n"),
        (
            "p/box/v/cpu.stat",
            "usage_usec 70\nuser_usec 50\nsystem_usec 20\nnr_periods 4\nnr_throttled 2\nthrottled_usec 11\n",
        ),
        ("p/box/v/cpu.pressure", psi),
        ("p/box/memory.current", "1000\n"),
        ("p/box/memory.max", "max\n"),
        ("p/box/memory.stat", "anon 700\nfile 200\nkernel 100\nkernel_stack 5\n"),
        (
            "p/box/io.stat",
            "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=5 wbytes=0 rios=1 wios=0\n",
        ),
    ]);
    let stats = layout(dir.path(), &[], Some("/p/box")).stats().unwrap();
    assert_eq!(stats.sandbox.path.unwrap().as_str(), "/p/box");
    assert_eq!((stats.sandbox.cpu.usage_usec, stats.sandbox.cpu.nr_periods), (Some(90), None));
    assert_eq!((stats.vcpus.cpu.system_usec, stats.vcpus.cpu.throttled_usec), (Some(20), Some(11)));
    assert_eq!(stats.vcpus.pressure.cpu.unwrap().some.total_usec, 9);
    // Its files are missing.
    assert_eq!(stats.overhead.cpu, CpuStats::default());
    assert_eq!((stats.memory.current_bytes, stats.memory.peak_bytes), (Some(1000), None));
    assert_eq!((stats.memory.limit_bytes, stats.memory.kernel_bytes), (None, Some(100)));
    assert_eq!((stats.io.total.read_bytes, stats.io.total.write_operations), (Some(15), Some(2)));
    assert!(stats.io.counts_buffered_writes && stats.io.devices.len() == 2);

    fs::write(dir.path().join("p/box/v/cpu.stat"), "usage_usec many\n").unwrap();
    let error = layout(dir.path(), &[], Some("/p/box")).stats().unwrap_err().to_string();
    assert!(error.contains("p/box/v/cpu.stat") && error.contains("usage_usec many"), "{error}");
}

#[test]
fn v2_in_a_group_that_is_not_ours() {
    let dir = fake(&[("p/memory.current", "5\n"), ("p/cpu.stat", "usage_usec 9\n")]);
    let stats = layout(dir.path(), &[], None).stats().unwrap();
    assert_eq!(stats.sandbox.path.unwrap().as_str(), "/p");
    assert_eq!((stats.memory.current_bytes, stats.sandbox.cpu.usage_usec), (Some(5), Some(9)));
    assert_eq!(stats.io.total, TotalTransfers::default());
}

#[test]
fn v1_counts_in_other_units() {
    let dir = fake(&[
        ("cpu/p/v/cpu.stat", "nr_periods 4\nnr_throttled 2\nthrottled_time 11000\n"),
        ("cpuacct/p/v/cpuacct.usage", "7000000\n"),
        ("cpuacct/p/v/cpuacct.stat", "user 5\nsystem 2\n"),
        ("cpuacct/p/box/cpuacct.usage", "2000999\n"),
        ("cpuacct/p/box/cpuacct.stat", "user 1\nsystem 1\n"),
        ("memory/p/box/memory.usage_in_bytes", "1000\n"),
        ("memory/p/box/memory.max_usage_in_bytes", "1500\n"),
        ("memory/p/box/memory.limit_in_bytes", "9223372036854771712\n"),
        ("memory/p/box/memory.kmem.usage_in_bytes", "50\n"),
        ("memory/p/box/memory.stat", "cache 1\nrss 2\ntotal_cache 300\ntotal_rss 600\n"),
        ("blkio/p/box/blkio.throttle.io_service_bytes", "8:0 Read 10\n8:0 Write 20\nTotal 30\n"),
        ("blkio/p/box/blkio.throttle.io_serviced", "8:0 Read 1\n8:0 Write 2\nTotal 3\n"),
    ]);
    let stats = layout(dir.path(), &["cpu", "cpuacct", "memory", "blkio"], Some("/p/box")).stats().unwrap();
    let ms = 1_000_000 / ticks_per_second();
    assert_eq!(stats.vcpus.cpu.usage_usec, Some(7000));
    assert_eq!((stats.vcpus.cpu.user_usec, stats.vcpus.cpu.system_usec), (Some(5 * ms), Some(2 * ms)));
    assert_eq!((stats.vcpus.cpu.nr_throttled, stats.vcpus.cpu.throttled_usec), (Some(2), Some(11)));
    assert_eq!(stats.overhead.cpu.usage_usec, Some(2000));
    assert_eq!(stats.sandbox.cpu.usage_usec, Some(9000));
    assert_eq!((stats.sandbox.cpu.throttled_usec, stats.sandbox.pressure), (None, Pressures::default()));
    let memory = stats.memory;
    assert_eq!((memory.anon_bytes, memory.file_bytes, memory.kernel_bytes), (Some(600), Some(300), Some(50)));
    assert_eq!((memory.peak_bytes, memory.limit_bytes), (Some(1500), None));
    assert_eq!((stats.io.total.write_bytes, stats.io.total.read_operations), (Some(20), Some(1)));
    assert!(!stats.io.counts_buffered_writes);
}
