//! What test guests boot: Debian 12's cloud kernel in both forms, and an initramfs of our own.

use super::image::{initramfs, kernel_tree};
use super::progress::Step;
use super::{HostError, bzimage, cache, modules, recipe};
use crate::case::Kernel;
use std::fs;
use std::path::PathBuf;

/// Files that a guest boots from.
pub struct GuestFiles {
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The uncompressed ELF kernel from inside it.
    pub vmlinux: PathBuf,
    /// The initramfs, an uncompressed cpio archive.
    pub initramfs: PathBuf,
}

/// The guest, built when it is not there yet. Every host uses kernel 6.1 as its guest: later ones notice
/// that QEMU's nested XSAVE is wrong.
pub fn guest_files() -> Result<GuestFiles, HostError> {
    let release = recipe::release(Kernel::V6_1);
    let digest = recipe::digest(
        &[
            &[release.suite, release.kernel_suite(), recipe::KERNEL_PACKAGES, recipe::GUEST_INIT],
            &recipe::GUEST_MODULES[..],
        ]
        .concat(),
    );
    let folder = cache::get("guest", &digest, |folder| {
        let tree = kernel_tree(Kernel::V6_1)?;
        let _step = Step::new("making the guest's kernel and initramfs");
        let image = fs::read(&tree.image).map_err(HostError::file("read", &tree.image))?;
        let vmlinux = bzimage::vmlinux(&image)
            .map_err(|error| HostError::Unexpected(format!("{}: {error}", tree.image.display())))?;
        let needed = modules::closure(&tree.modules, &recipe::GUEST_MODULES)?;
        let archive = initramfs(&tree.busybox, recipe::GUEST_INIT, &needed)?;
        for (name, content) in [("bzImage", image), ("vmlinux", vmlinux), ("initramfs", archive)] {
            let path = folder.join(name);
            fs::write(&path, content).map_err(HostError::file("write", path))?;
        }
        Ok(())
    })?;
    Ok(GuestFiles {
        bzimage: folder.join("bzImage"),
        vmlinux: folder.join("vmlinux"),
        initramfs: folder.join("initramfs"),
    })
}
