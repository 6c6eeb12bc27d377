//! Where the paths of a command line start.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

/// Where paths start.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// In this process's root and folder.
    Host,
    /// In this folder, which will be the root, and which is there on the host.
    Jail(BorrowedFd<'a>, &'a Path),
}

impl Source<'_> {
    /// Opens a file, close-on-exec. In a jail-to-be no link leads out of it.
    pub fn open(&self, path: &Path, flags: OFlags) -> io::Result<File> {
        let (flags, mode) = (flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o666));
        // The kernel refuses a mode for nothing.
        let or_none = if flags.contains(OFlags::CREATE) { mode } else { Mode::empty() };
        match self {
            Self::Host => Ok(rustix::fs::openat(CWD, path, flags, or_none)?.into()),
            Self::Jail(root, shown) => {
                let opened = rustix::fs::openat2(root, path, flags, or_none, ResolveFlags::IN_ROOT);
                opened.map(File::from).map_err(|error| {
                    let error = io::Error::from(error);
                    io::Error::new(
                        error.kind(),
                        format!("{error} (looked up in the root {})", shown.display()),
                    )
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn paths_of_a_jail_stay_in_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("vm.json"), "inside").unwrap();
        std::os::unix::fs::symlink("/vm.json", folder.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("out")).unwrap();
        let root = File::open(folder.path()).unwrap();
        let jail = Source::Jail(root.as_fd(), folder.path());
        for path in ["/vm.json", "vm.json", "/../../vm.json", "link"] {
            let mut text = String::new();
            jail.open(path.as_ref(), OFlags::RDONLY).unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "inside", "{path}");
        }
        let error = jail.open("out".as_ref(), OFlags::RDONLY).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains(folder.path().to_str().unwrap()), "{error}");
        jail.open("/made".as_ref(), OFlags::WRONLY | OFlags::CREATE).unwrap();
        assert!(folder.path().join("made").is_file());
    }
}
