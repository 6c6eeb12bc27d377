//! A running split virtqueue: the ring, its kick and its interrupt, with every check on what the guest wrote.

use std::io;
use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::{Interrupt, Vector};

/// A descriptor chain that the driver made available.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// What can be wrong with a ring.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
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

/// One queue of a started device.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
}

impl Virtqueue {
    /// Puts a ring, checked to lie in guest memory, together with its eventfds.
    pub fn new(index: u16, queue: Queue, kick: Arc<EventFd>, interrupt: Arc<dyn Interrupt>) -> Self {
        Self { index, queue, kick, interrupt }
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
        match self.queue.iter(memory) {
            Ok(mut chains) => Ok(chains.next()),
            Err(reason) => Err(QueueError::Available { queue: self.index, reason }),
        }
    }

    /// Gives the chain taken last back to the available ring: it will be popped again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns chain `head` to the driver with `written` bytes written into it.
    pub fn push_used(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<(), QueueError> {
        let queue = self.index;
        self.queue.add_used(memory, head, written).map_err(|reason| QueueError::Used { queue, reason })
    }

    /// Interrupts the driver if it wants to hear of what was pushed since the last call.
    pub fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let queue = self.index;
        let wanted =
            self.queue.needs_notification(memory).map_err(|reason| QueueError::Used { queue, reason })?;
        if wanted {
            self.interrupt
                .trigger(Vector::Queue(queue))
                .map_err(|source| QueueError::Signal { queue, source })?;
        }
        Ok(())
    }

    /// Asks for a kick when the driver adds chains; `true` if some arrived meanwhile and no kick may follow.
    pub fn enable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let queue = self.index;
        self.queue.enable_notification(memory).map_err(|reason| QueueError::Used { queue, reason })
    }

    /// Asks for no kicks; a hint that the driver may ignore.
    pub fn disable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let queue = self.index;
        self.queue.disable_notification(memory).map_err(|reason| QueueError::Used { queue, reason })
    }

    /// Hands every available chain to `each`, which returns the number of bytes that it wrote, then
    /// interrupts the driver. A driver that refills as fast as it is served gets one ring's worth of chains;
    /// the rest waits for a kick that is sent to ourselves, so that other devices have their turn.
    pub fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        mut each: impl FnMut(Chain<'_>) -> u32,
    ) -> Result<(), QueueError> {
        let mut left = self.queue.size();
        self.disable_kicks(memory)?;
        loop {
            let Some(chain) = self.pop(memory)? else {
                if self.enable_kicks(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let written = each(chain);
            self.push_used(memory, head, written)?;
            left -= 1;
            if left == 0 {
                self.enable_kicks(memory)?;
                let queue = self.index;
                self.kick.write(1).map_err(|source| QueueError::Signal { queue, source })?;
                break;
            }
        }
        self.notify(memory)
    }
}
