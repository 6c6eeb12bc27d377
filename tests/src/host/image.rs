//! Building the host: its kernel, its initrd and its root disk.

use super::command::{as_root, run};
use super::cpio::Archive;
use super::progress::Step;
use super::recipe::{self, Release};
use super::{HostError, cache, modules, packages};
use crate::case::Kernel;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a host boots from.
pub struct HostImage {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initrd that finds the root disk.
    pub initrd: PathBuf,
    /// The raw ext4 root disk; to be used as a snapshot only.
    pub disk: PathBuf,
}

/// The bench's host, and what its guests boot beside a kernel.
pub struct BenchImage {
    /// The host.
    pub host: HostImage,
    /// An initramfs of busybox alone, for guests whose start is measured.
    pub small_initramfs: PathBuf,
    /// One with modules and tools, for guests that work.
    pub tools_initramfs: PathBuf,
}

/// A kernel package's contents.
pub struct KernelTree {
    /// The bzImage.
    pub image: PathBuf,
    /// `lib/modules/<release>`.
    pub modules: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
}

/// The host with `kernel`, built when it is not there yet.
pub fn host_image(kernel: Kernel) -> Result<HostImage, HostError> {
    let release = recipe::release(kernel);
    let digest = recipe::digest(
        &[
            &[
                release.suite,
                release.kernel_suite(),
                recipe::HOST_PACKAGES,
                release.more_packages,
                recipe::KERNEL_PACKAGES,
            ][..],
            &[recipe::HOST_INITRD_INIT, recipe::AGENT_UNIT, recipe::START_JOB],
            &recipe::MASKED_UNITS[..],
            &recipe::LEFT_OUT[..],
            &recipe::HOST_INITRD_MODULES[..],
        ]
        .concat(),
    );
    let folder = cache::get(&format!("host-{}", release.name), &digest, |folder| {
        build(kernel, release, recipe::HOST_PACKAGES, 1 << 30, folder, |_, _| Ok(()))
    })?;
    Ok(HostImage::below(&folder))
}

/// The bench's host, built when it is not there yet: that of kernel 6.1 with what measures and is compared.
pub fn bench_image() -> Result<BenchImage, HostError> {
    let release = recipe::release(Kernel::V6_1);
    let packages = format!("{},{}", recipe::HOST_PACKAGES, recipe::BENCH_PACKAGES);
    let digest = recipe::digest(
        &[
            &[release.suite, release.kernel_suite(), &packages, recipe::KERNEL_PACKAGES][..],
            &[recipe::HOST_INITRD_INIT, recipe::AGENT_UNIT, recipe::START_JOB, recipe::BENCH_INIT],
            &recipe::MASKED_UNITS[..],
            &recipe::LEFT_OUT[..],
            &recipe::HOST_INITRD_MODULES[..],
            &recipe::BENCH_GUEST_MODULES[..],
            &recipe::BENCH_TOOLS[..],
        ]
        .concat(),
    );
    let folder = cache::get("bench", &digest, |folder| {
        build(Kernel::V6_1, release, &packages, 2 << 30, folder, |rootfs, tree| {
            let small = initramfs(&tree.busybox, recipe::BENCH_INIT, &[])?;
            let modules = modules::closure(&tree.modules, &recipe::BENCH_GUEST_MODULES)?;
            let working = initramfs(&tree.busybox, recipe::BENCH_INIT, &modules)?;
            // The kernel unpacks archives one after another.
            let working = [working, tools(rootfs)?].concat();
            for (name, content) in [("small", small), ("tools", working)] {
                let path = folder.join(name);
                fs::write(&path, content).map_err(HostError::file("write", path))?;
            }
            Ok(())
        })
    })?;
    Ok(BenchImage {
        host: HostImage::below(&folder),
        small_initramfs: folder.join("small"),
        tools_initramfs: folder.join("tools"),
    })
}

impl HostImage {
    /// The image that [`build`] made in `folder`.
    fn below(folder: &Path) -> Self {
        Self { kernel: folder.join("vmlinuz"), initrd: folder.join("initrd"), disk: folder.join("root.ext4") }
    }
}

/// The bench's tools from `rootfs` with their libraries, as a cpio archive.
fn tools(rootfs: &Path) -> Result<Vec<u8>, HostError> {
    let mut files = BTreeSet::new();
    for tool in recipe::BENCH_TOOLS {
        files.insert(tool.to_owned());
        // Lines of `name => /path (address)`, or `/path (address)` for the loader.
        let lines = run("finding a tool's libraries", as_root("chroot").arg(rootfs).args(["ldd", tool]))?;
        files.extend(lines.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    let mut archive = Archive::default();
    let mut folders = BTreeSet::new();
    for file in files {
        let name = file.trim_start_matches('/');
        let above: Vec<_> = Path::new(name).ancestors().skip(1).collect();
        for folder in above.into_iter().rev().filter_map(Path::to_str).filter(|folder| !folder.is_empty()) {
            if folders.insert(folder.to_owned()) {
                archive.directory(folder);
            }
        }
        let path = rootfs.join(name);
        archive.file(name, 0o755, &fs::read(&path).map_err(HostError::file("read", path))?);
    }
    Ok(archive.finish())
}

/// The kernel package of `kernel`'s release, fetched when it is not there yet.
pub fn kernel_tree(kernel: Kernel) -> Result<KernelTree, HostError> {
    let release = recipe::release(kernel);
    let digest = recipe::digest(&[release.suite, release.kernel_suite(), recipe::KERNEL_PACKAGES]);
    let folder = cache::get(&format!("kernel-{}", release.name), &digest, |folder| {
        packages::ensure()?;
        let _step = Step::new(format!("fetching the cloud kernel of {}", release.kernel_suite()));
        let tree = folder.join("tree");
        debootstrap(release, &tree, &folder.join("apt.conf"), |command| {
            command.arg("--variant=extract").arg(format!("--include={}", recipe::KERNEL_PACKAGES));
            if let Some(suite) = release.kernel_from {
                command.arg(format!("--aptopt=APT::Default-Release \"{suite}\""));
            }
        })?;
        // What merged /usr and separate folders share is sorted out here, once.
        let modules = newest_folder(&[tree.join("usr/lib/modules"), tree.join("lib/modules")])?;
        let release_name = file_name(&modules)?;
        let image = [modules.join("vmlinuz"), tree.join("boot").join(format!("vmlinuz-{release_name}"))]
            .into_iter()
            .find(|path| path.exists())
            .ok_or_else(|| HostError::Unexpected("the kernel package holds no vmlinuz".to_owned()))?;
        let busybox = [tree.join("usr/bin/busybox"), tree.join("bin/busybox")]
            .into_iter()
            .find(|path| path.exists())
            .ok_or_else(|| HostError::Unexpected("the package busybox-static holds no busybox".to_owned()))?;
        let keep = folder.join("modules");
        fs::create_dir(&keep).map_err(HostError::file("create", &keep))?;
        for (from, to) in [(&image, folder.join("vmlinuz")), (&busybox, folder.join("busybox"))] {
            fs::copy(from, &to).map_err(HostError::file("copy", from))?;
        }
        run("keeping the kernel's modules", as_root("mv").arg(&modules).arg(&keep))?;
        cache::remove(&tree)
    })?;
    Ok(KernelTree {
        image: folder.join("vmlinuz"),
        modules: newest_folder(&[folder.join("modules")])?,
        busybox: folder.join("busybox"),
    })
}

/// Makes a host of `packages` with a disk of `size` bytes in `folder`. `more` sees the finished root file system.
fn build(
    kernel: Kernel,
    release: &Release,
    packages: &str,
    size: u64,
    folder: &Path,
    more: impl FnOnce(&Path, &KernelTree) -> Result<(), HostError>,
) -> Result<(), HostError> {
    let tree = kernel_tree(kernel)?;
    packages::ensure()?;
    let rootfs = folder.join("rootfs");
    {
        let _step = Step::new(format!("building the root file system of {}", release.name));
        debootstrap(release, &rootfs, &folder.join("apt.conf"), |command| {
            let packages = format!("--include={packages}{}", release.more_packages);
            command.arg("--variant=essential").arg(packages);
            for pattern in recipe::LEFT_OUT {
                command.arg(format!("--dpkgopt=path-exclude={pattern}"));
            }
        })?;
    }
    let _step = Step::new(format!("making the disk of {}", release.name));
    equip(&rootfs, &tree)?;
    let disk = folder.join("root.ext4");
    fs::File::create(&disk).and_then(|file| file.set_len(size)).map_err(HostError::file("create", &disk))?;
    run(
        "making the host's disk",
        as_root("/sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d"])
            .arg(&rootfs)
            .arg(&disk),
    )?;
    more(&rootfs, &tree)?;
    cache::remove(&rootfs)?;
    fs::copy(&tree.image, folder.join("vmlinuz")).map_err(HostError::file("copy", &tree.image))?;
    let initrd = folder.join("initrd");
    let needed = modules::closure(&tree.modules, &recipe::HOST_INITRD_MODULES)?;
    fs::write(&initrd, initramfs(&tree.busybox, recipe::HOST_INITRD_INIT, &needed)?)
        .map_err(HostError::file("write", &initrd))
}

/// Puts modules, agent unit and settings into the root file system.
fn equip(rootfs: &Path, tree: &KernelTree) -> Result<(), HostError> {
    let modules = rootfs.join("usr/lib/modules");
    // On Debian 12 `/lib` is a link to `usr/lib`, made by the package usrmerge or usr-is-merged.
    run("copying kernel modules", as_root("mkdir").arg("-p").arg(&modules))?;
    run("copying kernel modules", as_root("cp").arg("-a").arg(&tree.modules).arg(&modules))?;
    modules::depmod(rootfs, &file_name(&tree.modules)?)?;
    install(rootfs, "etc/systemd/system/pinfold-agent.service", 0o644, recipe::AGENT_UNIT)?;
    install(rootfs, "usr/lib/pinfold/start-job", 0o755, recipe::START_JOB)?;
    install(rootfs, "etc/hostname", 0o644, "pinfold-host\n")?;
    install(rootfs, "etc/fstab", 0o644, "/dev/vda / ext4 defaults 0 0\n")?;
    // A set machine-id keeps systemd from its first-boot work.
    install(rootfs, "etc/machine-id", 0o444, "70696e666f6c6470696e666f6c640001\n")?;
    link(
        rootfs,
        "etc/systemd/system/multi-user.target.wants/pinfold-agent.service",
        "../pinfold-agent.service",
    )?;
    link(rootfs, "etc/systemd/system/default.target", "/lib/systemd/system/multi-user.target")?;
    for unit in recipe::MASKED_UNITS {
        link(rootfs, &format!("etc/systemd/system/{unit}"), "/dev/null")?;
    }
    Ok(())
}

/// An initramfs of busybox, `init`, and modules with the order to load them in `/modules/order`.
pub fn initramfs(busybox: &Path, init: &str, modules: &[modules::Module]) -> Result<Vec<u8>, HostError> {
    let busybox = fs::read(busybox).map_err(HostError::file("read", busybox))?;
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "modules"] {
        archive.directory(folder);
    }
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    archive.file("bin/busybox", 0o755, &busybox);
    archive.file("init", 0o755, init.as_bytes());
    let mut order = String::new();
    for module in modules {
        let file = format!("{}.ko", module.name);
        archive.file(&format!("modules/{file}"), 0o644, &module.object);
        order.push_str(&file);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

/// Runs mmdebstrap for `release` into `target`, with what `more` adds.
fn debootstrap(
    release: &Release,
    target: &Path,
    apt_conf: &Path,
    more: impl FnOnce(&mut Command),
) -> Result<(), HostError> {
    let mirror = packages::mirror()?;
    fs::write(apt_conf, packages::transport_settings()?).map_err(HostError::file("write", apt_conf))?;
    let signed = format!("[signed-by={}]", packages::KEYRING);
    let mut command = as_root("mmdebstrap");
    command
        .args(["--quiet", "--mode=root", "--aptopt=Apt::Install-Recommends \"false\""])
        .arg(format!("--aptopt={}", apt_conf.display()));
    more(&mut command);
    command.arg(release.suite).arg(target);
    for suite in std::iter::once(&release.suite).chain(release.more) {
        command.arg(format!("deb {signed} {} {suite} main", mirror.main));
    }
    if let Some(security) = mirror.security {
        command.arg(format!("deb {signed} {security} {} main", release.security));
    }
    run("building a Debian tree", &mut command).map(drop)
}

fn install(rootfs: &Path, file: &str, mode: u32, content: &str) -> Result<(), HostError> {
    let path = rootfs.join(file);
    let mut source = tempfile::NamedTempFile::new().map_err(HostError::file("create", "a temporary file"))?;
    source.write_all(content.as_bytes()).map_err(HostError::file("write", source.path()))?;
    run(
        "installing a file",
        as_root("install").args(["-D", "-m", &format!("{mode:o}")]).arg(source.path()).arg(path),
    )
    .map(drop)
}

fn link(rootfs: &Path, name: &str, to: &str) -> Result<(), HostError> {
    let path = rootfs.join(name);
    if let Some(folder) = path.parent() {
        run("installing a link", as_root("mkdir").arg("-p").arg(folder))?;
    }
    run("installing a link", as_root("ln").arg("-sfn").arg(to).arg(&path)).map(drop)
}

/// The last, by name, of the folders directly below the first of `places` that exists.
fn newest_folder(places: &[PathBuf]) -> Result<PathBuf, HostError> {
    places
        .iter()
        .filter_map(|place| fs::read_dir(place).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .filter(|path| path.is_dir())
        .max()
        .ok_or_else(|| HostError::Unexpected(format!("no kernel modules below {places:?}")))
}

fn file_name(path: &Path) -> Result<String, HostError> {
    path.file_name()
        .and_then(|name| name.to_str())
        .map(str::to_owned)
        .ok_or_else(|| HostError::Unexpected(format!("{} has no usable name", path.display())))
}
