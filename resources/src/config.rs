//! The configuration file.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{BootSource, CgroupSection, Drive, MachineConfig, NetworkInterface};

/// Sections of Firecracker's file that this version cannot honour.
const NOT_YET: [&str; 9] = [
    "balloon",
    "cpu-config",
    "entropy",
    "logger",
    "memory-hotplug",
    "metrics",
    "mmds-config",
    "pmem",
    "vsock",
];

/// What is wrong with a configuration. The text names the field by its path.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The text is not JSON, or not of the right shape.
    #[error("{0}")]
    Syntax(String),
    /// A section that this version cannot honour.
    #[error("{0}: this section is not supported yet; remove it")]
    NotYet(&'static str),
    /// A value that makes no sense.
    #[error("{field}: {problem}")]
    Value {
        /// Path of the field, such as `drives[0].drive_id`.
        field: String,
        /// What is wrong, and the way out.
        problem: String,
    },
}

/// A microVM as declared: Firecracker's configuration file with Pinfold's additions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MicrovmConfig {
    /// What the guest boots.
    pub boot_source: BootSource,
    /// Block devices, in the order in which the guest finds them.
    pub drives: Vec<Drive>,
    /// Network interfaces, in the order in which the guest finds them.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Processors and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// Placement and limits.
    #[serde(default)]
    pub cgroup: CgroupSection,
}

impl MicrovmConfig {
    /// Reads and checks a configuration file's text.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| ConfigError::Syntax(format!("not JSON: {e}")))?;
        if let Some(section) = NOT_YET.iter().find(|section| value.get(section).is_some()) {
            return Err(ConfigError::NotYet(section));
        }
        // From the text again, not from the value: a repeated key is an error there and lost here.
        let mut json = serde_json::Deserializer::from_str(text);
        let config: Self = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            match path.as_str() {
                "." => ConfigError::Syntax(error.into_inner().to_string()),
                _ => ConfigError::Value { field: path, problem: error.into_inner().to_string() },
            }
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks every value that can be judged without looking at the host.
    pub fn check(&self) -> Result<(), ConfigError> {
        let at = |section: String| {
            move |(field, problem): (&'static str, String)| ConfigError::Value {
                field: format!("{section}.{field}"),
                problem,
            }
        };
        self.machine_config.check().map_err(at("machine-config".to_owned()))?;
        self.cgroup.check().map_err(at("cgroup".to_owned()))?;
        let mut ids = HashSet::new();
        let mut root = None;
        for (index, drive) in self.drives.iter().enumerate() {
            let section = format!("drives[{index}]");
            drive.check().map_err(at(section.clone()))?;
            if !ids.insert(drive.drive_id.as_str()) {
                return Err(at(section)(("drive_id", format!("\"{}\" is there twice", drive.drive_id))));
            }
            if drive.is_root_device
                && let Some(other) = root.replace(&drive.drive_id)
            {
                return Err(at(section)((
                    "is_root_device",
                    format!("drive \"{other}\" is the root device already"),
                )));
            }
        }
        ids.clear();
        let mut taps = HashSet::new();
        for (index, interface) in self.network_interfaces.iter().enumerate() {
            let section = format!("network-interfaces[{index}]");
            interface.check().map_err(at(section.clone()))?;
            if !ids.insert(interface.iface_id.as_str()) {
                return Err(at(section)(("iface_id", format!("\"{}\" is there twice", interface.iface_id))));
            }
            if !taps.insert(&interface.host_dev_name) {
                return Err(at(section)((
                    "host_dev_name",
                    format!("{:?} is there twice", interface.host_dev_name),
                )));
            }
        }
        Ok(())
    }

    /// The drive that holds the root file system, and its place among the drives.
    pub fn root_drive(&self) -> Option<(usize, &Drive)> {
        self.drives.iter().enumerate().find(|(_, drive)| drive.is_root_device)
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
