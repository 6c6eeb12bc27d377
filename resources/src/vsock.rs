//! `vsock`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Firecracker's deprecated name of the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's context id.
    pub guest_cid: u32,
    /// The unix socket through which the host reaches the guest. A connection of the guest to its port P goes to
    /// the socket `<uds_path>_P`.
    pub uds_path: PathBuf,
}

impl Vsock {
    /// What is wrong with the values, as the field and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        // 0 to 2 are the hypervisor's, the loopback's and the host's (vsock(7)).
        if self.guest_cid < 3 {
            return Err(("guest_cid", format!("{} is reserved; use 3 or more", self.guest_cid)));
        }
        if self.uds_path.as_os_str().is_empty() {
            return Err(("uds_path", "is empty: name the unix socket to be made".to_owned()));
        }
        Ok(())
    }
}
