//! How much `unsafe` each crate has, outside of tests: more of it is a decision, made by changing `unsafe.txt`.

use std::fs;
use std::path::Path;

const INVENTORY: &str = include_str!("../unsafe.txt");
const CRATES: [&str; 6] = ["api_server", "arch", "cgroup", "devices", "resources", "vmm"];
/// What the word can begin.
const FORMS: [&str; 4] = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];

/// How often it occurs in a file's code.
fn count(text: &str) -> usize {
    let product = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let code = product.lines().map(|line| line.split("//").next().unwrap_or_default());
    code.map(|line| FORMS.iter().map(|form| line.matches(form).count()).sum::<usize>()).sum()
}

fn count_in(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            match (path.is_dir(), name.as_str()) {
                (true, "tests") | (false, "tests.rs") => 0,
                (true, _) => count_in(&path),
                (false, name) if name.ends_with(".rs") && !name.ends_with("_tests.rs") => {
                    count(&fs::read_to_string(&path).unwrap())
                }
                (false, _) => 0,
            }
        })
        .sum()
}

#[test]
fn unsafe_code_is_as_much_as_the_inventory_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let found: Vec<_> =
        CRATES.iter().map(|name| format!("{name} {}\n", count_in(&root.join(name).join("src")))).collect();
    let found = found.concat();
    assert!(found == INVENTORY, "if it is meant to change, let tests/unsafe.txt be:\n{found}");
}

#[test]
fn only_code_counts() {
    assert_eq!(
        count("// unsafe { }\nunsafe { a() }; unsafe fn b() {}\n#[cfg(test)]\nmod tests { unsafe { } }"),
        2
    );
}
