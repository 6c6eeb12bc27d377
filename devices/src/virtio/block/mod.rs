//! virtio-blk (virtio 1.2, section 5.2): one request queue, served by blocking calls on the thread that the
//! queue's events arrive on. A request that the rate limiter holds back stays in the ring.

mod disk;
mod request;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

pub use disk::BlockError;
use disk::{Disk, DiskFile};
use request::{HEADER_LEN, Request, Status};

use super::device::{Activation, DeviceError, EventSource, Memory, VirtioDevice};
use super::iovec::{ChainBuffers, ChainError, ChainIovecs};
use super::virtqueue::{BYTES_PER_EVENT, Turn, Virtqueue};
use crate::rate_limiter::{LimiterConfig, LimiterUpdate, RateLimiter};

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
    /// Limits of its requests, and of the bytes that they read and write.
    pub limiter: LimiterConfig,
}

/// A virtio block device.
pub struct Block {
    drive: Drive,
    limiter: RateLimiter,
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
        let limiter = RateLimiter::new(config.limiter)
            .map_err(|source| BlockError::Limiter { id: config.id.clone(), source })?;
        let sectors = disk.sectors();
        Ok(Self::with_disk(config, Box::new(disk), sectors, limiter))
    }

    fn with_disk(config: BlockConfig, disk: Box<dyn Disk>, sectors: u64, limiter: RateLimiter) -> Self {
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
        space[12..].copy_from_slice(&SEG_MAX.to_le_bytes());
        let mut block = Self {
            drive: Drive {
                disk,
                sectors: 0,
                id: config.id,
                read_only: config.read_only,
                cache: config.cache,
                flush_each_write: false,
                flush_failed: false,
                failed_before: false,
            },
            limiter,
            features,
            config: space,
            iovecs: ChainIovecs::new(),
            running: None,
        };
        block.set_sectors(sectors);
        block
    }

    /// Sets the capacity, also where the driver reads it.
    fn set_sectors(&mut self, sectors: u64) {
        self.drive.sectors = sectors;
        self.config[..8].copy_from_slice(&sectors.to_le_bytes());
    }

    /// Puts the file that is now at `path` in the place of the drive's file, also when the path is the same: another
    /// file may be there by now. The capacity becomes that of the new file; what may be done with the drive stays
    /// as it was. On an error nothing changes.
    ///
    /// To be called through [`Slot::update`](super::slot::Slot::update), which tells the driver.
    pub fn reopen(&mut self, path: &Path) -> Result<(), BlockError> {
        let disk = DiskFile::open(&self.drive.id, path, self.drive.read_only)?;
        self.set_sectors(disk.sectors());
        self.drive.replace_disk(Box::new(disk));
        Ok(())
    }

    /// Changes the limits from the next request on, and of the one that waits.
    pub fn set_limiter(&mut self, update: LimiterUpdate) {
        self.limiter.update(update);
    }

    /// Carries out what is available, as far as the limiter and the share of one event go.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(Running { memory, queue }) = &mut self.running else {
            return Ok(());
        };
        if self.limiter.is_blocked() {
            return Ok(());
        }
        let memory = memory.memory();
        let mut moved = 0;
        queue.serve_while(&memory, |chain| {
            let parsed = self.iovecs.fill(chain, &memory).map(|buffers| (Request::parse(&buffers), buffers));
            let len = match &parsed {
                Ok((Ok(request), _)) => u64::from(request.data_len()),
                _ => 0,
            };
            if !self.limiter.consume(1, len) {
                return Turn::Held;
            }
            let written = match parsed {
                Ok((request, buffers)) => self.drive.serve(request, &buffers),
                Err(error) => {
                    log::debug!("drive {}: {error}", self.drive.id);
                    0
                }
            };
            // Cannot overflow: it ends with the first request that goes beyond the limit.
            moved += len;
            if moved < BYTES_PER_EVENT { Turn::Used(written) } else { Turn::Last(written) }
        })?;
        Ok(())
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

    fn event_sources(&self) -> Vec<EventSource> {
        vec![EventSource { fd: self.limiter.as_raw_fd(), events: EventSet::IN | EventSet::EDGE_TRIGGERED }]
    }

    fn queue_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.serve()
    }

    fn source_event(&mut self, _fd: RawFd) -> Result<(), DeviceError> {
        self.limiter.event();
        self.serve()
    }

    fn reset(&mut self) {
        self.running = None;
        self.limiter.release();
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
    /// Goes on with another disk.
    fn replace_disk(&mut self, disk: Box<dyn Disk>) {
        // No flush reaches the old file any more, and the driver may still ask for one of what it wrote.
        if self.cache == CacheType::Writeback
            && !self.read_only
            && let Err(error) = self.disk.flush()
        {
            log::warn!("drive {}: writes to the file that was replaced may be lost: {error}", self.id);
        }
        self.disk = disk;
        self.flush_failed = false;
        self.failed_before = false;
    }

    /// Carries out `request`, parsed from `buffers`, and returns how many bytes were written into them.
    fn serve(&mut self, request: Result<Request, ChainError>, buffers: &ChainBuffers<'_>) -> u32 {
        let Some(status_at) = buffers.writable_len().checked_sub(1) else {
            log::debug!("drive {}: a request has no room for its status", self.id);
            return 0;
        };
        let (status, data) = match request {
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
