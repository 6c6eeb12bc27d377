//! Kernel modules and what they depend on.

use super::HostError;
use super::command::run;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel module ready to be loaded.
pub struct Module {
    /// Its name, dashes turned into underscores, as the kernel shows it.
    pub name: String,
    /// The uncompressed ELF object.
    pub object: Vec<u8>,
}

/// Returns `wanted` and all that they depend on from the tree `modules`, in the order to load them. What
/// is not in the tree is taken to be built into the kernel.
pub fn closure(modules: &Path, wanted: &[&str]) -> Result<Vec<Module>, HostError> {
    let mut files = HashMap::new();
    index(modules, &mut files)?;
    let mut ordered = Vec::new();
    for name in wanted {
        add(&files, name, &mut ordered)?;
    }
    Ok(ordered)
}

fn add(files: &HashMap<String, PathBuf>, name: &str, ordered: &mut Vec<Module>) -> Result<(), HostError> {
    let name = name.replace('-', "_");
    let Some(path) = files.get(&name) else { return Ok(()) };
    if ordered.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let object = load(path)?;
    // The kernel's build refuses circular dependencies, so this ends.
    for dependency in depends(&object) {
        add(files, &dependency, ordered)?;
    }
    ordered.push(Module { name, object });
    Ok(())
}

fn load(path: &Path) -> Result<Vec<u8>, HostError> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz")
            .arg("-dc")
            .arg(path)
            .output()
            .map_err(|source| HostError::Spawn { program: "xz".to_owned(), source })?;
        if !output.status.success() {
            return Err(HostError::Unexpected(format!("{} does not decompress", path.display())));
        }
        return Ok(output.stdout);
    }
    std::fs::read(path).map_err(HostError::file("read", path))
}

/// The names after `depends=` in the module's `.modinfo` section, which is a run of C strings.
fn depends(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    let mut strings = object.split(|byte| *byte == 0);
    let Some(found) = strings.find_map(|string| string.strip_prefix(KEY)) else { return Vec::new() };
    String::from_utf8_lossy(found).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn index(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<(), HostError> {
    for entry in std::fs::read_dir(folder).map_err(HostError::file("read", folder))? {
        let entry = entry.map_err(HostError::file("read", folder))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(HostError::file("read", &path))?;
        if kind.is_dir() {
            index(&path, files)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Runs depmod for the tree below `root` with the rootfs's own tools.
pub fn depmod(root: &Path, release: &str) -> Result<(), HostError> {
    run("indexing kernel modules", super::command::as_root("chroot").arg(root).args(["depmod", release]))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let tree = tempfile::tempdir().unwrap();
        let deep = tree.path().join("kernel/drivers");
        std::fs::create_dir_all(&deep).unwrap();
        for (file, content) in [
            ("virtio_net.ko", &b"\x7fELF\0license=GPL\0depends=net_failover,virtio\0"[..]),
            ("net_failover.ko", b"\0depends=failover\0"),
            ("failover.ko", b"\0depends=\0"),
            ("virtio.ko", b"\0depends=virtio-ring\0"),
            ("virtio-ring.ko", b"no such section"),
        ] {
            std::fs::write(deep.join(file), content).unwrap();
        }
        let names: Vec<String> = closure(tree.path(), &["virtio", "virtio_net", "builtin"])
            .unwrap()
            .into_iter()
            .map(|module| module.name)
            .collect();
        assert_eq!(names, ["virtio_ring", "virtio", "failover", "net_failover", "virtio_net"]);
    }
}
