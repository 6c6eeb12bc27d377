//! Replies for people.

use comfy_table::{Table, presets};
use serde_json::{Map, Value};

/// JSON over several lines; a text as it is.
pub fn pretty(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{}\n", text.lines().map(tame).collect::<Vec<_>>().join("\n")),
        value => format!("{value:#}\n"),
    }
}

/// An empty table.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

/// Without the spaces that fill up the last column.
pub fn text(table: &Table) -> String {
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Whether a reply to `GET /cgroup/threads` tells of threads that are not where they belong.
pub fn has_strays(reply: &Value) -> bool {
    !list(reply, "strays").is_empty()
}

/// A reply to `GET /cgroup/threads`.
pub fn threads(reply: &Value) -> String {
    let strays = list(reply, "strays");
    let mut table = table(&["TID", "NAME", "ROLE", "KERNEL", "CGROUP", ""]);
    for thread in list(reply, "threads") {
        let kernel = if thread["kernel"] == true { "yes" } else { "" };
        let stray = if strays.iter().any(|stray| stray["tid"] == thread["tid"]) { "stray" } else { "" };
        let row = [plain(&thread["tid"]), plain(&thread["comm"]), plain(&thread["role"]), kernel.to_owned()];
        table.add_row(row.into_iter().chain([groups(&thread["cgroup"]), stray.to_owned()]));
    }
    let count = match strays.len() {
        0 => "No strays.".to_owned(),
        1 => "1 stray.".to_owned(),
        count => format!("{count} strays."),
    };
    text(&table) + &count + "\n"
}

/// The members of a list.
pub fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// The group, where it is the same for all controllers; else a line for each group, with its controllers.
fn groups(groups: &Value) -> String {
    let none = Map::new();
    let mut lines: Vec<(String, Vec<&str>)> = Vec::new();
    for (controller, path) in groups.as_object().unwrap_or(&none) {
        let path = plain(path);
        match lines.iter_mut().find(|(known, _)| *known == path) {
            Some((_, controllers)) => controllers.push(controller),
            None => lines.push((path, vec![controller])),
        }
    }
    match lines.as_slice() {
        [(path, _)] => path.clone(),
        lines => {
            let lines =
                lines.iter().map(|(path, controllers)| format!("{path} ({})", controllers.join(", ")));
            lines.collect::<Vec<_>>().join("\n")
        }
    }
}

/// A reply to `GET /vm/config`: each value with its section and the path of its field.
pub fn config(reply: &Value) -> String {
    let mut table = table(&["SECTION", "FIELD", "VALUE"]);
    for (section, value) in reply.as_object().unwrap_or(&Map::new()) {
        let mut rows = Vec::new();
        match value {
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    flatten(String::new(), item, &mut |field, value| {
                        rows.push([format!("{section}[{index}]"), field, value]);
                    });
                }
            }
            value => {
                flatten(String::new(), value, &mut |field, value| rows.push([section.clone(), field, value]))
            }
        }
        for row in rows {
            table.add_row(row);
        }
    }
    text(&table)
}

/// Gives each value in `value` that is not null or empty, with its path.
fn flatten(path: String, value: &Value, row: &mut impl FnMut(String, String)) {
    match value {
        Value::Null => {}
        Value::Object(members) => {
            for (key, value) in members {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                flatten(path, value, row);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                flatten(format!("{path}[{index}]"), item, row);
            }
        }
        value => row(path, plain(value)),
    }
}

/// Without control characters, which would reach the terminal.
fn tame(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A value without quotes. What comes from others may hold anything.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => tame(text),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn threads_are_shown_with_their_groups() {
        let v2 = json!({ "tid": 7, "comm": "fc_vcpu 0", "role": "vcpu", "kernel": false,
            "cgroup": { "unified": "/pod/kata-sandbox/kata-sandbox-vcpus" } });
        let v1 = json!({ "tid": 8, "comm": "vhost-7\u{1b}", "role": "vhost", "kernel": true,
            "cgroup": { "cpu": "/a", "cpuset": "/a", "memory": "/b" } });
        let reply = json!({ "threads": [v2, v1], "strays": [v1] });
        let text = threads(&reply);
        let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["TID", "NAME", "ROLE", "KERNEL", "CGROUP"]);
        assert_eq!(lines[1], ["7", "fc_vcpu", "0", "vcpu", "/pod/kata-sandbox/kata-sandbox-vcpus"]);
        assert_eq!(lines[2], ["8", "vhost-7\u{fffd}", "vhost", "yes", "/a", "(cpu,", "cpuset)", "stray"]);
        assert_eq!(lines[3], ["/b", "(memory)"]);
        assert_eq!(lines[4], ["1", "stray."]);
        assert!(has_strays(&reply));
        assert!(!has_strays(&json!({ "threads": [], "strays": [] })));
        assert!(threads(&json!({ "threads": [], "strays": [] })).ends_with("No strays.\n"));
    }

    #[test]
    fn a_configuration_is_shown_value_by_value() {
        let reply = json!({ "drives": [{ "drive_id": "root", "rate_limiter": { "ops": { "size": 1 } } }],
            "machine-config": { "vcpu_count": 2 }, "vsock": null, "pmem": [] });
        let text = config(&reply);
        let rows: Vec<Vec<_>> = text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            rows,
            [
                vec!["drives[0]", "drive_id", "root"],
                vec!["drives[0]", "rate_limiter.ops.size", "1"],
                vec!["machine-config", "vcpu_count", "2"],
            ]
        );
    }

    #[test]
    fn a_text_is_shown_as_it_is() {
        assert_eq!(pretty(&json!("up 1\ndown\u{1b} 2\n")), "up 1\ndown\u{fffd} 2\n");
        assert_eq!(pretty(&json!({ "a": 1 })), "{\n  \"a\": 1\n}\n");
    }

    #[test]
    fn odd_replies_are_no_panic() {
        for odd in [json!(null), json!([1]), json!({ "threads": [1], "strays": 1, "drives": 7 })] {
            threads(&odd);
            config(&odd);
        }
    }
}
