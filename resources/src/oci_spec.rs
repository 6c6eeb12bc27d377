//! A bundle's `config.json`: what the OCI runtime specification, containerd and CRI-O say about the pod's place and
//! size.
//!
//! It is written by others and for others, so what is not named here is passed over. What is named has to have the
//! type that the specification gives it (config-linux.md, "Control groups").

use std::collections::BTreeMap;

use cgroup::{CpuSet, Resources, deserialize_period};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, from_json};
use crate::{Container, MicrovmConfig};

/// The container by which the limits of a specification are declared.
const CONTAINER: &str = "oci-spec";

/// containerd's annotations on a pod's sandbox: the sums over its containers, as decimal numbers
/// (pkg/cri/annotations).
const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// CRI-O's annotations, each by its name and by the one that it had before: CRI's `LinuxContainerResources` as JSON.
const POD: [&str; 2] = ["pod-linux-resources.crio.io", "io.kubernetes.cri-o.PodLinuxResources"];
const OVERHEAD: [&str; 2] = ["pod-linux-overhead.crio.io", "io.kubernetes.cri-o.PodLinuxOverhead"];

/// What a specification says about the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OciSpec {
    /// `linux.cgroupsPath`, unless it is empty.
    pub cgroups_path: Option<String>,
    /// What the pod's containers may use together, as far as that is limited.
    pub limits: Option<Resources>,
    /// What the runtime itself may use.
    pub overhead: Option<Resources>,
}

#[derive(Deserialize)]
struct Spec {
    linux: Option<Linux>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    cgroups_path: Option<String>,
    resources: Option<Limits>,
}

#[derive(Default, Deserialize)]
struct Limits {
    cpu: Option<Cpu>,
    memory: Option<Memory>,
}

#[derive(Default, Deserialize)]
struct Cpu {
    shares: Option<u64>,
    quota: Option<i64>,
    #[serde(default, deserialize_with = "deserialize_period")]
    period: Option<u64>,
    cpus: Option<CpuSet>,
    mems: Option<CpuSet>,
}

#[derive(Default, Deserialize)]
struct Memory {
    limit: Option<i64>,
}

/// What of CRI's `LinuxContainerResources` there is to apply. A number that is missing is 0.
#[derive(Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
struct CriResources {
    #[serde(deserialize_with = "deserialize_period")]
    cpu_period: Option<u64>,
    cpu_quota: Option<i64>,
    cpu_shares: Option<u64>,
    memory_limit_in_bytes: Option<i64>,
    cpuset_cpus: Option<CpuSet>,
    cpuset_mems: Option<CpuSet>,
}

impl OciSpec {
    /// Reads a `config.json`.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let spec: Spec = from_json(text.as_bytes())?;
        let linux = spec.linux.unwrap_or_default();
        let annotations = spec.annotations.unwrap_or_default();
        let own = linux.resources.map(Resources::from).unwrap_or_default();
        // A pod's sandbox has little use of its own; its annotations say what the pod has.
        let pod = match cri_o(&annotations, POD)? {
            Some(pod) => pod,
            None => containerd(&annotations)?,
        };
        Ok(Self {
            cgroups_path: linux.cgroups_path.filter(|path| !path.is_empty()),
            limits: some(own.patched(pod)),
            overhead: cri_o(&annotations, OVERHEAD)?.and_then(some),
        })
    }
}

impl MicrovmConfig {
    /// Takes up a specification's limits where none are declared.
    pub fn take_up(&mut self, spec: &OciSpec) -> Result<(), ConfigError> {
        let section = &mut self.cgroup;
        if let Some(limits) = spec.limits.as_ref().filter(|_| section.containers.is_empty()) {
            section.containers = vec![Container { id: CONTAINER.to_owned(), resources: limits.clone() }];
        }
        if section.overhead.is_none() {
            section.overhead.clone_from(&spec.overhead);
        }
        self.check()
    }
}

/// CRI-O's annotation of one of these names.
fn cri_o(annotations: &BTreeMap<String, String>, names: [&str; 2]) -> Result<Option<Resources>, ConfigError> {
    let found = names.into_iter().find_map(|name| Some((name, annotations.get(name)?)));
    let Some((name, text)) = found else { return Ok(None) };
    let resources: Option<CriResources> = serde_json::from_str(text).map_err(|error| wrong(name, &error))?;
    // Without numbers the kubelet has said nothing.
    Ok(resources.filter(|resources| *resources != CriResources::default()).map(Resources::from))
}

fn containerd(annotations: &BTreeMap<String, String>) -> Result<Resources, ConfigError> {
    fn number<T: std::str::FromStr<Err: std::fmt::Display>>(
        annotations: &BTreeMap<String, String>,
        name: &str,
    ) -> Result<Option<T>, ConfigError> {
        let text = annotations.get(name);
        text.map(|text| text.trim().parse().map_err(|error| wrong(name, &error))).transpose()
    }
    let period = number::<u64>(annotations, PERIOD)?;
    Ok(CriResources {
        cpu_period: deserialize_period(serde_json::json!(period)).map_err(|error| wrong(PERIOD, &error))?,
        cpu_quota: number(annotations, QUOTA)?,
        cpu_shares: number(annotations, SHARES)?,
        memory_limit_in_bytes: number(annotations, MEMORY)?,
        ..CriResources::default()
    }
    .into())
}

fn wrong(annotation: &str, error: &dyn std::fmt::Display) -> ConfigError {
    ConfigError::Value { field: format!("annotations.{annotation}"), problem: error.to_string() }
}

/// These, if they say anything.
fn some(resources: Resources) -> Option<Resources> {
    Some(resources).filter(|resources| *resources != Resources::default())
}

impl From<Limits> for Resources {
    fn from(limits: Limits) -> Self {
        let cpu = limits.cpu.unwrap_or_default();
        CriResources {
            cpu_period: cpu.period,
            cpu_quota: cpu.quota,
            cpu_shares: cpu.shares,
            memory_limit_in_bytes: limits.memory.unwrap_or_default().limit,
            cpuset_cpus: cpu.cpus,
            cpuset_mems: cpu.mems,
        }
        .into()
    }
}

impl From<CriResources> for Resources {
    fn from(cri: CriResources) -> Self {
        let cpu = cgroup::Cpu {
            shares: cri.cpu_shares,
            quota: cri.cpu_quota,
            period: cri.cpu_period,
            cpus: cri.cpuset_cpus,
            mems: cri.cpuset_mems,
            ..cgroup::Cpu::default()
        };
        let memory = cgroup::Memory { limit: cri.memory_limit_in_bytes, ..cgroup::Memory::default() };
        Self {
            cpu: Some(cpu).filter(|cpu| *cpu != cgroup::Cpu::default()),
            memory: Some(memory).filter(|memory| *memory != cgroup::Memory::default()),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests;
