//! Containers, limits and events.

use serde_json::{Value, json};

use crate::show::{list, plain, table, text};

/// The period of a quota that is given in CPUs, in microseconds.
const PERIOD: f64 = 100_000.0;

/// Microseconds in each 100000 for a number of CPUs.
pub fn quota(text: &str) -> Result<i64, String> {
    let cpus = text.parse::<f64>().ok().filter(|cpus| (0.01..=8192.0).contains(cpus));
    let cpus = cpus.ok_or("give a number of CPUs from 0.01 to 8192")?;
    // The nearest whole number, by way of its text.
    format!("{:.0}", cpus * PERIOD).parse().map_err(|_| "give a smaller number of CPUs".to_owned())
}

/// Bytes as a number with a unit.
pub fn bytes(text: &str) -> Result<i64, String> {
    let units = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];
    let unit = units.iter().find_map(|(unit, shift)| {
        let text = text.trim_end_matches('B').trim_end_matches('i');
        Some((text.strip_suffix(unit).or_else(|| text.strip_suffix(&unit.to_lowercase()))?, *shift))
    });
    let (number, shift) = unit.unwrap_or((text, 0));
    let bytes = number.parse::<i64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| "give a number of bytes, such as 600M".to_owned())
}

/// OCI LinuxResources of what is given.
pub fn resources(quota: Option<i64>, shares: Option<u64>, cpus: Option<&str>, memory: Option<i64>) -> Value {
    let mut all = json!({ "cpu": {}, "memory": {} });
    for (section, field, value) in [
        ("cpu", "quota", quota.map(Value::from)),
        ("cpu", "period", quota.map(|_| json!(100_000))),
        ("cpu", "shares", shares.map(Value::from)),
        ("cpu", "cpus", cpus.map(Value::from)),
        ("memory", "limit", memory.map(Value::from)),
    ] {
        if let Some(value) = value {
            all[section][field] = value;
        }
    }
    all
}

/// A reply to `GET /cgroup`: the containers, and the limits in force.
pub fn containers(reply: &Value) -> String {
    let mut containers = table(&["CONTAINER", "CPUS", "SHARES", "CPUSET", "MEMORY"]);
    let overhead = reply.get("overhead").filter(|overhead| overhead.is_object());
    let rows = list(reply, "containers").iter().map(|one| (plain(&one["id"]), &one["resources"]));
    for (id, resources) in rows.chain(overhead.map(|resources| ("(overhead)".to_owned(), resources))) {
        let cpu = &resources["cpu"];
        let row = [
            cpus(cpu),
            given(&cpu["shares"], plain),
            given(&cpu["cpus"], plain),
            given(&resources["memory"]["limit"], |bytes| size(bytes.as_f64())),
        ];
        containers.add_row([id].into_iter().chain(row));
    }
    let in_force = &reply["in_force"];
    if !in_force.is_object() {
        return text(&containers) + "\nNo groups: nothing is limited.\n";
    }
    let mut limits = table(&["GROUP", "LIMIT", "VALUE", ""]);
    for limit in list(in_force, "limits") {
        let pending = match &limit["pending"] {
            Value::Null => String::new(),
            value => format!("pending: {}", plain(value)),
        };
        limits.add_row([
            plain(&limit["group"]),
            plain(&limit["file"]),
            given(&limit["value"], plain),
            pending,
        ]);
    }
    let notes = ["pending", "unapplied"].iter().flat_map(|kind| {
        list(in_force, kind).iter().map(move |sentence| format!("{kind}: {}\n", plain(sentence)))
    });
    format!("{}\n{}{}", text(&containers), text(&limits), notes.collect::<String>())
}

/// A quota and period as a number of CPUs.
fn cpus(cpu: &Value) -> String {
    let period = cpu["period"].as_f64().filter(|period| *period > 0.0).unwrap_or(PERIOD);
    match cpu["quota"].as_f64() {
        Some(quota) if quota > 0.0 => format!("{:.2}", quota / period),
        _ => "-".to_owned(),
    }
}

/// What is there and says something, else a dash.
fn given(value: &Value, show: impl Fn(&Value) -> String) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::Number(number) if number.as_f64().is_some_and(|number| number <= 0.0) => "-".to_owned(),
        value => show(value),
    }
}

/// Bytes for people.
pub fn size(bytes: Option<f64>) -> String {
    let Some(mut amount) = bytes else { return "-".to_owned() };
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if amount < 1024.0 {
            return if unit == "B" { format!("{amount:.0} B") } else { format!("{amount:.1} {unit}") };
        }
        amount /= 1024.0;
    }
    format!("{amount:.1} TiB")
}

/// A reply to `GET /cgroup/events`, with a header or without.
pub fn events(reply: &Value, header: bool) -> String {
    let all = list(reply, "events");
    if all.is_empty() {
        return if header { "No events since the launch.\n".to_owned() } else { String::new() };
    }
    let mut table = table(if header { &["ID", "TIME", "EVENT", "COUNT", "TOTAL", "GROUP"] } else { &[] });
    for event in all {
        let time = event["time_ms"].as_u64().map_or_else(|| "-".to_owned(), time);
        table.add_row([
            plain(&event["id"]),
            time,
            plain(&event["kind"]),
            plain(&event["count"]),
            plain(&event["total"]),
            plain(&event["group"]),
        ]);
    }
    text(&table)
}

/// Milliseconds since 1970 as a time of day in UTC.
fn time(ms: u64) -> String {
    let seconds = ms / 1000;
    format!("{:02}:{:02}:{:02}.{:03}Z", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60, ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_with_units_are_read() {
        assert_eq!((quota("0.5"), quota("2"), quota("1.005")), (Ok(50_000), Ok(200_000), Ok(100_500)));
        for bad in ["", "0", "-1", "NaN", "inf", "9000", "two"] {
            quota(bad).unwrap_err();
        }
        for (text, wanted) in
            [("4096", 4096), ("4k", 4096), ("600M", 600 << 20), ("1GiB", 1 << 30), ("2T", 2 << 40)]
        {
            assert_eq!(bytes(text), Ok(wanted), "{text}");
        }
        for bad in ["", "M", "0", "-5", "5X", "1.5G", "9999999999T"] {
            bytes(bad).unwrap_err();
        }
        assert_eq!(
            (size(Some(5.0)), size(Some(1536.0)), size(None)),
            ("5 B".into(), "1.5 KiB".into(), "-".into())
        );
    }

    #[test]
    fn containers_are_shown_with_what_their_sum_makes() {
        let reply = json!({
            "containers": [
                { "id": "a", "resources": resources(Some(50_000), Some(2048), None, Some(600 << 20)) },
                { "id": "b", "resources": {} },
            ],
            "overhead": { "cpu": { "quota": 10_000 } },
            "in_force": {
                "limits": [
                    { "group": "vcpus", "file": "cpu.max", "value": "500000 100000", "pending": null },
                    { "group": "sandbox", "file": "memory.max", "value": "max", "pending": "4096" },
                ],
                "pending": ["memory waits"], "unapplied": [],
            },
        });
        let text = containers(&reply);
        let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["a", "0.50", "2048", "-", "600.0", "MiB"]);
        assert_eq!(lines[2], ["b", "-", "-", "-", "-"]);
        assert_eq!(lines[3], ["(overhead)", "0.10", "-", "-", "-"]);
        assert_eq!(lines[6], ["vcpus", "cpu.max", "500000", "100000"]);
        assert_eq!(lines[7], ["sandbox", "memory.max", "max", "pending:", "4096"]);
        assert_eq!(lines[8], ["pending:", "memory", "waits"]);
        assert!(containers(&json!({ "containers": [], "in_force": null })).contains("No groups"));
    }

    #[test]
    fn events_are_shown_with_their_time() {
        let event = json!({ "id": 1, "time_ms": 3_723_004, "group": "/p\u{1b}", "kind": "oom_kill", "count": 1,
            "total": 2 });
        let text = events(&json!({ "events": [event], "last_id": 1 }), true);
        let line: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(line, ["1", "01:02:03.004Z", "oom_kill", "1", "2", "/p\u{fffd}"]);
        assert!(events(&json!({ "events": [] }), true).starts_with("No events"));
        for odd in [json!(null), json!({ "events": [1], "containers": [1], "in_force": {} })] {
            events(&odd, false);
            containers(&odd);
        }
    }
}
