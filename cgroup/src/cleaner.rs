//! Removing the groups when everything in them has ended.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::file::{Door, FileError};
use crate::parts;
use crate::path::CgroupPath;
use crate::plan::Site;

/// Version of [`CleanerState`]; raised with every change of it.
const FORMAT: u32 = 2;
/// How long to wait before trying a busy group again: a group is busy for a moment after its last thread.
const RETRY: Duration = Duration::from_millis(5);

/// What there will be to remove in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leftovers {
    /// Directories of groups to go back to: where we were started, and the root if that is gone.
    exits: Vec<PathBuf>,
    /// Directory of the base, which is not ours.
    base: PathBuf,
    /// Our groups relative to it, innermost first.
    remove: Vec<String>,
    /// Groups relative to it that others may share, innermost first: removed when empty.
    shared: Vec<String>,
    /// Whether systemd removes all that is in the base, a scope, when the last process has left it or ended.
    in_scope: bool,
}

impl Leftovers {
    /// `None` when there is nothing of ours in the hierarchy.
    pub(crate) fn of(site: &Site, in_scope: bool) -> Option<Self> {
        let ours = site.ours();
        if ours.is_empty() {
            return None;
        }
        let relative = |group: &CgroupPath| Some(group.below(&site.base)?.to_str()?.to_owned());
        let mut exits: Vec<PathBuf> = Vec::new();
        for exit in site.hierarchy.own.iter().chain([&CgroupPath::root()]) {
            exits.extend(site.hierarchy.dir(exit).filter(|dir| !exits.contains(dir)));
        }
        Some(Self {
            exits,
            base: site.dir(&site.base),
            remove: ours.iter().rev().filter_map(relative).collect(),
            shared: site.between.iter().rev().filter_map(relative).collect(),
            in_scope: in_scope && site.between.is_empty(),
        })
    }
}

/// What of a [`Cleaner`] is plain data, to travel beside its descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanerState {
    format: u32,
    parts: Vec<PartState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PartState {
    leftovers: Leftovers,
    exits: Vec<PathBuf>,
}

/// Leaves and removes our groups, through descriptors opened beforehand: it works after a chroot and a change
/// of user. It may live in the process itself or in another one in the overhead group.
#[derive(Debug)]
pub struct Cleaner {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    leftovers: Leftovers,
    /// Those of `leftovers.exits` that could be opened.
    exits: Vec<Door>,
    base: OwnedFd,
}

impl Cleaner {
    pub(crate) fn open(sites: &[Site], in_scope: bool) -> Result<Self, FileError> {
        Self::of(sites.iter().filter_map(|site| Leftovers::of(site, in_scope)))
    }

    fn of(leftovers: impl Iterator<Item = Leftovers>) -> Result<Self, FileError> {
        let parts = leftovers.map(|leftovers| {
            let base = File::options()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
                .open(&leftovers.base)
                .map_err(|source| FileError::new("open the group", &leftovers.base, source))?;
            // An ordinary user may be unable to go back; then the groups go when somebody else removes them.
            let exits = leftovers.exits.iter().filter_map(|dir| Door::open(dir.join("cgroup.procs")).ok());
            let exits = exits.collect();
            Ok(Part { leftovers, exits, base: base.into() })
        });
        Ok(Self { parts: parts.collect::<Result<_, _>>()? })
    }

    /// Moves a process, with all its threads, back to where it was started, out of the groups that are to be
    /// removed.
    ///
    /// # Errors
    /// When a hierarchy lets it go nowhere; the others have been left all the same.
    pub fn move_out(&self, pid: i32) -> Result<(), Error> {
        self.leave(pid).map_err(Error::from)
    }

    /// `pid` 0 is the calling process.
    fn leave(&self, pid: i32) -> Result<(), FileError> {
        let mut failure = None;
        for part in &self.parts {
            // In order until one takes it. An ordinary user may have none that could be opened.
            let mut outcome = Ok(());
            for exit in &part.exits {
                outcome = exit.move_in(pid);
                if outcome.is_ok() {
                    break;
                }
            }
            failure = failure.or(outcome.err());
        }
        failure.map_or(Ok(()), Err)
    }

    /// Moves the calling process, with all its threads, back to where it was started, and removes the groups,
    /// trying again while they are busy, for `deadline` in all. Groups that are gone already are fine. Virtual
    /// machines and vhost devices of the process must be closed before: their kernel threads live here too.
    ///
    /// # Errors
    /// When a group is still there at the deadline, naming it; the others have been removed as far as possible.
    pub fn leave_and_remove(&self, deadline: Duration) -> Result<(), Error> {
        // Where that fails, removing says what is in the way.
        let left = self.leave(0);
        if let Err(error) = &left {
            log::debug!("{error}: {}", error.answer());
        }
        let end = Instant::now() + deadline;
        let mut failure = None;
        for part in &self.parts {
            if part.exits.is_empty() && part.leftovers.in_scope {
                continue;
            }
            let removed = part.leftovers.remove.iter().try_for_each(|group| part.remove(group, end));
            if let Err(error) = removed {
                failure.get_or_insert(error);
            } else {
                // Busy or not empty means that other microVMs are there.
                let _ = part.leftovers.shared.iter().try_for_each(|group| part.rmdir(group));
            }
        }
        failure.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Takes it apart to travel through an exec: plain data, and named descriptors (all close-on-exec, their
    /// names start with `cgroup.cleaner.`).
    #[must_use]
    pub fn into_parts(self) -> (CleanerState, Vec<(String, OwnedFd)>) {
        let (mut states, mut fds) = (Vec::new(), Vec::new());
        for (i, part) in self.parts.into_iter().enumerate() {
            fds.push((base_name(i), part.base));
            let mut exits = Vec::new();
            for (j, exit) in part.exits.into_iter().enumerate() {
                exits.push(exit.path);
                fds.push((exit_name(i, j), exit.file.into()));
            }
            states.push(PartState { leftovers: part.leftovers, exits });
        }
        (CleanerState { format: FORMAT, parts: states }, fds)
    }

    /// Puts together what [`Cleaner::into_parts`] gave, among descriptors that may hold others: those are closed.
    ///
    /// # Errors
    /// When the state is of another version or a descriptor is missing.
    pub fn from_parts(state: CleanerState, mut fds: Vec<(String, OwnedFd)>) -> Result<Self, Error> {
        parts::check_format(state.format, FORMAT)?;
        let mut all = Vec::new();
        for (i, part) in state.parts.into_iter().enumerate() {
            let base = parts::take(&mut fds, &base_name(i))?;
            let mut exits = Vec::new();
            for (j, path) in part.exits.into_iter().enumerate() {
                exits.push(Door { path, file: parts::take(&mut fds, &exit_name(i, j))?.into() });
            }
            all.push(Part { leftovers: part.leftovers, exits, base });
        }
        Ok(Self { parts: all })
    }
}

impl Part {
    fn remove(&self, group: &str, end: Instant) -> Result<(), FileError> {
        loop {
            match self.rmdir(group) {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                    sleep(RETRY)
                }
                Err(error) => {
                    let path: &Path = &self.leftovers.base.join(group);
                    return Err(FileError::new("remove the group", path, error));
                }
            }
        }
    }

    fn rmdir(&self, group: &str) -> io::Result<()> {
        let name = CString::new(group)?;
        // SAFETY: the descriptor is open as long as `self` lives, and `name` is a NUL-terminated string that
        // outlives the call, which only reads it.
        let rc = unsafe { libc::unlinkat(self.base.as_raw_fd(), name.as_ptr(), libc::AT_REMOVEDIR) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn base_name(part: usize) -> String {
    format!("cgroup.cleaner.{part}.base")
}

fn exit_name(part: usize, exit: usize) -> String {
    format!("cgroup.cleaner.{part}.exit.{exit}")
}

#[cfg(test)]
mod tests;
