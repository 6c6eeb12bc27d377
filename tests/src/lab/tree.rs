//! Cgroups with their threads as a tree for people, like `pstree` for each group.

use super::Group;
use super::threads::{BILLING, Thread};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Limits worth showing, of both versions.
const LIMITS: [&str; 12] = [
    "cgroup.type",
    "cpu.max",
    "cpu.weight",
    "cpu.shares",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
    "cpuset.cpus",
    "cpuset.cpus.effective",
    "memory.max",
    "memory.limit_in_bytes",
    "pids.max",
    "io.max",
];

/// What v1 shows as a memory limit that was never set.
const UNLIMITED_V1: &str = "9223372036854771712";

/// The tree of groups in which `threads` are, and of `also`, once for each set of v1 hierarchies in which it
/// looks the same. Hierarchies that account nothing are left out. Groups below `limited` show their limits.
pub fn render(threads: &[Thread], also: &[&Group], limited: &Group) -> String {
    let controllers: BTreeSet<&String> = threads
        .iter()
        .flat_map(|thread| thread.groups.keys())
        .filter(|name| BILLING.contains(&name.as_str()))
        .collect();
    let mut same: BTreeMap<Vec<(u32, &str)>, Vec<&str>> = BTreeMap::new();
    for controller in controllers {
        let places = threads
            .iter()
            .filter_map(|thread| Some((thread.tid, thread.groups.get(controller)?.as_str())))
            .collect();
        same.entry(places).or_default().push(controller);
    }
    let mut text = String::new();
    for (places, controllers) in same {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}:", controllers.join(", "));
        let mut root = Node::default();
        for group in also {
            root.descend(group.path());
        }
        for (tid, path) in places {
            if let Some(thread) = threads.iter().find(|thread| thread.tid == tid) {
                root.descend(path).threads.push(thread);
            }
        }
        root.show(&mut text, "", "", limited, &controllers);
    }
    text
}

#[derive(Default)]
struct Node<'a> {
    children: BTreeMap<String, Node<'a>>,
    threads: Vec<&'a Thread>,
}

impl Node<'_> {
    fn descend(&mut self, path: &str) -> &mut Self {
        path.split('/')
            .filter(|name| !name.is_empty())
            .fold(self, |node, name| node.children.entry(name.to_owned()).or_default())
    }

    fn show(&self, text: &mut String, indent: &str, path: &str, limited: &Group, controllers: &[&str]) {
        let rows = self.threads.len() + self.children.len();
        let branch =
            |row: usize| if row + 1 == rows { ("└── ", "    ") } else { ("├── ", "│   ") };
        for (row, thread) in self.threads.iter().enumerate() {
            let mark = if thread.kernel { " [kernel]" } else { "" };
            let _ = writeln!(
                text,
                "{indent}{}{} ({}) {}{mark}",
                branch(row).0,
                thread.comm,
                thread.tid,
                thread.role
            );
        }
        for (row, (name, child)) in self.children.iter().enumerate() {
            let (fork, continued) = branch(self.threads.len() + row);
            let path = format!("{path}/{name}");
            let limits =
                if path.starts_with(limited.path()) { limits(&path, controllers) } else { String::new() };
            let _ = writeln!(text, "{indent}{fork}{name}/{limits}");
            child.show(text, &format!("{indent}{continued}"), &path, limited, controllers);
        }
    }
}

/// The limits in force on the group `path` by the controllers of one hierarchy.
fn limits(path: &str, controllers: &[&str]) -> String {
    let group = Group::at(path);
    let mut shown = Vec::new();
    for file in LIMITS {
        let controller = file.split('.').next().unwrap_or_default();
        if !controllers.contains(&"unified") && !controllers.contains(&controller) {
            continue;
        }
        // A controller's file may be missing here, and most groups set no limit.
        let Ok(value) = group.read(file) else { continue };
        let value = value.replace('\n', "; ");
        let unlimited =
            [UNLIMITED_V1, "-1", "domain", ""].contains(&value.as_str()) || value.starts_with("max");
        if unlimited {
            continue;
        }
        shown.push(if file == "cgroup.type" { value } else { format!("{file}={value}") });
    }
    if shown.is_empty() { String::new() } else { format!("   {}", shown.join(", ")) }
}
