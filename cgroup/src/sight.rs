//! Where a group was looked up, for messages: its mount, and the namespaces in which that is so.

use std::fs;
use std::path::Path;

/// Namespaces that decide which groups there are and how they are called (namespaces(7)): their files in `ns`, and
/// their names.
const NAMESPACES: [(&str, &str); 2] = [("mnt", "mount"), ("cgroup", "cgroup")];
/// The first cgroup namespace (PROC_CGROUP_INIT_INO in include/linux/proc_ns.h): where process 1 is a container's own,
/// comparing with it would say nothing.
const FIRST_CGROUP_NAMESPACE: &str = "cgroup:[4026531835]";

/// What is to be known beside a path: nothing where the namespaces are those of process 1, else a clause that starts
/// with a comma. To be asked once, together with the mounts: later, the process may be elsewhere, or not be allowed to ask.
pub(crate) fn elsewhere() -> String {
    elsewhere_in(Path::new("/proc"))
}

fn elsewhere_in(proc: &Path) -> String {
    let differs = |file: &str| {
        let link = |process: &str| fs::read_link(proc.join(process).join("ns").join(file)).ok();
        let Some(own) = link("self") else { return false };
        // An ordinary user cannot see that of process 1.
        let first = link("1").is_none_or(|first| first == own);
        !first || (file == "cgroup" && own != Path::new(FIRST_CGROUP_NAMESPACE))
    };
    let names: Vec<_> = NAMESPACES.iter().filter(|(file, _)| differs(file)).map(|(_, name)| *name).collect();
    match names.as_slice() {
        [] => String::new(),
        names => format!(
            ", as seen in the {} namespace of this process, which is not the host's",
            names.join(" and ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn namespaces_of_our_own_are_named() {
        let said = |own: [&str; 2], first: Option<[&str; 2]>| {
            let proc = tempfile::tempdir().unwrap();
            for (process, links) in [("self", Some(own)), ("1", first)] {
                let folder = proc.path().join(process).join("ns");
                fs::create_dir_all(&folder).unwrap();
                for ((file, _), link) in NAMESPACES.iter().zip(links.into_iter().flatten()) {
                    symlink(link, folder.join(file)).unwrap();
                }
            }
            elsewhere_in(proc.path())
        };
        let host = ["mnt:[1]", FIRST_CGROUP_NAMESPACE];
        assert_eq!(said(host, Some(host)), "");
        assert_eq!(said(host, None), "");
        assert!(said(["mnt:[2]", host[1]], Some(host)).contains("the mount namespace"));
        let container = ["mnt:[2]", "cgroup:[3]"];
        assert!(said(container, Some(host)).contains("the mount and cgroup namespace"));
        // Its process 1 is in the same.
        assert!(said(container, Some(container)).contains("the cgroup namespace"));
    }
}
