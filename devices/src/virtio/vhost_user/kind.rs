//! What is special about each kind of device that another process serves.

use std::fmt;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS};

use crate::virtio::iovec::ChainBuffers;

/// Bytes of a file system's tag in the configuration space (virtio 1.2, section 5.11.4).
const TAG_LEN: usize = 36;
/// Bytes of a disk's configuration space up to the fields of write zeroes (section 5.2.4).
const DISK_CONFIG_LEN: usize = 60;

/// Bytes of a FUSE request's and a reply's header (linux/fuse.h).
const FUSE_IN_HEADER: u32 = 40;
const FUSE_OUT_HEADER: u32 = 16;
/// Where a request's number is in its header.
const FUSE_UNIQUE: u32 = 8;

/// Kinds of devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file system (virtio 1.2, section 5.11).
    Fs {
        /// By which the guest mounts it: 1 to 36 bytes.
        tag: String,
    },
    /// A disk (section 5.2).
    Disk {
        /// Its name.
        id: String,
    },
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fs { tag } => write!(f, "file system {tag}"),
            Self::Disk { id } => write!(f, "drive {id}"),
        }
    }
}

impl Kind {
    pub(super) fn device_type(&self) -> u32 {
        match self {
            Self::Fs { .. } => VIRTIO_ID_FS,
            Self::Disk { .. } => VIRTIO_ID_BLOCK,
        }
    }

    /// A queue for requests, and one before it for those that a file system does not want to wait.
    pub(super) fn queue_sizes(&self) -> Vec<u16> {
        match self {
            Self::Fs { .. } => vec![256, 1024],
            Self::Disk { .. } => vec![256],
        }
    }

    /// Features of this kind that the back-end may offer the driver.
    pub(super) fn features(&self) -> u64 {
        match self {
            Self::Fs { .. } => 0,
            Self::Disk { .. } => [
                VIRTIO_BLK_F_SIZE_MAX,
                VIRTIO_BLK_F_SEG_MAX,
                VIRTIO_BLK_F_RO,
                VIRTIO_BLK_F_BLK_SIZE,
                VIRTIO_BLK_F_FLUSH,
                VIRTIO_BLK_F_TOPOLOGY,
                VIRTIO_BLK_F_DISCARD,
                VIRTIO_BLK_F_WRITE_ZEROES,
            ]
            .iter()
            .fold(0, |bits, bit| bits | 1 << bit),
        }
    }

    /// The configuration space, if it is ours to say.
    pub(super) fn config(&self) -> Option<Vec<u8>> {
        match self {
            Self::Fs { tag } => {
                let mut config = tag.as_bytes().to_vec();
                config.resize(TAG_LEN, 0);
                // The number of queues for requests.
                config.extend(1_u32.to_le_bytes());
                Some(config)
            }
            Self::Disk { .. } => None,
        }
    }

    /// How much of it to ask the back-end for, if it is the back-end's to say.
    pub(super) fn config_len(&self) -> usize {
        match self {
            Self::Fs { .. } => 0,
            Self::Disk { .. } => DISK_CONFIG_LEN,
        }
    }

    /// Answers a request with an error; returns the number of bytes written.
    pub(super) fn refuse(&self, buffers: &ChainBuffers<'_>) -> u32 {
        match self {
            Self::Fs { .. } => {
                let mut unique = [0; 8];
                if buffers.readable_len() < FUSE_IN_HEADER
                    || buffers.writable_len() < FUSE_OUT_HEADER
                    || buffers.read_at(FUSE_UNIQUE, &mut unique).is_err()
                {
                    // FUSE_FORGET wants no reply.
                    return 0;
                }
                let mut reply = [0; FUSE_OUT_HEADER as usize];
                reply[..4].copy_from_slice(&FUSE_OUT_HEADER.to_le_bytes());
                reply[4..8].copy_from_slice(&(-libc::ENOTCONN).to_le_bytes());
                reply[8..].copy_from_slice(&unique);
                buffers.write_at(0, &reply).map_or(0, |()| FUSE_OUT_HEADER)
            }
            Self::Disk { .. } => {
                // The status is the last byte.
                let Some(at) = buffers.writable_len().checked_sub(1) else { return 0 };
                let status = u8::try_from(VIRTIO_BLK_S_IOERR).unwrap_or(u8::MAX);
                buffers.write_at(at, &[status]).map_or(0, |()| at + 1)
            }
        }
    }
}
