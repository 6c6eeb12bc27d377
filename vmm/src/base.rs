//! Which group ours are built in, and the scope that systemd makes where that is to be one.

use std::path::{Path, PathBuf};

use cgroup::{Hierarchies, Parent, PathError, ScopeError, ScopeName, ScopeNameError, is_scope_form};
use resources::{CgroupSection, Driver, InstanceId};

use crate::exit::chain;

/// What is there when systemd is process 1 (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// Why there is no base.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The parent's name is none.
    #[error("cgroup.parent")]
    Parent(#[source] NameError),
    /// Neither is that in the OCI specification.
    #[error("cgroup.oci_spec: linux.cgroupsPath of {path}", path = .path.display())]
    CgroupsPath {
        /// The section's field.
        path: PathBuf,
        /// What is wrong.
        source: NameError,
    },
    /// The microVM's id cannot name a scope.
    #[error("the scope of this microVM")]
    Id(#[from] ScopeNameError),
    /// systemd has made none.
    #[error(transparent)]
    Scope(#[from] ScopeError),
}

/// Why a text names no group.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// It is no path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// It is no scope.
    #[error(transparent)]
    Scope(#[from] ScopeNameError),
}

/// A group as it is named.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Group(Parent),
    Scope(ScopeName),
}

/// The base for the microVM `id`: what the section names, else what the OCI specification's `linux.cgroupsPath`
/// does, else where there is no group of our own to build in a scope by systemd. Has the scope made, so that this
/// process is in it. `None` leaves the choice to the crate `cgroup`.
pub fn choose(
    id: &InstanceId,
    section: &CgroupSection,
    cgroups_path: Option<&str>,
    request: &cgroup::Request,
    hierarchies: &Hierarchies,
) -> Result<Option<Parent>, BaseError> {
    let start = |name: &ScopeName| cgroup::start_scope(name, request.version).map(Parent::Scope);
    match named(section, cgroups_path)? {
        Some(Named::Group(parent)) => return Ok(Some(parent)),
        Some(Named::Scope(name)) => return Ok(Some(start(&name)?)),
        None => {}
    }
    match section.driver {
        Driver::Systemd => Ok(Some(start(&ScopeName::of_vm(id.as_str())?)?)),
        Driver::Auto
            if Path::new(BOOTED).is_dir()
                && !cgroup::has_own_base(hierarchies, request.version, &request.names) =>
        {
            match start(&ScopeName::of_vm(id.as_str())?) {
                Ok(parent) => Ok(Some(parent)),
                Err(error @ ScopeError::Unreachable(..)) => {
                    log::info!("no scope by systemd: {}", chain(&error));
                    Ok(None)
                }
                Err(error) => Err(error.into()),
            }
        }
        Driver::Auto | Driver::Cgroupfs | Driver::None => Ok(None),
    }
}

fn named(section: &CgroupSection, cgroups_path: Option<&str>) -> Result<Option<Named>, BaseError> {
    let existing = |text: &str| text.parse().map(Parent::Existing);
    Ok(match (&section.parent, cgroups_path) {
        (Some(parent), _) => Some(by_form(section.driver, parent, existing).map_err(BaseError::Parent)?),
        (None, Some(text)) => {
            Some(by_form(section.driver, text, Parent::of_cgroups_path).map_err(|source| {
                BaseError::CgroupsPath { path: section.oci_spec.clone().unwrap_or_default(), source }
            })?)
        }
        (None, None) => None,
    })
}

/// What `text` names in the driver's form; without a driver the form says which.
fn by_form(
    driver: Driver,
    text: &str,
    path: impl FnOnce(&str) -> Result<Parent, PathError>,
) -> Result<Named, NameError> {
    let scope = match driver {
        Driver::Systemd => true,
        Driver::Auto => is_scope_form(text),
        Driver::Cgroupfs | Driver::None => false,
    };
    Ok(if scope { Named::Scope(text.parse()?) } else { Named::Group(path(text)?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCOPE: &str = "kubepods-pod1.slice:cri-containerd:4f";

    fn of(section: &str, cgroups_path: Option<&str>) -> Result<Option<Named>, String> {
        let section = serde_json::from_str(section).unwrap();
        named(&section, cgroups_path).map_err(|error| chain(&error))
    }

    #[test]
    fn the_section_goes_before_the_specification() {
        let group = |path: &str| path.parse().unwrap();
        let parent = Parent::Existing(group("/a"));
        assert_eq!(of(r#"{"parent": "/a"}"#, Some("/b")), Ok(Some(Named::Group(parent))));
        assert_eq!(of("{}", Some("/b")), Ok(Some(Named::Group(Parent::Made(group("/b"))))));
        assert_eq!(of("{}", None), Ok(None));
    }

    #[test]
    fn the_form_of_the_other_driver_is_refused() {
        let scope = Ok(Some(Named::Scope(SCOPE.parse().unwrap())));
        assert_eq!(of("{}", Some(SCOPE)), scope);
        assert_eq!(of(r#"{"driver": "systemd"}"#, Some(SCOPE)), scope);
        assert_eq!(of(&format!(r#"{{"parent": "{SCOPE}"}}"#), None), scope);
        for (section, cgroups_path, start, word) in [
            (
                r#"{"driver": "cgroupfs", "oci_spec": "b"}"#,
                Some(SCOPE),
                "cgroup.oci_spec: linux.cgroupsPath of b: ",
                "systemd driver",
            ),
            (
                r#"{"driver": "systemd", "oci_spec": "b"}"#,
                Some("/a"),
                "cgroup.oci_spec: linux.cgroupsPath of b: ",
                "cgroupfs driver",
            ),
            (r#"{"driver": "systemd", "parent": "/a"}"#, None, "cgroup.parent: ", "cgroupfs driver"),
            (r#"{"parent": "a"}"#, None, "cgroup.parent: ", "systemd driver"),
            (r#"{"parent": "a:b:c"}"#, None, "cgroup.parent: ", ".slice"),
        ] {
            let error = of(section, cgroups_path).unwrap_err();
            assert!(error.starts_with(start) && error.contains(word), "{error}");
        }
    }
}
