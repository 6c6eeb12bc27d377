//! Which cgroup hierarchies there are, where they are mounted, and where in them this process is.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::path::CgroupPath;
use crate::sight;

/// Which version of cgroups is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VersionChoice {
    /// The one that has the CPU and memory controllers.
    #[default]
    Auto,
    /// The v1 hierarchies.
    V1,
    /// The unified hierarchy, even a hybrid one without controllers.
    V2,
}

/// Why the hierarchies could not be found.
#[derive(Debug, thiserror::Error)]
pub enum HierarchyError {
    /// procfs could not be read.
    #[error("cannot read {path} to find the cgroup hierarchies; mount procfs there")]
    Proc {
        /// The file.
        path: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// None is mounted of the version asked for.
    #[error(
        "no cgroup {version} hierarchy is mounted where this process sees it{seen}; mount one (usually on \
         /sys/fs/cgroup), or set cgroup.version or \"driver\": \"none\" in the cgroup section"
    )]
    NotMounted {
        /// Which version.
        version: &'static str,
        /// What was found in its place, and in which namespaces.
        seen: String,
    },
}

/// One hierarchy as this process sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hierarchy {
    /// The second field of `/proc/PID/cgroup`: empty for v2, such as `cpu,cpuacct` or `name=systemd` for v1.
    pub(crate) key: String,
    /// The group that the mount shows on its mount point: `/` but for bind mounts and cgroup namespaces.
    root: CgroupPath,
    point: PathBuf,
    /// Where this process is; `None` when that group is deleted or outside our cgroup namespace.
    pub(crate) own: Option<CgroupPath>,
    /// In which namespaces that is so, see [`sight::elsewhere`].
    seen: String,
}

impl Hierarchy {
    /// Whether this is a v1 hierarchy with this controller.
    pub(crate) fn has(&self, controller: &str) -> bool {
        self.key.split(',').any(|name| name == controller)
    }

    /// Whether it holds no controller of a v1 layout, and only tracks processes for whoever mounted it: a named
    /// one, or beside v1 the unified one. systemd keeps its units in them.
    pub(crate) fn only_tracks(&self) -> bool {
        self.key.is_empty() || self.key.starts_with("name=")
    }

    /// The directory of a group, which need not exist; `None` when the mount does not show that part.
    pub(crate) fn dir(&self, path: &CgroupPath) -> Option<PathBuf> {
        let below = path.below(&self.root)?;
        // Joining nothing would add a slash.
        Some(if below.as_os_str().is_empty() { self.point.clone() } else { self.point.join(below) })
    }

    /// Whether on v2 the root that we see is that of our cgroup namespace alone: the root of all has no type.
    pub(crate) fn is_namespaced(&self) -> bool {
        self.dir(&CgroupPath::root()).is_some_and(|root| root.join("cgroup.type").exists())
    }

    /// The group that memory used in `dir` is charged to on v2: the nearest with the memory controller, from
    /// `dir` itself upwards.
    pub(crate) fn charged(&self, dir: &Path) -> PathBuf {
        let groups = dir.ancestors().take_while(|at| *at != self.point);
        groups.into_iter().find(|at| at.join("memory.current").exists()).unwrap_or(&self.point).to_owned()
    }

    /// For messages: `v2` or `v1 cpu,cpuacct`.
    pub(crate) fn label(&self) -> String {
        if self.key.is_empty() { "v2".to_owned() } else { format!("v1 {}", self.key) }
    }

    /// Where it is mounted and what of it is shown, for messages.
    pub(crate) fn shown(&self) -> String {
        format!("{} shows {} of {}{}", self.point.display(), self.root, self.label(), self.seen)
    }

    /// Whether a path leads into it.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        path.starts_with(&self.point)
    }
}

/// The hierarchies that this process can see.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hierarchies {
    v1: Vec<Hierarchy>,
    v2: Option<Hierarchy>,
    /// Mounts of groups that are all outside our cgroup namespace, and so have no names here.
    out_of_sight: Vec<PathBuf>,
    /// In which namespaces all this is so, see [`sight::elsewhere`].
    seen: String,
}

impl Hierarchies {
    /// Reads `/proc/self/mountinfo` and `/proc/self/cgroup`.
    ///
    /// # Errors
    /// When either file cannot be read. Finding nothing mounted is no error yet.
    pub fn discover() -> Result<Self, HierarchyError> {
        let read = |path| std::fs::read(path).map_err(|source| HierarchyError::Proc { path, source });
        let mounts = read("/proc/self/mountinfo")?;
        // Paths below a cgroup root that are not UTF-8 are nobody's: they become text that matches nothing.
        let own = String::from_utf8_lossy(&read("/proc/self/cgroup")?).into_owned();
        Ok(Self::parse_in(&String::from_utf8_lossy(&mounts), &own, sight::elsewhere()))
    }

    /// From the texts of `/proc/self/mountinfo` and `/proc/self/cgroup` (proc_pid_mountinfo(5), cgroups(7)).
    /// Lines that do not follow the format are passed over.
    #[must_use]
    pub fn parse(mountinfo: &str, own: &str) -> Self {
        Self::parse_in(mountinfo, own, String::new())
    }

    fn parse_in(mountinfo: &str, own: &str, seen: String) -> Self {
        let mounts = visible(mountinfo.lines().filter_map(Mount::parse).collect());
        let outside = |mount: &&Mount| mount.root.starts_with("/..");
        let out_of_sight = mounts.iter().filter(outside).map(|mount| mount.point.clone()).collect();
        let mut all = Self { out_of_sight, seen, ..Self::default() };
        for line in own.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(id), Some(key), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            let own = if path.ends_with(" (deleted)") { None } else { path.parse().ok() };
            let v2 = id == "0" && key.is_empty();
            // Of several mounts take a writable one, then the one that shows most.
            let best = mounts
                .iter()
                .filter(|mount| if v2 { mount.v2 } else { mount.is_of(key) })
                .filter_map(|mount| Some((mount, mount.root.parse::<CgroupPath>().ok()?)))
                .min_by_key(|(mount, root)| (mount.read_only, root.components().count()));
            let Some((mount, root)) = best else { continue };
            let (point, seen) = (mount.point.clone(), all.seen.clone());
            let hierarchy = Hierarchy { key: key.to_owned(), root, point, own, seen };
            if v2 { all.v2 = Some(hierarchy) } else { all.v1.push(hierarchy) }
        }
        all
    }

    /// Where this process was in the hierarchy named by `key` (the second field of `/proc/PID/cgroup`, empty
    /// for v2) when the hierarchies were read.
    #[must_use]
    pub fn own_cgroup(&self, key: &str) -> Option<&CgroupPath> {
        self.v1.iter().chain(&self.v2).find(|h| h.key == key)?.own.as_ref()
    }

    /// The hierarchies to place threads in: one for v2, else every v1 one, and the unified one beside them.
    pub(crate) fn choose(&self, version: VersionChoice) -> Result<Chosen<'_>, HierarchyError> {
        let not_mounted = |version| {
            let outside = self.out_of_sight.iter().map(|point| {
                format!("; what is mounted on {} is outside of its cgroup namespace", point.display())
            });
            HierarchyError::NotMounted {
                version,
                seen: format!("{}{}", self.seen, outside.collect::<String>()),
            }
        };
        let v1_has_controllers = self.v1.iter().any(|h| h.has("cpu") || h.has("memory"));
        let v1_usable = self.v1.iter().any(|h| !h.only_tracks());
        match (version, &self.v2) {
            (VersionChoice::V2, Some(v2)) => Ok(Chosen::V2(v2)),
            (VersionChoice::Auto, Some(v2)) if !v1_has_controllers => Ok(Chosen::V2(v2)),
            (VersionChoice::V1 | VersionChoice::Auto, _) if v1_usable => {
                Ok(Chosen::V1(self.v1.iter().chain(&self.v2).collect()))
            }
            (VersionChoice::V1, _) => Err(not_mounted("v1")),
            (VersionChoice::V2, None) => Err(not_mounted("v2")),
            (VersionChoice::Auto, _) => Err(not_mounted("v1 or v2")),
        }
    }
}

/// See [`Hierarchies::choose`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Chosen<'a> {
    V1(Vec<&'a Hierarchy>),
    V2(&'a Hierarchy),
}

/// A mount of a cgroup file system.
struct Mount {
    root: String,
    point: PathBuf,
    read_only: bool,
    v2: bool,
    options: Vec<String>,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        // ID PARENT DEV ROOT POINT OPTIONS [TAGS...] - TYPE SOURCE SUPER_OPTIONS
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point, flags) = (left.next()?, left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        let options: Vec<String> = options.split(',').map(str::to_owned).collect();
        Some(Self {
            root: String::from_utf8(unescape(root)).ok()?,
            point: OsString::from_vec(unescape(point)).into(),
            read_only: flags.split(',').any(|flag| flag == "ro") || options.iter().any(|o| o == "ro"),
            v2: match kind {
                "cgroup2" => true,
                "cgroup" => false,
                // Kept until `visible` has run: a tmpfs on top hides what is below.
                _ => return Some(Self::other(OsString::from_vec(unescape(point)).into())),
            },
            options,
        })
    }

    fn other(point: PathBuf) -> Self {
        Self { root: String::new(), point, read_only: true, v2: false, options: Vec::new() }
    }

    fn is_of(&self, key: &str) -> bool {
        !self.v2 && key.split(',').all(|name| self.options.iter().any(|option| option == name))
    }
}

/// Drops mounts that a later one on the same point hides.
fn visible(mounts: Vec<Mount>) -> Vec<Mount> {
    let mut seen: Vec<Mount> = Vec::new();
    for mount in mounts {
        seen.retain(|earlier| earlier.point != mount.point);
        seen.push(mount);
    }
    seen
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> Vec<u8> {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let code = bytes.get(at + 1..at + 4).filter(|_| *byte == b'\\');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(code) = code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            out.push(code);
            at += 4;
        } else {
            out.push(*byte);
            at += 1;
        }
    }
    out
}

/// Whether a group looks as if a runtime had made it for this sandbox, so that we may build in it.
pub(crate) fn made_for_us(path: &CgroupPath) -> bool {
    let Some(last) = path.components().next_back() else { return false };
    let login = path.components().any(|part| part.starts_with("user@"))
        || (last.starts_with("session-") && last.ends_with(".scope"));
    !(login || last.ends_with(".service") || last == "init.scope")
}

#[cfg(test)]
mod tests;
