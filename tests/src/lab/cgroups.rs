//! Cgroups around the VM under test, as kubelet and systemd would make them.

use super::{PATIENCE, read, write};
use crate::case::{CgroupVersion, Failure};
use crate::check;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The controllers that kubelet hands down.
const CONTROLLERS: &str = "+cpu +cpuset +io +memory +pids";

/// A cgroup that exists, in the unified hierarchy or by the same path in each v1 hierarchy.
#[derive(Debug, Clone)]
pub struct Group {
    path: String,
}

/// A pod's cgroup, removed with all below it on drop.
#[derive(Debug)]
pub struct Pod(Made);

/// A cgroup made for a case. What was not there before is removed on drop.
#[derive(Debug)]
pub struct Made {
    group: Group,
    created: Vec<PathBuf>,
}

/// Makes the cgroup that the container runtime's daemon runs in.
pub fn caller() -> Result<Made, Failure> {
    Group::create("/system.slice/containerd.service")
}

impl Pod {
    /// Makes `/kubepods/pod<uid>` whose children have all controllers.
    pub fn create(uid: &str) -> Result<Self, Failure> {
        let pod = Self(Group::create(&format!("/kubepods/pod{uid}"))?);
        if version()? == CgroupVersion::V2 {
            write(&pod.dir("")?.join("cgroup.subtree_control"), CONTROLLERS)?;
        }
        Ok(pod)
    }
}

impl Deref for Pod {
    type Target = Group;

    fn deref(&self) -> &Group {
        &self.0
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(failure) = self.remove() {
            eprintln!("lab: {failure}");
        }
    }
}

impl Deref for Made {
    type Target = Group;

    fn deref(&self) -> &Group {
        &self.group
    }
}

/// A systemd unit with one idle process, which stands for a launcher that systemd looks after. Stopped on drop.
#[derive(Debug)]
pub struct Unit {
    name: String,
    group: Group,
}

impl Unit {
    /// Starts `<name>.service`.
    pub fn start(name: &str) -> Result<Self, Failure> {
        succeed(Command::new("systemd-run").args(["--quiet", "--unit", name, "sleep", "infinity"]))?;
        Ok(Self { name: name.to_owned(), group: Group::at(&format!("/system.slice/{name}.service")) })
    }

    /// Sets a property, for which systemd may change the controllers that the unit uses.
    pub fn set(&self, property: &str) -> Result<(), Failure> {
        succeed(Command::new("systemctl").args(["set-property", "--runtime", &self.name, property]))
    }

    /// Stops it, for which systemd kills all that it finds in the unit's group.
    pub fn stop(&self) -> Result<(), Failure> {
        succeed(Command::new("systemctl").args(["stop", &self.name]))
    }
}

impl Deref for Unit {
    type Target = Group;

    fn deref(&self) -> &Group {
        &self.group
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // It may have been stopped already.
        drop(self.stop());
    }
}

fn succeed(command: &mut Command) -> Result<(), Failure> {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(Failure(format!("{command:?} ended with {status}"))) }
}

impl Drop for Made {
    fn drop(&mut self) {
        for folder in self.created.iter().rev() {
            // Someone else may have moved in, or a pod may have removed it already.
            drop(fs::remove_dir(folder));
        }
    }
}

impl Group {
    /// Makes the cgroup `path` (`/a/b`) and its ancestors, with all controllers from the root down.
    pub fn create(path: &str) -> Result<Made, Failure> {
        let mut made = Made { group: Self::at(path), created: Vec::new() };
        for root in roots()? {
            let mut folder = root.mount.clone();
            for name in path.split('/').filter(|name| !name.is_empty()) {
                if root.unified {
                    write(&folder.join("cgroup.subtree_control"), CONTROLLERS)?;
                }
                let parent = folder.clone();
                folder.push(name);
                match fs::create_dir(&folder) {
                    Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                        return Err(Failure(format!("cannot create {}: {error}", folder.display())));
                    }
                    Err(_) => {}
                    Ok(()) => made.created.push(folder.clone()),
                }
                if root.has("cpuset") {
                    // A v1 cpuset is born empty and admits nobody.
                    for file in ["cpuset.cpus", "cpuset.mems"] {
                        if read(&folder.join(file))?.trim().is_empty() {
                            write(&folder.join(file), read(&parent.join(file))?.trim())?;
                        }
                    }
                }
            }
        }
        Ok(made)
    }

    /// Names the cgroup `path`, which need not exist.
    pub fn at(path: &str) -> Self {
        Self { path: path.to_owned() }
    }

    /// The path below the roots of the hierarchies.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The group named `name` below this one, which need not exist.
    pub fn child(&self, name: &str) -> Self {
        Self::at(&format!("{}/{name}", self.path))
    }

    /// The group's folder in the hierarchy of `controller` (any name will do on v2).
    pub fn dir(&self, controller: &str) -> Result<PathBuf, Failure> {
        let root = roots()?
            .into_iter()
            .find(|root| root.unified || root.has(controller))
            .ok_or_else(|| Failure(format!("no cgroup hierarchy has {controller}")))?;
        Ok(root.mount.join(self.path.trim_start_matches('/')))
    }

    /// Whether the group exists, in any hierarchy.
    pub fn exists(&self) -> Result<bool, Failure> {
        Ok(roots()?.iter().any(|root| root.mount.join(self.path.trim_start_matches('/')).exists()))
    }

    /// Waits until the group is gone from all hierarchies: systemd removes its own some time after the last process.
    pub fn wait_gone(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        while self.exists()? {
            check!(Instant::now() < deadline, "{} is still there", self.path());
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("{} is gone", self.path());
        Ok(())
    }

    /// Fails, naming what came before, if there is a group below this one in any hierarchy.
    pub fn expect_empty(&self, after: &str) -> Result<(), Failure> {
        let left = self.children()?;
        check!(left.is_empty(), "after {after} {left:?} is left below {}", self.path());
        println!("after {after} nothing is left");
        Ok(())
    }

    /// The names of the groups right below this one, in any hierarchy.
    pub fn children(&self) -> Result<BTreeSet<String>, Failure> {
        let mut names = BTreeSet::new();
        for root in roots()? {
            for entry in fs::read_dir(root.mount.join(self.path.trim_start_matches('/')))? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    names.insert(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        Ok(names)
    }

    /// A file of the group, such as `cpu.max`; its controller is the part before the dot.
    pub fn read(&self, file: &str) -> Result<String, Failure> {
        let controller = file.split('.').next().unwrap_or_default();
        Ok(read(&self.dir(controller)?.join(file))?.trim().to_owned())
    }

    /// Writes a file of the group.
    pub fn write(&self, file: &str, text: &str) -> Result<(), Failure> {
        let controller = file.split('.').next().unwrap_or_default();
        write(&self.dir(controller)?.join(file), text)
    }

    /// The group's `cgroup.procs` in every hierarchy that has the group, opened for writing. Writing `0` moves
    /// the writer.
    pub fn doors(&self) -> Result<Vec<File>, Failure> {
        roots()?
            .into_iter()
            .map(|root| root.mount.join(self.path.trim_start_matches('/')).join("cgroup.procs"))
            .filter(|file| file.exists())
            .map(|file| {
                File::options()
                    .write(true)
                    .open(&file)
                    .map_err(|error| Failure(format!("cannot open {}: {error}", file.display())))
            })
            .collect()
    }

    /// Moves the process `pid` here, in every hierarchy.
    pub fn adopt(&self, pid: u32) -> Result<(), Failure> {
        for root in roots()? {
            let file = root.mount.join(self.path.trim_start_matches('/')).join("cgroup.procs");
            write(&file, &pid.to_string())?;
        }
        Ok(())
    }

    /// The CPU time that the group has used, in microseconds.
    pub fn cpu_usec(&self) -> Result<u64, Failure> {
        match version()? {
            CgroupVersion::V2 => field(&self.read("cpu.stat")?, "usage_usec"),
            CgroupVersion::V1 => Ok(self.read("cpuacct.usage")?.parse::<u64>()? / 1000),
        }
    }

    /// The anonymous memory charged to the group, in bytes. Kernels gather this figure lazily, every two
    /// seconds; this waits until it stands still.
    pub fn anon_bytes(&self) -> Result<u64, Failure> {
        let name = match version()? {
            CgroupVersion::V2 => "anon",
            CgroupVersion::V1 => "total_rss",
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut last = field(&self.read("memory.stat")?, name)?;
        loop {
            std::thread::sleep(Duration::from_millis(2500));
            let now = field(&self.read("memory.stat")?, name)?;
            if now == last || Instant::now() > deadline {
                return Ok(now);
            }
            last = now;
        }
    }

    /// Removes the group and all groups below it, waiting a moment for threads that are just ending.
    pub fn remove(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + Duration::from_secs(5);
        for root in roots()? {
            let folder = root.mount.join(self.path.trim_start_matches('/'));
            while let Err(error) = remove_tree(&folder) {
                if Instant::now() > deadline {
                    return Err(Failure(format!("cannot remove {}: {error}", folder.display())));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }
}

/// The cgroup version with the controllers.
pub(super) fn version() -> Result<CgroupVersion, Failure> {
    Ok(if roots()?.iter().any(|root| root.unified) { CgroupVersion::V2 } else { CgroupVersion::V1 })
}

/// A mounted hierarchy with controllers.
pub(super) struct Root {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Whether it is the unified one.
    pub unified: bool,
    /// On v1, its controllers, or its name: `name=systemd`.
    pub controllers: Vec<String>,
}

impl Root {
    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

/// The hierarchies to work in: the unified one when it has the controllers, else the v1 ones.
pub(super) fn roots() -> Result<Vec<Root>, Failure> {
    Ok(parse_mounts(&read(Path::new("/proc/self/mounts"))?, |mount| {
        fs::read_to_string(mount.join("cgroup.controllers")).is_ok_and(|list| list.contains("memory"))
    }))
}

fn parse_mounts(mounts: &str, has_controllers: impl Fn(&Path) -> bool) -> Vec<Root> {
    // Mount options of v1 that name no controller.
    const OPTIONS: [&str; 9] =
        ["rw", "ro", "nosuid", "nodev", "noexec", "relatime", "noprefix", "xattr", "clone_children"];
    let mut v1 = Vec::new();
    for line in mounts.lines() {
        let [_, mount, kind, options, ..] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
        let mount = PathBuf::from(mount);
        if kind == "cgroup2" && has_controllers(&mount) {
            return vec![Root { mount, unified: true, controllers: Vec::new() }];
        }
        if kind != "cgroup" {
            continue;
        }
        let controllers =
            options.split(',').filter(|name| !OPTIONS.contains(name)).map(str::to_owned).collect();
        v1.push(Root { mount, unified: false, controllers });
    }
    v1
}

fn remove_tree(folder: &Path) -> std::io::Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

/// The number after `name` in a file of lines `name number`.
fn field(text: &str, name: &str) -> Result<u64, Failure> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .ok_or_else(|| Failure(format!("no field {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchies_with_controllers_are_found() {
        let hybrid = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                      cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0\n\
                      cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n";
        let roots = parse_mounts(hybrid, |_| false);
        assert_eq!(roots.len(), 2);
        assert_eq!(roots[0].controllers, ["name=systemd"]);
        assert_eq!(roots[1].controllers, ["cpu", "cpuacct"]);
        assert!(parse_mounts(hybrid, |_| true)[0].unified);
    }

    #[test]
    fn fields_are_whole_words() {
        assert_eq!(field("anon_thp 4\nanon 8\n", "anon").unwrap(), 8);
        assert!(field("anon_thp 4\n", "anon").is_err());
    }
}
