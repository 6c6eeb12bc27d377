//! Where paths are looked up, for messages: who is told of a file that is not there is to know where it is missing.

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind};
use std::sync::{PoisonError, RwLock};

use serde::{Deserialize, Serialize};

/// A root that is not the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// Where it is, as seen from outside, as far as that is known.
    pub path: String,
    /// The mount namespace, such as `mnt:[4026531841]`.
    pub namespace: String,
    /// In a jail, what is said of the groups' files: they were looked up before.
    pub groups: Option<String>,
}

static ROOT: RwLock<Option<Root>> = RwLock::new(None);

/// Notes in which root paths are looked up from now on; `None` is the host's.
pub fn set_root(root: Option<Root>) {
    *ROOT.write().unwrap_or_else(PoisonError::into_inner) = root;
}

/// Notes whether somebody else has given this process another root, or another mount namespace, than process 1 has. To be
/// called before there are seccomp filters.
pub fn discover() {
    let link = |path: &str| fs::read_link(path).ok().map(|link| link.to_string_lossy().into_owned());
    let path = link("/proc/self/root").unwrap_or_else(|| "/".to_owned());
    let namespace = link("/proc/self/ns/mnt").unwrap_or_else(|| "unknown".to_owned());
    // Only root may ask for that of process 1.
    let elsewhere = link("/proc/1/ns/mnt").is_some_and(|hosts| hosts != namespace);
    set_root((path != "/" || elsewhere).then_some(Root { path, namespace, groups: None }));
}

/// Where paths are looked up, for the end of a message; nothing on the host.
pub fn place() -> String {
    match &*ROOT.read().unwrap_or_else(PoisonError::into_inner) {
        Some(Root { path, namespace, .. }) => {
            format!(" (looked up in the root {path} of the mount namespace {namespace})")
        }
        None => String::new(),
    }
}

/// The same of the groups' files.
fn place_of_groups() -> String {
    let jail =
        ROOT.read().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(|root| root.groups.clone());
    jail.unwrap_or_else(place)
}

/// [`place`], if `error` is about something that was looked up.
pub fn place_of(error: &dyn Error) -> String {
    use ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem};
    let mut cause = error.source();
    let mut of_groups = false;
    while let Some(error) = cause {
        of_groups |= error.is::<cgroup::FileError>();
        let kind = match error.downcast_ref::<kvm_ioctls::Error>() {
            Some(error) => Some(io::Error::from_raw_os_error(error.errno()).kind()),
            None => error.downcast_ref::<io::Error>().map(io::Error::kind),
        };
        if matches!(kind, Some(NotFound | PermissionDenied | ReadOnlyFilesystem)) {
            return if of_groups { place_of_groups() } else { place() };
        }
        cause = error.source();
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::chain;
    use crate::files::{self, Kind};

    /// What is said of a group's file that is not there.
    fn group() -> String {
        let point = tempfile::tempdir().unwrap();
        fs::create_dir_all(point.path().join("p/box")).unwrap();
        let mounts = format!("1 2 0:3 / {} rw - cgroup2 c rw", point.path().display());
        let names = ["box", "v", "o"].map(|name| name.parse().unwrap());
        let [sandbox, vcpus, overhead] = names;
        let request = cgroup::Request {
            version: cgroup::VersionChoice::V2,
            parent: Some(cgroup::Parent::Existing("/p".parse().unwrap())),
            names: cgroup::Names { sandbox, vcpus, overhead },
            containers: Vec::new(),
            overhead: None,
            id: "vm".to_owned(),
        };
        match cgroup::resolve_in(&cgroup::Hierarchies::parse(&mounts, "0::/"), &request) {
            Err(cgroup::Error::Plan(cgroup::PlanError::File(error))) => {
                chain(&cgroup::ChangeError::Refused(error))
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_missing_in_a_root() {
        let missing = || chain(&files::open("f", "/no/such".as_ref(), Kind::File).unwrap_err());
        let wanted = "(looked up in the root /srv/jail of the mount namespace mnt:[1])";
        let other = || chain(&files::open("f", "/".as_ref(), Kind::File).unwrap_err());
        // Other tests of this process may ask meanwhile; they look for other words.
        let root = Root { path: "/srv/jail".to_owned(), namespace: "mnt:[1]".to_owned(), groups: None };
        set_root(Some(root.clone()));
        let (jailed, of_another_kind) = (missing(), other());
        // Those of the groups were opened before there was a jail.
        set_root(Some(Root { groups: Some(" (looked up before)".to_owned()), ..root }));
        let (of_a_group, of_a_file) = (group(), missing());
        set_root(None);
        assert!(of_a_group.ends_with("(looked up before)"), "{of_a_group}");
        assert!(of_a_file.ends_with(wanted), "{of_a_file}");
        assert!(jailed.ends_with(wanted) && jailed.contains("/no/such"), "{jailed}");
        assert!(!of_another_kind.contains("looked up"), "{of_another_kind}");
        assert!(!missing().contains("looked up"));
    }
}
