//! virtio-balloon, the traditional memory balloon (virtio 1.2, section 5.5): memory that the guest does without
//! for as long as the host wants it, and what the guest says of its memory.

mod discard;
mod stats;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;

use discard::{DiscardQueue, Naming};
pub use stats::Stats;
use stats::StatsPoll;

use super::device::{Activation, DeviceError, EventSource, Memory, VirtioDevice};
use super::iovec::ChainIovecs;
use super::virtqueue::Virtqueue;
use crate::counter::{Counters, counters};

/// Index of the queue that names pages which the guest does without.
const INFLATE: usize = 0;
/// Index of the queue that names pages which the guest uses again.
const DEFLATE: usize = 1;
/// The greatest size of each queue: inflate, deflate, statistics, free page hints (which we do not offer) and
/// free page reports. Linux reports only on a queue of 32 or more.
const QUEUE_SIZES: [u16; 5] = [256; 5];

/// Feature bits (virtio 1.2, section 5.5.3); virtio-bindings has no names for them.
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// Length of the configuration space: num_pages, which the device sets, and actual, which the driver sets.
const CONFIG_LEN: usize = 8;
/// Offset of `actual` in it.
const ACTUAL: usize = 4;

/// Pages in a MiB: the balloon counts in pages of 4 KiB, whatever the guest's are.
const MIB_PAGES: u32 = 256;
/// The largest balloon in MiB.
const AMOUNT_MAX_MIB: u32 = u32::MAX / MIB_PAGES;

/// Why a balloon cannot be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// More pages than a balloon can count.
    #[error("a balloon of {amount_mib} MiB is too large: ask for {AMOUNT_MAX_MIB} MiB at most")]
    TooLarge {
        /// What was asked for.
        amount_mib: u32,
    },
    /// A driver learns only when it starts whether there are statistics.
    #[error(
        "could not change the polling interval of the balloon's statistics from {from} s to {to} s: they can \
         only be switched on or off before the guest starts"
    )]
    StatsSwitch {
        /// The interval as it is.
        from: u16,
        /// What was asked for.
        to: u16,
    },
    /// The timer of the statistics does not work.
    #[error("could not {doing} the timer of the balloon's statistics")]
    Timer {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// What a balloon is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonConfig {
    /// How much memory the guest is to do without, in MiB.
    pub amount_mib: u32,
    /// The guest may take memory back out of the balloon rather than kill a process.
    pub deflate_on_oom: bool,
    /// How often the guest is asked for statistics, in seconds; 0 for never.
    pub stats_polling_interval_s: u16,
    /// The guest reports pages as they become free, and the host takes them back until they are used again.
    pub free_page_reporting: bool,
}

counters! {
    /// What the balloon counts.
    BalloonCounters {
        /// Kicks of the queue that names pages for the balloon.
        inflate_count,
        /// Kicks of the queue that takes pages back.
        deflate_count,
        /// Statistics that came.
        stats_updates_count,
        /// Statistics that cannot be read.
        stats_update_fails,
        /// Kicks of the queue that reports free pages.
        free_page_report_count,
        /// Bytes given back to the host, from the balloon or because they were reported free.
        discarded_bytes,
        /// Pieces of memory that the host did not take back.
        discard_fails,
    }
}

/// A virtio memory balloon.
///
/// Pages in the balloon, and pages reported as free, go back to the host with MADV_DONTNEED and read as zeros
/// when they are used again. This is right for private anonymous memory, which the guest's memory therefore
/// has to be: a page of a private file mapping would get the file's contents back instead. So whoever
/// configures a balloon copies the kernel and the initrd into guest memory and maps no file there.
pub struct Balloon {
    features: u64,
    config: [u8; CONFIG_LEN],
    queues: usize,
    /// If they are offered.
    stats: Option<StatsPoll>,
    iovecs: ChainIovecs,
    running: Option<Running>,
    counters: Arc<BalloonCounters>,
}

struct Running {
    memory: Memory,
    inflate: DiscardQueue,
    deflate: Virtqueue,
    reporting: Option<DiscardQueue>,
}

impl Balloon {
    /// A balloon with nothing in it, which the driver is to inflate to `amount_mib`.
    pub fn new(config: BalloonConfig) -> Result<Self, BalloonError> {
        let mut features =
            1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let mut queues = DEFLATE + 1;
        let mut stats = None;
        if config.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if config.stats_polling_interval_s > 0 {
            features |= F_STATS_VQ;
            queues += 1;
            stats = Some(StatsPoll::new(config.stats_polling_interval_s)?);
        }
        if config.free_page_reporting {
            features |= F_REPORTING;
            queues = QUEUE_SIZES.len();
        }
        let space = [0; CONFIG_LEN];
        let mut balloon = Self {
            features,
            config: space,
            queues,
            stats,
            iovecs: ChainIovecs::new(),
            running: None,
            counters: Arc::default(),
        };
        balloon.set_amount_mib(config.amount_mib)?;
        Ok(balloon)
    }

    /// Asks the driver to inflate or deflate the balloon to `amount_mib` MiB.
    pub fn set_amount_mib(&mut self, amount_mib: u32) -> Result<(), BalloonError> {
        let pages = amount_mib.checked_mul(MIB_PAGES).ok_or(BalloonError::TooLarge { amount_mib })?;
        self.config[..ACTUAL].copy_from_slice(&pages.to_le_bytes());
        Ok(())
    }

    /// How much the driver was asked for, in MiB.
    pub fn amount_mib(&self) -> u32 {
        self.target_pages() / MIB_PAGES
    }

    /// How much the driver says that there is in the balloon, in whole MiB.
    pub fn actual_mib(&self) -> u32 {
        self.actual_pages() / MIB_PAGES
    }

    /// Asks the driver for statistics every `interval_s` seconds, the first time one interval from now. They
    /// can be neither switched on nor off.
    pub fn set_stats_polling_interval_s(&mut self, interval_s: u16) -> Result<(), BalloonError> {
        match &mut self.stats {
            Some(stats) if interval_s > 0 => stats.set_interval_s(interval_s),
            None if interval_s == 0 => Ok(()),
            stats => {
                let from = stats.as_ref().map_or(0, StatsPoll::interval_s);
                Err(BalloonError::StatsSwitch { from, to: interval_s })
            }
        }
    }

    /// What the driver last said of the guest's memory; `None` when statistics are off.
    pub fn stats(&self) -> Option<Stats> {
        self.stats.as_ref().map(|stats| Stats {
            target_pages: self.target_pages(),
            actual_pages: self.actual_pages(),
            target_mib: self.amount_mib(),
            actual_mib: self.actual_mib(),
            ..stats.latest()
        })
    }

    fn target_pages(&self) -> u32 {
        let [a, b, c, d, ..] = self.config;
        u32::from_le_bytes([a, b, c, d])
    }

    fn actual_pages(&self) -> u32 {
        let [.., a, b, c, d] = self.config;
        u32::from_le_bytes([a, b, c, d])
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES[..self.queues]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == ACTUAL && data.len() == CONFIG_LEN - ACTUAL {
            self.config[ACTUAL..].copy_from_slice(data);
        } else {
            log::debug!("balloon: ignored a write of {} bytes at {offset} of the configuration", data.len());
        }
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }

    fn event_sources(&self) -> Vec<EventSource> {
        self.stats.iter().map(StatsPoll::event_source).collect()
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let (Some(Some(inflate)), Some(Some(deflate))) = (queues.next(), queues.next()) else {
            return Err(DeviceError::Driver("did not enable the inflate and deflate queues of a balloon"));
        };
        if activation.features & F_STATS_VQ != 0
            && let Some(stats) = &mut self.stats
            && let Some(queue) = queues.next().flatten()
        {
            stats.start(queue)?;
        }
        // Section 5.5.2 gives queue 4 to reports. Linux leaves out the indices of queues that were not
        // negotiated, and so finds it at 2 or 3; either way it is the one that is left.
        let reporting = queues.flatten().next().filter(|_| activation.features & F_REPORTING != 0);
        self.running = Some(Running {
            memory: activation.memory,
            inflate: DiscardQueue::new(inflate, Naming::Numbers),
            deflate,
            reporting: reporting.map(|queue| DiscardQueue::new(queue, Naming::Buffers)),
        });
        Ok(())
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(Running { memory, inflate, deflate, reporting }) = &mut self.running else {
            return Ok(());
        };
        let (memory, iovecs, counters) = (memory.memory(), &mut self.iovecs, &self.counters);
        match (index, reporting, &mut self.stats) {
            (INFLATE, _, _) => {
                counters.inflate_count.inc();
                inflate.serve(&memory, iovecs, counters)?;
            }
            // Nothing to do: a page comes back when it is touched.
            (DEFLATE, _, _) => {
                counters.deflate_count.inc();
                deflate.serve(&memory, |_| 0)?;
            }
            (_, Some(queue), _) if queue.index() == index => {
                counters.free_page_report_count.inc();
                queue.serve(&memory, iovecs, counters)?;
            }
            (_, _, Some(stats)) => stats.receive(index, &memory, iovecs, counters)?,
            _ => log::debug!("balloon: unexpected kick of queue {index}"),
        }
        Ok(())
    }

    fn source_event(&mut self, _fd: RawFd) -> Result<(), DeviceError> {
        if let (Some(stats), Some(running)) = (&mut self.stats, &self.running) {
            stats.tick(&running.memory.memory())?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
        if let Some(stats) = &mut self.stats {
            stats.stop();
        }
        // Whatever driver comes next has put nothing into the balloon.
        self.config[ACTUAL..].fill(0);
    }
}

#[cfg(test)]
mod tests;
