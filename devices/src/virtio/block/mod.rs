//! virtio-blk (virtio 1.2, section 5.2). Requests are served on the thread that the queues' events arrive on, by
//! blocking calls or by io_uring. A request that the rate limiter holds back stays in the ring.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`request`] | what a chain asks for |
//! | [`drive`] | which requests are taken, and what became of them |
//! | [`task`] | requests under way |
//! | [`server`] | from the queues to the disk and back |
//! | [`polling`] | waiting a moment for several requests |
//! | [`pace`] | when the driver is told, while more is being done |
//! | [`engine`], [`uring`] | blocking calls, or io_uring |
//! | [`disk`] | the file or block device |
//! | [`vhost_user`] | a drive that another process serves instead |

mod disk;
mod drive;
mod engine;
mod pace;
mod polling;
mod request;
mod server;
mod task;
mod uring;
mod vhost_user;

use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::epoll::{Epoll, EventSet};

pub use disk::BlockError;
use disk::{Abilities, Disk, DiskFile};
use drive::{Drive, MAX_CLEARED_SECTORS};
use engine::Engine;
use server::Server;
use uring::Uring;
pub use vhost_user::{VhostUserBlock, VhostUserBlockConfig};

use super::device::{Activation, DeviceError, EventSource, VirtioDevice};
use crate::counter::{Counters, counters};
use crate::rate_limiter::{LimiterConfig, LimiterUpdate, RateLimiter};

/// Descriptors in a request queue.
const QUEUE_SIZE: u16 = 256;

/// Data segments in one request: the queue's size less the descriptors of header and status. A driver that is
/// not told any number uses a single segment.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// A hint for the alignment of discards: the usual block of a file system, 4 KiB, in sectors.
const DISCARD_ALIGNMENT: u32 = 8;

/// Length of the configuration space: struct virtio_blk_config up to write_zeroes_may_unmap and its padding.
const CONFIG_LEN: usize = 60;

/// Where the configuration space says how many queues there are, in 16 bits.
const NUM_QUEUES_AT: usize = 34;

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

/// How requests reach the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEngine {
    /// By blocking calls, one after the other.
    Sync,
    /// By io_uring, many at a time; by blocking calls where the kernel does not let us.
    Async,
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
    /// How requests are carried out.
    pub engine: IoEngine,
    /// Request queues, 1 or more. One thread serves them all.
    pub queues: u16,
    /// Limits of its requests, and of the bytes that they read and write.
    pub limiter: LimiterConfig,
}

counters! {
    /// What a drive counts.
    BlockCounters {
        /// Kicks of its queues.
        queue_event_count,
        /// Times that the limiter let waiting requests go on.
        rate_limiter_event_count,
        /// Requests that had to wait for the limiter.
        rate_limiter_throttled_events,
        /// Chains that are no request.
        invalid_reqs_count,
        /// Requests that failed on the disk.
        execute_fails,
        /// Reads that were done.
        read_count,
        /// Bytes that they read.
        read_bytes,
        /// Writes that were done, zeroing included.
        write_count,
        /// Bytes that they wrote.
        write_bytes,
        /// Flushes that were done.
        flush_count,
        /// Discards that were done.
        discard_count,
        /// Changes of the file behind the drive.
        update_count,
        /// Those that failed.
        update_fails,
    }
}

/// A virtio block device.
pub struct Block {
    drive: Drive,
    limiter: RateLimiter,
    features: u64,
    config: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    /// For [`IoEngine::Async`]: ready to read when something that io_uring does has ended.
    completions: Option<Epoll>,
    fallen_back: bool,
    running: Option<Server>,
    counters: Arc<BlockCounters>,
}

impl Block {
    /// Opens the drive's file. Its capacity is the file's size now, in whole sectors of 512 bytes.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let disk = DiskFile::open(&config.id, &config.path, config.read_only)?;
        let failed = |what| {
            let id = config.id.clone();
            move |source| BlockError::Descriptor { id, what, source }
        };
        let limiter = RateLimiter::new(config.limiter).map_err(failed("a timer for its rate_limiter"))?;
        let completions = match config.engine {
            IoEngine::Sync => None,
            IoEngine::Async => Some(Epoll::new().map_err(failed("an epoll for its io_uring"))?),
        };
        let sectors = disk.sectors();
        let mut block = Self::with_disk(config, Box::new(disk), sectors, limiter);
        block.completions = completions;
        Ok(block)
    }

    fn with_disk(config: BlockConfig, disk: Box<dyn Disk>, sectors: u64, limiter: RateLimiter) -> Self {
        let mut features = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_BLK_F_SEG_MAX;
        let abilities = disk.abilities();
        for (offered, feature) in [
            (config.read_only, VIRTIO_BLK_F_RO),
            (config.cache == CacheType::Writeback, VIRTIO_BLK_F_FLUSH),
            (config.queues > 1, VIRTIO_BLK_F_MQ),
            // A table for each request costs both sides more than it saves, unless the ring would be too short for
            // what can be in flight. Blocking calls have one request in flight.
            (config.engine == IoEngine::Async, VIRTIO_RING_F_INDIRECT_DESC),
            (abilities.discard, VIRTIO_BLK_F_DISCARD),
            (abilities.zero, VIRTIO_BLK_F_WRITE_ZEROES),
        ] {
            features |= u64::from(offered) << feature;
        }
        let mut block = Self {
            drive: Drive::new(config.id, disk, sectors, config.read_only, config.cache),
            limiter,
            features,
            config: configuration_space(config.queues, abilities),
            queue_sizes: vec![QUEUE_SIZE; usize::from(config.queues.max(1))],
            completions: None,
            fallen_back: false,
            running: None,
            counters: Arc::default(),
        };
        block.tell_capacity();
        block
    }

    /// Has the driver read the capacity.
    fn tell_capacity(&mut self) {
        self.config[..8].copy_from_slice(&self.drive.sectors.to_le_bytes());
    }

    /// Puts the file that is now at `path` in the place of the drive's file, also when the path is the same: another
    /// file may be there by now. The capacity becomes that of the new file; what may be done with the drive stays
    /// as it was. What is in flight on the old file ends there; what has only half been done begins anew on the new
    /// one. On an error nothing changes.
    ///
    /// To be called through [`Slot::update`](super::slot::Slot::update), which tells the driver.
    pub fn reopen(&mut self, path: &Path) -> Result<(), BlockError> {
        self.counters.update_count.inc();
        let disk = DiskFile::open(&self.drive.id, path, self.drive.read_only)
            .inspect_err(|_| self.counters.update_fails.inc())?;
        let sectors = disk.sectors();
        match &mut self.running {
            Some(server) => {
                if let Err(error) = server.replace_disk(&mut self.drive, Box::new(disk), sectors) {
                    // The next event meets it again, and then the device needs a reset.
                    log::debug!("drive {}: {}", self.drive.id, resources::chain(&error));
                }
            }
            None => self.drive.replace_disk(Box::new(disk), sectors),
        }
        self.tell_capacity();
        Ok(())
    }

    /// Changes the limits from the next request on, and of the one that waits.
    pub fn set_limiter(&mut self, update: LimiterUpdate) {
        self.limiter.update(update);
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        match &mut self.running {
            Some(server) => server.serve(&mut self.drive, &mut self.limiter),
            None => Ok(()),
        }
    }

    /// What carries out the requests. Runs on the thread that serves the device.
    fn engine(&mut self) -> Engine {
        let Some(completions) = &self.completions else { return Engine::Blocking };
        match Uring::new(self.drive.disk.fd(), completions) {
            Ok(ring) => Engine::Uring(Box::new(ring)),
            Err(error) => {
                // Drivers can start a device as often as they like.
                let level = if self.fallen_back { log::Level::Debug } else { log::Level::Warn };
                self.fallen_back = true;
                log::log!(
                    level,
                    "drive {}: io_engine \"Async\" cannot be had, so requests are blocking as with \"Sync\": {}",
                    self.drive.id,
                    resources::chain(&error)
                );
                Engine::Blocking
            }
        }
    }
}

/// The configuration space of a drive of no capacity (virtio 1.2, section 5.2.4). Fields of features that are not
/// offered are 0.
fn configuration_space(queues: u16, abilities: Abilities) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |offset: usize, value: u32| space[offset..][..4].copy_from_slice(&value.to_le_bytes());
    put(12, SEG_MAX);
    if abilities.discard {
        // max_discard_sectors, max_discard_seg, discard_sector_alignment
        put(36, MAX_CLEARED_SECTORS);
        put(40, 1);
        put(44, DISCARD_ALIGNMENT);
    }
    if abilities.zero {
        // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
        put(48, MAX_CLEARED_SECTORS);
        put(52, 1);
        put(56, 1);
    }
    if queues > 1 {
        space[NUM_QUEUES_AT..][..2].copy_from_slice(&queues.to_le_bytes());
    }
    space
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if activation.queues.iter().all(Option::is_none) {
            return Err(DeviceError::Driver("did not enable any request queue of a drive"));
        }
        let has = |feature: u32| activation.features & (1 << feature) != 0;
        // Virtio 1.2, section 5.2.5.1: a driver without flushes may take writes for durable.
        self.drive.flush_each_write = self.drive.cache == CacheType::Writeback && !has(VIRTIO_BLK_F_FLUSH);
        self.drive.negotiated =
            Abilities { discard: has(VIRTIO_BLK_F_DISCARD), zero: has(VIRTIO_BLK_F_WRITE_ZEROES) };
        let engine = self.engine();
        let counters = Arc::clone(&self.counters);
        self.running = Some(Server::new(engine, activation.memory, activation.queues, counters));
        Ok(())
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }

    fn event_sources(&self) -> Vec<EventSource> {
        let timer =
            EventSource { fd: self.limiter.as_raw_fd(), events: EventSet::IN | EventSet::EDGE_TRIGGERED };
        // Ready only while there is something to take from a ring.
        let completions =
            self.completions.iter().map(|epoll| EventSource { fd: epoll.as_raw_fd(), events: EventSet::IN });
        std::iter::once(timer).chain(completions).collect()
    }

    fn queue_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.counters.queue_event_count.inc();
        self.serve()
    }

    fn source_event(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        if fd == self.limiter.as_raw_fd() {
            self.counters.rate_limiter_event_count.inc();
            self.limiter.event();
        }
        self.serve()
    }

    fn reset(&mut self) {
        // Waits for what is in flight.
        self.running = None;
        self.limiter.release();
    }
}

#[cfg(test)]
mod tests;
