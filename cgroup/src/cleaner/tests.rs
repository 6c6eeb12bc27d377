use std::fs;

use super::*;

/// A base with groups of ours in it, and what is to be removed there. Plain directories stand for groups.
fn base() -> (tempfile::TempDir, Leftovers) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("pinfold/vm/box/vcpus")).unwrap();
    fs::create_dir_all(dir.path().join("pinfold/vm/box/rest")).unwrap();
    fs::create_dir(dir.path().join("start")).unwrap();
    fs::write(dir.path().join("start/cgroup.procs"), "").unwrap();
    let names = ["pinfold/vm/box/rest", "pinfold/vm/box/vcpus", "pinfold/vm/box", "pinfold/vm"];
    let leftovers = Leftovers {
        exits: vec![dir.path().join("gone"), dir.path().join("start")],
        base: dir.path().to_owned(),
        remove: names.map(str::to_owned).to_vec(),
        shared: vec!["pinfold".to_owned()],
        in_scope: false,
    };
    (dir, leftovers)
}

fn cleaner<const N: usize>(leftovers: [Leftovers; N]) -> Cleaner {
    Cleaner::of(leftovers.into_iter()).unwrap()
}

#[test]
fn leaves_and_removes_what_is_ours() {
    let (dir, leftovers) = base();
    let (state, fds) = cleaner([leftovers]).into_parts();
    let text = serde_json::to_string(&state).unwrap();
    let cleaner = Cleaner::from_parts(serde_json::from_str(&text).unwrap(), fds).unwrap();
    cleaner.leave_and_remove(Duration::ZERO).unwrap();
    assert!(!dir.path().join("pinfold").exists());
    assert_eq!(fs::read_to_string(dir.path().join("start/cgroup.procs")).unwrap(), "0");
    // Gone already is fine.
    cleaner.leave_and_remove(Duration::ZERO).unwrap();
}

#[test]
fn another_process_is_moved_by_its_id() {
    let (dir, leftovers) = base();
    cleaner([leftovers]).move_out(4711).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join("start/cgroup.procs")).unwrap(), "4711");
}

#[test]
fn what_others_share_stays() {
    let (dir, leftovers) = base();
    fs::create_dir(dir.path().join("pinfold/other")).unwrap();
    cleaner([leftovers]).leave_and_remove(Duration::ZERO).unwrap();
    assert!(dir.path().join("pinfold/other").exists());
    assert!(!dir.path().join("pinfold/vm").exists());
}

#[test]
fn what_cannot_be_removed_is_named_and_the_rest_goes() {
    let (dir, leftovers) = base();
    let (other, mut second) = base();
    second.exits.clear();
    fs::write(dir.path().join("pinfold/vm/box/stray"), "").unwrap();
    let error = cleaner([leftovers, second]).leave_and_remove(Duration::ZERO).unwrap_err();
    let Error::File(error) = error else { panic!("{error}") };
    assert_eq!(error.path(), dir.path().join("pinfold/vm/box"));
    assert!(!dir.path().join("pinfold/vm/box/rest").exists());
    assert!(!other.path().join("pinfold").exists());
}

#[test]
fn a_base_that_is_gone_is_an_error_at_the_start() {
    let (dir, mut leftovers) = base();
    leftovers.base = dir.path().join("gone");
    let error = Cleaner::of([leftovers].into_iter()).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOENT));
}
