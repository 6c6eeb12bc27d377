//! `fs`: folders of the host's in the guest.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ResourceId;

/// Bytes of a tag (virtio 1.2, section 5.11.4).
const MAX_TAG: usize = 36;

/// A virtio file system. Either its server is there already, or we start one for a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fs {
    /// Its name in the API, and in the guest: `mount -t virtiofs TAG FOLDER`.
    pub tag: ResourceId,
    /// Socket of a vhost-user-fs server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The folder that a `virtiofsd` of our own is to serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_dir: Option<PathBuf>,
}

impl Fs {
    /// What is wrong with the values, as the field and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.tag.as_str().len() > MAX_TAG {
            return Err(("tag", format!("has more than {MAX_TAG} bytes")));
        }
        match (&self.socket, &self.shared_dir) {
            (None, None) => Err(("socket", "missing: name a server's socket, or a shared_dir".to_owned())),
            (Some(_), Some(_)) => {
                Err(("shared_dir", "has no meaning with a socket; leave one out".to_owned()))
            }
            _ => Ok(()),
        }
    }
}
