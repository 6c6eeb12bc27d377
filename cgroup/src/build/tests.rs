use std::cell::Cell;

use super::*;
use crate::hierarchy::Hierarchies;
use crate::plan::{Names, Request, resolve_in};
use crate::{Error, Parent, VersionChoice};

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

/// A folder that stands for the hierarchies and refuses one thing that is done to it.
struct Fake {
    folder: tempfile::TempDir,
    born_with: &'static [(&'static str, &'static str)],
    /// What is still to come until one is refused, and how.
    failing: Cell<(usize, i32)>,
    /// What was refused.
    refused: Cell<Option<PathBuf>>,
}

impl Fake {
    fn new(born_with: &'static [(&'static str, &'static str)], roots: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fake = Self { folder, born_with, failing: Cell::new((usize::MAX, 0)), refused: Cell::new(None) };
        for root in roots {
            // The pod's group is there, and has CPUs.
            let pod = fake.folder.path().join(root).join("p");
            fs::create_dir_all(pod.parent().unwrap()).unwrap();
            fake.make(&pod).unwrap();
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fs::write(pod.join(file), "0-3").unwrap();
            }
        }
        fake
    }

    fn plan(&self, v2: bool) -> Plan {
        let point = self.folder.path().display();
        let all = if v2 {
            Hierarchies::parse(&format!("1 2 0:3 / {point} rw - cgroup2 c rw"), "0::/x.service")
        } else {
            let names = ["cpu", "cpuset", "memory", "pids"];
            let mounts = names.map(|c| format!("1 2 0:3 / {point}/{c} rw - cgroup c rw,{c}\n")).concat();
            Hierarchies::parse(&mounts, &names.map(|c| format!("1:{c}:/\n")).concat())
        };
        let resources = r#"{"cpu":{"quota":50000,"cpus":"1"},"memory":{"limit":400000000}}"#;
        let overhead = r#"{"cpu":{"quota":50000},"pids":{"limit":9}}"#;
        resolve_in(
            &all,
            &Request {
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
            },
        )
        .map_err(|error: Error| error.to_string())
        .unwrap()
    }

    /// All groups.
    fn groups(&self) -> BTreeSet<PathBuf> {
        fn below(dir: &Path, found: &mut BTreeSet<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    below(&entry.path(), found);
                    found.insert(entry.path());
                }
            }
        }
        let mut found = BTreeSet::new();
        below(self.folder.path(), &mut found);
        found
    }

    fn may(&self, path: &Path) -> io::Result<()> {
        let (left, errno) = self.failing.get();
        self.failing.set((left.wrapping_sub(1), errno));
        if left > 0 {
            return Ok(());
        }
        self.refused.set(Some(path.to_owned()));
        Err(io::Error::from_raw_os_error(errno))
    }
}

impl Files for Fake {
    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn read(&self, path: &Path) -> Result<String, FileError> {
        self.may(path).and_then(|()| fs::read_to_string(path)).map_err(|e| FileError::new("read", path, e))
    }

    fn write(&self, path: &Path, value: &str) -> Result<(), FileError> {
        let enabled = value.strip_prefix('+').map(|name| {
            let before = fs::read_to_string(path).unwrap();
            format!("{before} {name}")
        });
        self.may(path)
            .and_then(|()| fs::write(path, enabled.as_deref().unwrap_or(value)))
            .map_err(|error| FileError::new(format!("write `{value}` to"), path, error))
    }
}

impl Groups for Fake {
    fn make(&self, dir: &Path) -> io::Result<()> {
        self.may(dir)?;
        fs::create_dir(dir)?;
        self.born_with.iter().try_for_each(|(file, text)| fs::write(dir.join(file), text))
    }

    fn remove(&self, dir: &Path) -> io::Result<()> {
        let groups = fs::read_dir(dir)?.filter(|entry| entry.as_ref().unwrap().path().is_dir());
        if groups.count() > 0 {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        fs::remove_dir_all(dir)
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

#[test]
fn whatever_refuses_nothing_is_left() {
    for (v2, born_with, roots) in [(true, V2, &[""][..]), (false, V1, &["cpu", "cpuset", "memory", "pids"])] {
        for errno in [libc::EBUSY, libc::EACCES, libc::ENOSPC, libc::EOPNOTSUPP] {
            let mut failed = 0;
            for nth in 0.. {
                let fake = Fake::new(born_with, roots);
                let (plan, before) = (fake.plan(v2), fake.groups());
                fake.failing.set((nth, errno));
                let built = build_in(&fake, &plan);
                let Some(refused) = fake.refused.take() else {
                    built.unwrap();
                    break;
                };
                match built {
                    Err(error) => {
                        assert_eq!(fake.groups(), before, "{errno} at {}", refused.display());
                        assert_eq!(error.errno(), Some(errno));
                        assert!(error.to_string().contains(refused.to_str().unwrap()), "{error}");
                        failed += 1;
                    }
                    // A controller that cannot be had is no error. What it would limit is said.
                    Ok(built) => {
                        let name = refused.file_name().unwrap().to_str().unwrap();
                        assert!(["cgroup.subtree_control", "cgroup.controllers"].contains(&name), "{name}");
                        assert_ne!(built.created, Vec::<PathBuf>::new());
                    }
                }
            }
            assert!(failed > 10, "only {failed} things were refused");
        }
    }
}
