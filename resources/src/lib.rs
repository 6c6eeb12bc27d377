//! What was asked for: the microVM's declared state as plain serde types with validation.
//!
//! The types follow Firecracker's configuration file field by field, with Pinfold's additions (the `cgroup`
//! section, `vhost` on network interfaces). Nothing here opens, maps or spawns anything. Fields that nobody
//! knows are refused by name, and so are fields that this version knows but cannot honour yet: nothing is
//! accepted and then ignored.

mod action;
mod balloon;
mod boot_source;
mod cgroup_section;
mod chain;
mod config;
mod cpu_config;
mod drive;
mod entropy;
mod fs;
mod id;
mod machine;
mod mmds;
mod network;
mod observability;
mod oci_spec;
mod rate_limiter;
mod sizing;
mod vsock;

pub use action::{
    Action, DiagnosisQuery, EventsQuery, Fault, Outcome, Phase, PhaseError, Reply, VmState, WhatIfQuery,
};
pub use balloon::{Balloon, BalloonPatch, BalloonStatsPatch};
pub use boot_source::BootSource;
pub use cgroup_section::{CgroupPatch, CgroupSection, CgroupVersion, Container, Driver, check_container_id};
// For those who may not know `cgroup`.
pub use cgroup::{Bandwidth, CpuSet};
pub use chain::chain;
pub use config::{ConfigError, MicrovmConfig, NotYet, from_json};
pub use cpu_config::{Bitmap, CpuConfig, CpuidModifier, MsrModifier, Number, Register, RegisterModifier};
pub use drive::{CacheType, Drive, DrivePatch, IoEngine};
pub use entropy::Entropy;
pub use fs::Fs;
pub use id::{InstanceId, ResourceId};
pub use machine::{HugePages, MAX_VCPUS, MachineConfig, MachineConfigPatch};
pub use mmds::{MmdsConfig, MmdsVersion};
pub use network::{MacAddr, NetBackend, NetworkInterface, NetworkInterfacePatch, VhostMode};
pub use observability::{LogLevel, Logger, Metrics, Serial};
pub use oci_spec::OciSpec;
pub use rate_limiter::{RateLimiter, TokenBucket};
pub use vsock::Vsock;
