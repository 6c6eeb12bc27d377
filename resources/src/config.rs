//! The declared microVM: what the configuration file holds, and what the API makes of it.

use std::collections::HashSet;

use serde::de::{DeserializeOwned, Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use crate::{
    Action, Balloon, BootSource, CgroupSection, CpuConfig, Drive, Entropy, Fs, Logger, MachineConfig,
    Metrics, MmdsConfig, NetworkInterface, RateLimiter, ResourceId, Serial, Vsock,
};

/// What is wrong with a configuration. The text names the field by its path.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The text is not JSON, or not of the right shape.
    #[error("{0}")]
    Syntax(String),
    /// A value that makes no sense.
    #[error("{field}: {problem}")]
    Value {
        /// Path of the field, such as `drives[0].drive_id`.
        field: String,
        /// What is wrong, and the way out.
        problem: String,
    },
    /// A device that is not there.
    #[error("there is no {kind} \"{id}\"")]
    Unknown {
        /// What it would be.
        kind: &'static str,
        /// Its id.
        id: String,
    },
}

/// A microVM as declared: Firecracker's configuration file with Pinfold's additions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MicrovmConfig {
    /// What the guest boots.
    #[serde(default)]
    pub boot_source: Option<BootSource>,
    /// Block devices, in the order in which the guest finds them.
    pub drives: Vec<Drive>,
    /// Network interfaces, in the order in which the guest finds them.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Processors and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// The CPU template.
    #[serde(default)]
    pub cpu_config: Option<CpuConfig>,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// The entropy device.
    #[serde(default)]
    pub entropy: Option<Entropy>,
    /// File systems.
    #[serde(default)]
    pub fs: Vec<Fs>,
    /// The balloon.
    #[serde(default)]
    pub balloon: Option<Balloon>,
    /// The log.
    #[serde(default)]
    pub logger: Option<Logger>,
    /// The metrics.
    #[serde(default)]
    pub metrics: Option<Metrics>,
    /// The serial console.
    #[serde(default)]
    pub serial: Option<Serial>,
    /// The metadata service.
    #[serde(default)]
    pub mmds_config: Option<MmdsConfig>,
    /// Firecracker's persistent memory devices; always empty.
    #[serde(default)]
    pub pmem: Vec<NotYet>,
    /// Firecracker's hotpluggable memory; always absent.
    #[serde(default)]
    pub memory_hotplug: Option<NotYet>,
    /// Placement and limits.
    #[serde(default)]
    pub cgroup: CgroupSection,
}

/// A section of Firecracker's that this version cannot honour: there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum NotYet {}

impl<'de> serde::Deserialize<'de> for NotYet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(deserializer)?;
        Err(D::Error::custom("this is not supported yet; leave it out"))
    }
}

/// Names the section in an error of one of its fields.
pub(crate) fn at(section: String) -> impl FnOnce((&'static str, String)) -> ConfigError {
    move |(field, problem)| ConfigError::Value { field: format!("{section}.{field}"), problem }
}

/// Refuses a `value` that another has for the same field.
fn once<'a>(
    seen: &mut HashSet<&'a str>,
    value: &'a str,
    section: &str,
    field: &'static str,
) -> Result<(), ConfigError> {
    match seen.insert(value) {
        true => Ok(()),
        false => Err(at(section.to_owned())((field, format!("{value:?} is there twice")))),
    }
}

/// Reads JSON, naming the field that is wrong by its path.
pub fn from_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, ConfigError> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            "." => ConfigError::Syntax(error.into_inner().to_string()),
            _ => ConfigError::Value { field: path, problem: error.into_inner().to_string() },
        }
    })?;
    json.end().map_err(|error| ConfigError::Syntax(error.to_string()))?;
    Ok(value)
}

impl MicrovmConfig {
    /// Reads and checks a configuration file's text.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let config: Self = from_json(text.as_bytes())?;
        config.check_bootable()?;
        config.check()?;
        Ok(config)
    }

    /// A microVM of which only the section `cgroup` is declared, by its text.
    pub fn from_cgroup_json(text: &str) -> Result<Self, ConfigError> {
        let config = Self { cgroup: from_json(text.as_bytes())?, ..Self::default() };
        config.check()?;
        Ok(config)
    }

    /// Takes up what an action declares. What declares nothing changes nothing; neither does what is refused.
    pub fn apply(&mut self, action: Action) -> Result<(), ConfigError> {
        let mut next = self.clone();
        match action {
            Action::PutBootSource(source) => next.boot_source = Some(source),
            Action::PutMachineConfig(config) => next.machine_config = config,
            Action::PatchMachineConfig(patch) => patch.apply(&mut next.machine_config),
            Action::PutCpuConfig(config) => next.cpu_config = Some(config),
            Action::PutDrive(drive) => put(&mut next.drives, drive, |drive| &drive.drive_id),
            Action::PutNetworkInterface(interface) => {
                put(&mut next.network_interfaces, interface, |interface| &interface.iface_id);
            }
            Action::PutVsock(vsock) => next.vsock = Some(vsock),
            Action::PutEntropy(entropy) => next.entropy = Some(entropy),
            Action::PutFs(fs) => put(&mut next.fs, fs, |fs| &fs.tag),
            Action::PutSerial(serial) => next.serial = Some(serial),
            Action::PutLogger(logger) => next.logger = Some(logger),
            Action::PutMetrics(metrics) => next.metrics = Some(metrics),
            Action::PutBalloon(balloon) => next.balloon = Some(balloon),
            Action::PutMmdsConfig(config) => next.mmds_config = Some(config),
            Action::PatchDrive(patch) => {
                let drive = find(&mut next.drives, "drive", &patch.drive_id, |drive| &drive.drive_id)?;
                drive.path_on_host = patch.path_on_host.or(drive.path_on_host.take());
                drive.rate_limiter = patched(drive.rate_limiter, patch.rate_limiter);
            }
            Action::PatchNetworkInterface(patch) => {
                let all = &mut next.network_interfaces;
                let interface =
                    find(all, "network interface", &patch.iface_id, |interface| &interface.iface_id)?;
                interface.rx_rate_limiter = patched(interface.rx_rate_limiter, patch.rx_rate_limiter);
                interface.tx_rate_limiter = patched(interface.tx_rate_limiter, patch.tx_rate_limiter);
            }
            Action::PatchBalloon(patch) => next.some_balloon()?.amount_mib = patch.amount_mib,
            Action::PatchBalloonStats(patch) => {
                next.some_balloon()?.stats_polling_interval_s = patch.stats_polling_interval_s;
            }
            Action::PutCgroup(section) => {
                next.cgroup = next.cgroup.with_limits_of(*section).map_err(at("cgroup".to_owned()))?;
            }
            Action::PatchCgroup(patch) => patch.apply(&mut next.cgroup),
            Action::PatchOverhead(patch) => {
                let old = next.cgroup.overhead.take().unwrap_or_default();
                next.cgroup.overhead = Some(old.patched(*patch));
            }
            Action::PutContainer(container) => {
                put(&mut next.cgroup.containers, *container, |container| &container.id);
            }
            Action::DeleteContainer(id) => {
                let all = &mut next.cgroup.containers;
                let at = all.iter().position(|container| container.id == id);
                all.remove(at.ok_or(ConfigError::Unknown { kind: "container", id })?);
            }
            Action::GetInstance
            | Action::GetVersion
            | Action::GetConfig
            | Action::GetMachineConfig
            | Action::GetBalloon
            | Action::GetBalloonStats
            | Action::GetMmds
            | Action::GetCgroup
            | Action::GetCgroupThreads
            | Action::GetCgroupStats
            | Action::GetPrometheus
            | Action::GetCgroupEvents(_)
            | Action::GetCgroupDiagnosis(_)
            | Action::GetCgroupWhatIf(_)
            | Action::Start
            | Action::SetVmState(_)
            | Action::FlushMetrics
            | Action::SendCtrlAltDel
            | Action::PutMmds(_)
            | Action::PatchMmds(_) => return Ok(()),
        }
        next.check()?;
        *self = next;
        Ok(())
    }

    /// Whether there is something to boot.
    pub fn check_bootable(&self) -> Result<&BootSource, ConfigError> {
        self.boot_source.as_ref().ok_or_else(|| ConfigError::Value {
            field: "boot-source".to_owned(),
            problem: "missing: name at least the guest's kernel_image_path".to_owned(),
        })
    }

    /// The CPUs that the vCPUs are to be pinned to, one each; `None` when they are not to be.
    pub fn pinning(&self) -> Result<Option<cgroup::CpuSet>, ConfigError> {
        if !self.cgroup.pin_vcpus {
            return Ok(None);
        }
        let containers = self.cgroup.containers.iter().map(|container| &container.resources);
        let cpus = cgroup::Sums::of(containers, None).vcpus.cpus.unwrap_or_default();
        let vcpus = self.machine_config.vcpu_count;
        if cpus.len() == usize::from(vcpus) {
            return Ok(Some(cpus));
        }
        let problem = format!(
            "the containers' CPUs are \"{cpus}\", and there are {vcpus} vCPUs; give as many CPUs as vCPUs, or leave \
             it out"
        );
        Err(at("cgroup".to_owned())(("pin_vcpus", problem)))
    }

    /// Checks every value that can be judged without looking at the host.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        self.machine_config.check().map_err(at("machine-config".to_owned()))?;
        self.cgroup.check().map_err(at("cgroup".to_owned()))?;
        if let Some(config) = &self.cpu_config {
            config.check().map_err(at("cpu-config".to_owned()))?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.check().map_err(at("vsock".to_owned()))?;
        }
        if let Some(balloon) = &self.balloon {
            balloon.check(self.machine_config.mem_size_mib).map_err(at("balloon".to_owned()))?;
        }
        self.check_drives()?;
        self.check_file_systems()?;
        self.check_interfaces()
    }

    fn check_drives(&self) -> Result<(), ConfigError> {
        let mut ids = HashSet::new();
        let mut root = None;
        for (index, drive) in self.drives.iter().enumerate() {
            let section = format!("drives[{index}]");
            drive.check().map_err(at(section.clone()))?;
            once(&mut ids, drive.drive_id.as_str(), &section, "drive_id")?;
            if drive.is_root_device
                && let Some(other) = root.replace(&drive.drive_id)
            {
                let problem = format!("drive \"{other}\" is the root device already");
                return Err(at(section)(("is_root_device", problem)));
            }
        }
        Ok(())
    }

    fn check_file_systems(&self) -> Result<(), ConfigError> {
        let mut tags = HashSet::new();
        for (index, fs) in self.fs.iter().enumerate() {
            let section = format!("fs[{index}]");
            fs.check().map_err(at(section.clone()))?;
            once(&mut tags, fs.tag.as_str(), &section, "tag")?;
        }
        Ok(())
    }

    fn check_interfaces(&self) -> Result<(), ConfigError> {
        let mut ids = HashSet::new();
        let mut taps = HashSet::new();
        for (index, interface) in self.network_interfaces.iter().enumerate() {
            let section = format!("network-interfaces[{index}]");
            interface.check().map_err(at(section.clone()))?;
            once(&mut ids, interface.iface_id.as_str(), &section, "iface_id")?;
            if let Some(tap) = &interface.host_dev_name {
                once(&mut taps, tap.as_str(), &section, "host_dev_name")?;
            }
        }
        let Some(mmds) = &self.mmds_config else { return Ok(()) };
        mmds.check(|id| ids.contains(id.as_str())).map_err(at("mmds-config".to_owned()))?;
        let served = |interface: &&NetworkInterface| mmds.network_interfaces.contains(&interface.iface_id);
        let problem = self.network_interfaces.iter().filter(served).find_map(|one| {
            let (why, instead) = match (&one.socket, one.vhost) {
                (Some(_), _) => ("a socket, and its server", "name another interface"),
                (None, crate::VhostMode::On) => {
                    ("vhost \"on\", and the kernel's vhost-net", "set it to \"auto\"")
                }
                (None, _) => return None,
            };
            Some(format!("\"{}\" has {why} passes the service by; {instead}", one.iface_id))
        });
        match problem {
            Some(problem) => Err(at("mmds-config".to_owned())(("network_interfaces", problem))),
            None => Ok(()),
        }
    }

    /// Whether another process is to reach guest memory: then it has to be shared memory.
    pub fn needs_shared_memory(&self) -> bool {
        !self.fs.is_empty()
            || self.drives.iter().any(|drive| drive.socket.is_some())
            || self.network_interfaces.iter().any(|interface| interface.socket.is_some())
    }

    /// The drive that holds the root file system, and its place among the drives.
    pub fn root_drive(&self) -> Option<(usize, &Drive)> {
        self.drives.iter().enumerate().find(|(_, drive)| drive.is_root_device)
    }

    fn some_balloon(&mut self) -> Result<&mut Balloon, ConfigError> {
        self.balloon.as_mut().ok_or_else(|| ConfigError::Unknown { kind: "device", id: "balloon".to_owned() })
    }
}

/// Puts `new` into `all`, in the place of the one with its id if there is one.
fn put<T, I: PartialEq>(all: &mut Vec<T>, new: T, id: impl Fn(&T) -> &I) {
    match all.iter_mut().find(|old| id(old) == id(&new)) {
        Some(old) => *old = new,
        None => all.push(new),
    }
}

fn find<'a, T>(
    all: &'a mut [T],
    kind: &'static str,
    wanted: &ResourceId,
    id: impl Fn(&T) -> &ResourceId,
) -> Result<&'a mut T, ConfigError> {
    all.iter_mut()
        .find(|one| id(one) == wanted)
        .ok_or_else(|| ConfigError::Unknown { kind, id: wanted.to_string() })
}

fn patched(old: Option<RateLimiter>, patch: Option<RateLimiter>) -> Option<RateLimiter> {
    let Some(patch) = patch else { return old };
    Some(old.unwrap_or_default().patched(patch))
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
