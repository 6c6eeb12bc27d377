//! Files of cgroupfs and procfs, as some kernel may write them: statistics, events, hierarchies, sets of CPUs.

use std::collections::BTreeMap;
use std::path::Path;

use cgroup::{CgroupPath, CpuSet, Hierarchies, Layout, Scope};
use serde_json::json;

use crate::input::Input;

const V2: [&str; 12] = [
    "cpu.stat",
    "cpu.max",
    "cpuset.cpus.effective",
    "cpu.pressure",
    "memory.pressure",
    "io.pressure",
    "io.stat",
    "memory.stat",
    "memory.current",
    "memory.peak",
    "memory.max",
    "memory.events",
];
const V1: [&str; 15] = [
    "cpu.stat",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
    "cpuset.cpus",
    "cpuacct.usage",
    "cpuacct.stat",
    "memory.stat",
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.limit_in_bytes",
    "memory.kmem.usage_in_bytes",
    "blkio.throttle.io_service_bytes",
    "blkio.throttle.io_serviced",
    "memory.oom_control",
    "memory.failcnt",
];

/// Groups all of which are `folder`.
fn layout(folder: &Path, v2: bool) -> Layout {
    let key = if v2 { "" } else { "cpu,cpuacct,cpuset,memory,blkio,pids" };
    let hierarchy = json!({"key": key, "root": "/", "point": folder.parent(), "own": null, "seen": ""});
    let group = format!("/{}", folder.file_name().and_then(|name| name.to_str()).unwrap_or_default());
    let site = json!({
        "hierarchy": hierarchy, "base": group, "between": [], "sandbox": group, "vcpus": group, "overhead": group,
    });
    serde_json::from_value(json!({"v2": v2, "sites": [site]})).expect("a layout is plain data")
}

fn read(layout: &Layout) {
    if let Ok(stats) = layout.stats() {
        serde_json::to_string(&stats).expect("statistics are JSON");
    }
    for scope in [Scope::Sandbox, Scope::Vcpus, Scope::Overhead] {
        let _ = (layout.bandwidth(scope), layout.cpus(scope), layout.cpu(scope));
    }
    let _ = (layout.base_cpus(), layout.account());
    let snapshot = |now| layout.snapshot(now, BTreeMap::new(), BTreeMap::new());
    if let (Ok(before), Ok(after)) = (snapshot(0), snapshot(1_000_000)) {
        let _ = serde_json::to_string(&cgroup::diagnose(&before, &after));
    }
}

fn parse(text: &str) {
    let (mountinfo, own) = text.split_once('\0').unwrap_or((text, text));
    let hierarchies = Hierarchies::parse(mountinfo, own);
    let _ = hierarchies.own_cgroup("");
    if let Ok(set) = text.parse::<CpuSet>() {
        assert_eq!(set.to_string().parse(), Ok(set), "{text:?}");
    }
    if let Ok(path) = text.parse::<CgroupPath>() {
        assert_eq!(path.as_str().parse::<CgroupPath>().ok(), Some(path), "{text:?}");
    }
}

/// Either one text to parse, or files that change once.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.u8();
    if choice & 1 == 0 {
        return parse(&String::from_utf8_lossy(input.rest()));
    }
    let v2 = choice & 2 == 0;
    let names = if v2 { &V2[..] } else { &V1[..] };
    let folder = crate::host::fresh_path();
    std::fs::create_dir(&folder).expect("the host has room for temporary files");
    let layout = layout(&folder, v2);
    let mut log = None;
    for _ in 0..2 {
        for _ in 0..8 {
            let choice = input.u8();
            let name = names[usize::from(choice) % names.len()];
            let contents = input.short_bytes();
            if !input.is_empty() || !contents.is_empty() {
                std::fs::write(folder.join(name), contents).expect("the host has room for temporary files");
            }
        }
        read(&layout);
        match &mut log {
            None => log = layout.watch().ok(),
            Some((log, _)) => drop(log.check()),
        }
    }
    let _ = std::fs::remove_dir_all(&folder);
}
