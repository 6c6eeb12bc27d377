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
    set_root((path != "/" || elsewhere).then_some(Root { path, namespace }));
}

/// Where paths are looked up, for the end of a message; nothing on the host.
pub fn place() -> String {
    match &*ROOT.read().unwrap_or_else(PoisonError::into_inner) {
        Some(Root { path, namespace }) => {
            format!(" (looked up in the root {path} of the mount namespace {namespace})")
        }
        None => String::new(),
    }
}

/// [`place`], if `error` is about something that was looked up.
pub fn place_of(error: &dyn Error) -> String {
    let mut cause = error.source();
    while let Some(error) = cause {
        let kind = match error.downcast_ref::<kvm_ioctls::Error>() {
            Some(error) => Some(io::Error::from_raw_os_error(error.errno()).kind()),
            None => error.downcast_ref::<io::Error>().map(io::Error::kind),
        };
        if matches!(kind, Some(ErrorKind::NotFound | ErrorKind::PermissionDenied)) {
            return place();
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

    #[test]
    fn a_file_that_is_not_there_is_missing_in_a_root() {
        let missing = || chain(&files::open("f", "/no/such".as_ref(), Kind::File).unwrap_err());
        let other = || chain(&files::open("f", "/".as_ref(), Kind::File).unwrap_err());
        // Other tests of this process may ask meanwhile; they look for other words.
        set_root(Some(Root { path: "/srv/jail".to_owned(), namespace: "mnt:[1]".to_owned() }));
        let (jailed, of_another_kind) = (missing(), other());
        set_root(None);
        let wanted = "(looked up in the root /srv/jail of the mount namespace mnt:[1])";
        assert!(jailed.ends_with(wanted) && jailed.contains("/no/such"), "{jailed}");
        assert!(!of_another_kind.contains("looked up"), "{of_another_kind}");
        assert!(!missing().contains("looked up"));
    }
}
