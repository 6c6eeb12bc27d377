//! The group to build in, as it is named from outside.

use crate::path::{CgroupPath, PathError};
use crate::scope::is_scope_form;

/// Where relative paths of OCI specifications start.
const HOME: &str = "/pinfold";

/// The group to build in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parent {
    /// It must exist.
    Existing(CgroupPath),
    /// What is missing of it is made, and removed at the end if nobody else is in it.
    Made(CgroupPath),
    /// systemd's scope, which this process was moved to. What systemd does not make, such as the groups of v1's
    /// cpuset, is made; and what it makes it removes.
    Scope(CgroupPath),
}

impl Parent {
    /// From an OCI specification's `linux.cgroupsPath` in the cgroupfs driver's form. It names the container's own
    /// group, which runtimes make. As there, empty components and `.` count for nothing. A relative path is one
    /// below `/pinfold`: where it starts is the runtime's choice (config-linux.md, "Cgroups Path").
    ///
    /// # Errors
    /// When the path holds `..` or what no path may hold, or has the systemd driver's form.
    pub fn of_cgroups_path(text: &str) -> Result<Self, PathError> {
        if is_scope_form(text) {
            return Err(PathError::NotAbsolute(text.escape_debug().to_string()));
        }
        let plain: Vec<&str> = text.split('/').filter(|part| !["", "."].contains(part)).collect();
        let home = if text.starts_with('/') { "" } else { HOME };
        format!("{home}/{}", plain.join("/")).parse().map(Self::Made)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &CgroupPath {
        match self {
            Self::Existing(path) | Self::Made(path) | Self::Scope(path) => path,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_specifications_are_those_of_other_runtimes() {
        for (text, path) in [
            ("/kubepods/burstable/pod1/4f", "/kubepods/burstable/pod1/4f"),
            ("/kubepods/pod1/crio-4f", "/kubepods/pod1/crio-4f"),
            ("/docker/4f", "/docker/4f"),
            ("//docker/./4f/", "/docker/4f"),
            ("/a:b:c", "/a:b:c"),
            ("a/b", "/pinfold/a/b"),
            ("/", "/"),
        ] {
            assert_eq!(Parent::of_cgroups_path(text), Ok(Parent::Made(path.parse().unwrap())), "{text}");
        }
        for bad in ["/a/../b", "..", "/a\nb", "system.slice:docker:4f", "::"] {
            assert!(Parent::of_cgroups_path(bad).is_err(), "{bad}");
        }
    }
}
