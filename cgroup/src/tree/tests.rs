use std::fs;

use super::*;
use crate::parts::PartsError;

fn tree(dir: &std::path::Path) -> Tree {
    let door = |kind, name: &str| {
        fs::write(dir.join(name), "").unwrap();
        (kind, Door::open(dir.join(name)).unwrap())
    };
    Tree {
        groups: Groups { v2: true, places: Vec::new(), created: vec![dir.to_owned()] },
        joined: AtomicBool::new(false),
        needs_exec: true,
        doors: vec![
            door(Kind::Process, "procs"),
            door(Kind::Thread(Role::Overhead), "overhead"),
            door(Kind::Thread(Role::Vcpu), "vcpu"),
        ],
    }
}

fn written(dir: &std::path::Path) -> [String; 3] {
    ["procs", "overhead", "vcpu"].map(|name| fs::read_to_string(dir.join(name)).unwrap())
}

#[test]
fn the_process_joins_once_and_threads_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path());
    tree.join(Role::Overhead).unwrap();
    assert_eq!(written(dir.path()), ["0", "0", ""]);
    tree.join(Role::Vcpu).unwrap();
    tree.join(Role::Vcpu).unwrap();
    assert_eq!(written(dir.path()), ["0", "0", "00"]);
}

#[test]
fn it_survives_an_exec_among_others() {
    let dir = tempfile::tempdir().unwrap();
    let first = tree(dir.path());
    first.join(Role::Overhead).unwrap();
    let (state, mut fds) = first.into_parts();
    let text = serde_json::to_string(&state).unwrap();
    fds.insert(1, ("stranger".to_owned(), fs::File::open(dir.path()).unwrap().into()));
    let second = Tree::from_parts(serde_json::from_str(&text).unwrap(), fds).unwrap();
    assert!(second.needs_exec());
    assert_eq!(second.groups().created, [dir.path()]);
    second.join(Role::Vcpu).unwrap();
    assert_eq!(written(dir.path()), ["0", "0", "0"]);

    let lost = Tree::from_parts(state.clone(), Vec::new()).unwrap_err();
    assert!(matches!(lost, Error::Parts(PartsError::Missing(name)) if name == "cgroup.tree.0"));
    let other = TreeState { format: 99, ..state };
    let foreign = Tree::from_parts(other, Vec::new()).unwrap_err();
    assert!(matches!(foreign, Error::Parts(PartsError::Format { got: 99, ours: FORMAT })));
}

#[test]
fn a_refused_join_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = tree(dir.path());
    // A descriptor that cannot be written to.
    tree.doors[0].1.file = fs::File::open(dir.path().join("procs")).unwrap();
    let error = tree.join(Role::Overhead).unwrap_err();
    assert!(error.to_string().contains("procs"), "{error}");
    assert!(matches!(error, Error::File(error) if error.errno() == Some(libc::EBADF)));
    assert!(!tree.joined.load(Ordering::Acquire));
}
