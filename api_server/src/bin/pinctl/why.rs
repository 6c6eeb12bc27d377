//! What holds the microVM back, and what other limits would do.

use serde_json::Value;

use crate::show::{list, plain, table, text};

/// A reply to `GET /cgroup/diagnosis`.
pub fn diagnosis(reply: &Value) -> String {
    let mut groups = table(&[
        "GROUP",
        "THREADS",
        "RUNNING",
        "OWN QUOTA",
        "QUOTA ABOVE",
        "CPU WAIT",
        "STOLEN",
        "MEMORY",
        "IO",
    ]);
    for group in ["vcpus", "overhead"] {
        let figures = ["running", "own_quota", "quota_above", "cpu_wait", "stolen", "memory", "io"]
            .map(|name| percent(&reply[group][format!("{name}_percent")]));
        groups.add_row([group.to_owned(), plain(&reply[group]["threads"])].into_iter().chain(figures));
    }
    let verdict = &reply["verdict"];
    let evidence = list(verdict, "evidence").iter().map(|one| format!("  - {}\n", plain(one)));
    let mut unknown: Vec<_> =
        ["vcpus", "overhead"].iter().flat_map(|group| list(&reply[group], "unknown")).map(plain).collect();
    unknown.dedup();
    let unknown = unknown.iter().map(|why| format!("unknown: {why}\n"));
    format!(
        "{}\n{}\n{}{}",
        plain(&verdict["sentence"]),
        evidence.collect::<String>(),
        text(&groups),
        unknown.collect::<String>()
    )
}

/// The path that asks about other limits.
pub fn question(quota: Option<&str>, period: Option<u64>, cpus: Option<&str>, window_ms: u64) -> String {
    let period = period.map(|period| period.to_string());
    let given = [("quota", quota), ("period", period.as_deref()), ("cpus", cpus)];
    let given = given.into_iter().filter_map(|(key, value)| Some(format!("&{key}={}", value?)));
    format!("/cgroup/what-if?window_ms={window_ms}{}", given.collect::<String>())
}

/// A reply to `GET /cgroup/what-if`.
pub fn what_if(reply: &Value) -> String {
    let mut rows = table(&["", "QUOTA", "PERIOD", "CPUSET", "THROTTLED", "CPUS USED", "CPUS UNMET"]);
    for (name, limits, outcome) in
        [("now", "in_force", &reply["recorded"]), ("then", "asked", &reply["predicted"])]
    {
        let limits = &reply[limits];
        let quota = if limits["quota"].is_null() { "max".to_owned() } else { plain(&limits["quota"]) };
        let cpus = if limits["cpus"].is_null() { "-".to_owned() } else { plain(&limits["cpus"]) };
        rows.add_row([
            name.to_owned(),
            quota,
            plain(&limits["period"]),
            cpus,
            range(&outcome["throttled_percent"], 1, "%"),
            range(&outcome["cpus_used"], 2, ""),
            range(&outcome["cpus_unmet"], 2, ""),
        ]);
    }
    format!("{}\n\n{}", plain(&reply["sentence"]), text(&rows))
}

fn percent(value: &Value) -> String {
    range(value, 1, "%")
}

/// A number, or the two ends of a range of them.
fn range(value: &Value, digits: usize, unit: &str) -> String {
    let number = |value: &Value| value.as_f64().map(|number| format!("{number:.digits$}{unit}"));
    match (number(value), number(&value["lower"]), number(&value["upper"])) {
        (Some(one), ..) => one,
        (_, Some(lower), Some(upper)) if lower == upper => lower,
        (_, Some(lower), Some(upper)) => format!("{lower} to {upper}"),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_diagnosis_is_a_sentence_with_its_figures() {
        let group = json!({ "threads": 2, "running_percent": 20.0, "own_quota_percent": 80.0, "stolen_percent": null,
            "unknown": ["off"] });
        let verdict =
            json!({ "cause": "own_quota", "sentence": "They are throttled.", "evidence": ["9 of 10\u{1b}"] });
        let shown = diagnosis(&json!({ "verdict": verdict, "vcpus": group, "overhead": group }));
        let lines: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0].join(" "), "They are throttled.");
        assert_eq!(lines[1].join(" "), "- 9 of 10\u{fffd}");
        assert_eq!(lines[4], ["vcpus", "2", "20.0%", "80.0%", "-", "-", "-", "-", "-"]);
        assert_eq!(lines[6..], [["unknown:", "off"]]);
    }

    #[test]
    fn other_limits_are_asked_for_and_shown_beside_those_in_force() {
        assert_eq!(question(None, None, None, 5), "/cgroup/what-if?window_ms=5");
        assert_eq!(
            question(Some("max"), Some(7), Some("0-1"), 5),
            "/cgroup/what-if?window_ms=5&quota=max&period=7&cpus=0-1"
        );
        let shown = what_if(&json!({
            "sentence": "So it is.",
            "in_force": { "quota": null, "period": 100_000, "cpus": null },
            "asked": { "quota": 5000, "period": 100_000, "cpus": "0-1" },
            "recorded": { "cpus_used": 0.5, "throttled_percent": null },
            "predicted": { "cpus_used": { "lower": 0.25, "upper": 0.5 },
                "throttled_percent": { "lower": 100.0, "upper": 100.0 }, "cpus_unmet": { "lower": 0.0, "upper": 1.5 } },
        }));
        let lines: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[3], ["now", "max", "100000", "-", "-", "0.50", "-"]);
        let then = ["then", "5000", "100000", "0-1", "100.0%", "0.25", "to", "0.50", "0.00", "to", "1.50"];
        assert_eq!(lines[4], then);
    }

    #[test]
    fn odd_replies_are_no_panic() {
        for odd in
            [json!(null), json!([1]), json!({ "verdict": 1, "vcpus": [1], "recorded": 5, "predicted": [] })]
        {
            diagnosis(&odd);
            what_if(&odd);
        }
    }
}
