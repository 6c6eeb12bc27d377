//! The threat model names tests that there are.

use crate::cases;
use std::collections::HashSet;
use std::fs;
use std::path::Path;

const PAGE: &str = include_str!("../../resources/THREAT_MODEL.md");
const CRATES: [&str; 7] = ["api_server", "arch", "cgroup", "devices", "resources", "vmm", "tests"];

/// Each promise with the tests that hold it: what is in backquotes behind its colon.
fn promises() -> Vec<(String, Vec<String>)> {
    let items = PAGE.split("\n- ").skip(1).map(|item| {
        let item = item.split("\n\n").next().unwrap_or_default();
        let line = item.split_whitespace().collect::<Vec<_>>().join(" ");
        let (promise, tests) = line.split_once(": `").unwrap_or((&line, ""));
        let names = tests.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        (promise.to_owned(), names.filter(|name| !name.is_empty()).map(str::to_owned).collect())
    });
    items.collect()
}

/// Adds the unit tests of a folder's files.
fn unit_tests(folder: &Path, found: &mut HashSet<String>) {
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            unit_tests(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text.split("#[test]").skip(1).filter_map(|rest| {
                let (_, name) = rest.split_once("fn ")?;
                Some(name.split('(').next()?.to_owned())
            });
            found.extend(names);
        }
    }
}

#[test]
fn every_test_that_the_threat_model_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found: HashSet<String> = cases::all().iter().map(|case| case.name.to_owned()).collect();
    CRATES.iter().for_each(|name| unit_tests(&root.join(name), &mut found));
    let corpus = fs::read_dir(root.join("tests/fuzz/corpus")).unwrap();
    found.extend(corpus.map(|target| target.unwrap().file_name().to_string_lossy().into_owned()));
    let promises = promises();
    assert!(promises.len() > 20, "{promises:?}");
    for (promise, tests) in promises {
        assert!(!tests.is_empty(), "no test holds: {promise}");
        for test in tests {
            assert!(found.contains(&test), "`{test}`, which is to hold {promise:?}, does not exist");
        }
    }
}
