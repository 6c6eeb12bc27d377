//! How the files of groups are reached: by their paths, or in a jail, which does not show them, by descriptors that were
//! opened before.
//!
//! The kernel asks for rights when a file is opened, so a descriptor is good for a process that has lost them since.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::events::EventNotifier;
use crate::file::{self, FileError, Files, Kernel, READ_LIMIT};
use crate::limits::Limits;
use crate::settings::Scope;
use crate::snapshot::Threads;

/// What names of handed descriptors start with: that of a file, whose path follows, and the name of the notifier.
const FILE: &str = "cgroup.file.";
const NOTIFIER: &str = "cgroup.notifier";

/// The way to the files of groups.
#[derive(Debug, Clone, Default)]
pub(crate) enum Reach {
    /// By path.
    #[default]
    Paths,
    /// By path, and what is opened is kept.
    Keeping(Arc<Mutex<BTreeMap<PathBuf, File>>>),
    /// By what was kept.
    Kept(Arc<Kept>),
}

/// What was opened.
#[derive(Debug)]
pub(crate) struct Kept {
    files: BTreeMap<PathBuf, File>,
    notifier: Option<OwnedFd>,
}

/// How something is reached is no part of what it is.
impl PartialEq for Reach {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Reach {}

impl Reach {
    /// The notifier that was kept.
    pub(crate) fn notifier(&self) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::Kept(kept) => kept.notifier.as_ref().map(OwnedFd::try_clone).transpose(),
            Self::Paths | Self::Keeping(_) => Ok(None),
        }
    }
}

impl Files for Reach {
    fn exists(&self, path: &Path) -> bool {
        match self {
            Self::Paths | Self::Keeping(_) => Kernel.exists(path),
            Self::Kept(kept) => kept.files.keys().any(|file| file.starts_with(path)),
        }
    }

    fn read(&self, path: &Path) -> Result<String, FileError> {
        let failed = |source| FileError::new("read", path, source);
        match self {
            Self::Paths => file::read(path),
            Self::Keeping(kept) => {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let file = match kept.remove(path) {
                    Some(file) => file,
                    None => File::open(path).map_err(failed)?,
                };
                let text = text(&file).map_err(failed)?;
                kept.insert(path.to_owned(), file);
                Ok(text)
            }
            Self::Kept(kept) => kept.find(path).and_then(text).map_err(failed),
        }
    }

    fn write(&self, path: &Path, value: &str) -> Result<(), FileError> {
        match self {
            Self::Paths | Self::Keeping(_) => Kernel.write(path, value),
            Self::Kept(kept) => {
                let written = kept.find(path).and_then(|mut file| file.write_all(value.as_bytes()));
                written.map_err(|source| file::write_failed(path, value, source))
            }
        }
    }
}

impl Kept {
    fn find(&self, path: &Path) -> io::Result<&File> {
        self.files.get(path).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }
}

/// The whole text of a kernel file that stays open. A read at the start makes the kernel say it anew.
fn text(file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = file.read_at(&mut buffer, bytes.len() as u64)?;
        bytes.extend_from_slice(&buffer[..count]);
        if count == 0 || bytes.len() as u64 > READ_LIMIT {
            return String::from_utf8(bytes).map_err(io::Error::other);
        }
    }
}

impl Limits {
    /// Opens every file that limits, figures and events are read from or written to, for a process that will not see
    /// them: named descriptors, all close-on-exec, whose names start with `cgroup.`. See [`Limits::keep`].
    ///
    /// # Errors
    /// When a file that is there refuses.
    pub fn open_files(&self) -> Result<Vec<(String, OwnedFd)>, Error> {
        let mut kept = BTreeMap::new();
        let (held, taken) = self.files();
        for path in held {
            // What is not there belongs to a controller that is not there.
            match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(file) => drop(kept.insert(path, file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(FileError::new("open for changing limits", &path, source).into()),
            }
        }
        let kept = Arc::new(Mutex::new(kept));
        // Whatever these read will be read again.
        let reach = Reach::Keeping(Arc::clone(&kept));
        for path in taken {
            reach.read(&path)?;
        }
        let layout = self.layout().reached_by(reach);
        layout.stats()?;
        layout.snapshot(0, Threads::new(), Threads::new())?;
        let _ = (layout.base_cpus(), layout.thread_ids(Scope::Overhead));
        let (_, notifier) = layout.watch()?;
        let kept = std::mem::take(&mut *kept.lock().unwrap_or_else(PoisonError::into_inner));
        let files = kept.into_iter().filter_map(|(path, file)| {
            let name = format!("{FILE}{}", path.to_str()?);
            Some((name, OwnedFd::from(file)))
        });
        Ok(files.chain(notifier.map(|it| (NOTIFIER.to_owned(), it.into()))).collect())
    }

    /// Reaches all files from now on by what [`Limits::open_files`] gave, among descriptors that may hold others, which are
    /// given back.
    pub fn keep(&mut self, fds: Vec<(String, OwnedFd)>) -> Vec<(String, OwnedFd)> {
        let mut kept = Kept { files: BTreeMap::new(), notifier: None };
        let mut others = Vec::new();
        for (name, fd) in fds {
            if let Some(path) = name.strip_prefix(FILE) {
                kept.files.insert(path.into(), fd.into());
            } else if name == NOTIFIER {
                kept.notifier = Some(fd);
            } else {
                others.push((name, fd));
            }
        }
        self.set_reach(Reach::Kept(Arc::new(kept)));
        others
    }
}

impl From<EventNotifier> for OwnedFd {
    fn from(notifier: EventNotifier) -> Self {
        notifier.0.into()
    }
}
