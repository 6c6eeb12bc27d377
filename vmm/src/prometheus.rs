//! Figures of the groups in Prometheus's text format, version 0.0.4: `GET /metrics/prometheus`.

use std::collections::BTreeMap;
use std::fmt::Write;

use cgroup::{GroupStats, Pressure, Stats};

use crate::threads::RoleLoad;

/// What the text is, as a media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// Metrics of one name: its kind and what it says, then each sample's labels and value.
struct Family<'a> {
    name: &'a str,
    kind: &'a str,
    help: &'a str,
    samples: Vec<(String, f64)>,
}

/// All figures as text. What the kernel does not have is left out.
pub fn text(stats: &Stats, roles: &BTreeMap<&'static str, RoleLoad>) -> String {
    let groups = [("sandbox", &stats.sandbox), ("vcpus", &stats.vcpus), ("overhead", &stats.overhead)];
    let each = |of: &dyn Fn(&GroupStats) -> Option<f64>| {
        let sample = |(group, stats): &(&str, &GroupStats)| Some((format!("group=\"{group}\""), of(stats)?));
        groups.iter().filter_map(sample).collect::<Vec<_>>()
    };
    let modes = groups.iter().flat_map(|(group, stats)| {
        [("user", stats.cpu.user_usec), ("system", stats.cpu.system_usec)].into_iter().filter_map(
            move |(mode, usec)| Some((format!("group=\"{group}\",mode=\"{mode}\""), seconds(usec?))),
        )
    });
    let waiting = groups.iter().flat_map(|(group, stats)| {
        let pressure = &stats.pressure;
        [("cpu", pressure.cpu), ("memory", pressure.memory), ("io", pressure.io)]
            .into_iter()
            .flat_map(move |(resource, pressure)| shares(group, resource, pressure))
    });
    let (memory, io) = (&stats.memory, &stats.io.total);
    let role = |of: fn(&RoleLoad) -> u64| {
        roles.iter().map(|(role, load)| (format!("role=\"{role}\""), seconds(of(load)))).collect()
    };
    let families = [
        counter(
            "cpu_usage_seconds_total",
            "CPU time of the group.",
            each(&|g| g.cpu.usage_usec.map(seconds)),
        ),
        counter("cpu_mode_seconds_total", "CPU time of the group by mode.", modes.collect()),
        counter(
            "cpu_periods_total",
            "Periods in which a quota applied.",
            each(&|g| g.cpu.nr_periods.map(float)),
        ),
        counter(
            "cpu_throttled_periods_total",
            "Periods in which the quota was used up.",
            each(&|g| g.cpu.nr_throttled.map(float)),
        ),
        counter(
            "cpu_throttled_seconds_total",
            "Time for which CPUs were withheld because of the quota.",
            each(&|g| g.cpu.throttled_usec.map(seconds)),
        ),
        counter("pressure_seconds_total", "Time in which tasks of the group waited.", waiting.collect()),
        gauge(
            "memory_bytes",
            "Memory of the sandbox.",
            labelled(
                "kind",
                [
                    ("current", memory.current_bytes),
                    ("peak", memory.peak_bytes),
                    ("limit", memory.limit_bytes),
                    ("anon", memory.anon_bytes),
                    ("file", memory.file_bytes),
                    ("kernel", memory.kernel_bytes),
                ],
            ),
        ),
        counter(
            "io_bytes_total",
            "Block I/O of the sandbox.",
            labelled("direction", [("read", io.read_bytes), ("write", io.write_bytes)]),
        ),
        counter(
            "io_operations_total",
            "Block I/O of the sandbox.",
            labelled("direction", [("read", io.read_operations), ("write", io.write_operations)]),
        ),
        counter(
            "thread_run_seconds_total",
            "Time of the role's threads on a CPU.",
            role(|load| load.run_usec),
        ),
        counter(
            "thread_wait_seconds_total",
            "Time of the role's threads ready to run and waiting for a CPU.",
            role(|load| load.wait_usec),
        ),
    ];
    let mut text = String::new();
    for Family { name, kind, help, samples } in families.iter().filter(|family| !family.samples.is_empty()) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP pinfold_{name} {help}\n# TYPE pinfold_{name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(text, "pinfold_{name}{{{labels}}} {value}");
        }
    }
    text
}

fn counter<'a>(name: &'a str, help: &'a str, samples: Vec<(String, f64)>) -> Family<'a> {
    Family { name, kind: "counter", help, samples }
}

fn gauge<'a>(name: &'a str, help: &'a str, samples: Vec<(String, f64)>) -> Family<'a> {
    Family { name, kind: "gauge", help, samples }
}

fn labelled<const N: usize>(label: &str, values: [(&str, Option<u64>); N]) -> Vec<(String, f64)> {
    let sample = |(name, value): (&str, Option<u64>)| Some((format!("{label}=\"{name}\""), float(value?)));
    values.into_iter().filter_map(sample).collect()
}

fn shares(group: &str, resource: &str, pressure: Option<Pressure>) -> Vec<(String, f64)> {
    let some = pressure.map(|pressure| ("some", pressure.some));
    let full = pressure.and_then(|pressure| pressure.full).map(|share| ("full", share));
    [some, full]
        .into_iter()
        .flatten()
        .map(|(kind, share)| {
            let labels = format!("group=\"{group}\",resource=\"{resource}\",tasks=\"{kind}\"");
            (labels, seconds(share.total_usec))
        })
        .collect()
}

fn seconds(usec: u64) -> f64 {
    float(usec) / 1e6
}

/// Beyond 2^53 the last digits are lost, as in every reader of this format.
#[expect(clippy::cast_precision_loss, reason = "said above")]
fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_become_lines_and_what_is_missing_is_left_out() {
        let mut stats = Stats {
            v2: true,
            sandbox: GroupStats::default(),
            vcpus: GroupStats::default(),
            overhead: GroupStats::default(),
            memory: cgroup::MemoryStats { anon_bytes: Some(4096), ..cgroup::MemoryStats::default() },
            io: cgroup::IoStats::default(),
        };
        stats.vcpus.cpu.usage_usec = Some(1_500_000);
        let text = text(&stats, &BTreeMap::from([("vcpu", RoleLoad::default())]));
        let wanted = "# HELP pinfold_cpu_usage_seconds_total CPU time of the group.\n\
                      # TYPE pinfold_cpu_usage_seconds_total counter\n\
                      pinfold_cpu_usage_seconds_total{group=\"vcpus\"} 1.5\n\
                      # HELP pinfold_memory_bytes Memory of the sandbox.\n\
                      # TYPE pinfold_memory_bytes gauge\n\
                      pinfold_memory_bytes{kind=\"anon\"} 4096\n";
        assert!(text.starts_with(wanted), "{text}");
        assert!(text.ends_with("pinfold_thread_wait_seconds_total{role=\"vcpu\"} 0\n"), "{text}");
    }
}
