use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io;

use super::*;
use crate::hierarchy::{Chosen, Hierarchies, VersionChoice};
use crate::numbers::Numbers;
use crate::plan::Site;
use crate::{Cpu, Memory, Pids};

/// Groups in memory that are as particular as the kernel's.
#[derive(Default)]
struct Fake {
    files: RefCell<BTreeMap<PathBuf, String>>,
    /// Writes still to come until one fails, and how; with whether all later ones fail as well.
    failing: Cell<Option<(usize, i32, bool)>>,
    writes: Cell<usize>,
}

impl Fake {
    fn set(&self, path: &str, text: &str) {
        self.files.borrow_mut().insert(Path::new("/cg").join(path), text.to_owned());
    }

    fn get(&self, path: &str) -> String {
        self.files.borrow()[&Path::new("/cg").join(path)].clone()
    }

    fn v2() -> Self {
        let fake = Self::default();
        fake.set("p/cpuset.cpus.effective", "0-7");
        for group in ["p/box/v", "p/box/o"] {
            for (file, text) in
                [("cpu.weight", "100"), ("cpu.max", "max 100000"), ("cpuset.cpus", ""), ("cpuset.mems", "")]
            {
                fake.set(&format!("{group}/{file}"), text);
            }
        }
        for (file, text) in [
            ("cpu.max", "max 100000"),
            ("pids.max", "max"),
            ("memory.max", "max"),
            ("memory.current", "1000000"),
            ("memory.stat", "anon 900000\ninactive_file 50000\nactive_file 50000"),
        ] {
            fake.set(&format!("p/box/{file}"), text);
        }
        fake
    }

    fn v1() -> Self {
        let fake = Self::default();
        fake.set("cpuset/p/cpuset.cpus", "0-7");
        fake.set("cpuset/p/cpuset.mems", "0-1");
        for group in ["p/v", "p/box"] {
            for (file, text) in [
                ("cpu/G/cpu.shares", "1024"),
                ("cpu/G/cpu.cfs_quota_us", "-1"),
                ("cpu/G/cpu.cfs_period_us", "100000"),
                ("cpuset/G/cpuset.cpus", "0-7"),
                ("cpuset/G/cpuset.mems", "0-1"),
            ] {
                fake.set(&file.replace('G', group), text);
            }
        }
        fake.set("memory/p/box/memory.limit_in_bytes", "9223372036854771712");
        fake.set("memory/p/box/memory.usage_in_bytes", "1000000");
        fake.set("memory/p/box/memory.stat", "total_inactive_file 50000\ntotal_active_file 50000");
        fake.set("pids/p/box/pids.max", "max");
        fake
    }

    /// Whether the kernel would take it.
    fn judge(&self, path: &Path, value: &str) -> Result<(), i32> {
        let files = self.files.borrow();
        let file = path.file_name().unwrap().to_str().unwrap();
        let beside = |name: &str| files[&path.with_file_name(name)].trim().to_owned();
        match file {
            "cpuset.cpus" | "cpuset.mems" if path.starts_with("/cg/cpuset") => {
                let set: CpuSet = value.parse().map_err(|_| libc::EINVAL)?;
                let base: CpuSet = files[&Path::new("/cg/cpuset/p").join(file)].parse().unwrap();
                if set.is_empty() {
                    return Err(libc::ENOSPC);
                }
                if set.is_subset(&base) { Ok(()) } else { Err(libc::EACCES) }
            }
            PERIOD_FILE if beside(QUOTA_FILE) != "-1" => Err(libc::EINVAL),
            QUOTA_FILE if value != "-1" && beside(PERIOD_FILE) != "100000" => Err(libc::EINVAL),
            "memory.limit_in_bytes" if amount(value) < 900_000 => Err(libc::EBUSY),
            "memory.max" => {
                assert!(amount(value) > 900_000, "the guest is killed by {value}");
                Ok(())
            }
            _ if value.is_empty() => Err(libc::EINVAL),
            _ => Ok(()),
        }
    }

    /// The group around the two on v2 has what they have together, at every moment.
    fn is_valid(&self) {
        let quota = |group: &str| {
            self.files.borrow().get(&Path::new("/cg/p/box").join(group).join("cpu.max")).map(|t| amount(t))
        };
        if let (Some(outer), Some(v), Some(o)) = (quota(""), quota("v"), quota("o")) {
            assert!(v.saturating_add(o) <= outer, "{v} and {o} in {outer} after write {}", self.writes.get());
        }
    }
}

impl Files for Fake {
    fn exists(&self, path: &Path) -> bool {
        self.files.borrow().keys().any(|file| file.starts_with(path))
    }

    fn read(&self, path: &Path) -> Result<String, FileError> {
        let text = self.files.borrow().get(path).cloned();
        let missing = || FileError::new("read", path, io::Error::from_raw_os_error(libc::ENOENT));
        text.map(|text| format!("{text}\n")).ok_or_else(missing)
    }

    fn write(&self, path: &Path, value: &str) -> Result<(), FileError> {
        self.writes.set(self.writes.get() + 1);
        let injected = match self.failing.get() {
            Some((0, errno, on)) => {
                self.failing.set(on.then_some((0, errno, true)));
                Err(errno)
            }
            Some((left, errno, on)) => {
                self.failing.set(Some((left - 1, errno, on)));
                Ok(())
            }
            None => Ok(()),
        };
        injected.and_then(|()| self.judge(path, value)).map_err(|errno| {
            FileError::new(format!("write `{value}` to"), path, io::Error::from_raw_os_error(errno))
        })?;
        // The kernel shows these in its own words.
        let shown = match value.trim() {
            "-1" if path.ends_with("memory.limit_in_bytes") => "9223372036854771712",
            other => other,
        };
        self.files.borrow_mut().insert(path.to_owned(), shown.to_owned());
        self.is_valid();
        Ok(())
    }
}

fn site(hierarchy: &crate::hierarchy::Hierarchy, vcpus: &str, overhead: &str) -> Site {
    Site {
        hierarchy: hierarchy.clone(),
        base: "/p".parse().unwrap(),
        between: Vec::new(),
        sandbox: Some("/p/box".parse().unwrap()),
        vcpus: vcpus.parse().unwrap(),
        overhead: overhead.parse().unwrap(),
    }
}

fn unlimited(v2: bool) -> Limits {
    let sites = if v2 {
        let all = Hierarchies::parse("1 2 0:3 / /cg rw - cgroup2 c rw", "0::/");
        let Ok(Chosen::V2(found)) = all.choose(VersionChoice::V2) else { panic!() };
        vec![site(found, "/p/box/v", "/p/box/o")]
    } else {
        let names = ["cpu", "cpuset", "memory", "pids"];
        let mounts = names.map(|c| format!("1 2 0:3 / /cg/{c} rw - cgroup c rw,{c}\n")).concat();
        let own = names.map(|c| format!("1:{c}:/\n")).concat();
        let all = Hierarchies::parse(&mounts, &own);
        let Ok(Chosen::V1(found)) = all.choose(VersionChoice::V1) else { panic!() };
        let vcpus = |key: &str| if key.starts_with("cpu") { "/p/v" } else { "/p/box" };
        found.into_iter().map(|one| site(one, vcpus(&one.key), "/p/box")).collect()
    };
    let wanted = Wanted { sums: Sums::default(), overhead_cpus: None, never: Vec::new() };
    Limits {
        layout: Layout { v2, sites, reach: Reach::default() },
        refused: BTreeMap::new(),
        placement: Vec::new(),
        wanted,
        outcome: Outcome::default(),
    }
}

fn fake(v2: bool) -> Fake {
    if v2 { Fake::v2() } else { Fake::v1() }
}

fn resources(json: &str) -> Resources {
    serde_json::from_str(json).unwrap()
}

/// The two containers of the design's example.
fn of_record() -> [Resources; 2] {
    [
        resources(r#"{"cpu":{"shares":2048,"quota":200000,"period":100000},"memory":{"limit":419430400}}"#),
        resources(r#"{"cpu":{"shares":3072,"quota":300000,"period":100000},"memory":{"limit":209715200}}"#),
    ]
}

#[test]
fn the_example_of_record_comes_and_goes() {
    for v2 in [true, false] {
        let (fake, mut limits) = (fake(v2), unlimited(v2));
        let before = fake.files.borrow().clone();
        limits.change_in(&fake, &of_record(), None).unwrap();
        if v2 {
            assert_eq!(fake.get("p/box/v/cpu.max"), "500000 100000");
            assert_eq!(fake.get("p/box/v/cpu.weight"), "363");
            assert_eq!(fake.get("p/box/memory.max"), "629145600");
        } else {
            assert_eq!(fake.get("cpu/p/v/cpu.shares"), "5120");
            assert_eq!(fake.get("cpu/p/v/cpu.cfs_quota_us"), "500000");
            assert_eq!(fake.get("memory/p/box/memory.limit_in_bytes"), "629145600");
        }
        let two = fake.files.borrow().clone();
        let third = resources(r#"{"cpu":{"quota":50000,"cpus":"2-3"},"memory":{"limit":1000000}}"#);
        let three = [&of_record()[..], &[third]].concat();
        limits.change_in(&fake, &three, None).unwrap();
        assert_ne!(*fake.files.borrow(), two);
        limits.change_in(&fake, &of_record(), None).unwrap();
        assert_eq!(*fake.files.borrow(), two);
        let writes = fake.writes.get();
        limits.change_in(&fake, &of_record(), None).unwrap();
        assert_eq!(fake.writes.get(), writes, "what is there already is not written");
        limits.change_in(&fake, &[], None).unwrap();
        assert_eq!(*fake.files.borrow(), before);
    }
}

impl Numbers {
    fn some(&mut self, from: u64, to: u64) -> Option<i64> {
        (self.below(5) > 0).then(|| i64::try_from(from + self.below(to - from)).unwrap())
    }

    fn one(&mut self) -> Resources {
        let first = u16::try_from(self.below(8)).unwrap();
        let cpus = (self.below(5) > 0).then(|| (first..=7).step_by(2).collect());
        let quota = self.some(1000, 400_000);
        let shares = self.some(2, 5000).and_then(|shares| u64::try_from(shares).ok());
        Resources {
            cpu: Some(Cpu { quota, shares, cpus, ..Cpu::default() }),
            memory: Some(Memory { limit: self.some(64 << 20, 1 << 32), ..Memory::default() }),
            pids: Some(Pids { limit: self.some(1, 1000) }),
            ..Resources::default()
        }
    }
}

/// At each write of many changes each error of the kernel's is tried; then the change is let through.
#[test]
fn a_refused_write_leaves_everything_as_it_was() {
    const ERRORS: [i32; 5] = [libc::EBUSY, libc::EACCES, libc::ENOSPC, libc::EOPNOTSUPP, libc::EINVAL];
    for v2 in [true, false] {
        let (fake, mut limits) = (fake(v2), unlimited(v2));
        let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
        let mut tried = 0;
        for _ in 0..40 {
            let containers: Vec<Resources> = (0..numbers.below(4)).map(|_| numbers.one()).collect();
            let overhead = (numbers.below(3) > 0).then(|| numbers.one());
            let (files, shown) = (fake.files.borrow().clone(), limits.clone());
            'change: for at in 0.. {
                for errno in ERRORS {
                    fake.failing.set(Some((at, errno, false)));
                    let outcome = limits.change_in(&fake, &containers, overhead.as_ref());
                    if fake.failing.take().is_some() {
                        // There are no more writes than that.
                        outcome.unwrap();
                        break 'change;
                    }
                    let error = outcome.unwrap_err();
                    let ChangeError::Refused(error) = &error else { panic!("{error:?}") };
                    assert_eq!(error.errno(), Some(errno));
                    assert_eq!((&*fake.files.borrow(), &limits), (&files, &shown), "write {at}");
                    tried += 1;
                }
            }
        }
        assert!(tried > 500, "{tried}");
    }
}

#[test]
fn what_cannot_be_set_back_is_named() {
    let (fake, mut limits) = (Fake::v2(), unlimited(true));
    let before = limits.clone();
    fake.failing.set(Some((1, libc::EBUSY, true)));
    let error = limits.change_in(&fake, &of_record(), None).unwrap_err();
    assert!(matches!(&error, ChangeError::Torn { unrestored, .. } if unrestored.len() == 1), "{error:?}");
    assert!(error.to_string().contains("/cg/p/box/v/cpu."), "{error}");
    assert_eq!(limits, before);
    // Asking again mends it.
    fake.failing.set(None);
    limits.change_in(&fake, &[], None).unwrap();
    assert_eq!(*fake.files.borrow(), *Fake::v2().files.borrow());
}

#[test]
fn memory_in_use_makes_a_shrink_wait() {
    for (v2, file, usage) in [
        (true, "p/box/memory.max", "p/box/memory.current"),
        (false, "memory/p/box/memory.limit_in_bytes", "memory/p/box/memory.usage_in_bytes"),
    ] {
        let (fake, mut limits) = (fake(v2), unlimited(v2));
        let limit = |mib: u64| vec![resources(&format!(r#"{{"memory":{{"limit":{}}}}}"#, mib << 20))];
        limits.change_in(&fake, &limit(600), None).unwrap();
        assert!(!limits.is_pending());
        fake.set(usage, &(500u64 << 20).to_string());
        limits.change_in(&fake, &limit(400), None).unwrap();
        assert_eq!(fake.get(file), (600u64 << 20).to_string());
        let shown = limits.in_force_in(&fake);
        assert_eq!(shown.pending.len(), 1);
        let waiting: Vec<_> = shown.limits.iter().filter_map(|limit| limit.pending.as_deref()).collect();
        assert_eq!(waiting, [(400u64 << 20).to_string()]);
        assert!(limits.retry_in(&fake).unwrap());

        // Not yet the margin below.
        fake.set(usage, &(390u64 << 20).to_string());
        assert!(limits.retry_in(&fake).unwrap());
        // A refusal leaves it waiting.
        fake.set(usage, &(300u64 << 20).to_string());
        fake.failing.set(Some((0, libc::EBUSY, false)));
        limits.retry_in(&fake).unwrap_err();
        assert!(limits.is_pending());
        assert!(!limits.retry_in(&fake).unwrap());
        assert_eq!(fake.get(file), (400u64 << 20).to_string());
        assert_eq!(limits.in_force_in(&fake).pending, Vec::<String>::new());

        // Page cache is no reason to wait.
        fake.set(usage, &(300u64 << 20).to_string());
        let stat = format!("inactive_file {0}\ntotal_inactive_file {0}", 290u64 << 20);
        fake.set(if v2 { "p/box/memory.stat" } else { "memory/p/box/memory.stat" }, &stat);
        limits.change_in(&fake, &limit(100), None).unwrap();
        assert_eq!(fake.get(file), (100u64 << 20).to_string());
        // More is never refused, whatever is in use.
        fake.set(usage, &(900u64 << 20).to_string());
        limits.change_in(&fake, &limit(200), None).unwrap();
        assert_eq!(fake.get(file), (200u64 << 20).to_string());
        assert!(!limits.is_pending());
    }
}

#[test]
fn a_group_that_starts_takes_what_old_cache_leaves() {
    let (fake, mut limits) = (Fake::v2(), unlimited(true));
    fake.set("p/box/memory.current", &(500u64 << 20).to_string());
    limits.wanted.sums.memory = Some(400 << 20);
    limits.outcome = limits.write(&fake, &limits.wanted, Shrink::Floor).unwrap();
    assert!(limits.is_pending());
    let floor = (500u64 << 20) - 100_000 + MEMORY_MARGIN;
    assert_eq!(fake.get("p/box/memory.max"), floor.to_string());
}

#[test]
fn an_old_period_goes_before_the_quota() {
    let (fake, mut limits) = (Fake::v1(), unlimited(false));
    fake.set("cpu/p/v/cpu.cfs_period_us", "50000");
    fake.set("cpu/p/v/cpu.cfs_quota_us", "500000");
    limits.change_in(&fake, &of_record(), None).unwrap();
    assert_eq!(fake.get("cpu/p/v/cpu.cfs_period_us"), "100000");
    assert_eq!(fake.get("cpu/p/v/cpu.cfs_quota_us"), "500000");
}

#[test]
fn cpus_follow_and_must_be_the_bases() {
    for v2 in [true, false] {
        let (fake, mut limits) = (fake(v2), unlimited(v2));
        let on = |cpus: &str| vec![resources(&format!(r#"{{"cpu":{{"cpus":"{cpus}"}}}}"#))];
        let cpus = |role: &str| {
            let dir = match (v2, role) {
                (true, "v") => "p/box/v",
                (true, _) => "p/box/o",
                (false, "v") => "cpuset/p/v",
                (false, _) => "cpuset/p/box",
            };
            fake.get(&format!("{dir}/cpuset.cpus"))
        };
        limits.change_in(&fake, &on("2-3"), None).unwrap();
        assert_eq!((cpus("v").as_str(), cpus("o").as_str()), ("2-3", "0-1,4-7"));
        assert_eq!(limits.vcpus_cpus().unwrap().to_string(), "2-3");
        let files = fake.files.borrow().clone();
        let error = limits.change_in(&fake, &on("7-8"), None).unwrap_err();
        assert!(matches!(error, ChangeError::Plan(PlanError::CpusOutside { .. })), "{error:?}");
        assert_eq!(*fake.files.borrow(), files);
        limits.change_in(&fake, &[], None).unwrap();
        let all = if v2 { "" } else { "0-7" };
        assert_eq!((cpus("v").as_str(), cpus("o").as_str()), (all, all));
    }
}

#[test]
fn what_is_missing_is_said_and_a_group_that_is_gone_is_an_error() {
    let (fake, mut limits) = (Fake::v2(), unlimited(true));
    limits.refused.insert("memory".to_owned(), "nobody hands it on".to_owned());
    fake.files.borrow_mut().retain(|path, _| !path.ends_with("memory.max"));
    limits.change_in(&fake, &of_record(), None).unwrap();
    let shown = limits.in_force_in(&fake);
    assert_eq!(shown.unapplied.len(), 1);
    assert!(shown.unapplied[0].contains("nobody hands it on"), "{:?}", shown.unapplied);
    assert!(shown.limits.iter().any(|limit| limit.file == "cpu.max" && limit.group == Scope::Vcpus));

    fake.files.borrow_mut().retain(|path, _| !path.starts_with("/cg/p/box/v"));
    let error = limits.change_in(&fake, &[], None).unwrap_err();
    assert!(matches!(error, ChangeError::Refused(error) if error.errno() == Some(libc::ENOENT)));
}

#[test]
fn a_refusal_says_where_the_file_was_looked_up() {
    for (v2, shown) in [(true, "(/cg shows / of v2)"), (false, "(/cg/cpu shows / of v1 cpu)")] {
        for (errno, said) in
            [(libc::ENOENT, true), (libc::EACCES, true), (libc::EROFS, true), (libc::EBUSY, false)]
        {
            let (fake, mut limits) = (fake(v2), unlimited(v2));
            fake.failing.set(Some((0, errno, false)));
            let error = limits.change_in(&fake, &of_record(), None).unwrap_err();
            let ChangeError::Refused(error) = error else { panic!("{error:?}") };
            assert_eq!(error.to_string().contains(shown), said, "{error}");
        }
    }
}

#[test]
fn files_that_were_opened_before_are_enough() {
    let dir = crate::stats::tests::fake(&[
        ("p/box/memory.max", "max\n"),
        ("p/box/memory.current", "4096\n"),
        ("p/box/memory.stat", "anon 4096\n"),
        ("p/box/memory.events", "max 0\noom 0\noom_kill 0\n"),
        ("p/box/v/cpu.max", "max 100000\n"),
        ("p/box/v/cpu.stat", "usage_usec 70\n"),
        ("p/box/o/cgroup.threads", "7\n8\n0\n"),
        ("p/cpuset.cpus.effective", "0-3\n"),
    ]);
    let mut limits =
        Limits { layout: crate::stats::tests::layout(dir.path(), &[], Some("/p/box")), ..unlimited(true) };
    let fds = limits.open_files().unwrap();
    assert!(fds.iter().any(|(name, _)| name.ends_with("/p/box/memory.max")), "{fds:?}");
    fs::remove_dir_all(dir.path()).unwrap();
    assert_eq!(limits.layout().stats().unwrap().vcpus.cpu.usage_usec, None, "by path nothing is there");

    let other = ("other".to_owned(), File::open("/dev/null").unwrap().into());
    let rest = limits.keep(fds.into_iter().chain([other]).collect());
    assert_eq!(rest.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["other"]);
    assert_eq!(limits.layout().stats().unwrap().vcpus.cpu.usage_usec, Some(70));
    assert_eq!(limits.layout().thread_ids(Scope::Overhead), [7, 8]);
    assert_eq!(limits.layout().base_cpus().unwrap().len(), 4);
    assert_eq!(limits.layout().watch().unwrap().0.check().0, 0);
    limits.change(&[resources(r#"{"memory":{"limit":419430400}}"#)], None).unwrap();
    let in_force = limits.in_force();
    let memory = in_force.limits.iter().find(|limit| limit.file == "memory.max").unwrap();
    assert_eq!(memory.value.as_deref(), Some("419430400"), "{in_force:?}");
}
