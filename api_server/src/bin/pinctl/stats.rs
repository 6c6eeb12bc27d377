//! What the groups used and waited for.

use serde_json::Value;

use crate::groups::size;
use crate::show::{list, plain, table, text};

/// Two replies to `GET /cgroup/stats`, one after the other: what was used in all, and shares of the time between.
pub fn page(before: &Value, now: &Value, threads: bool) -> String {
    let elapsed = grown(before, now, "/time_usec");
    let share = |pointer: &str| match (grown(before, now, pointer), elapsed) {
        (Some(used), Some(elapsed)) if elapsed > 0.0 => format!("{:.1}%", used / elapsed * 100.0),
        _ => "-".to_owned(),
    };
    let mut groups =
        table(&["GROUP", "CPU", "USER", "SYSTEM", "THROTTLED", "PERIODS", "WAIT CPU", "WAIT MEM", "WAIT IO"]);
    for group in ["sandbox", "vcpus", "overhead"] {
        let cpu = |name: &str| format!("/{group}/cpu/{name}");
        let pressure = |kind: &str| {
            let value = now.pointer(&format!("/{group}/pressure/{kind}/some/avg10")).and_then(Value::as_f64);
            value.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.1}%"))
        };
        let throttled = match (count(now, &cpu("nr_throttled")), count(now, &cpu("nr_periods"))) {
            (Some(throttled), Some(periods)) => format!("{throttled}/{periods}"),
            _ => "-".to_owned(),
        };
        groups.add_row([
            group.to_owned(),
            share(&cpu("usage_usec")),
            seconds(now, &cpu("user_usec")),
            seconds(now, &cpu("system_usec")),
            seconds(now, &cpu("throttled_usec")),
            throttled,
            pressure("cpu"),
            pressure("memory"),
            pressure("io"),
        ]);
    }
    let bytes = |pointer: &str| size(now.pointer(pointer).and_then(Value::as_f64));
    let limit = match now.pointer("/memory/limit_bytes") {
        Some(Value::Number(limit)) => size(limit.as_f64()),
        _ => "no limit".to_owned(),
    };
    let memory = format!(
        "memory    {} of {limit}; peak {}; anonymous {}, page cache {}, kernel {}\n",
        bytes("/memory/current_bytes"),
        bytes("/memory/peak_bytes"),
        bytes("/memory/anon_bytes"),
        bytes("/memory/file_bytes"),
        bytes("/memory/kernel_bytes"),
    );
    let operations = |name: &str| count(now, name).map_or_else(|| "-".to_owned(), |count| count.to_string());
    let note = match now.pointer("/io/counts_buffered_writes") {
        Some(Value::Bool(false)) => " (v1: buffered writes are charged to the root group)",
        _ => "",
    };
    let io = format!(
        "block I/O read {} in {} operations, written {} in {}{note}\n",
        bytes("/io/read_bytes"),
        operations("/io/read_operations"),
        bytes("/io/write_bytes"),
        operations("/io/write_operations"),
    );
    let mut roles = table(&["ROLE", "THREADS", "CPU", "WAITING"]);
    for (role, load) in now["roles"].as_object().into_iter().flatten() {
        let of = |name: &str| share(&format!("/roles/{role}/{name}"));
        roles.add_row([role.clone(), plain(&load["threads"]), of("run_usec"), of("wait_usec")]);
    }
    let mut page = format!("{}\n{memory}{io}\n{}", text(&groups), text(&roles));
    if threads {
        page = format!("{page}\n{}", text(&each_thread(before, now, elapsed)));
    }
    page
}

fn each_thread(before: &Value, now: &Value, elapsed: Option<f64>) -> comfy_table::Table {
    let mut table = table(&["TID", "NAME", "ROLE", "CPU", "WAITING"]);
    for thread in list(now, "threads") {
        let old =
            list(before, "threads").iter().find(|old| old["tid"] == thread["tid"]).unwrap_or(&Value::Null);
        let share = |name: &str| match (grown(old, thread, name), elapsed) {
            (Some(used), Some(elapsed)) if elapsed > 0.0 => format!("{:.1}%", used / elapsed * 100.0),
            _ => "-".to_owned(),
        };
        table.add_row([
            plain(&thread["tid"]),
            plain(&thread["comm"]),
            plain(&thread["role"]),
            share("/run_usec"),
            share("/wait_usec"),
        ]);
    }
    table
}

/// How much a figure has grown.
fn grown(before: &Value, now: &Value, pointer: &str) -> Option<f64> {
    Some((now.pointer(pointer)?.as_f64()? - before.pointer(pointer)?.as_f64()?).max(0.0))
}

fn count(stats: &Value, pointer: &str) -> Option<u64> {
    stats.pointer(pointer)?.as_u64()
}

/// Microseconds as seconds.
fn seconds(stats: &Value, pointer: &str) -> String {
    let usec = stats.pointer(pointer).and_then(Value::as_f64);
    usec.map_or_else(|| "-".to_owned(), |usec| format!("{:.2} s", usec / 1e6))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample(time_usec: u64, usage: u64) -> Value {
        let cpu = json!({ "usage_usec": usage, "user_usec": 1_500_000, "system_usec": null, "nr_periods": 10,
            "nr_throttled": 4, "throttled_usec": 70_000 });
        json!({
            "time_usec": time_usec,
            "sandbox": { "cpu": {}, "pressure": { "cpu": null } },
            "vcpus": { "cpu": cpu, "pressure": { "cpu": { "some": { "avg10": 12.34 } } } },
            "overhead": { "cpu": {}, "pressure": {} },
            "memory": { "current_bytes": 1_048_576, "limit_bytes": null },
            "io": { "read_bytes": 2048, "read_operations": 3, "counts_buffered_writes": false },
            "roles": { "vcpu": { "threads": 2, "run_usec": usage, "wait_usec": 0 } },
            "threads": [{ "tid": 7, "comm": "fc_vcpu 0", "role": "vcpu", "run_usec": usage, "wait_usec": 0 }],
        })
    }

    #[test]
    fn shares_are_of_the_time_between() {
        let page = page(&sample(1_000_000, 0), &sample(2_000_000, 250_000), true);
        let lines: Vec<Vec<_>> = page.lines().map(|line| line.split_whitespace().collect()).collect();
        let vcpus = ["vcpus", "25.0%", "1.50", "s", "-", "0.07", "s", "4/10", "12.3%", "-", "-"];
        assert_eq!(lines[2], vcpus);
        assert_eq!(lines[3], ["overhead", "-", "-", "-", "-", "-", "-", "-", "-"]);
        assert!(page.contains("memory    1.0 MiB of no limit; peak -;"), "{page}");
        assert!(page.contains("read 2.0 KiB in 3 operations, written - in - (v1: buffered"), "{page}");
        assert!(lines.contains(&vec!["vcpu", "2", "25.0%", "0.0%"]), "{page}");
        assert!(lines.contains(&vec!["7", "fc_vcpu", "0", "vcpu", "25.0%", "0.0%"]), "{page}");
    }

    #[test]
    fn odd_replies_are_no_panic() {
        for odd in [json!(null), json!([1]), json!({ "threads": [1], "roles": 7, "time_usec": "x" })] {
            page(&odd, &odd, true);
            page(&sample(5, 5), &odd, true);
            page(&sample(5, 5), &sample(5, 5), true);
        }
    }
}
