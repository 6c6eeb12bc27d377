//! `cgroup`: where the threads go, and what they may use.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Containers of a pod.
const MAX_CONTAINERS: usize = 1024;
/// Bytes of a container's id.
const MAX_CONTAINER_ID: usize = 255;

/// Which of the kernel's cgroup interfaces to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupVersion {
    /// v1 when its hierarchies have the cpu or the memory controller, else v2.
    #[default]
    Auto,
    /// The legacy hierarchies, one or more controllers each.
    V1,
    /// The unified hierarchy.
    V2,
}

/// Who makes the groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// The one whose form the parent has; without a parent systemd where it runs, unless our own group will do.
    #[default]
    Auto,
    /// Pinfold makes directories in cgroupfs.
    Cgroupfs,
    /// systemd makes a transient scope, in which Pinfold makes directories.
    Systemd,
    /// Nobody: the threads stay where Pinfold was started. The explicit opt-out.
    None,
}

/// A container of the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// Its name in the API.
    pub id: String,
    /// What it may use, as in its OCI specification (`linux.resources`).
    #[serde(default)]
    pub resources: cgroup::Resources,
}

/// Placement and limits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CgroupSection {
    /// Which interface.
    #[serde(default)]
    pub version: CgroupVersion,
    /// Who makes the groups.
    #[serde(default)]
    pub driver: Driver,
    /// The pod's cgroup, below which the sandbox is made: a path such as `/kubepods/pod1`, which must exist, or a
    /// scope of systemd's, as `slice:prefix:name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// A bundle's config.json, or its folder: it gives what is not declared here. It is read once, at the launch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oci_spec: Option<PathBuf>,
    /// Name of the group of the whole microVM.
    #[serde(default = "sandbox_name")]
    pub sandbox_name: cgroup::GroupName,
    /// Name of the vCPU threads' group.
    #[serde(default = "vcpus_name")]
    pub vcpus_name: cgroup::GroupName,
    /// Name of the group of all other threads (v2).
    #[serde(default = "overhead_name")]
    pub overhead_name: cgroup::GroupName,
    /// Whether each vCPU has a CPU of its own.
    #[serde(default)]
    pub pin_vcpus: bool,
    /// Whether the containers' sums decide the number of vCPUs and the memory, at the launch.
    #[serde(default)]
    pub size_vm: bool,
    /// What Pinfold itself may use beyond the containers' sum: the pod's overhead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overhead: Option<cgroup::Resources>,
    /// The containers whose sum is the microVM's share.
    #[serde(default)]
    pub containers: Vec<Container>,
}

/// A group name of ours, which is valid.
fn name(text: &str) -> cgroup::GroupName {
    text.parse().expect("a valid group name")
}

fn sandbox_name() -> cgroup::GroupName {
    name("kata-sandbox")
}

fn vcpus_name() -> cgroup::GroupName {
    name("kata-sandbox-vcpus")
}

fn overhead_name() -> cgroup::GroupName {
    name("kata-sandbox-overhead")
}

impl Default for CgroupSection {
    fn default() -> Self {
        Self {
            version: CgroupVersion::default(),
            driver: Driver::default(),
            parent: None,
            oci_spec: None,
            sandbox_name: sandbox_name(),
            vcpus_name: vcpus_name(),
            overhead_name: overhead_name(),
            pin_vcpus: false,
            size_vm: false,
            overhead: None,
            containers: Vec::new(),
        }
    }
}

/// Other limits than were declared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CgroupPatch {
    /// Instead of the overhead that was declared.
    #[serde(default)]
    pub overhead: Option<cgroup::Resources>,
    /// Instead of all containers that were declared.
    #[serde(default)]
    pub containers: Option<Vec<Container>>,
}

impl CgroupPatch {
    /// Takes up what is given.
    pub(crate) fn apply(self, section: &mut CgroupSection) {
        section.overhead = self.overhead.or(section.overhead.take());
        section.containers = self.containers.unwrap_or(std::mem::take(&mut section.containers));
    }
}

/// What is wrong with a container's id, which has to fit into the path of a request.
pub fn check_container_id(id: &str) -> Result<(), String> {
    let odd = |c: char| !(c.is_ascii_alphanumeric() || "_-.+".contains(c));
    match id {
        "" => Err("The ID cannot be empty.".to_owned()),
        _ if id.len() > MAX_CONTAINER_ID => {
            Err(format!("A container's ID can have {MAX_CONTAINER_ID} bytes at most."))
        }
        _ if id.contains(odd) || id.chars().all(|c| c == '.') => {
            Err("A container's ID can only contain alphanumeric characters and `_`, `-`, `.` and `+`."
                .to_owned())
        }
        _ => Ok(()),
    }
}

impl CgroupSection {
    /// This placement with the limits of `other`, which may repeat the placement but not change it: the threads are
    /// in their places.
    pub(crate) fn with_limits_of(&self, other: Self) -> Result<Self, (&'static str, String)> {
        let (old, new, default) = (self, &other, Self::default());
        let kept = [
            ("version", new.version == old.version || new.version == default.version),
            ("driver", new.driver == old.driver || new.driver == default.driver),
            ("parent", new.parent == old.parent || new.parent == default.parent),
            ("oci_spec", new.oci_spec == old.oci_spec || new.oci_spec == default.oci_spec),
            ("sandbox_name", [&old.sandbox_name, &default.sandbox_name].contains(&&new.sandbox_name)),
            ("vcpus_name", [&old.vcpus_name, &default.vcpus_name].contains(&&new.vcpus_name)),
            ("overhead_name", [&old.overhead_name, &default.overhead_name].contains(&&new.overhead_name)),
            ("pin_vcpus", new.pin_vcpus == old.pin_vcpus || new.pin_vcpus == default.pin_vcpus),
            ("size_vm", new.size_vm == old.size_vm || new.size_vm == default.size_vm),
        ];
        if let Some((field, _)) = kept.into_iter().find(|(_, kept)| !kept) {
            let problem = "cannot be changed after the launch, when the threads are in their places; leave it \
                           out, or as GET /cgroup shows it";
            return Err((field, problem.to_owned()));
        }
        Ok(Self { overhead: other.overhead, containers: other.containers, ..self.clone() })
    }

    /// What is wrong with the values, as the field and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        let names = [&self.sandbox_name, &self.vcpus_name, &self.overhead_name];
        if names[0] == names[1] || names[0] == names[2] || names[1] == names[2] {
            return Err(("sandbox_name", "the three group names must differ".to_owned()));
        }
        if self.containers.len() > MAX_CONTAINERS {
            return Err(("containers", format!("there can be {MAX_CONTAINERS} at most")));
        }
        for (index, container) in self.containers.iter().enumerate() {
            check_container_id(&container.id)
                .map_err(|problem| ("containers", format!("[{index}].id: {problem}")))?;
            if self.containers[..index].iter().any(|earlier| earlier.id == container.id) {
                return Err(("containers", format!("the id {:?} is there twice", container.id)));
            }
        }
        Ok(())
    }
}
