//! Choosing where the threads will live, without changing anything yet.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::error::Error;
use crate::file::{self, FileError, Files, Kernel};
use crate::hierarchy::{Chosen, Hierarchies, Hierarchy, HierarchyError, VersionChoice};
use crate::parent::Parent;
use crate::path::{CgroupPath, GroupName, PathError};
use crate::resources::{Owner, Resources};
use crate::sites;
use crate::sums::Sums;

/// The names of our groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Names {
    /// The group of everything.
    pub sandbox: GroupName,
    /// The group of the vCPU threads.
    pub vcpus: GroupName,
    /// The group of all other threads; v2 only, on v1 they are in the sandbox group itself.
    pub overhead: GroupName,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Which hierarchies to use.
    pub version: VersionChoice,
    /// The group to build in. `None`: our own group, else `/pinfold/<id>`.
    pub parent: Option<Parent>,
    /// How our groups are called.
    pub names: Names,
    /// What the containers ask for: its sum limits the vCPU threads.
    pub containers: Vec<Resources>,
    /// What the pod overhead asks for: it limits all other threads.
    pub overhead: Option<Resources>,
    /// The microVM's name, for the group of last resort, `/pinfold/<id>`.
    pub id: String,
}

/// Why there is no place for the threads.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// No hierarchy of the kind asked for.
    #[error(transparent)]
    Hierarchy(#[from] HierarchyError),
    /// Two groups with one name.
    #[error(
        "sandbox_name, vcpus_name and overhead_name of the cgroup section must differ; `{0}` is there twice"
    )]
    SameName(GroupName),
    /// The parent does not exist.
    #[error(
        "cgroup.parent: the group {path} does not exist in the {hierarchy} hierarchy ({dir}; {seen}); create \
         it there, or name another"
    )]
    ParentMissing {
        /// The configured parent.
        path: CgroupPath,
        /// Which hierarchy.
        hierarchy: String,
        /// Where it was looked for.
        dir: String,
        /// What is mounted there.
        seen: String,
    },
    /// The parent cannot hold a domain group.
    #[error(
        "the group {dir} is of type `{kind}` and cannot hold a sandbox; name a group of type `domain` in \
         cgroup.parent"
    )]
    ParentType {
        /// Its directory.
        dir: String,
        /// Contents of its `cgroup.type`.
        kind: String,
    },
    /// Processes live in a group of our name.
    #[error(
        "the group {0} exists and is populated: another microVM or a leftover process is in it; end that, or \
         choose other names or another parent in the cgroup section"
    )]
    Populated(String),
    /// A group of our name has a type that ours cannot have.
    #[error("the group {dir} exists with type `{kind}`, which does not fit; remove it (rmdir)")]
    GroupType {
        /// Its directory.
        dir: String,
        /// Contents of its `cgroup.type`.
        kind: String,
    },
    /// The CPUs asked for are not the base's.
    #[error("the {what} {asked} are not all among the CPUs of the base group {base} ({available})")]
    CpusOutside {
        /// Whose CPUs.
        what: &'static str,
        /// The CPUs asked for.
        asked: CpuSet,
        /// The base group.
        base: String,
        /// The CPUs it may use.
        available: CpuSet,
    },
    /// Neither our own group nor the root will do.
    #[error(
        "no cgroup to run in: {own}, and {root}; name an existing group in cgroup.parent that this user may \
         write to, or set \"driver\": \"none\" to run without placement"
    )]
    NoBase {
        /// Why not our own group.
        own: String,
        /// Why not `/pinfold/<id>`.
        root: String,
    },
    /// A file of a group that no group can have.
    #[error(
        "no group can have the file {0:?}: name one of a controller that is mounted here, such as memory.max (v2) or \
         memory.limit_in_bytes (v1)"
    )]
    NoSuchFile(String),
    /// The microVM's id cannot name a group.
    #[error("the microVM's id cannot name its group below /pinfold")]
    Id(#[from] PathError),
    /// A file or directory refused.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The groups of one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Site {
    pub(crate) hierarchy: Hierarchy,
    /// What is there already, on which ours are built.
    pub(crate) base: CgroupPath,
    /// Groups between `base` and ours, outermost first: `/pinfold` and `/pinfold/<id>`, or none.
    pub(crate) between: Vec<CgroupPath>,
    /// The group of everything where it is ours.
    pub(crate) sandbox: Option<CgroupPath>,
    /// Where the vCPU threads live. Ours when it differs from `sandbox` and `base`.
    pub(crate) vcpus: CgroupPath,
    /// Where all other threads live. Likewise.
    pub(crate) overhead: CgroupPath,
}

impl Site {
    /// Our groups, outermost first.
    pub(crate) fn ours(&self) -> Vec<CgroupPath> {
        let mut groups: Vec<CgroupPath> = self.sandbox.iter().cloned().collect();
        for group in [&self.vcpus, &self.overhead] {
            if *group != self.base && !groups.contains(group) {
                groups.push(group.clone());
            }
        }
        groups
    }

    /// The directory of the group that ours are made in. It may be still to come.
    pub(crate) fn around(&self) -> PathBuf {
        self.dir(self.between.last().unwrap_or(&self.base))
    }

    /// The directory of one of this site's groups.
    pub(crate) fn dir(&self, group: &CgroupPath) -> PathBuf {
        // All of them are at or below `base`, which the mount was seen to show.
        self.hierarchy.dir(group).unwrap_or_else(|| PathBuf::from(group.as_str()))
    }
}

/// A place that was found fit. Nothing has been changed yet.
#[derive(Debug)]
pub struct Plan {
    pub(crate) v2: bool,
    /// Whether the base is a scope that this process is in.
    pub(crate) in_scope: bool,
    pub(crate) sites: Vec<Site>,
    pub(crate) sums: Sums,
    /// CPUs of the overhead group when they differ from the base's.
    pub(crate) overhead_cpus: Option<CpuSet>,
    pub(crate) unapplied: Vec<String>,
    /// What was asked for that is never applied.
    pub(crate) never: Vec<String>,
    /// Files of the group that ours are built in, and what to write to them.
    pub(crate) around: Vec<(String, String)>,
}

impl Plan {
    /// Has a value written to a file, such as `memory.max`, of the group that ours are built in, before ours exist.
    ///
    /// # Errors
    /// When that is no file's name, or there is no hierarchy that could have it.
    pub fn set_around(&mut self, file: &str, value: &str) -> Result<(), PlanError> {
        let plain = file.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        let (controller, _) = file.split_once('.').filter(|_| plain).unwrap_or_default();
        let there = self.v2 || self.sites.iter().any(|site| site.hierarchy.has(controller));
        if controller.is_empty() || !there {
            return Err(PlanError::NoSuchFile(file.to_owned()));
        }
        if let ("cpuset.cpus", Ok(available)) = (file, value.parse::<CpuSet>()) {
            self.overhead_cpus = self.sums.overhead_cpus(&available);
        }
        self.around.push((file.to_owned(), value.to_owned()));
        Ok(())
    }
}

/// Finds the place for what is asked: the base, in this order, is the parent that was named; our own group if a
/// runtime made it for the sandbox; `/pinfold/<id>` if we may. Changes nothing.
///
/// # Errors
/// When a configured parent is missing, not writable or of the wrong type, when a group of our name is
/// populated, or when no base can be had; each says how to name one.
pub fn resolve(request: &Request) -> Result<Plan, Error> {
    resolve_in(&Hierarchies::discover().map_err(PlanError::from)?, request)
}

/// [`resolve`] in hierarchies found before.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_in(hierarchies: &Hierarchies, request: &Request) -> Result<Plan, Error> {
    Ok(plan(hierarchies, request)?)
}

/// Whether without a parent our own group would be the base.
#[must_use]
pub fn has_own_base(hierarchies: &Hierarchies, version: VersionChoice, names: &Names) -> bool {
    hierarchies.choose(version).is_ok_and(|chosen| match chosen {
        Chosen::V2(v2) => sites::own(&[v2], names, true).is_ok(),
        Chosen::V1(all) => sites::own(&all, names, false).is_ok(),
    })
}

fn plan(hierarchies: &Hierarchies, request: &Request) -> Result<Plan, PlanError> {
    let names = &request.names;
    for (name, others) in
        [(&names.sandbox, [&names.vcpus, &names.overhead]), (&names.vcpus, [&names.overhead; 2])]
    {
        if others.contains(&name) {
            return Err(PlanError::SameName(name.clone()));
        }
    }
    let (v2, all) = match hierarchies.choose(request.version)? {
        Chosen::V2(v2) => (true, vec![v2]),
        Chosen::V1(all) => (false, all),
    };
    let sums = Sums::of(&request.containers, request.overhead.as_ref());
    let mut unapplied = Vec::new();
    let sites = match &request.parent {
        Some(parent) => sites::named(&all, parent, names, v2, &mut unapplied)?,
        None => match sites::own(&all, names, v2) {
            Ok(sites) => sites,
            Err(reason) => sites::last_resort(&all, request, v2, reason, &mut unapplied)?,
        },
    };
    for site in &sites {
        let checked = check_base(site, v2).and_then(|()| {
            let mut ours = site.ours().into_iter();
            ours.try_for_each(|group| {
                check_group(&site.dir(&group), site.sandbox.as_ref() == Some(&group), v2)
            })
        });
        checked.map_err(|error| match error {
            PlanError::File(error) => error.in_sight_of(&site.hierarchy).into(),
            other => other,
        })?;
    }
    let overhead_cpus = overhead_cpus(&Kernel, &sites, &sums, v2)?;
    let never = never_applied(&request.containers, request.overhead.as_ref());
    let in_scope = matches!(request.parent, Some(Parent::Scope(_)));
    Ok(Plan { v2, in_scope, sites, sums, overhead_cpus, unapplied, never, around: Vec::new() })
}

/// What was asked for that Pinfold never applies.
pub(crate) fn never_applied(containers: &[Resources], overhead: Option<&Resources>) -> Vec<String> {
    let containers = containers.iter().zip(1..).map(|(container, number): (_, usize)| {
        (format!("container {number}"), container.not_applied(Owner::Container))
    });
    let overhead = overhead.into_iter().map(|o| ("the overhead".to_owned(), o.not_applied(Owner::Overhead)));
    let all = containers.chain(overhead);
    all.flat_map(|(whose, fields)| {
        fields.into_iter().map(move |f| format!("{f} of {whose} is never applied"))
    })
    .collect()
}

/// Whether the type of the base (v2) lets our layout be built on it.
fn check_base(site: &Site, v2: bool) -> Result<(), PlanError> {
    let dir = site.dir(&site.base);
    // The root has no type: it takes everything.
    let kind = if v2 { cgroup_type(&dir)? } else { None };
    let fits = match kind.as_deref() {
        None | Some("domain") => true,
        // Holds threaded groups already: fine for more of them, but a domain below would be invalid.
        Some("domain threaded") => site.sandbox.is_none(),
        Some(_) => false,
    };
    match kind {
        Some(kind) if !fits => Err(PlanError::ParentType { dir: dir.display().to_string(), kind }),
        _ => Ok(()),
    }
}

/// Whether a group of our name, if there, is empty and of a type that we can use.
fn check_group(dir: &Path, is_sandbox: bool, v2: bool) -> Result<(), PlanError> {
    if !dir.is_dir() {
        return Ok(());
    }
    let shown = || dir.display().to_string();
    let populated = if v2 {
        file::read(&dir.join("cgroup.events"))?.lines().any(|line| line == "populated 1")
    } else {
        !file::read(&dir.join("cgroup.procs"))?.trim().is_empty()
    };
    if populated {
        return Err(PlanError::Populated(shown()));
    }
    match if v2 && is_sandbox { cgroup_type(dir)? } else { None } {
        Some(kind) if !["domain", "domain threaded"].contains(&kind.as_str()) => {
            Err(PlanError::GroupType { dir: shown(), kind })
        }
        _ => Ok(()),
    }
}

fn cgroup_type(dir: &Path) -> Result<Option<String>, FileError> {
    let path = dir.join("cgroup.type");
    if path.exists() { Ok(Some(file::read(&path)?.trim().to_owned())) } else { Ok(None) }
}

/// The CPUs that threads in `dir` may run on. Without the cpuset controller in it they are those of the nearest group
/// that has it.
pub(crate) fn effective_cpus(files: &dyn Files, dir: &Path) -> Option<CpuSet> {
    dir.ancestors().find_map(|dir| {
        ["cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"]
            .iter()
            .find_map(|name| files.read(&dir.join(name)).ok()?.parse::<CpuSet>().ok())
    })
}

/// The overhead group's CPUs, after checking that the base has those asked for.
pub(crate) fn overhead_cpus(
    files: &dyn Files,
    sites: &[Site],
    sums: &Sums,
    v2: bool,
) -> Result<Option<CpuSet>, PlanError> {
    let Some(site) = sites.iter().find(|site| v2 || site.hierarchy.has("cpuset")) else { return Ok(None) };
    let base = site.around();
    let Some(available) = effective_cpus(files, &base) else { return Ok(None) };
    for (what, asked) in [("containers' CPUs", &sums.vcpus.cpus), ("overhead's CPUs", &sums.overhead.cpus)] {
        if let Some(asked) = asked.as_ref().filter(|asked| !asked.is_subset(&available)) {
            let (asked, base) = (asked.clone(), base.display().to_string());
            return Err(PlanError::CpusOutside { what, asked, base, available });
        }
    }
    Ok(sums.overhead_cpus(&available))
}

#[cfg(test)]
mod tests;
