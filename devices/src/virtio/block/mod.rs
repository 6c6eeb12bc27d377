//! virtio-blk (virtio 1.2, section 5.2): one request queue, served by blocking calls on the thread that the
//! queue's events arrive on.

mod disk;
mod request;

use std::io;
use std::path::PathBuf;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;

pub use disk::BlockError;
use disk::{Disk, DiskFile};
use request::{HEADER_LEN, Request, Status};

use super::device::{Activation, DeviceError, Memory, VirtioDevice};
use super::iovec::{ChainBuffers, ChainIovecs};
use super::virtqueue::Virtqueue;

/// Descriptors in the request queue.
const QUEUE_SIZE: u16 = 256;

/// Data segments in one request: the queue's size less the descriptors of header and status. A driver that is
/// not told any number uses a single segment.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Length of the configuration space: capacity, size_max, seg_max.
const CONFIG_LEN: usize = 16;

/// What the host does for the durability of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// Writes reach the host's page cache. No flush is offered, and one that comes is answered without doing
    /// anything: what a crash of the host leaves is up to chance.
    Unsafe,
    /// A flush completes after everything written before it is on stable storage. For a driver that does not
    /// use flushes, each write does.
    Writeback,
}

/// What a drive is made of.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// The drive's name, which the guest reads as its serial number, cut to 20 bytes.
    pub id: String,
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Neither the guest nor we can write to it.
    pub read_only: bool,
    /// How durable writes are.
    pub cache: CacheType,
}

/// A virtio block device.
pub struct Block {
    drive: Drive,
    features: u64,
    config: [u8; CONFIG_LEN],
    iovecs: ChainIovecs,
    running: Option<Running>,
}

struct Running {
    memory: Memory,
    queue: Virtqueue,
}

impl Block {
    /// Opens the drive's file. Its capacity is the file's size now, in whole sectors of 512 bytes.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let disk = DiskFile::open(&config.id, &config.path, config.read_only)?;
        let sectors = disk.sectors();
        Ok(Self::with_disk(config, Box::new(disk), sectors))
    }

    fn with_disk(config: BlockConfig, disk: Box<dyn Disk>, sectors: u64) -> Self {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX;
        if config.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        if config.cache == CacheType::Writeback {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        let mut space = [0; CONFIG_LEN];
        space[..8].copy_from_slice(&sectors.to_le_bytes());
        space[12..].copy_from_slice(&SEG_MAX.to_le_bytes());
        Self {
            drive: Drive {
                disk,
                sectors,
                id: config.id,
                read_only: config.read_only,
                cache: config.cache,
                flush_each_write: false,
                flush_failed: false,
                failed_before: false,
            },
            features,
            config: space,
            iovecs: ChainIovecs::new(),
            running: None,
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queue = activation
            .queues
            .into_iter()
            .next()
            .flatten()
            .ok_or(DeviceError::Driver("did not enable the request queue of a drive"))?;
        // Virtio 1.2, section 5.2.5.1: a driver without flushes may take writes for durable.
        self.drive.flush_each_write =
            self.drive.cache == CacheType::Writeback && activation.features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        self.running = Some(Running { memory: activation.memory, queue });
        Ok(())
    }

    fn queue_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        let Some(Running { memory, queue }) = &mut self.running else {
            return Ok(());
        };
        let memory = memory.memory();
        queue.serve(&memory, |chain| match self.iovecs.fill(chain, &memory) {
            Ok(buffers) => self.drive.serve(&buffers),
            Err(error) => {
                log::debug!("drive {}: {error}", self.drive.id);
                0
            }
        })?;
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }
}

/// What requests are carried out on.
struct Drive {
    disk: Box<dyn Disk>,
    sectors: u64,
    id: String,
    read_only: bool,
    cache: CacheType,
    flush_each_write: bool,
    /// After a failed flush the kernel takes the lost pages for clean, and the next flush would succeed
    /// without them. So none does any more.
    flush_failed: bool,
    failed_before: bool,
}

impl Drive {
    /// Carries out the request in `buffers` and returns how many bytes were written into them.
    fn serve(&mut self, buffers: &ChainBuffers<'_>) -> u32 {
        let Some(status_at) = buffers.writable_len().checked_sub(1) else {
            log::debug!("drive {}: a request has no room for its status", self.id);
            return 0;
        };
        let (status, data) = match Request::parse(buffers) {
            Ok(request) => self.execute(request, buffers),
            Err(error) => {
                log::debug!("drive {}: {error}", self.id);
                (Status::IoErr, 0)
            }
        };
        match buffers.write_at(status_at, &[status as u8]) {
            Ok(()) => data + 1,
            Err(error) => {
                log::debug!("drive {}: {error}", self.id);
                data
            }
        }
    }

    /// The status of `request`, and how many bytes of data it wrote into `buffers`.
    fn execute(&mut self, request: Request, buffers: &ChainBuffers<'_>) -> (Status, u32) {
        let result = match request {
            Request::In { sector, len } => match request::offset(sector, len, self.sectors) {
                Some(offset) => self.disk.read(offset, buffers, len).map(|()| len),
                None => return (Status::IoErr, 0),
            },
            Request::Out { .. } if self.read_only => return (Status::IoErr, 0),
            Request::Out { sector, len } => match request::offset(sector, len, self.sectors) {
                Some(offset) => self.write(offset, buffers, len).map(|()| 0),
                None => return (Status::IoErr, 0),
            },
            Request::Flush => match self.cache {
                CacheType::Unsafe => Ok(0),
                CacheType::Writeback => self.flush().map(|()| 0),
            },
            Request::GetId { len } => return self.tell_id(buffers, len),
            Request::Unsupported(_) => return (Status::Unsupported, 0),
        };
        match result {
            Ok(written) => (Status::Ok, written),
            Err(error) => {
                self.report(request, &error);
                (Status::IoErr, 0)
            }
        }
    }

    fn write(&mut self, offset: u64, buffers: &ChainBuffers<'_>, len: u32) -> io::Result<()> {
        self.disk.write(offset, buffers, HEADER_LEN, len)?;
        if self.flush_each_write { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.flush_failed {
            return Err(io::Error::other("an earlier flush failed, and with it writes were lost"));
        }
        let result = self.disk.flush();
        self.flush_failed = result.is_err();
        result
    }

    /// Answers a request for the name: 20 bytes, filled up with zeros (virtio 1.2, section 5.2.6.2).
    fn tell_id(&self, buffers: &ChainBuffers<'_>, len: u32) -> (Status, u32) {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id.iter_mut().zip(self.id.bytes()) {
            *to = from;
        }
        if len < VIRTIO_BLK_ID_BYTES || buffers.write_at(0, &id).is_err() {
            return (Status::IoErr, 0);
        }
        (Status::Ok, VIRTIO_BLK_ID_BYTES)
    }

    /// Logs a failure of the host's; only the first one loudly, because the guest may repeat it at will.
    fn report(&mut self, request: Request, error: &io::Error) {
        let level = if self.failed_before { log::Level::Debug } else { log::Level::Warn };
        self.failed_before = true;
        log::log!(level, "drive {}: {request:?}: {error}", self.id);
    }
}

#[cfg(test)]
mod tests;
