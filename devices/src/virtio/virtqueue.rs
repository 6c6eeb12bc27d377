//! A running split virtqueue: the ring, its kick and its interrupt, with every check on what the guest wrote.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileMemory, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

pub use super::chain::Chain;
use super::interrupt::{Interrupt, Vector};
use super::lookup::in_one_piece;

/// What can be wrong with a ring.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A part of the ring is not in guest memory, or not in one piece of it.
    #[error("queue {queue}: the {part} of {len} bytes at {address:#x} is not in guest memory")]
    Ring {
        /// Index of the queue.
        queue: u16,
        /// Which part.
        part: &'static str,
        /// Its guest physical address.
        address: u64,
        /// Its length in bytes.
        len: usize,
    },
    /// The available ring names a descriptor that does not exist.
    #[error("queue {queue}: the available ring names descriptor {head} in a table of {size}")]
    Head {
        /// Index of the queue.
        queue: u16,
        /// The descriptor.
        head: u16,
        /// The size of the queue.
        size: u16,
    },
    /// The available ring's index or place makes no sense.
    #[error("queue {queue}: the available ring cannot be followed: {reason}")]
    Available {
        /// Index of the queue.
        queue: u16,
        /// What virtio-queue says.
        reason: virtio_queue::Error,
    },
    /// The used ring cannot be written.
    #[error("queue {queue}: the used ring cannot be written: {reason}")]
    Used {
        /// Index of the queue.
        queue: u16,
        /// What virtio-queue says.
        reason: virtio_queue::Error,
    },
    /// The interrupt or the kick eventfd failed.
    #[error("queue {queue}: could not signal an eventfd")]
    Signal {
        /// Index of the queue.
        queue: u16,
        /// What the host said.
        source: io::Error,
    },
}

/// How many bytes a device moves for one event before it leaves the rest to a kick of its own: enough for the cost
/// of another event not to matter, and little enough for other devices not to wait long, however large the
/// requests.
pub const BYTES_PER_EVENT: u64 = 4 << 20;

/// What became of a chain, for [`Virtqueue::serve_while`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It was used, with this many bytes written into it.
    Used(u32),
    /// Likewise, and that is enough for one event.
    Last(u32),
    /// It stays in the ring. Whoever says so comes back without a kick.
    Held,
}

/// The three parts of a queue: what it is called, its address, and its length in bytes (virtio 1.2, section 2.7, with
/// the fields of VIRTIO_F_EVENT_IDX).
fn parts(queue: &Queue) -> [(&'static str, u64, usize); 3] {
    let size = usize::from(queue.size());
    [
        ("descriptor table", queue.desc_table(), 16 * size),
        ("available ring", queue.avail_ring(), 6 + 2 * size),
        ("used ring", queue.used_ring(), 6 + 8 * size),
    ]
}

/// Checks that all three parts of queue `index` lie in guest memory, each in one region of it: then a part is
/// in one piece in our address space too, as vhost needs it.
pub fn check_ring(index: u16, queue: &Queue, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
    for (part, address, len) in parts(queue) {
        memory.get_slice(GuestAddress(address), len).map_err(|_| QueueError::Ring {
            queue: index,
            part,
            address,
            len,
        })?;
    }
    Ok(())
}

/// Where the descriptor table, the available and the used ring are in our address space, if each is in one piece of
/// guest memory.
pub fn ring_addresses(queue: &Queue, memory: &GuestMemoryMmap) -> Option<[u64; 3]> {
    let [table, available, used] = parts(queue).map(|(_, address, len)| {
        let slice = memory.get_slice(GuestAddress(address), len).ok()?;
        u64::try_from(slice.ptr_guard().as_ptr().addr()).ok()
    });
    Some([table?, available?, used?])
}

/// Signals an eventfd. One whose counter is full is as signalled as can be.
pub(super) fn signal(event: &EventFd) -> io::Result<()> {
    match event.write(1) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        result => result,
    }
}

/// One queue of a started device.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    /// The used index that the driver was told of last.
    told: u16,
}

impl Virtqueue {
    /// Puts a ring, checked with [`check_ring`], together with its eventfds.
    pub fn new(index: u16, queue: Queue, kick: Arc<EventFd>, interrupt: Arc<dyn Interrupt>) -> Self {
        let told = queue.next_used();
        Self { index, queue, kick, interrupt, told }
    }

    /// Index of the queue in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The ring itself, for those who hand its addresses on (vhost).
    pub fn ring(&self) -> &Queue {
        &self.queue
    }

    /// The eventfd that the driver's notifications arrive at.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the next available chain.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, QueueError> {
        let (queue, size, next) = (self.index, self.queue.size(), self.queue.next_avail());
        let added = self.available_field(memory, 2, Ordering::Acquire)?.wrapping_sub(next);
        if added == 0 {
            return Ok(None);
        }
        // A driver that adds more than there is room for would keep us busy with the same chains.
        if added > size {
            return Err(QueueError::Available { queue, reason: virtio_queue::Error::InvalidAvailRingIndex });
        }
        let head = self.available_field(memory, 4 + 2 * u64::from(next % size), Ordering::Relaxed)?;
        if head >= size {
            return Err(QueueError::Head { queue, head, size });
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(Chain::new(memory, self.queue.desc_table(), size, head)))
    }

    /// Whether [`Self::pop`] has something to say, be it an error.
    pub fn has_available(&self, memory: &GuestMemoryMmap) -> bool {
        let index = self.available_field(memory, 2, Ordering::Acquire);
        index.map_or(true, |index| index != self.queue.next_avail())
    }

    /// Gives the chain taken last back to the available ring: it will be popped again.
    pub fn undo_pop(&mut self) {
        self.undo_pops(1);
    }

    /// Gives the `count` chains taken last back likewise.
    pub fn undo_pops(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Returns chain `head` to the driver with `written` bytes written into it.
    pub fn push_used(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_used_together(memory, &[(head, written)])
    }

    /// Returns chains, by their heads, to the driver with as many bytes written into each. The driver sees all of them
    /// at once: it never finds the beginning of a packet without its end.
    pub fn push_used_together(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let mut next = self.queue.next_used();
        for &(head, written) in chains {
            let offset = 4 + 8 * u64::from(next % self.queue.size());
            let entry = self.used_part(memory, offset, size_of::<[u32; 2]>())?;
            let Ok(entry) = entry.get_ref(0) else {
                return Err(self.used(outside(self.queue.used_ring(), offset)));
            };
            entry.store([u32::from(head).to_le(), written.to_le()]);
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        self.store_used_field(memory, 2, next, Ordering::Release)
    }

    /// Interrupts the driver if something was pushed since the last call and it wants to hear of it (virtio 1.2,
    /// section 2.7.7).
    pub fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let used = self.queue.next_used();
        let old = std::mem::replace(&mut self.told, used);
        if old == used {
            return Ok(());
        }
        // What the driver wants is read after it can see the used index.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            let event =
                self.available_field(memory, 4 + 2 * u64::from(self.queue.size()), Ordering::Relaxed)?;
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(old)
        } else {
            u32::from(self.available_field(memory, 0, Ordering::Relaxed)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            let queue = self.index;
            self.interrupt
                .trigger(Vector::Queue(queue))
                .map_err(|source| QueueError::Signal { queue, source })?;
        }
        Ok(())
    }

    /// Goes on where whoever served this ring before us has stopped: behind what was used last. Returns the used index.
    pub fn resume_after_used(&mut self, memory: &GuestMemoryMmap) -> Result<u16, QueueError> {
        let used = self.queue.used_idx(memory, Ordering::Acquire).map_err(|reason| self.used(reason))?;
        self.queue.set_next_avail(used.0);
        self.queue.set_next_used(used.0);
        self.told = used.0;
        Ok(used.0)
    }

    /// After [`Self::resume_after_used`]: returns the chains that whoever served this ring before us had taken, by their
    /// heads, with as many bytes written as `each` says, and goes on behind them. One whose place in the available ring
    /// the driver has used again meanwhile is not found, and stays out.
    pub fn answer_taken(
        &mut self,
        memory: &GuestMemoryMmap,
        heads: &[u16],
        mut each: impl FnMut(Chain<'_>) -> u32,
    ) -> Result<(), QueueError> {
        let size = self.queue.size();
        let taken = u16::try_from(heads.len()).unwrap_or(u16::MAX);
        let behind = self.queue.next_avail().wrapping_add(taken);
        let end = self.available_field(memory, 2, Ordering::Acquire)?;
        for &head in heads {
            for position in (1..=size).map(|back| end.wrapping_sub(back)) {
                if self.available_field(memory, 4 + 2 * u64::from(position % size), Ordering::Relaxed)?
                    != head
                {
                    continue;
                }
                self.queue.set_next_avail(position);
                if let Some(chain) = self.pop(memory)? {
                    let written = each(chain);
                    self.push_used(memory, head, written)?;
                }
                break;
            }
        }
        self.queue.set_next_avail(behind);
        Ok(())
    }

    /// Asks for a kick when the driver adds chains; `true` if some arrived meanwhile and no kick may follow.
    pub fn enable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue.enable_notification(memory).map_err(|reason| self.used(reason))
    }

    /// Asks for a kick only when the driver has added `count` chains; `true` if they are there and no kick may
    /// follow. `None` without VIRTIO_F_EVENT_IDX, which this takes (virtio 1.2, section 2.7.10).
    pub fn enable_kick_after(
        &mut self,
        memory: &GuestMemoryMmap,
        count: u16,
    ) -> Result<Option<bool>, QueueError> {
        if !self.queue.event_idx_enabled() {
            return Ok(None);
        }
        // With fewer descriptors than that the kick would never come.
        let count = count.min(self.queue.size() / 2).max(1);
        let next = self.queue.next_avail();
        let event = next.wrapping_add(count - 1);
        self.store_used_field(memory, 4 + 8 * u64::from(self.queue.size()), event, Ordering::Relaxed)?;
        // What the driver has added is read after it can see what we want.
        fence(Ordering::SeqCst);
        let available = self.available_field(memory, 2, Ordering::Relaxed)?;
        Ok(Some(available.wrapping_sub(next) >= count))
    }

    /// Asks for no kicks; a hint that the driver may ignore.
    pub fn disable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        self.queue.disable_notification(memory).map_err(|reason| self.used(reason))
    }

    /// Hands every available chain to `each`, which returns the number of bytes that it wrote, then
    /// interrupts the driver. A driver that refills as fast as it is served gets one ring's worth of chains;
    /// the rest waits for a kick that is sent to ourselves, so that other devices have their turn.
    pub fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        mut each: impl FnMut(Chain<'_>) -> u32,
    ) -> Result<(), QueueError> {
        self.serve_while(memory, |chain| Turn::Used(each(chain)))
    }

    /// As [`Self::serve`], for as long as `each` wants. After [`Turn::Last`] the rest waits for a kick that is sent
    /// to ourselves; after [`Turn::Held`] the driver is asked for none, and none is sent.
    pub fn serve_while(
        &mut self,
        memory: &GuestMemoryMmap,
        mut each: impl FnMut(Chain<'_>) -> Turn,
    ) -> Result<(), QueueError> {
        self.disable_kicks(memory)?;
        // Every turn counts, also one that finds nothing though the index says that there is something.
        for _ in 0..self.queue.size() {
            if let Some(chain) = self.pop(memory)? {
                let head = chain.head_index();
                match each(chain) {
                    Turn::Used(written) => self.push_used(memory, head, written)?,
                    Turn::Last(written) => {
                        self.push_used(memory, head, written)?;
                        break;
                    }
                    Turn::Held => {
                        self.undo_pop();
                        return self.notify(memory);
                    }
                }
            } else if self.enable_kicks(memory)? {
                self.disable_kicks(memory)?;
            } else {
                return self.notify(memory);
            }
        }
        self.notify(memory)?;
        self.kick_again()
    }

    /// Sends ourselves a kick, so that other devices have their turn before this queue goes on. The driver's kicks
    /// may be disabled meanwhile: this one is certain to come.
    pub fn kick_again(&self) -> Result<(), QueueError> {
        signal(&self.kick).map_err(|source| QueueError::Signal { queue: self.index, source })
    }

    /// The `len` bytes at `offset` of the used ring.
    fn used_part<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'m>, QueueError> {
        let start = self.queue.used_ring();
        part_at(memory, start, offset, len).ok_or_else(|| self.used(outside(start, offset)))
    }

    /// Sets the 16 bits at `offset` of the used ring.
    fn store_used_field(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        value: u16,
        order: Ordering,
    ) -> Result<(), QueueError> {
        let field = self.used_part(memory, offset, size_of::<u16>())?;
        let Ok(field) = field.get_atomic_ref::<AtomicU16>(0) else {
            return Err(self.used(outside(self.queue.used_ring(), offset)));
        };
        field.store(value.to_le(), order);
        Ok(())
    }

    /// The 16 bits at `offset` of the available ring.
    fn available_field(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        order: Ordering,
    ) -> Result<u16, QueueError> {
        let start = self.queue.avail_ring();
        if let Some(field) = part_at(memory, start, offset, size_of::<u16>())
            && let Ok(field) = field.get_atomic_ref::<AtomicU16>(0)
        {
            return Ok(u16::from_le(field.load(order)));
        }
        Err(QueueError::Available { queue: self.index, reason: outside(start, offset) })
    }

    fn used(&self, reason: virtio_queue::Error) -> QueueError {
        QueueError::Used { queue: self.index, reason }
    }
}

/// The `len` bytes at `offset` of a part of a ring that begins at `start`.
fn part_at(memory: &GuestMemoryMmap, start: u64, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
    in_one_piece(memory, GuestAddress(start.checked_add(offset)?), len)
}

/// Why there is nothing to access at `offset` of a part that begins at `start`.
#[cold]
fn outside(start: u64, offset: u64) -> virtio_queue::Error {
    let address = GuestAddress(start.saturating_add(offset));
    virtio_queue::Error::GuestMemory(GuestMemoryError::InvalidGuestAddress(address))
}

#[cfg(test)]
mod tests;
