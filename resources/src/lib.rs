//! What was asked for: the microVM's declared state as plain serde types with validation.
//!
//! The types follow Firecracker's configuration file field by field, with Pinfold's additions (the `cgroup`
//! section, `vhost` on network interfaces). Nothing here opens, maps or spawns anything. Fields that nobody
//! knows are refused by name, and so are fields that this version knows but cannot honour yet: nothing is
//! accepted and then ignored.

mod boot_source;
mod cgroup_section;
mod config;
mod drive;
mod id;
mod machine;
mod network;
mod rate_limiter;

pub use boot_source::BootSource;
pub use cgroup_section::{CgroupSection, CgroupVersion, Container, Driver};
pub use config::{ConfigError, MicrovmConfig};
pub use drive::{CacheType, Drive, IoEngine};
pub use id::{InstanceId, ResourceId};
pub use machine::{HugePages, MAX_VCPUS, MachineConfig};
pub use network::{MacAddr, NetworkInterface, VhostMode};
pub use rate_limiter::{RateLimiter, TokenBucket};
