//! Queues whose chains name pages that the guest does without, and how these go back to the host.

use std::io;
use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::BalloonCounters;
use crate::virtio::iovec::{ChainBuffers, ChainError, ChainIovecs};
use crate::virtio::virtqueue::{Chain, QueueError, Virtqueue, signal};

/// Bytes in a page: of the balloon's, which is fixed (virtio 1.2, section 5.5.6), and of the host's.
const PAGE: u64 = 4096;

/// What one turn of the event loop does at most: each step takes a chain or discards one piece of memory.
const STEPS: u32 = 512;
/// Where pieces end: at multiples of this, the size of a huge page, so that no huge page is split for it.
const PIECE: u64 = 2 << 20;

/// The most page numbers taken from one chain; Linux puts 256 into one, others a page full. Pages beyond stay
/// with the guest.
const MAX_NUMBERS: usize = 1024;
/// The most buffers taken from one chain; Linux uses 32. Memory beyond stays with the guest.
const MAX_BUFFERS: usize = 1024;

/// How the chains of a queue name pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// The readable buffers hold page numbers (section 5.5.6).
    Numbers,
    /// The writable buffers are the pages (section 5.5.6.7).
    Buffers,
}

/// A queue of pages to discard. It goes on from one event to the next: however much a chain names, it is
/// returned when all of it is done, and other devices have their turn in between.
pub(super) struct DiscardQueue {
    queue: Virtqueue,
    naming: Naming,
    /// The chain that `ranges` is from, to be returned when they are done.
    head: Option<u16>,
    /// What is left of it: guest memory, in whole pages.
    ranges: Vec<Range<u64>>,
    numbers: Vec<u32>,
}

impl DiscardQueue {
    /// A queue that has just been enabled.
    pub(super) fn new(queue: Virtqueue, naming: Naming) -> Self {
        Self { queue, naming, head: None, ranges: Vec::new(), numbers: Vec::new() }
    }

    /// Index of the queue in its device.
    pub(super) fn index(&self) -> usize {
        usize::from(self.queue.index())
    }

    /// Goes on with what is there to do. If some is left, kicks the queue itself.
    pub(super) fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        iovecs: &mut ChainIovecs,
        counters: &BalloonCounters,
    ) -> Result<(), QueueError> {
        for _ in 0..STEPS {
            if let Some(piece) = next_piece(&mut self.ranges) {
                match discard(memory, &piece) {
                    Ok(()) => counters.discarded_bytes.add(piece.end - piece.start),
                    Err(error) => report(counters, &piece, &error),
                }
                continue;
            }
            if let Some(head) = self.head.take() {
                self.queue.push_used(memory, head, 0)?;
            }
            if let Some(chain) = self.queue.pop(memory)? {
                self.head = Some(chain.head_index());
                match self.naming {
                    Naming::Numbers => self.collect_numbers(chain, memory, iovecs),
                    Naming::Buffers => self.collect_buffers(chain, memory),
                }
            } else if !self.queue.enable_kicks(memory)? {
                return self.queue.notify(memory);
            }
        }
        self.queue.notify(memory)?;
        let queue = self.queue.index();
        signal(self.queue.kick()).map_err(|source| QueueError::Signal { queue, source })
    }

    /// Turns the page numbers in `chain` into ranges.
    fn collect_numbers(&mut self, chain: Chain<'_>, memory: &GuestMemoryMmap, iovecs: &mut ChainIovecs) {
        self.numbers.clear();
        let read = iovecs.fill(chain, memory).and_then(|buffers| read_numbers(&buffers, &mut self.numbers));
        if let Err(error) = read {
            return log::debug!("balloon: page numbers: {error}");
        }
        self.numbers.sort_unstable();
        let mut outside = 0;
        for number in &self.numbers {
            let start = u64::from(*number) * PAGE;
            let page = start..start + PAGE;
            if !is_memory(memory, &page) {
                outside += 1;
                continue;
            }
            match self.ranges.last_mut() {
                // Next to the one before, or the same.
                Some(last) if last.end >= page.start => last.end = page.end,
                _ => self.ranges.push(page),
            }
        }
        if outside > 0 {
            log::debug!("balloon: {outside} of {} pages are not in guest memory", self.numbers.len());
        }
    }

    /// Turns the writable buffers of `chain` into ranges.
    fn collect_buffers(&mut self, chain: Chain<'_>, memory: &GuestMemoryMmap) {
        let mut outside = 0;
        for descriptor in chain.take(MAX_BUFFERS).filter(|descriptor| descriptor.is_write_only()) {
            let start = descriptor.addr().0;
            let buffer = start..start.saturating_add(u64::from(descriptor.len()));
            if !is_memory(memory, &buffer) {
                outside += 1;
                continue;
            }
            // Inwards: a page that is not wholly in the buffer is in use. No overflow: both ends are in memory.
            let pages = start.next_multiple_of(PAGE)..buffer.end - buffer.end % PAGE;
            if !pages.is_empty() {
                self.ranges.push(pages);
            }
        }
        if outside > 0 {
            log::debug!("balloon: {outside} ranges reported as free are not in guest memory");
        }
    }
}

/// Logs a failure of the host's; only the first one loudly, because the guest may repeat it at will.
fn report(counters: &BalloonCounters, piece: &Range<u64>, error: &io::Error) {
    let level = if counters.discard_fails.count() > 0 { log::Level::Debug } else { log::Level::Warn };
    counters.discard_fails.inc();
    log::log!(level, "balloon: could not give guest memory {piece:#x?} back to the host: {error}");
}

/// Copies the page numbers in the readable part of `buffers`.
fn read_numbers(buffers: &ChainBuffers<'_>, numbers: &mut Vec<u32>) -> Result<(), ChainError> {
    let mut bytes = [0; 4 * MAX_NUMBERS];
    let have = usize::try_from(buffers.readable_len() / 4).unwrap_or(usize::MAX);
    if have > MAX_NUMBERS {
        log::debug!("balloon: took {MAX_NUMBERS} of {have} page numbers");
    }
    let bytes = &mut bytes[..4 * have.min(MAX_NUMBERS)];
    buffers.read_at(0, bytes)?;
    let (whole, _) = bytes.as_chunks();
    numbers.extend(whole.iter().map(|number| u32::from_le_bytes(*number)));
    Ok(())
}

/// Whether `range` is not empty, and all of it is guest memory.
fn is_memory(memory: &GuestMemoryMmap, range: &Range<u64>) -> bool {
    let len = usize::try_from(range.end - range.start);
    len.is_ok_and(|len| len > 0 && memory.check_range(GuestAddress(range.start), len))
}

/// Takes the next piece of what is left.
pub(super) fn next_piece(ranges: &mut Vec<Range<u64>>) -> Option<Range<u64>> {
    let range = ranges.last_mut()?;
    let end = (range.start / PIECE + 1) * PIECE;
    if range.end <= end {
        return ranges.pop();
    }
    let piece = range.start..end;
    range.start = end;
    Some(piece)
}

/// Gives the host's memory behind `range`, whole pages of guest memory, back. The range then reads as zeros,
/// until the guest writes to it again. In memory that is shared with another process it is a hole.
fn discard(memory: &GuestMemoryMmap, range: &Range<u64>) -> io::Result<()> {
    let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let shared = memory.iter().any(|region| region.file_offset().is_some());
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    for slice in memory.get_slices(GuestAddress(range.start), len) {
        let slice = slice.map_err(io::Error::other)?;
        let pointer = slice.ptr_guard_mut();
        // SAFETY: the slice is guest memory, kept mapped by the borrow of `memory`; it becomes zeros as if the
        // guest had written them, and nobody makes Rust references to it. The kernel takes whole pages only,
        // and the last page of a mapping belongs to it even if the region ends within.
        let result = unsafe { libc::madvise(pointer.as_ptr().cast(), slice.len(), advice) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
