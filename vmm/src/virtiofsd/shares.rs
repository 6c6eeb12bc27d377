//! What servers may be started from outside of a jail: pinned down while there is nothing in it.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{VirtiofsdError, server};

/// The program and the folders, as the host has them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shares {
    /// The program.
    pub program: PathBuf,
    /// Each folder as it was named, and where it is.
    folders: Vec<(PathBuf, PathBuf)>,
}

impl Shares {
    /// Looks the folders up, with all links in their paths. `jail` is the jail's root.
    pub(super) fn find(program: PathBuf, named: &[PathBuf], jail: &Path) -> Result<Self, VirtiofsdError> {
        let real = |path: &Path| {
            fs::canonicalize(path).map_err(|source| VirtiofsdError::Folder { path: path.to_owned(), source })
        };
        let root = real(jail)?;
        let resolve = |folder: &PathBuf| {
            server::check_folder(folder)?;
            let path = real(folder)?;
            match path.starts_with(&root) || root.starts_with(&path) {
                true => Err(VirtiofsdError::NotApart { folder: folder.clone(), jail: jail.to_owned() }),
                false => Ok((folder.clone(), path)),
            }
        };
        let folders = named.iter().map(resolve).collect::<Result<_, _>>()?;
        Ok(Self { program, folders })
    }

    /// Where the folder of this number is.
    pub(super) fn folder(&self, number: u32) -> Option<&Path> {
        Some(&self.folders.get(usize::try_from(number).ok()?)?.1)
    }
}

/// The same with both ends of the link through the jail's wall.
pub struct Sharing {
    shares: Shares,
    inside: OwnedFd,
    outside: OwnedFd,
}

impl Sharing {
    /// Of the folders that the command line names; `None` where it names none.
    pub fn of(named: &[PathBuf], jail: &Path) -> Result<Option<Self>, VirtiofsdError> {
        if named.is_empty() {
            return Ok(None);
        }
        let shares = Shares::find(server::find()?, named, jail)?;
        let (inside, outside) = UnixStream::pair().map_err(VirtiofsdError::Pair)?;
        Ok(Some(Self { shares, inside: inside.into(), outside: outside.into() }))
    }

    /// For who starts servers.
    pub fn outside(&self) -> (&Shares, BorrowedFd<'_>) {
        (&self.shares, self.outside.as_fd())
    }

    /// For who asks for them: what the folders are called.
    pub fn into_inside(self) -> (Vec<PathBuf>, OwnedFd) {
        (self.shares.folders.into_iter().map(|(name, _)| name).collect(), self.inside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::chain;

    #[test]
    fn a_folder_is_one_that_is_apart_from_the_jail() {
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| base.path().join(name);
        for folder in ["jail/root/run", "shared"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        fs::write(at("file"), "").unwrap();
        std::os::unix::fs::symlink(at("jail/root/run"), at("link")).unwrap();
        let find = |name: &str| Shares::find("/bin/server".into(), &[at(name)], &at("jail/root"));
        for (name, word) in [
            ("missing", "No such file"),
            ("file", "ot a directory"),
            ("jail/root", "devices"),
            ("jail/root/run", "devices"),
            ("link", "devices"),
            ("jail", "devices"),
        ] {
            let error = chain(&find(name).unwrap_err());
            assert!(error.contains(at(name).to_str().unwrap()) && error.contains(word), "{error}");
        }
        let shares = find("shared").unwrap();
        assert_eq!(shares.folders[0].0, at("shared"));
        assert_eq!(shares.folder(0), Some(&*fs::canonicalize(at("shared")).unwrap()));
        assert_eq!(shares.folder(1), None);
        assert!(Sharing::of(&[], &at("jail/root")).unwrap().is_none());
    }
}
