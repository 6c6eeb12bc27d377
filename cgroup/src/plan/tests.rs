use std::fs;
use std::path::Path;

use super::*;

/// A directory that stands for a mounted v2 hierarchy, or several v1 ones.
struct Fake(tempfile::TempDir);

impl Fake {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn group(&self, path: &str, files: &[(&str, &str)]) -> &Self {
        let dir = self.0.path().join(path);
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
        self
    }

    fn v2(&self, own: &str) -> Hierarchies {
        let point = self.0.path().display();
        Hierarchies::parse(&format!("1 2 0:3 / {point} rw - cgroup2 cgroup rw"), &format!("0::{own}"))
    }

    fn v1(&self, own: &[(&str, &str)]) -> Hierarchies {
        let point = self.0.path().display();
        let mounts: String =
            own.iter().map(|(c, _)| format!("1 2 0:3 / {point}/{c} rw - cgroup c rw,{c}\n")).collect();
        let lines: String = own.iter().map(|(c, path)| format!("1:{c}:{path}\n")).collect();
        Hierarchies::parse(&mounts, &lines)
    }
}

fn resolved(hierarchies: &Hierarchies, request: &Request) -> Result<Plan, PlanError> {
    resolve_in(hierarchies, request).map_err(|error| match error {
        Error::Plan(error) => error,
        other => panic!("{other}"),
    })
}

fn request(parent: Option<&str>) -> Request {
    Request {
        version: VersionChoice::Auto,
        parent: parent.map(|parent| Parent::Existing(parent.parse().unwrap())),
        names: Names {
            sandbox: "box".parse().unwrap(),
            vcpus: "vcpus".parse().unwrap(),
            overhead: "rest".parse().unwrap(),
        },
        containers: Vec::new(),
        overhead: None,
        id: "vm-1".to_owned(),
    }
}

fn paths(plan: &Plan) -> Vec<(Option<&str>, &str, &str)> {
    plan.sites
        .iter()
        .map(|s| (s.sandbox.as_ref().map(CgroupPath::as_str), s.vcpus.as_str(), s.overhead.as_str()))
        .collect()
}

#[test]
fn v2_below_the_configured_parent() {
    let fake = Fake::new();
    fake.group("pods/p1", &[("cgroup.type", "domain\n")]);
    let plan = resolved(&fake.v2("/made/for/us"), &request(Some("/pods/p1"))).unwrap();
    assert_eq!(paths(&plan), [(Some("/pods/p1/box"), "/pods/p1/box/vcpus", "/pods/p1/box/rest")]);
    assert!(fs::read_dir(fake.0.path().join("pods/p1")).unwrap().count() == 1, "nothing was made");
}

#[test]
fn files_of_the_group_around_are_those_of_controllers_that_are_there() {
    let fake = Fake::new();
    fake.group("pods/p1", &[("cgroup.type", "domain\n")]).group("memory/pods/p1", &[]);
    let mut v2 = resolved(&fake.v2("/"), &request(Some("/pods/p1"))).unwrap();
    v2.set_around("io.max", "8:0 rbps=1").unwrap();
    assert_eq!(v2.around, [("io.max".to_owned(), "8:0 rbps=1".to_owned())]);
    let mut v1 = resolved(&fake.v1(&[("memory", "/")]), &request(Some("/pods/p1"))).unwrap();
    v1.set_around("memory.limit_in_bytes", "1").unwrap();
    let refused = |plan: &mut Plan, bad: &str| {
        let error = plan.set_around(bad, "1").unwrap_err().to_string();
        assert!(error.contains(&format!("{bad:?}")), "{error}");
    };
    refused(&mut v1, "cpu.shares");
    ["../memory.max", "memory", ""].iter().for_each(|bad| refused(&mut v2, bad));
}

#[test]
fn cpus_are_those_of_the_group_around() {
    let fake = Fake::new();
    fake.group("pods", &[("cgroup.type", "domain\n"), ("cpuset.cpus.effective", "0-3\n")]);
    let mut request = request(None);
    request.parent = Some(Parent::Made("/pods/made".parse().unwrap()));
    request.containers = vec![serde_json::from_str(r#"{"cpu":{"cpus":"0"}}"#).unwrap()];
    let mut plan = resolved(&fake.v2("/"), &request).unwrap();
    assert!(plan.sites[0].around().ends_with("pods/made"));
    // It is not there yet, so that the one above it counts.
    assert_eq!(plan.overhead_cpus, Some("1-3".parse().unwrap()));
    plan.set_around("cpuset.cpus", "0-1").unwrap();
    assert_eq!(plan.overhead_cpus, Some("1".parse().unwrap()));
}

#[test]
fn v2_in_our_own_group() {
    let fake = Fake::new();
    fake.group("pods/sandbox", &[("cgroup.type", "domain threaded\n")]);
    let plan = resolved(&fake.v2("/pods/sandbox"), &request(None)).unwrap();
    assert_eq!(paths(&plan), [(None, "/pods/sandbox/vcpus", "/pods/sandbox/rest")]);
}

#[test]
fn v2_in_the_root_of_a_cgroup_namespace() {
    let fake = Fake::new();
    fake.group("", &[("cgroup.type", "domain\n")]);
    let place = [(None, "/vcpus", "/rest")];
    for parent in [None, Some("/")] {
        assert_eq!(paths(&resolved(&fake.v2("/"), &request(parent)).unwrap()), place, "{parent:?}");
    }
}

#[test]
fn v2_at_the_root_when_our_own_group_is_a_service() {
    let fake = Fake::new();
    fake.group("system.slice/containerd.service", &[]);
    let plan = resolved(&fake.v2("/system.slice/containerd.service"), &request(None)).unwrap();
    let home = "/pinfold/vm-1/box";
    assert_eq!(paths(&plan), [(Some(home), "/pinfold/vm-1/box/vcpus", "/pinfold/vm-1/box/rest")]);
    assert_eq!(plan.sites[0].between.len(), 2);
    let bad = Request { id: "a/b".to_owned(), ..request(None) };
    assert!(matches!(resolved(&fake.v2("/"), &bad), Err(PlanError::Id(_))));
}

#[test]
fn unfit_parents_are_refused() {
    let fake = Fake::new();
    for (name, kind) in [("t", "threaded"), ("i", "domain invalid"), ("d", "domain threaded")] {
        fake.group(name, &[("cgroup.type", kind)]);
        let error = resolved(&fake.v2("/"), &request(Some(&format!("/{name}")))).unwrap_err();
        assert!(matches!(&error, PlanError::ParentType { kind: k, .. } if k == kind), "{error}");
    }
    let error = resolved(&fake.v2("/"), &request(Some("/nope"))).unwrap_err();
    assert!(matches!(error, PlanError::ParentMissing { .. }));
    let seen = format!("{} shows / of v2", fake.0.path().display());
    assert!(error.to_string().contains("/nope") && error.to_string().contains(&seen), "{error}");
}

#[test]
fn populated_groups_are_refused_and_empty_ones_reused() {
    let fake = Fake::new();
    fake.group("p/box", &[("cgroup.events", "populated 1\nfrozen 0\n")]);
    let error = resolved(&fake.v2("/"), &request(Some("/p"))).unwrap_err();
    assert!(matches!(error, PlanError::Populated(_)), "{error}");
    fake.group("p/box", &[("cgroup.events", "populated 0\nfrozen 0\n"), ("cgroup.type", "domain threaded")]);
    resolved(&fake.v2("/"), &request(Some("/p"))).unwrap();
    fake.group("p/box", &[("cgroup.type", "threaded")]);
    assert!(matches!(resolved(&fake.v2("/"), &request(Some("/p"))), Err(PlanError::GroupType { .. })));
    fake.group("memory/p/box", &[("cgroup.procs", "17\n")]).group("cpu/p", &[]);
    let v1 = fake.v1(&[("cpu", "/"), ("memory", "/")]);
    assert!(matches!(resolved(&v1, &request(Some("/p"))), Err(PlanError::Populated(_))));
}

#[test]
fn names_must_differ() {
    let fake = Fake::new();
    let mut request = request(Some("/"));
    request.names.overhead = request.names.vcpus.clone();
    assert!(matches!(resolved(&fake.v2("/"), &request), Err(PlanError::SameName(_))));
    request.names.overhead = request.names.sandbox.clone();
    assert!(matches!(resolved(&fake.v2("/"), &request), Err(PlanError::SameName(_))));
}

#[test]
fn v1_siblings_per_thread_and_one_group_elsewhere() {
    let fake = Fake::new();
    fake.group("cpu/p", &[]).group("memory/p", &[]).group("freezer", &[]).group("name=systemd", &[]);
    let all = fake.v1(&[("cpu", "/"), ("memory", "/"), ("freezer", "/"), ("name=systemd", "/")]);
    let plan = resolved(&all, &request(Some("/p"))).unwrap();
    let whole = (Some("/p/box"), "/p/box", "/p/box");
    assert_eq!(paths(&plan), [(Some("/p/box"), "/p/vcpus", "/p/box"), whole, whole]);
    // In a hierarchy that only tracks, the parent is made. In another controller's it is not, and that is said.
    assert_eq!(plan.sites[2].hierarchy.label(), "v1 name=systemd");
    assert_eq!((plan.sites[2].base.as_str(), plan.sites[2].between.len()), ("/", 1));
    assert_eq!(plan.unapplied.len(), 1);
    assert!(plan.unapplied[0].contains("v1 freezer"), "{:?}", plan.unapplied);
    fs::remove_dir(fake.0.path().join("memory/p")).unwrap();
    let error = resolved(&all, &request(Some("/p"))).unwrap_err();
    assert!(error.to_string().contains("v1 memory"), "{error}");
}

#[test]
fn v1_own_groups_count_only_when_all_that_the_pod_pays_for_are_there() {
    let fake = Fake::new();
    fake.group("cpu/s", &[]).group("memory/s", &[]).group("pids", &[]);
    let plan = resolved(&fake.v1(&[("cpu", "/s"), ("memory", "/s"), ("pids", "/")]), &request(None)).unwrap();
    // Memory stays where the runtime put it.
    assert_eq!(paths(&plan), [(Some("/s/box"), "/s/vcpus", "/s/box"), (None, "/s", "/s")]);
    assert_eq!(plan.sites[1].ours(), []);
    let plan = resolved(&fake.v1(&[("cpu", "/"), ("memory", "/s")]), &request(None)).unwrap();
    assert_eq!(plan.sites[1].sandbox.as_ref().unwrap().as_str(), "/pinfold/vm-1/box");
}

#[test]
fn a_root_out_of_sight_is_no_base() {
    let fake = Fake::new();
    let point = fake.0.path().display();
    let part = Hierarchies::parse(&format!("1 2 0:3 /docker {point} rw - cgroup2 c rw"), "0::/x.service");
    let error = resolved(&part, &request(None)).unwrap_err();
    assert!(error.to_string().contains("cgroup.parent"), "{error}");
    assert!(matches!(error, PlanError::NoBase { .. }));
}

#[test]
fn cpus_come_from_the_base() {
    let fake = Fake::new();
    fake.group("", &[("cpuset.cpus.effective", "0-7\n")]).group("p", &[("cpuset.cpus.effective", "0-3\n")]);
    fake.group("q/r", &[]);
    let on = |parent: &str, cpus: &str| {
        let mut request = request(Some(parent));
        request.containers =
            vec![serde_json::from_str(&format!(r#"{{"cpu":{{"cpus":"{cpus}"}}}}"#)).unwrap()];
        resolved(&fake.v2("/"), &request).map(|plan| plan.overhead_cpus.map(|set| set.to_string()))
    };
    assert_eq!(on("/p", "1").unwrap().as_deref(), Some("0,2-3"));
    assert_eq!(on("/p", "0-3").unwrap(), None);
    assert!(matches!(on("/p", "3-4"), Err(PlanError::CpusOutside { .. })));
    // Without the controller the CPUs are those of a group above.
    assert_eq!(on("/q/r", "4").unwrap().as_deref(), Some("0-3,5-7"));
}

#[test]
fn nobody_lives_outside_the_mount() {
    let fake = Fake::new();
    fake.group("p", &[]);
    let plan = resolved(&fake.v2("/"), &request(Some("/p"))).unwrap();
    for group in plan.sites[0].ours() {
        assert!(plan.sites[0].dir(&group).starts_with(fake.0.path()));
    }
    assert_eq!(plan.sites[0].dir(&"/p".parse().unwrap()), fake.0.path().join(Path::new("p")));
}

#[test]
fn what_is_never_applied_is_said() {
    let fake = Fake::new();
    fake.group("p", &[]);
    let mut request = request(Some("/p"));
    request.containers = vec![
        Resources::default(),
        serde_json::from_str(r#"{"memory":{"swap":5},"pids":{"limit":5}}"#).unwrap(),
    ];
    request.overhead = Some(serde_json::from_str(r#"{"cpu":{"burst":5},"pids":{"limit":5}}"#).unwrap());
    let plan = resolved(&fake.v2("/"), &request).unwrap();
    assert_eq!(
        plan.never,
        [
            "pids.limit of container 2 is never applied",
            "memory.swap of container 2 is never applied",
            "cpu.burst of the overhead is never applied"
        ]
    );
}

fn made(path: &str) -> Request {
    Request { parent: Some(Parent::Made(path.parse().unwrap())), ..request(None) }
}

#[test]
fn what_is_missing_of_a_specs_group_is_made() {
    let fake = Fake::new();
    fake.group("pods/p1", &[("cgroup.type", "domain\n")]);
    let plan = resolved(&fake.v2("/x.service"), &made("/pods/p1/a/b")).unwrap();
    assert_eq!(paths(&plan), [(Some("/pods/p1/a/b/box"), "/pods/p1/a/b/box/vcpus", "/pods/p1/a/b/box/rest")]);
    assert_eq!((plan.sites[0].base.as_str(), plan.sites[0].between.len()), ("/pods/p1", 2));
    let plan = resolved(&fake.v2("/x.service"), &made("/pods/p1")).unwrap();
    assert_eq!((plan.sites[0].base.as_str(), plan.sites[0].between.len()), ("/pods/p1", 0));
    // On v1 in each hierarchy as far as it is missing there.
    fake.group("cpu/p", &[]).group("pids", &[]).group("memory/p/c", &[]);
    let plan = resolved(&fake.v1(&[("cpu", "/"), ("memory", "/"), ("pids", "/")]), &made("/p/c")).unwrap();
    let bases: Vec<_> = plan.sites.iter().map(|site| site.base.as_str()).collect();
    assert_eq!(bases, ["/p", "/p/c", "/"]);
    assert!(plan.unapplied.is_empty(), "{:?}", plan.unapplied);
}

#[test]
fn a_named_group_that_is_our_own_is_built_in_as_ours() {
    let fake = Fake::new();
    fake.group("pods/p1", &[("cgroup.type", "domain\n")]);
    for request in [made("/pods/p1"), request(Some("/pods/p1"))] {
        let plan = resolved(&fake.v2("/pods/p1"), &request).unwrap();
        assert_eq!(paths(&plan), [(None, "/pods/p1/vcpus", "/pods/p1/rest")]);
    }
}
