//! Finished artefacts under `target/pinfold-host`: each is a folder `<name>-<digest>`, made whole or not at all.

use super::HostError;
use super::command::{as_root, run};
use crate::artifacts::target_dir;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The folder of all artefacts.
pub fn root() -> Result<PathBuf, HostError> {
    let root = target_dir()?.join("pinfold-host");
    fs::create_dir_all(&root).map_err(HostError::file("create", &root))?;
    Ok(root)
}

/// Returns the artefact `name` of the recipe `digest`, calling `build` with an empty folder when it is
/// not there yet. Older recipes' artefacts of that name are removed.
pub fn get(
    name: &str,
    digest: &str,
    build: impl FnOnce(&Path) -> Result<(), HostError>,
) -> Result<PathBuf, HostError> {
    let root = root()?;
    let done = root.join(format!("{name}-{digest}"));
    // One builder a name; another process waits here and then finds the result.
    let lock_path = root.join(format!("{name}.lock"));
    let lock = File::create(&lock_path).map_err(HostError::file("create", &lock_path))?;
    lock.lock().map_err(HostError::file("lock", &lock_path))?;
    if done.is_dir() {
        return Ok(done);
    }
    let half_done = root.join(format!("{name}.building"));
    remove(&half_done)?;
    fs::create_dir(&half_done).map_err(HostError::file("create", &half_done))?;
    build(&half_done)?;
    for entry in fs::read_dir(&root).map_err(HostError::file("read", &root))?.flatten() {
        let is_older = entry
            .file_name()
            .to_str()
            .and_then(|file| file.strip_prefix(name)?.strip_prefix('-'))
            .is_some_and(|rest| {
                rest.len() == digest.len() && rest.bytes().all(|byte| byte.is_ascii_hexdigit())
            });
        if is_older {
            remove(&entry.path())?;
        }
    }
    fs::rename(&half_done, &done).map_err(HostError::file("rename", &half_done))?;
    Ok(done)
}

/// Removes a tree, parts of which may be root's.
pub fn remove(tree: &Path) -> Result<(), HostError> {
    if !tree.exists() {
        return Ok(());
    }
    run("removing a tree", as_root("rm").args(["-rf", "--one-file-system"]).arg(tree)).map(drop)
}
