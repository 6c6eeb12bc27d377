use std::cell::{Cell, RefCell};

use super::*;
use crate::hierarchy::Hierarchies;
use crate::plan::{Names, Request, resolve_in};
use crate::{Parent, VersionChoice};

const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

/// What the kernel puts into a new group.
const V2: &[(&str, &str)] = &[
    ("cgroup.type", "domain"),
    ("cgroup.procs", ""),
    ("cgroup.controllers", "cpuset cpu io memory pids"),
    ("cgroup.subtree_control", ""),
    ("cpu.max", "max 100000"),
    ("cpu.weight", "100"),
    ("cpuset.cpus", ""),
    ("cpuset.mems", ""),
    ("memory.max", "max"),
    ("memory.current", "0"),
    ("pids.max", "max"),
];
const V1: &[(&str, &str)] = &[
    ("cgroup.procs", ""),
    ("cpu.shares", "1024"),
    ("cpu.cfs_quota_us", "-1"),
    ("cpu.cfs_period_us", "100000"),
    ("cpuset.cpus", ""),
    ("cpuset.mems", ""),
    ("memory.limit_in_bytes", "9223372036854771712"),
    ("memory.usage_in_bytes", "0"),
    ("pids.max", "max"),
];

/// Groups in memory, of which one thing that is done to them is refused.
#[derive(Clone)]
struct Fake {
    born_with: &'static [(&'static str, &'static str)],
    groups: RefCell<BTreeSet<PathBuf>>,
    files: RefCell<BTreeMap<PathBuf, String>>,
    /// What is still to come until one is refused, and how.
    failing: Cell<(usize, i32)>,
    /// What was refused.
    refused: RefCell<Option<PathBuf>>,
}

impl Fake {
    /// With the pod's group, which has CPUs, in each of these hierarchies.
    fn new(point: &Path, v2: bool) -> Self {
        let fake = Self {
            born_with: if v2 { V2 } else { V1 },
            groups: RefCell::default(),
            files: RefCell::default(),
            failing: Cell::new((usize::MAX, 0)),
            refused: RefCell::default(),
        };
        for root in if v2 { &[""][..] } else { &CONTROLLERS } {
            let pod = point.join(root).join("p");
            fake.make(&pod).unwrap();
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fake.files.borrow_mut().insert(pod.join(file), "0-3".to_owned());
            }
        }
        fake
    }

    fn may(&self, path: &Path) -> io::Result<()> {
        let (left, errno) = self.failing.get();
        self.failing.set((left.wrapping_sub(1), errno));
        if left > 0 {
            return Ok(());
        }
        self.refused.replace(Some(path.to_owned()));
        Err(io::Error::from_raw_os_error(errno))
    }

    fn text(&self, path: &Path) -> io::Result<String> {
        self.files.borrow().get(path).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }
}

impl Files for Fake {
    fn exists(&self, path: &Path) -> bool {
        self.files.borrow().contains_key(path) || self.groups.borrow().contains(path)
    }

    fn read(&self, path: &Path) -> Result<String, FileError> {
        self.may(path).and_then(|()| self.text(path)).map_err(|error| FileError::new("read", path, error))
    }

    fn write(&self, path: &Path, value: &str) -> Result<(), FileError> {
        let new = |old: String| match value.strip_prefix('+') {
            Some(controller) => format!("{old} {controller}"),
            None => value.to_owned(),
        };
        self.may(path)
            .and_then(|()| self.text(path))
            .map(|old| drop(self.files.borrow_mut().insert(path.to_owned(), new(old))))
            .map_err(|error| FileError::new(format!("write `{value}` to"), path, error))
    }
}

impl Groups for Fake {
    fn make(&self, dir: &Path) -> io::Result<()> {
        self.may(dir)?;
        if !self.groups.borrow_mut().insert(dir.to_owned()) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let files = self.born_with.iter().map(|(file, text)| (dir.join(file), (*text).to_owned()));
        self.files.borrow_mut().extend(files);
        Ok(())
    }

    fn remove(&self, dir: &Path) -> io::Result<()> {
        let mut groups = self.groups.borrow_mut();
        if groups.iter().any(|group| group.parent() == Some(dir)) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        groups.remove(dir);
        self.files.borrow_mut().retain(|file, _| file.parent() != Some(dir));
        Ok(())
    }

    fn seed(&self, dir: &Path) -> Result<(), FileError> {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let (path, above) = (dir.join(file), dir.parent().unwrap().join(file));
            if self.read(&path)?.trim().is_empty() {
                self.write(&path, self.read(&above)?.trim())?;
            }
        }
        Ok(())
    }
}

/// What there is to build in the hierarchies at `point`, where the pod's group is made.
fn plan(point: &Path, v2: bool) -> Plan {
    let shown = point.display();
    let all = if v2 {
        fs::create_dir_all(point.join("p")).unwrap();
        Hierarchies::parse(&format!("1 2 0:3 / {shown} rw - cgroup2 c rw"), "0::/x.service")
    } else {
        let mounts = CONTROLLERS.map(|c| {
            fs::create_dir_all(point.join(c).join("p")).unwrap();
            format!("1 2 0:3 / {shown}/{c} rw - cgroup c rw,{c}\n")
        });
        Hierarchies::parse(&mounts.concat(), &CONTROLLERS.map(|c| format!("1:{c}:/\n")).concat())
    };
    let resources = r#"{"cpu":{"quota":50000,"cpus":"1"},"memory":{"limit":400000000}}"#;
    let overhead = r#"{"cpu":{"quota":50000},"pids":{"limit":9}}"#;
    let request = Request {
        version: VersionChoice::Auto,
        parent: Some(Parent::Made("/p/q".parse().unwrap())),
        names: Names {
            sandbox: "box".parse().unwrap(),
            vcpus: "v".parse().unwrap(),
            overhead: "o".parse().unwrap(),
        },
        containers: vec![serde_json::from_str(resources).unwrap()],
        overhead: Some(serde_json::from_str(overhead).unwrap()),
        id: "vm".to_owned(),
    };
    resolve_in(&all, &request).unwrap()
}

#[test]
fn whatever_refuses_nothing_is_left() {
    for v2 in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(folder.path(), v2);
        let fresh = Fake::new(folder.path(), v2);
        for errno in [libc::EBUSY, libc::EACCES, libc::ENOSPC, libc::EOPNOTSUPP] {
            let mut failed = 0;
            for nth in 0.. {
                let fake = fresh.clone();
                fake.failing.set((nth, errno));
                let built = build_in(&fake, &plan);
                let Some(refused) = fake.refused.take() else {
                    // All of it was done.
                    assert_eq!(
                        fake.groups.borrow().len(),
                        fresh.groups.borrow().len() + built.unwrap().created.len()
                    );
                    break;
                };
                match built {
                    Err(error) => {
                        assert_eq!(fake.groups, fresh.groups, "{errno} at {}", refused.display());
                        assert_eq!(error.errno(), Some(errno));
                        assert!(error.to_string().contains(refused.to_str().unwrap()), "{error}");
                        failed += 1;
                    }
                    // A controller that cannot be had is no error.
                    Ok(_) => {
                        let name = refused.file_name().unwrap().to_str().unwrap();
                        assert!(["cgroup.subtree_control", "cgroup.controllers"].contains(&name), "{name}");
                    }
                }
            }
            assert!(failed > 10, "only {failed} things were refused");
        }
    }
}
