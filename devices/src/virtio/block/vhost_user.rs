//! A drive that another process serves by vhost-user. What is there (its capacity, whether it can only be read) is what
//! that one says; how its driver may use it is what both know. When it is gone every request fails with an I/O error.

use std::path::PathBuf;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::request::Status;
use super::{BlockError, CONFIG_LEN, CacheType, NUM_QUEUES_AT, QUEUE_SIZE};
use crate::virtio::iovec::ChainBuffers;
use crate::virtio::vhost_user::{BackEndDevice, FrontEnd, VhostUserError, Wanted};

/// What the driver is offered if the server offers it.
const FEATURES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// What a drive of another process is made of.
#[derive(Clone, Debug)]
pub struct VhostUserBlockConfig {
    /// The drive's name, for messages.
    pub id: String,
    /// Where the server listens.
    pub socket: PathBuf,
    /// Whether the driver may flush, if the server offers it.
    pub cache: CacheType,
    /// Request queues, 1 or more.
    pub queues: u16,
}

/// A virtio block device that another process serves.
pub struct VhostUserBlock {
    config: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    front: FrontEnd,
}

impl VhostUserBlock {
    /// Connects to the server and asks it what it offers. Guest memory must be shared memory.
    pub fn connect(config: VhostUserBlockConfig) -> Result<Self, BlockError> {
        let queues = config.queues.max(1);
        let mut features = FEATURES;
        for (wanted, feature) in
            [(config.cache == CacheType::Writeback, VIRTIO_BLK_F_FLUSH), (queues > 1, VIRTIO_BLK_F_MQ)]
        {
            features |= u64::from(wanted) << feature;
        }
        let front = FrontEnd::connect(Wanted {
            what: format!("drive {}", config.id),
            path: config.socket,
            stream: None,
            queues: queues.into(),
            features,
            refuse,
            wants_answers: |_| true,
        })?;
        let queue_sizes = vec![QUEUE_SIZE; queues.into()];
        let mut block = Self { config: [0; CONFIG_LEN], queue_sizes, front };
        block.read_config()?;
        Ok(block)
    }

    /// Asks the server anew what the drive is like, its capacity above all. On an error nothing changes, unless it is
    /// that the server is lost.
    ///
    /// To be called through [`Slot::update`](crate::virtio::slot::Slot::update), which tells the driver.
    pub fn refresh(&mut self) -> Result<(), BlockError> {
        Ok(self.read_config()?)
    }

    fn read_config(&mut self) -> Result<(), VhostUserError> {
        let mut config = self.config;
        self.front.read_config(&mut config)?;
        // The driver finds as many queues as it is given, and not as many as the server could serve.
        let queues = u16::try_from(self.queue_sizes.len()).unwrap_or(u16::MAX);
        config[NUM_QUEUES_AT..][..2].copy_from_slice(&queues.to_le_bytes());
        self.config = config;
        Ok(())
    }
}

/// Answers a request with an I/O error in the server's place.
fn refuse(buffers: &ChainBuffers<'_>) -> u32 {
    u32::from(Status::IoErr.tell(buffers))
}

impl BackEndDevice for VhostUserBlock {
    const TYPE: u32 = VIRTIO_ID_BLOCK;

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
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
