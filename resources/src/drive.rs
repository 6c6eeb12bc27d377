//! `drives`: block devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{RateLimiter, ResourceId};

/// What a guest's flush is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// The guest is not offered flushes; data reaches the disk when the host thinks fit.
    #[default]
    Unsafe,
    /// A flush completes when the data are on the disk.
    Writeback,
}

/// How requests reach the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// Blocking system calls.
    #[default]
    Sync,
    /// io_uring, where the host has it.
    Async,
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name in the API, and its serial number in the guest (the first 20 bytes).
    pub drive_id: ResourceId,
    /// Whether the guest's root file system is on it.
    pub is_root_device: bool,
    /// The partition that holds the root file system, for `root=PARTUUID=`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// What a flush is worth.
    #[serde(default)]
    pub cache_type: CacheType,
    /// The file or block device behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Whether the guest may only read.
    #[serde(default)]
    pub is_read_only: bool,
    /// Limits on its use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// How requests reach the file.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Socket of a vhost-user-blk server, instead of a file. It says whether the guest may only read, and how requests
    /// are done is up to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Whether the device has an I/O thread of its own.
    #[serde(default)]
    pub io_thread: bool,
    /// Request queues, 1 to 32. The guest uses at most one per vCPU; one thread serves them all.
    #[serde(default = "one")]
    pub queues: u8,
}

fn one() -> u8 {
    1
}

/// The most request queues: as many as there can be vCPUs.
const MAX_QUEUES: u8 = 32;

impl Drive {
    /// What is wrong with the values, as the field and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.socket.is_some() {
            let others = [
                ("path_on_host", self.path_on_host.is_some()),
                ("is_read_only", self.is_read_only),
                ("rate_limiter", self.rate_limiter.is_some()),
                ("io_engine", self.io_engine != IoEngine::default()),
                ("io_thread", self.io_thread),
            ];
            if let Some((field, _)) = others.into_iter().find(|(_, there)| *there) {
                return Err((
                    field,
                    "is the server's to say on a drive with a socket; leave it out".to_owned(),
                ));
            }
        } else if self.path_on_host.is_none() {
            return Err((
                "path_on_host",
                "missing: name the file or block device behind the drive, or a server's socket".to_owned(),
            ));
        }
        if self.partuuid.is_some() && !self.is_root_device {
            return Err(("partuuid", "has a meaning only with is_root_device".to_owned()));
        }
        let sane = |uuid: &str| !uuid.is_empty() && uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        if self.partuuid.as_deref().is_some_and(|uuid| !sane(uuid)) {
            return Err(("partuuid", "must be hexadecimal digits and hyphens".to_owned()));
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(("queues", format!("must be 1 to {MAX_QUEUES}")));
        }
        Ok(())
    }
}

/// `PATCH /drives/{id}`. Of a drive with a socket it has neither of the fields beside the name, and has the server asked
/// for the drive's capacity anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// Which drive.
    pub drive_id: ResourceId,
    /// The file or block device to be behind it from now on; opened anew even when it is the same path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Other limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
