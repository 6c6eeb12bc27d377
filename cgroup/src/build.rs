//! Making the groups of a plan: directories, types, controllers, limits. All or nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use cgroups_rs::fs::cpuset::CpuSetController;

use crate::file::{FileError, Files, Kernel};
use crate::limits::Limits;
use crate::plan::{Plan, Site};

/// Controllers that our sandbox group should have, those of domains first: once a group has processes and a
/// threaded controller for its children, it can have no more domain children.
const FOR_SANDBOX: [&str; 5] = ["memory", "io", "pids", "cpu", "cpuset"];
/// Controllers that our threaded groups should have.
const FOR_THREADS: [&str; 2] = ["cpu", "cpuset"];

/// Groups that can be made, as far as building needs it: tests put others in their place.
trait Groups: Files {
    /// Makes an empty group.
    fn make(&self, dir: &Path) -> io::Result<()>;
    /// Removes a group that nobody is in.
    fn remove(&self, dir: &Path) -> io::Result<()>;
    /// Gives a group of a v1 cpuset hierarchy that has no CPUs or memory nodes those of the group above.
    fn seed(&self, dir: &Path) -> Result<(), FileError>;
}

impl Groups for Kernel {
    fn make(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir(dir)
    }

    fn remove(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir(dir)
    }

    fn seed(&self, dir: &Path) -> Result<(), FileError> {
        use cgroups_rs::fs::Controller as _;
        // On a directory that exists this does nothing but copy.
        CpuSetController::new(dir.to_owned(), PathBuf::new(), false)
            .create()
            .map_err(|error| FileError::new("set up the cpuset of", dir, cause(&error)))
    }
}

/// What was made.
#[derive(Debug)]
pub(crate) struct Built {
    /// Directories that were not there before, outermost first.
    pub(crate) created: Vec<PathBuf>,
    pub(crate) limits: Limits,
}

/// Makes the groups and sets their limits. On an error everything that was made is removed again.
pub(crate) fn build(plan: &Plan) -> Result<Built, FileError> {
    build_in(&Kernel, plan)
}

fn build_in(files: &dyn Groups, plan: &Plan) -> Result<Built, FileError> {
    let mut builder = Builder {
        files,
        created: Vec::new(),
        reused: BTreeSet::new(),
        in_scope: plan.in_scope,
        around: plan.around.clone(),
        refused: BTreeMap::new(),
    };
    for site in &plan.sites {
        let built = if plan.v2 { builder.v2(site) } else { builder.v1(site) };
        built.map_err(|error| error.in_sight_of(&site.hierarchy))?;
    }
    let limits = Limits::establish(files, plan, std::mem::take(&mut builder.refused))?;
    Ok(Built { created: std::mem::take(&mut builder.created), limits })
}

struct Builder<'a> {
    files: &'a dyn Groups,
    created: Vec<PathBuf>,
    reused: BTreeSet<PathBuf>,
    /// Whether the base is a scope that this process is in.
    in_scope: bool,
    /// What is written to files of the group that ours are built in.
    around: Vec<(String, String)>,
    /// Why a controller could not be enabled.
    refused: BTreeMap<String, String>,
}

impl Drop for Builder<'_> {
    fn drop(&mut self) {
        for dir in self.created.iter().rev() {
            if let Err(error) = self.files.remove(dir)
                // There systemd removes what we are in.
                && !self.in_scope
            {
                log::warn!("cannot remove the group {} that was just made: {error}", dir.display());
            }
        }
    }
}

impl Builder<'_> {
    fn v1(&mut self, site: &Site) -> Result<(), FileError> {
        let ours = site.ours();
        for group in site.between.iter().chain(&ours) {
            if ours.first() == Some(group) {
                self.set_around(site, false)?;
            }
            let dir = site.dir(group);
            self.mkdir(&dir)?;
            if site.hierarchy.has("cpuset") {
                self.seed_cpuset(&dir, ours.contains(group) && self.reused.contains(&dir))?;
            }
        }
        Ok(())
    }

    fn v2(&mut self, site: &Site) -> Result<(), FileError> {
        if let Some(sandbox) = site.sandbox.as_ref().filter(|_| self.in_scope) {
            let dir = site.dir(sandbox);
            self.mkdir(&dir)?;
            self.files.write(&dir.join("cgroup.procs"), "0")?;
        }
        let mut above = site.dir(&site.base);
        for group in site.between.iter().chain(&site.sandbox) {
            if site.sandbox.as_ref() == Some(group) {
                self.set_around(site, true)?;
            }
            self.enable(&above, &FOR_SANDBOX)?;
            above = site.dir(group);
            self.mkdir(&above)?;
        }
        if site.sandbox.is_none() {
            self.set_around(site, true)?;
        }
        // First the type, then controllers: enabling one that only domains can have would forbid the type.
        for group in [&site.vcpus, &site.overhead] {
            let dir = site.dir(group);
            self.mkdir(&dir)?;
            self.files.write(&dir.join("cgroup.type"), "threaded")?;
        }
        for controller in FOR_THREADS {
            self.enable_one(&above, controller);
        }
        Ok(())
    }

    /// Writes what was asked for to the files of the group that ours are built in, as far as this hierarchy has them.
    fn set_around(&self, site: &Site, v2: bool) -> Result<(), FileError> {
        let dir = site.around();
        for (name, value) in &self.around {
            let controller = name.split('.').next().unwrap_or_default();
            if v2 || site.hierarchy.has(controller) {
                self.files.write(&dir.join(name), value)?;
            }
        }
        Ok(())
    }

    fn mkdir(&mut self, dir: &Path) -> Result<(), FileError> {
        match self.files.make(dir) {
            Ok(()) => self.created.push(dir.to_owned()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                self.reused.insert(dir.to_owned());
            }
            Err(error) => return Err(FileError::new("make the group", dir, error)),
        }
        Ok(())
    }

    /// Enables controllers for the children of `dir`, as far as the kernel lets us.
    fn enable(&mut self, dir: &Path, controllers: &[&str]) -> Result<(), FileError> {
        // With processes in it the group would become a threaded domain, and our sandbox could not be a domain
        // in it. Only the root of all, which alone has no type, is exempt.
        if self.files.exists(&dir.join("cgroup.type"))
            && !self.files.read(&dir.join("cgroup.procs"))?.trim().is_empty()
        {
            let why = format!("processes live in {} itself, so it hands no controllers on", dir.display());
            self.refused.extend(controllers.iter().map(|name| ((*name).to_owned(), why.clone())));
            return Ok(());
        }
        for controller in controllers {
            self.enable_one(dir, controller);
        }
        Ok(())
    }

    fn enable_one(&mut self, dir: &Path, controller: &str) {
        let listed = |name: &str| {
            self.files
                .read(&dir.join(name))
                .map(|list| list.split_whitespace().any(|word| word == controller))
        };
        let control = dir.join("cgroup.subtree_control");
        let outcome = match (listed("cgroup.controllers"), listed("cgroup.subtree_control")) {
            (_, Ok(true)) => return,
            (Ok(false), _) => Err(format!("{} does not have it to hand on", dir.display())),
            (Err(error), _) => Err(format!("{error}: {}", error.answer())),
            (Ok(true), _) => self
                .files
                .write(&control, &format!("+{controller}"))
                .map_err(|e| format!("{e}: {}", e.answer())),
        };
        if let Err(why) = outcome {
            log::debug!("controller {controller}: {why}");
            // The outermost reason is the one to mend.
            self.refused.entry(controller.to_owned()).or_insert(why);
        }
    }

    /// Gives a group of a v1 cpuset hierarchy the CPUs and memory nodes of the group above, without which no
    /// thread can join; `anew` also when it has some of old.
    fn seed_cpuset(&self, dir: &Path, anew: bool) -> Result<(), FileError> {
        self.files.seed(dir)?;
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let path = dir.join(name);
            if let Some(above) = dir.parent().filter(|_| anew) {
                self.files.write(&path, self.files.read(&above.join(name))?.trim())?;
            }
            // It may have failed without a word.
            if self.files.read(&path)?.trim().is_empty() {
                let answer = io::Error::from_raw_os_error(libc::ENOSPC);
                return Err(FileError::new("copy the parent's value to", &path, answer));
            }
        }
        Ok(())
    }
}

/// The kernel's answer in an error of cgroups-rs.
fn cause(error: &cgroups_rs::fs::error::Error) -> io::Error {
    match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(io) => io.raw_os_error().map_or_else(|| io.kind().into(), io::Error::from_raw_os_error),
        None => io::Error::other(error.to_string()),
    }
}

#[cfg(test)]
mod tests;
