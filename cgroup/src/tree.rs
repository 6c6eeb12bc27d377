//! The groups that were made, and the way into them.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::build::build;
use crate::cleaner::Cleaner;
use crate::error::Error;
use crate::file::{Door, FileError};
use crate::limits::Limits;
use crate::parts;
use crate::path::CgroupPath;
use crate::plan::{Plan, Site};

/// Version of [`TreeState`]; raised with every change of it.
const FORMAT: u32 = 1;

/// What a thread does, which decides where it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Event loop, API, I/O: everything that is not a vCPU.
    Overhead,
    /// Runs a vCPU.
    Vcpu,
}

/// The groups of one hierarchy, as paths in `/proc/PID/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The second field of `/proc/PID/cgroup`: empty for v2, such as `cpu,cpuacct` for v1.
    pub hierarchy: String,
    /// The group that holds everything; `None` where that is not ours, or where there is no such group.
    pub sandbox: Option<CgroupPath>,
    /// Where vCPU threads live.
    pub vcpus: CgroupPath,
    /// Where all other threads live.
    pub overhead: CgroupPath,
}

impl Place {
    /// Where threads of this role live.
    #[must_use]
    pub fn of(&self, role: Role) -> &CgroupPath {
        match role {
            Role::Overhead => &self.overhead,
            Role::Vcpu => &self.vcpus,
        }
    }
}

/// The placement as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// Whether it is cgroup v2.
    pub v2: bool,
    /// Every hierarchy in which threads are placed.
    pub places: Vec<Place>,
    /// Directories that we made (others of our names were empty and are reused), outermost first.
    pub created: Vec<PathBuf>,
}

/// What of a [`Tree`] is plain data, to travel beside its descriptors through an exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeState {
    format: u32,
    groups: Groups,
    joined: bool,
    needs_exec: bool,
    doors: Vec<(Kind, PathBuf)>,
}

/// Who goes through a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    /// The whole process, once.
    Process,
    /// Each thread of the role.
    Thread(Role),
}

/// The groups, with the descriptors to join them by, which stay open for life: vCPUs may come later.
#[derive(Debug)]
pub struct Tree {
    groups: Groups,
    joined: AtomicBool,
    needs_exec: bool,
    doors: Vec<(Kind, Door)>,
}

impl Plan {
    /// What removes the groups if this process is killed before it has a [`Cleaner`] from [`Plan::create`], to be used
    /// by another process. None for a v2 scope: systemd cleans that up, and nobody else may be in it when controllers are
    /// enabled there.
    ///
    /// # Errors
    /// When the base group cannot be opened.
    pub fn cleaner(&self) -> Result<Option<Cleaner>, Error> {
        if self.v2 && self.in_scope {
            return Ok(None);
        }
        Ok(Some(Cleaner::open(&self.sites, self.in_scope)?))
    }

    /// Makes the groups, sets their limits, and opens the descriptors to join them by, and those to leave and
    /// remove them by.
    ///
    /// # Errors
    /// When the kernel refuses a group, its type, a limit, or the opening; everything that was made is removed
    /// then. A limit whose controller is missing is no error but noted in [`Limits::in_force`].
    pub fn create(self) -> Result<(Tree, Limits, Cleaner), Error> {
        let built = build(&self)?;
        let opened = self.doors().and_then(|doors| Ok((doors, Cleaner::open(&self.sites, self.in_scope)?)));
        let (doors, cleaner) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                for dir in built.created.iter().rev() {
                    // The error to report is the one above; what stays is in its path.
                    let _ = std::fs::remove_dir(dir);
                }
                return Err(error.into());
            }
        };
        let places = self.sites.iter().map(|site| Place {
            hierarchy: site.hierarchy.key.clone(),
            sandbox: site.sandbox.clone(),
            vcpus: site.vcpus.clone(),
            overhead: site.overhead.clone(),
        });
        let groups = Groups { v2: self.v2, places: places.collect(), created: built.created };
        let joined = AtomicBool::new(false);
        Ok((Tree { needs_exec: self.needs_exec(), groups, joined, doors }, built.limits, cleaner))
    }

    fn doors(&self) -> Result<Vec<(Kind, Door)>, FileError> {
        let mut doors = Vec::new();
        let mut add = |kind, site: &Site, group: &CgroupPath, file| {
            let opened = Door::open(site.dir(group).join(file));
            opened.map(|door| doors.push((kind, door))).map_err(|error| error.in_sight_of(&site.hierarchy))
        };
        for site in &self.sites {
            let (vcpu, overhead) = (Kind::Thread(Role::Vcpu), Kind::Thread(Role::Overhead));
            match &site.sandbox {
                // Threads may move about only inside their domain, so the process goes to the domain first.
                Some(sandbox) if self.v2 => add(Kind::Process, site, sandbox, "cgroup.procs")?,
                // Later threads inherit this.
                Some(sandbox) if site.vcpus == *sandbox => add(Kind::Process, site, sandbox, "cgroup.procs")?,
                _ => {}
            }
            if site.vcpus != site.overhead {
                let file = if self.v2 { "cgroup.threads" } else { "tasks" };
                add(overhead, site, &site.overhead, file)?;
                add(vcpu, site, &site.vcpus, file)?;
            }
        }
        Ok(doors)
    }

    /// Whether the memory of this process is charged elsewhere than it will be.
    fn needs_exec(&self) -> bool {
        self.sites.iter().filter(|site| self.v2 || site.hierarchy.has("memory")).any(|site| {
            let Some(own) = site.hierarchy.own.as_ref().and_then(|own| site.hierarchy.dir(own)) else {
                return true;
            };
            // Of a threaded group, and of one without the memory controller, a group above is charged.
            let charged = |dir: PathBuf| if self.v2 { site.hierarchy.charged(&dir) } else { dir };
            charged(own) != charged(site.dir(site.sandbox.as_ref().unwrap_or(&site.base)))
        })
    }
}

impl Tree {
    /// Moves the calling thread to where its role lives, through descriptors opened beforehand. The first
    /// call, to be made by the main thread while it is the only one, moves the process there as well.
    ///
    /// # Errors
    /// When the kernel refuses the move; the thread must then not go on.
    pub fn join(&self, role: Role) -> Result<(), Error> {
        let first = !self.joined.load(Ordering::Acquire);
        for (kind, door) in &self.doors {
            if *kind == Kind::Thread(role) || (first && *kind == Kind::Process) {
                door.enter()?;
            }
        }
        self.joined.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether memory that the process had before it joined is charged elsewhere, so that it should exec
    /// itself after joining.
    #[must_use]
    pub fn needs_exec(&self) -> bool {
        self.needs_exec
    }

    /// Where everything is, as plain data.
    #[must_use]
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Takes it apart to travel through an exec: plain data, and named descriptors (all close-on-exec, their
    /// names start with `cgroup.tree.`).
    #[must_use]
    pub fn into_parts(self) -> (TreeState, Vec<(String, OwnedFd)>) {
        let doors = self.doors.iter().map(|(kind, door)| (*kind, door.path.clone())).collect();
        let state = TreeState {
            format: FORMAT,
            groups: self.groups,
            joined: self.joined.into_inner(),
            needs_exec: self.needs_exec,
            doors,
        };
        let files = self.doors.into_iter().map(|(_, door)| OwnedFd::from(door.file));
        (state, files.enumerate().map(|(i, fd)| (format!("cgroup.tree.{i}"), fd)).collect())
    }

    /// Puts together what [`Tree::into_parts`] gave, among descriptors that may hold others: those are closed.
    ///
    /// # Errors
    /// When the state is of another version or a descriptor is missing.
    pub fn from_parts(state: TreeState, mut fds: Vec<(String, OwnedFd)>) -> Result<Self, Error> {
        parts::check_format(state.format, FORMAT)?;
        let mut doors = Vec::new();
        for (i, (kind, path)) in state.doors.into_iter().enumerate() {
            let file = parts::take(&mut fds, &format!("cgroup.tree.{i}"))?.into();
            doors.push((kind, Door { path, file }));
        }
        Ok(Self {
            groups: state.groups,
            joined: AtomicBool::new(state.joined),
            needs_exec: state.needs_exec,
            doors,
        })
    }
}

#[cfg(test)]
mod tests;
