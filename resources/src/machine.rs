//! `machine-config`: processors and memory.

use serde::{Deserialize, Serialize};

/// The most vCPUs that a microVM can have.
pub const MAX_VCPUS: u8 = 32;

/// Pages that back guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary pages.
    #[default]
    None,
    /// Transparent huge pages.
    Transparent,
    /// Pages of 2 MiB from hugetlbfs.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// Processors and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Guest memory in MiB.
    pub mem_size_mib: u64,
    /// Whether two vCPUs share a core.
    #[serde(default)]
    pub smt: bool,
    /// Firecracker's deprecated CPU templates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
    /// Whether to log dirty pages, for incremental snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Pages that back guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Whether devices are on PCI; else on virtio-mmio. An addition to Firecracker's, written only when it is so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pci: bool,
}

impl Default for MachineConfig {
    /// Firecracker's defaults: one vCPU and 128 MiB.
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            pci: false,
        }
    }
}

impl MachineConfig {
    /// Guest memory in bytes.
    pub fn mem_size(&self) -> Option<u64> {
        self.mem_size_mib.checked_mul(1 << 20)
    }

    /// What is wrong with the values, as the field and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        if !(1..=MAX_VCPUS).contains(&self.vcpu_count) {
            return Err(("vcpu_count", format!("{} is not in 1 to {MAX_VCPUS}", self.vcpu_count)));
        }
        if self.smt && self.vcpu_count != 1 && self.vcpu_count % 2 == 1 {
            return Err(("vcpu_count", format!("{} is odd; with smt it must be 1 or even", self.vcpu_count)));
        }
        if self.mem_size_mib == 0 {
            return Err(("mem_size_mib", "must be more than 0".to_owned()));
        }
        if self.mem_size().is_none() {
            return Err(("mem_size_mib", format!("{} MiB is beyond any address space", self.mem_size_mib)));
        }
        if self.cpu_template.as_deref().is_some_and(|template| template != "None") {
            return Err(("cpu_template", "CPU templates are not supported; leave it out".to_owned()));
        }
        if self.track_dirty_pages {
            return Err(("track_dirty_pages", "snapshots are not supported yet; leave it out".to_owned()));
        }
        if self.huge_pages != HugePages::None {
            return Err(("huge_pages", "huge pages are not supported yet; say \"None\"".to_owned()));
        }
        Ok(())
    }
}

/// `PATCH /machine-config`: what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    /// Number of vCPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    /// Guest memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    /// Whether two vCPUs share a core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// Firecracker's deprecated CPU templates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
    /// Whether to log dirty pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// Pages that back guest memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// Whether devices are on PCI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<bool>,
}

impl MachineConfigPatch {
    /// `config` with what is present here.
    pub(crate) fn apply(self, config: &mut MachineConfig) {
        let MachineConfigPatch {
            vcpu_count,
            mem_size_mib,
            smt,
            cpu_template,
            track_dirty_pages,
            huge_pages,
            pci,
        } = self;
        config.vcpu_count = vcpu_count.unwrap_or(config.vcpu_count);
        config.mem_size_mib = mem_size_mib.unwrap_or(config.mem_size_mib);
        config.smt = smt.unwrap_or(config.smt);
        config.cpu_template = cpu_template.or(config.cpu_template.take());
        config.track_dirty_pages = track_dirty_pages.unwrap_or(config.track_dirty_pages);
        config.huge_pages = huge_pages.unwrap_or(config.huge_pages);
        config.pci = pci.unwrap_or(config.pci);
    }
}
