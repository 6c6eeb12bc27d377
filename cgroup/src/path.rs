//! Names and paths of cgroups that cannot lead anywhere but where they say.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest path below a hierarchy's root: PATH_MAX with room for the mount point and a file's name.
const MAX_PATH: usize = 3072;
/// NAME_MAX of kernfs.
const MAX_NAME: usize = 255;

/// What the kernel's own files in a cgroup directory begin with (v1 and v2). A group of such a name could
/// shadow or collide with one, so `mkdir` would fail or mislead.
const KERNEL_PREFIXES: [&str; 18] = [
    "blkio.",
    "cgroup.",
    "cpu.",
    "cpuacct.",
    "cpuset.",
    "debug.",
    "devices.",
    "dmem.",
    "freezer.",
    "hugetlb.",
    "io.",
    "irq.",
    "memory.",
    "misc.",
    "net_cls.",
    "net_prio.",
    "perf_event.",
    "pids.",
];
/// Kernel files without a prefix: all of v1.
const KERNEL_FILES: [&str; 3] = ["tasks", "notify_on_release", "release_agent"];

/// Why a text is not a [`GroupName`] or [`CgroupPath`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The path is relative; the systemd driver's form is the likeliest reason.
    #[error(
        "cgroup path `{0}` does not start with `/`: give the path below the hierarchy's root, such as \
         /kubepods/pod1 (the form slice:prefix:name belongs to the systemd driver)"
    )]
    NotAbsolute(String),
    /// A component is empty, `.` or `..`.
    #[error("cgroup path `{0}` holds an empty component, `.` or `..`: write it without")]
    Component(String),
    /// The name holds a slash or a control character, or is empty, `.` or `..`.
    #[error("`{0}` cannot name a cgroup: use one path component without control characters")]
    Name(String),
    /// The name could collide with one of the kernel's files.
    #[error("`{0}` cannot name a cgroup: it could collide with the kernel's own files; choose another name")]
    Reserved(String),
    /// Longer than the kernel or we allow.
    #[error("cgroup path or name of {0} bytes is too long: at most {MAX_NAME} for a name, {MAX_PATH} in all")]
    TooLong(usize),
}

/// The name of one cgroup: a single path component that the kernel accepts and that no file of the
/// kernel's can have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupName(String);

impl GroupName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for GroupName {
    type Error = PathError;

    fn try_from(name: String) -> Result<Self, PathError> {
        component(&name).map_err(|bad| match bad {
            BadComponent::Form => PathError::Name(name.escape_debug().to_string()),
            BadComponent::Length => PathError::TooLong(name.len()),
        })?;
        if KERNEL_FILES.contains(&name.as_str()) || KERNEL_PREFIXES.iter().any(|p| name.starts_with(p)) {
            return Err(PathError::Reserved(name));
        }
        Ok(Self(name))
    }
}

/// The absolute path of a cgroup inside its hierarchy, as in `/proc/PID/cgroup`: `/kubepods/pod1`. It has no
/// empty, `.` or `..` component, so joining it to a mount point stays below that mount point.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CgroupPath(String);

impl CgroupPath {
    /// The root of the hierarchy, `/`.
    #[must_use]
    pub fn root() -> Self {
        Self("/".to_owned())
    }

    /// Whether this is the hierarchy's root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.0 == "/"
    }

    /// The path of the group `name` in this group.
    #[must_use]
    pub fn join(&self, name: &GroupName) -> Self {
        if self.is_root() { Self(format!("/{}", name.0)) } else { Self(format!("{}/{}", self.0, name.0)) }
    }

    /// The group that holds this one; `None` for the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let (parent, _) = self.0.rsplit_once('/').filter(|_| !self.is_root())?;
        Some(if parent.is_empty() { Self::root() } else { Self(parent.to_owned()) })
    }

    /// The components from the root on; none for the root.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/').filter(|part| !part.is_empty())
    }

    /// The path as text, with the leading slash.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part of this path below `ancestor`, relative and possibly empty; `None` when it is not below.
    #[must_use]
    pub(crate) fn below(&self, ancestor: &Self) -> Option<&Path> {
        Path::new(&self.0).strip_prefix(&ancestor.0).ok()
    }
}

impl FromStr for CgroupPath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        let Some(rest) = text.strip_prefix('/') else {
            return Err(PathError::NotAbsolute(text.escape_debug().to_string()));
        };
        if text.len() > MAX_PATH {
            return Err(PathError::TooLong(text.len()));
        }
        if !rest.is_empty() {
            for part in rest.split('/') {
                component(part).map_err(|bad| match bad {
                    BadComponent::Form => PathError::Component(text.escape_debug().to_string()),
                    BadComponent::Length => PathError::TooLong(part.len()),
                })?;
            }
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for CgroupPath {
    type Error = PathError;

    fn try_from(text: String) -> Result<Self, PathError> {
        text.parse()
    }
}

impl FromStr for GroupName {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        text.to_owned().try_into()
    }
}

impl From<CgroupPath> for String {
    fn from(path: CgroupPath) -> Self {
        path.0
    }
}

impl From<GroupName> for String {
    fn from(name: GroupName) -> Self {
        name.0
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

enum BadComponent {
    Form,
    Length,
}

fn component(part: &str) -> Result<(), BadComponent> {
    let odd = part.is_empty() || part == "." || part == "..";
    if odd || part.contains('/') || part.chars().any(char::is_control) {
        Err(BadComponent::Form)
    } else if part.len() > MAX_NAME {
        Err(BadComponent::Length)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
        for bad in ["", ".", "..", "a/b", "/", "a\nb", "a\0b", "a\tb"] {
            assert!(matches!(bad.parse::<GroupName>(), Err(PathError::Name(_))), "{bad:?}");
        }
        for bad in ["cgroup.procs", "memory.max", "cpu.", "tasks", "notify_on_release"] {
            assert!(matches!(bad.parse::<GroupName>(), Err(PathError::Reserved(_))), "{bad:?}");
        }
        assert!(matches!("x".repeat(256).parse::<GroupName>(), Err(PathError::TooLong(256))));
        for good in ["kata-sandbox", "cri-containerd:ID", "pod1.slice", "cpu", "..x", "ä"] {
            assert_eq!(good.parse::<GroupName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn paths_are_absolute_and_plain() {
        for bad in ["", "kubepods", "kubepods-pod1.slice:cri-containerd:ID"] {
            assert!(matches!(bad.parse::<CgroupPath>(), Err(PathError::NotAbsolute(_))), "{bad:?}");
        }
        for bad in ["//", "/a//b", "/a/", "/..", "/a/../b", "/./a", "/a\n"] {
            assert!(matches!(bad.parse::<CgroupPath>(), Err(PathError::Component(_))), "{bad:?}");
        }
        assert!(matches!("/a".repeat(2000).parse::<CgroupPath>(), Err(PathError::TooLong(_))));
        let path: CgroupPath = serde_json::from_str("\"/kubepods/pod1\"").unwrap();
        assert_eq!(path.components().collect::<Vec<_>>(), ["kubepods", "pod1"]);
        assert!(serde_json::from_str::<CgroupPath>("\"kubepods\"").is_err());
    }

    #[test]
    fn joining_and_parents_are_inverse() {
        let name: GroupName = "b".parse().unwrap();
        let root = CgroupPath::root();
        assert_eq!(root.join(&name).as_str(), "/b");
        assert_eq!(root.join(&name).join(&name).as_str(), "/b/b");
        assert_eq!(root.join(&name).join(&name).parent(), Some(root.join(&name)));
        assert_eq!(root.join(&name).parent(), Some(root.clone()));
        assert_eq!(root.parent(), None);
        assert_eq!(root.join(&name).below(&root), Some(Path::new("b")));
        assert_eq!(root.below(&root), Some(Path::new("")));
        assert_eq!(root.below(&root.join(&name)), None);
    }
}
