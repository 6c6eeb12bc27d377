//! What a guest says of its memory (virtio 1.2, section 5.5.6.3). The driver lends a buffer with numbers; we keep
//! it, and return it when we want new ones.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::{BalloonCounters, BalloonError};
use crate::virtio::device::{DeviceError, EventSource};
use crate::virtio::iovec::{ChainBuffers, ChainError, ChainIovecs};
use crate::virtio::virtqueue::{QueueError, Virtqueue, signal};

/// Bytes of one number: a tag of 16 bits and a value of 64, without padding.
const RECORD: usize = 10;
/// The most numbers looked at in one buffer; there are 16 tags so far.
const MAX_RECORDS: usize = 256;

/// What there is to know of a balloon, and of its guest's memory: a number that the guest did not give is
/// `None`. All are the guest's word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// How much the driver was asked for, in pages of 4 KiB.
    pub target_pages: u32,
    /// How much the driver says that there is in the balloon, in pages of 4 KiB.
    pub actual_pages: u32,
    /// `target_pages` in whole MiB.
    pub target_mib: u32,
    /// `actual_pages` in whole MiB.
    pub actual_mib: u32,
    /// Memory swapped in, in bytes.
    pub swap_in: Option<u64>,
    /// Memory swapped out, in bytes.
    pub swap_out: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Other page faults.
    pub minor_faults: Option<u64>,
    /// Memory that is not used for anything, in bytes.
    pub free_memory: Option<u64>,
    /// All memory that the guest has, in bytes.
    pub total_memory: Option<u64>,
    /// Memory to be had for new programs without swapping, as an estimate, in bytes.
    pub available_memory: Option<u64>,
    /// Memory that holds copies of what is on disks, in bytes.
    pub disk_caches: Option<u64>,
    /// Huge pages allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    pub hugetlb_failures: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kill: Option<u64>,
    /// Allocations that had to wait for memory.
    pub alloc_stall: Option<u64>,
    /// Pages scanned by the guest's reclaiming thread.
    pub async_scan: Option<u64>,
    /// Pages scanned by those who wanted memory.
    pub direct_scan: Option<u64>,
    /// Pages reclaimed by the guest's reclaiming thread.
    pub async_reclaim: Option<u64>,
    /// Pages reclaimed by those who wanted memory.
    pub direct_reclaim: Option<u64>,
}

impl Stats {
    /// Takes what the readable part of `buffers` holds. Unknown tags are passed over; the last of several
    /// numbers with the same tag counts.
    fn parse(buffers: &ChainBuffers<'_>) -> Result<Self, ChainError> {
        let mut bytes = [0; RECORD * MAX_RECORDS];
        let have = usize::try_from(buffers.readable_len()).unwrap_or(usize::MAX) / RECORD;
        let bytes = &mut bytes[..RECORD * have.min(MAX_RECORDS)];
        buffers.read_at(0, bytes)?;
        let mut stats = Self::default();
        let (records, _) = bytes.as_chunks::<RECORD>();
        for [tag_low, tag_high, value @ ..] in records {
            if let Some(field) = stats.field(u16::from_le_bytes([*tag_low, *tag_high])) {
                *field = Some(u64::from_le_bytes(*value));
            }
        }
        Ok(stats)
    }

    /// The number that a tag means: VIRTIO_BALLOON_S_* (section 5.5.6.4; from 10 on as in Linux).
    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kill,
            11 => &mut self.alloc_stall,
            12 => &mut self.async_scan,
            13 => &mut self.direct_scan,
            14 => &mut self.async_reclaim,
            15 => &mut self.direct_reclaim,
            _ => return None,
        })
    }
}

/// Asks the driver for statistics at intervals.
pub(super) struct StatsPoll {
    interval_s: u16,
    /// Armed while there is a queue.
    timer: TimerFd,
    latest: Stats,
    queue: Option<Virtqueue>,
    /// The driver's buffer, kept until the timer expires.
    held: Option<u16>,
}

impl StatsPoll {
    /// Makes the timer. `interval_s` is greater than 0.
    pub(super) fn new(interval_s: u16) -> Result<Self, BalloonError> {
        let timer = new_timer().map_err(|source| BalloonError::Timer { doing: "make", source })?;
        Ok(Self { interval_s, timer, latest: Stats::default(), queue: None, held: None })
    }

    pub(super) fn interval_s(&self) -> u16 {
        self.interval_s
    }

    /// Sets an interval greater than 0, which starts now.
    pub(super) fn set_interval_s(&mut self, interval_s: u16) -> Result<(), BalloonError> {
        self.interval_s = interval_s;
        if self.queue.is_none() {
            return Ok(());
        }
        self.arm().map_err(|source| BalloonError::Timer { doing: "set", source })
    }

    /// What the driver said last, without the size of the balloon.
    pub(super) fn latest(&self) -> Stats {
        self.latest
    }

    /// The timer. Edge triggered, for the case that it expires just before a reset.
    pub(super) fn event_source(&self) -> EventSource {
        EventSource { fd: self.timer.as_raw_fd(), events: EventSet::IN | EventSet::EDGE_TRIGGERED }
    }

    /// The driver enabled `queue`.
    pub(super) fn start(&mut self, queue: Virtqueue) -> Result<(), DeviceError> {
        self.queue = Some(queue);
        self.arm().map_err(|source| DeviceError::Host {
            doing: "could not set the timer of the balloon's statistics".to_owned(),
            source,
        })
    }

    /// The driver reset the device; what it said does not hold any more.
    pub(super) fn stop(&mut self) {
        (self.latest, self.queue, self.held) = (Stats::default(), None, None);
        // An expiry without a queue does nothing.
        if let Err(error) = self.timer.clear() {
            log::debug!("balloon: could not stop the timer of the statistics: {error}");
        }
    }

    /// Queue `index` was kicked: if it is ours, takes the numbers that the driver lends.
    pub(super) fn receive(
        &mut self,
        index: usize,
        memory: &GuestMemoryMmap,
        iovecs: &mut ChainIovecs,
        counters: &BalloonCounters,
    ) -> Result<(), QueueError> {
        let Some(queue) = self.queue.as_mut().filter(|queue| usize::from(queue.index()) == index) else {
            return Ok(());
        };
        for _ in 0..queue.ring().size() {
            if let Some(chain) = queue.pop(memory)? {
                let head = chain.head_index();
                match iovecs.fill(chain, memory).and_then(|buffers| Stats::parse(&buffers)) {
                    Ok(stats) => {
                        counters.stats_updates_count.inc();
                        self.latest = stats;
                    }
                    Err(error) => {
                        counters.stats_update_fails.inc();
                        log::debug!("balloon: statistics: {error}");
                    }
                }
                // One is enough to ask with.
                if let Some(older) = self.held.replace(head) {
                    queue.push_used(memory, older, 0)?;
                }
            } else if !queue.enable_kicks(memory)? {
                return queue.notify(memory);
            }
        }
        // The driver lends buffers as fast as they are returned: others have their turn first.
        queue.notify(memory)?;
        signal(queue.kick()).map_err(|source| QueueError::Signal { queue: queue.index(), source })
    }

    /// The timer may have expired: if so, asks for new numbers by returning the buffer. If the driver has not
    /// answered yet, it has not lent one.
    pub(super) fn tick(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        // Fails if the timer was set anew in the meantime.
        if self.timer.wait().is_ok()
            && let Some(queue) = &mut self.queue
            && let Some(head) = self.held.take()
        {
            queue.push_used(memory, head, 0)?;
            queue.notify(memory)?;
        }
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        let interval = Duration::from_secs(self.interval_s.into());
        Ok(self.timer.reset(interval, Some(interval))?)
    }
}

/// A timer that does not block whoever asks whether it has expired, as that of `TimerFd::new` would.
fn new_timer() -> io::Result<TimerFd> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { TimerFd::from_raw_fd(fd) })
}
