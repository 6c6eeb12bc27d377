//! virtio-fs (virtio 1.2, section 5.11), a folder of the host's that another process serves by vhost-user. When that one
//! is gone, every request gets an error ([`fuse`]).

mod fuse;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::vhost_user::{BackEndDevice, FrontEnd, VhostUserError, Wanted};

/// Descriptors in the queue of requests that are not to wait, and in the one of all others.
const QUEUE_SIZES: [u16; 2] = [256, 1024];
/// How many there are of the latter.
const REQUEST_QUEUES: u32 = 1;

/// Bytes of the tag, and of the whole configuration space (section 5.11.4).
const TAG_LEN: usize = 36;
const CONFIG_LEN: usize = TAG_LEN + 4;

/// A file system that the process behind a socket serves.
pub struct Fs {
    config: [u8; CONFIG_LEN],
    front: FrontEnd,
}

impl Fs {
    /// Connects to the server at `path` and asks it what it offers. The guest mounts the file system by `tag`, of at
    /// most 36 bytes. Guest memory must be shared memory.
    pub fn connect(tag: &str, path: PathBuf) -> Result<Self, VhostUserError> {
        Self::new(tag, path, None)
    }

    /// The same by a connection to a server, which messages call `path`.
    pub fn over(tag: &str, stream: UnixStream, path: PathBuf) -> Result<Self, VhostUserError> {
        Self::new(tag, path, Some(stream))
    }

    fn new(tag: &str, path: PathBuf, stream: Option<UnixStream>) -> Result<Self, VhostUserError> {
        let front = FrontEnd::connect(Wanted {
            what: format!("file system {tag}"),
            path,
            stream,
            queues: QUEUE_SIZES.len(),
            features: 0,
            refuse: fuse::refuse,
            wants_answers: |_| true,
        })?;
        let mut config = [0; CONFIG_LEN];
        let len = tag.len().min(TAG_LEN);
        config[..len].copy_from_slice(&tag.as_bytes()[..len]);
        config[TAG_LEN..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        Ok(Self { config, front })
    }
}

impl BackEndDevice for Fs {
    const TYPE: u32 = VIRTIO_ID_FS;

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn space(&self) -> &[u8] {
        &self.config
    }

    fn front(&self) -> &FrontEnd {
        &self.front
    }

    fn front_mut(&mut self) -> &mut FrontEnd {
        &mut self.front
    }
}

#[cfg(test)]
mod tests;
