//! What an operator has, one scenario after the other, as `tests/scenarios` describes them.

mod callers;
mod limits;

use crate::case::Case;

/// The cases of this folder.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    callers::CASES.iter().chain(limits::CASES)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    /// The words in backquotes that are named like cases: `scenario_callers_v2`.
    fn named(page: &str) -> BTreeSet<&str> {
        let quoted = page.split('`').skip(1).step_by(2);
        quoted.filter(|word| word.ends_with("_v1") || word.ends_with("_v2")).collect()
    }

    #[test]
    fn each_case_that_a_page_names_exists() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let table = fs::read_to_string(folder.join("README.md")).unwrap();
        let mut pages = 0;
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let page = fs::read_to_string(&path).unwrap();
            let cases = named(&page);
            assert!(!cases.is_empty(), "{name} names no case");
            for case in cases {
                assert!(crate::cases::find(case).is_some(), "{name} names {case}, which is no case");
                assert!(name == "README.md" || table.contains(case), "README.md lacks {case} of {name}");
            }
            if name != "README.md" {
                assert!(table.contains(&format!("({name})")), "README.md has no link to {name}");
                pages += 1;
            }
        }
        assert_eq!(pages, table.matches(".md)").count(), "README.md links to pages that are not there");
        for case in super::cases() {
            assert!(table.contains(case.name), "no page has {}", case.name);
        }
    }
}
