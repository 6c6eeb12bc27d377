//! What happens to the groups: memory that hits its limit, and processes that are killed for it, in the group of
//! everything and in every group above it that can be seen.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::counters::{self, StatsError};
use crate::file::FileError;
use crate::layout::Layout;
use crate::path::CgroupPath;
use crate::reach::Reach;

/// Events that are kept. When there are more, hits of the limit are forgotten before kills.
const KEPT: usize = 256;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// Memory was about to go beyond the limit (v2 `max`, v1 `failcnt`).
    Max,
    /// Nothing could be freed at the limit (v2 only).
    Oom,
    /// A process was killed for it.
    OomKill,
}

/// Something that happened to a group, or to a group in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Its number; later ones have higher numbers.
    pub id: u64,
    /// When it was noticed, in milliseconds since 1970.
    pub time_ms: u64,
    /// The group whose limit it is, or below which it happened.
    pub group: CgroupPath,
    /// What.
    pub kind: EventKind,
    /// How often since the last event of the kind.
    pub count: u64,
    /// How often since the group was made.
    pub total: u64,
}

/// A file with counts.
#[derive(Debug)]
struct Source {
    group: CgroupPath,
    path: PathBuf,
    form: Form,
    last: Counts,
}

/// The counts of each kind that a file has.
type Counts = [(EventKind, Option<u64>); 3];

#[derive(Debug, Clone, Copy)]
enum Form {
    /// v2 `memory.events`.
    Events,
    /// v1 `memory.oom_control`.
    OomControl,
    /// v1 `memory.failcnt`.
    Failcnt,
}

impl Form {
    fn parse(self, text: &str) -> Result<Counts, &str> {
        let (max, oom, kill) = match self {
            Self::Events => {
                let [max, oom, kill] = counters::keyed(text, ["max", "oom", "oom_kill"])?;
                (max, oom, kill)
            }
            Self::OomControl => {
                let [kill] = counters::keyed(text, ["oom_kill"])?;
                (None, None, kill)
            }
            Self::Failcnt => (Some(counters::number(text)?), None, None),
        };
        Ok([(EventKind::Max, max), (EventKind::Oom, oom), (EventKind::OomKill, kill)])
    }
}

/// What happened since it was made.
#[derive(Debug)]
pub struct EventLog {
    reach: Reach,
    sources: Vec<Source>,
    kept: VecDeque<Event>,
    last_id: u64,
}

/// Becomes readable when there may be new events (v2).
#[derive(Debug)]
pub struct EventNotifier(pub(crate) File);

impl Layout {
    /// Starts to watch the groups. On v1, where the kernel tells nobody, there is no notifier.
    ///
    /// # Errors
    /// When a file that is there refuses or does not follow the kernel's format, or no notifier can be had.
    pub fn watch(&self) -> Result<(EventLog, Option<EventNotifier>), StatsError> {
        let reach = self.reach.clone();
        let mut log = EventLog { reach, sources: Vec::new(), kept: VecDeque::new(), last_id: 0 };
        let Some(site) = self.site("memory") else { return Ok((log, None)) };
        let files: &[(&str, Form)] = match self.v2 {
            true => &[("memory.events", Form::Events)],
            false => &[("memory.oom_control", Form::OomControl), ("memory.failcnt", Form::Failcnt)],
        };
        let mut group = Some(site.sandbox.clone().unwrap_or_else(|| site.base.clone()));
        while let Some(path) = group.filter(|path| !path.is_root()) {
            // What the mount does not show cannot be read either.
            let Some(dir) = site.hierarchy.dir(&path) else { break };
            for (name, form) in files {
                let file = dir.join(name);
                match counters::read(&self.reach, &file, |text| form.parse(text)) {
                    Ok(None) => {}
                    Ok(Some(last)) => {
                        log.sources.push(Source { group: path.clone(), path: file, form: *form, last });
                    }
                    // Of a group above ours that is no reason to fail.
                    Err(error) if log.sources.is_empty() => return Err(error),
                    Err(error) => log::info!("events of {path} are not watched: {error}"),
                }
            }
            group = path.parent();
        }
        let notifier = match self.v2 {
            true => Some(self.notifier(&log)?),
            false => None,
        };
        Ok((log, notifier))
    }
}

impl Layout {
    fn notifier(&self, log: &EventLog) -> Result<EventNotifier, FileError> {
        let failed = |source| FileError::new("watch", Path::new("memory.events"), source);
        match self.reach.notifier().map_err(failed)? {
            Some(kept) => Ok(EventNotifier(kept.into())),
            None => EventNotifier::new(log.sources.iter().map(|source| &source.path)),
        }
    }
}

impl EventLog {
    /// Looks for new events. A file that cannot be read any more is not looked at again; why is among the errors.
    pub fn check(&mut self) -> (usize, Vec<StatsError>) {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
        let (mut found, mut errors) = (Vec::new(), Vec::new());
        self.sources.retain_mut(|source| {
            match counters::read(&self.reach, &source.path, |text| source.form.parse(text)) {
                Ok(Some(counts)) => {
                    for ((kind, now), (_, before)) in counts.into_iter().zip(source.last) {
                        let (Some(total), Some(before)) = (now, before) else { continue };
                        if total > before {
                            found.push((source.group.clone(), kind, total - before, total));
                        }
                    }
                    source.last = counts;
                    true
                }
                // The group is gone.
                Ok(None) => false,
                Err(error) => {
                    errors.push(error);
                    false
                }
            }
        });
        let new = found.len();
        for (group, kind, count, total) in found {
            self.last_id += 1;
            self.keep(Event { id: self.last_id, time_ms, group, kind, count, total });
        }
        (new, errors)
    }

    fn keep(&mut self, event: Event) {
        if self.kept.len() >= KEPT {
            let at = self.kept.iter().position(|event| event.kind == EventKind::Max).unwrap_or(0);
            self.kept.remove(at);
        }
        self.kept.push_back(event);
    }

    /// The events that are kept with higher numbers than `since`, oldest first.
    pub fn since(&self, since: u64) -> impl Iterator<Item = &Event> {
        self.kept.iter().filter(move |event| event.id > since)
    }

    /// The number of the last event; 0 before the first.
    #[must_use]
    pub fn last_id(&self) -> u64 {
        self.last_id
    }
}

impl EventNotifier {
    fn new<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Result<Self, FileError> {
        // SAFETY: inotify_init1 takes an integer.
        let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
        if fd < 0 {
            let path = PathBuf::from("memory.events");
            return Err(FileError::new("watch (inotify_init1)", &path, io::Error::last_os_error()));
        }
        // SAFETY: it is a new descriptor, which nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        for path in paths {
            let fail = |source| FileError::new("watch", path, source);
            let name = CString::new(path.as_os_str().as_bytes()).map_err(|nul| fail(nul.into()))?;
            // SAFETY: the descriptor is open, and the name is a NUL-terminated string that the call only reads.
            let watch = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), name.as_ptr(), libc::IN_MODIFY) };
            if watch < 0 {
                return Err(fail(io::Error::last_os_error()));
            }
        }
        Ok(Self(fd.into()))
    }

    /// Takes back that it is readable.
    pub fn drain(&self) {
        // Room for many events of 16 bytes. It does not wait, and what is left keeps it readable.
        let mut events = [0; 4096];
        let _ = (&self.0).read(&mut events);
    }
}

impl AsRawFd for EventNotifier {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
