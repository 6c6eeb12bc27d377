//! On which group of each hierarchy ours are built.

use crate::file;
use crate::hierarchy::{Hierarchy, made_for_us};
use crate::parent::Parent;
use crate::path::{CgroupPath, GroupName};
use crate::plan::{Names, PlanError, Request, Site};

/// v1 controllers whose groups are per thread: the vCPUs get a group of their own.
const PER_THREAD: [&str; 3] = ["cpu", "cpuacct", "cpuset"];
/// v1 controllers that the pod must pay through: a base without one of those (where mounted) is refused.
const ESSENTIAL: [&str; 4] = ["cpu", "cpuacct", "cpuset", "memory"];

/// The sites of a base that is given from outside.
pub(crate) fn named(
    all: &[&Hierarchy],
    parent: &Parent,
    names: &Names,
    v2: bool,
    unapplied: &mut Vec<String>,
) -> Result<Vec<Site>, PlanError> {
    let path = parent.path();
    let mut sites = Vec::new();
    for &hierarchy in all {
        if !v2 && hierarchy.only_tracks() {
            track(hierarchy, path, &names.sandbox, &mut sites, unapplied);
            continue;
        }
        match below(hierarchy, parent, names, v2) {
            Ok(site) => sites.push(site),
            Err(error) if v2 || essential(hierarchy) => return Err(error),
            // What other controllers lose is worth a word.
            Err(_) => unapplied.push(format!(
                "threads stay where they are in the {} hierarchy: {path} is missing there, or not writable",
                hierarchy.label()
            )),
        }
    }
    if sites.is_empty() {
        let hierarchy = if v2 { "v2" } else { "v1" }.to_owned();
        let (dir, seen) =
            ("none fits".to_owned(), all.iter().map(|one| one.shown()).collect::<Vec<_>>().join("; "));
        return Err(PlanError::ParentMissing { path: path.clone(), hierarchy, dir, seen });
    }
    Ok(sites)
}

/// The site below a parent that was named, in a hierarchy with controllers.
fn below(hierarchy: &Hierarchy, parent: &Parent, names: &Names, v2: bool) -> Result<Site, PlanError> {
    let path = parent.path();
    let (base, between) = match parent {
        Parent::Existing(path) => (path.clone(), Vec::new()),
        Parent::Made(path) | Parent::Scope(path) => split(hierarchy, path),
    };
    let dir = hierarchy.dir(&base).filter(|dir| dir.is_dir()).ok_or_else(|| PlanError::ParentMissing {
        path: path.clone(),
        hierarchy: hierarchy.label(),
        dir: hierarchy.dir(path).map_or("out of sight".to_owned(), |dir| dir.display().to_string()),
        seen: hierarchy.shown(),
    })?;
    file::may_create_in(&dir).map_err(|error| error.in_sight_of(hierarchy))?;
    // A group with processes in it, ourselves for one, cannot hand controllers on to a sandbox below it.
    let ours = v2 && hierarchy.own.as_ref() == Some(path) && (!path.is_root() || hierarchy.is_namespaced());
    Ok(if ours { inside(hierarchy, path, names) } else { site(hierarchy, &base, between, names, v2) })
}

/// The nearest group to `path` that exists, `path` itself or one above, and what is missing below it.
fn split(hierarchy: &Hierarchy, path: &CgroupPath) -> (CgroupPath, Vec<CgroupPath>) {
    let (mut base, mut missing) = (path.clone(), Vec::new());
    while !hierarchy.dir(&base).is_some_and(|dir| dir.is_dir()) {
        let Some(above) = base.parent() else { break };
        missing.insert(0, base);
        base = above;
    }
    (base, missing)
}

/// Adds the site of a hierarchy without controllers. systemd moves every process that it finds in one of its
/// units there into that unit's groups of all controllers, whenever it changes what controllers the unit has; so
/// who only leaves those groups is brought back to its launcher's some day. What of `parent` is missing here is
/// made, as other runtimes do.
fn track(
    hierarchy: &Hierarchy,
    parent: &CgroupPath,
    sandbox: &GroupName,
    sites: &mut Vec<Site>,
    unapplied: &mut Vec<String>,
) {
    let (base, between) = split(hierarchy, parent);
    match hierarchy.dir(&base).map(|dir| file::may_create_in(&dir)) {
        Some(Ok(())) => {
            let home = parent.join(sandbox);
            sites.push(Site {
                hierarchy: hierarchy.clone(),
                base,
                between,
                sandbox: Some(home.clone()),
                vcpus: home.clone(),
                overhead: home,
            });
        }
        _ => unapplied.push(format!(
            "threads stay where they are in the {} hierarchy, as {base} is out of sight there or not writable; \
             systemd may move them to groups of its units",
            hierarchy.label()
        )),
    }
}

/// The sites of our own group, or why it cannot be the base.
pub(crate) fn own(all: &[&Hierarchy], names: &Names, v2: bool) -> Result<Vec<Site>, String> {
    let mut sites = Vec::new();
    for &hierarchy in all {
        let label = hierarchy.label();
        let strict = v2 || essential(hierarchy);
        // What is a root only by a cgroup namespace was made for whoever is in that.
        let fit = |own: &&CgroupPath| made_for_us(own) || (v2 && own.is_root() && hierarchy.is_namespaced());
        let Some(own) = hierarchy.own.as_ref().filter(fit) else {
            if strict {
                let own = hierarchy.own.as_ref().map_or("out of sight", CgroupPath::as_str);
                return Err(format!("our own group in {label} ({own}) was not made for a sandbox"));
            }
            continue;
        };
        if !v2 && !per_thread(hierarchy) {
            // The process is where the runtime wanted it, and there it stays: nothing to make.
            let base = own.clone();
            let (vcpus, overhead) = (base.clone(), base.clone());
            let hierarchy = hierarchy.clone();
            sites.push(Site { hierarchy, base, between: Vec::new(), sandbox: None, vcpus, overhead });
            continue;
        }
        let dir =
            hierarchy.dir(own).ok_or_else(|| format!("our own group {own} is not mounted for {label}"))?;
        file::may_create_in(&dir).map_err(|error| format!("in {label} we {error} ({})", error.answer()))?;
        sites.push(if v2 {
            inside(hierarchy, own, names)
        } else {
            site(hierarchy, own, Vec::new(), names, v2)
        });
    }
    Ok(sites)
}

/// The sites of `/pinfold/<id>`.
pub(crate) fn last_resort(
    all: &[&Hierarchy],
    request: &Request,
    v2: bool,
    own: String,
    unapplied: &mut Vec<String>,
) -> Result<Vec<Site>, PlanError> {
    let root = CgroupPath::root();
    let pinfold = root.join(&"pinfold".parse()?);
    let home = pinfold.join(&request.id.parse()?);
    let between = vec![pinfold, home.clone()];
    let mut sites = Vec::new();
    for &hierarchy in all {
        if !v2 && hierarchy.only_tracks() {
            track(hierarchy, &home, &request.names.sandbox, &mut sites, unapplied);
            continue;
        }
        let fit = match hierarchy.dir(&root) {
            Some(dir) => {
                file::may_create_in(&dir).map_err(|error| format!("we {error} ({})", error.answer()))
            }
            None => Err(format!("the root of {} is not mounted ({})", hierarchy.label(), hierarchy.shown())),
        };
        match fit {
            Ok(()) => sites.push(site(hierarchy, &root, between.clone(), &request.names, v2)),
            Err(root) => return Err(PlanError::NoBase { own, root }),
        }
    }
    Ok(sites)
}

/// The site in `own`, our own group on v2, which is the threaded domain and plays the sandbox's part.
fn inside(hierarchy: &Hierarchy, own: &CgroupPath, names: &Names) -> Site {
    Site {
        hierarchy: hierarchy.clone(),
        base: own.clone(),
        between: Vec::new(),
        sandbox: None,
        vcpus: own.join(&names.vcpus),
        overhead: own.join(&names.overhead),
    }
}

fn site(hierarchy: &Hierarchy, base: &CgroupPath, between: Vec<CgroupPath>, names: &Names, v2: bool) -> Site {
    let inner = between.last().unwrap_or(base);
    let sandbox = inner.join(&names.sandbox);
    let (vcpus, overhead) = if v2 {
        (sandbox.join(&names.vcpus), sandbox.join(&names.overhead))
    } else if per_thread(hierarchy) {
        (inner.join(&names.vcpus), sandbox.clone())
    } else {
        (sandbox.clone(), sandbox.clone())
    };
    Site {
        hierarchy: hierarchy.clone(),
        base: base.clone(),
        between,
        sandbox: Some(sandbox),
        vcpus,
        overhead,
    }
}

fn essential(hierarchy: &Hierarchy) -> bool {
    ESSENTIAL.iter().any(|controller| hierarchy.has(controller))
}

fn per_thread(hierarchy: &Hierarchy) -> bool {
    PER_THREAD.iter().any(|controller| hierarchy.has(controller))
}
