//! The targets.

pub mod api_json;
pub mod balloon;
pub mod block;
pub mod block_uring;
pub mod cgroup_files;
pub mod config_file;
pub mod entropy;
pub mod http;
pub mod kernel;
pub mod legacy;
pub mod mmds;
pub mod net;
pub mod oci_spec;
pub mod pci;
pub mod platform;
pub mod vhost_user;
pub mod vsock;

use devices::rate_limiter::{Bucket, LimiterConfig};

use crate::input::Input;

/// Limits of a device; seldom any, and generous ones, as those that are used up wait for the clock.
fn limiter(choice: bool, input: &mut Input<'_>) -> LimiterConfig {
    if !choice {
        return LimiterConfig::default();
    }
    let mut bucket = || {
        Some(Bucket {
            size: u64::from(input.u16()),
            one_time_burst: u64::from(input.u8()),
            refill_time_ms: u64::from(input.u8()),
        })
    };
    LimiterConfig { bandwidth: bucket(), ops: bucket() }
}
