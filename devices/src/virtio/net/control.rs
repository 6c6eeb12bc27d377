//! The control queue (virtio 1.2, section 5.1.6.5), on which one command is known: how many pairs of queues are in use.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::device::{DeviceError, Memory};
use crate::virtio::iovec::{ChainBuffers, ChainIovecs};
use crate::virtio::virtqueue::{QueueError, Turn, Virtqueue};

/// Waits for the kicks of a control queue. Which queue that is depends on the driver's features, and the event loop keeps
/// away from the kicks of a device that others serve.
pub(super) struct KickWatch {
    epoll: Epoll,
    watched: Option<RawFd>,
}

impl KickWatch {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, watched: None })
    }

    /// Becomes readable with the kick given to [`Self::watch`].
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Waits for `kick`, which has to live until [`Self::stop`].
    pub(super) fn watch(&mut self, kick: &EventFd) -> Result<(), DeviceError> {
        let fd = kick.as_raw_fd();
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).map_err(|source| {
            DeviceError::Host { doing: "could not wait for the kicks of a control queue".to_owned(), source }
        })?;
        self.watched = Some(fd);
        Ok(())
    }

    /// Waits for nothing any more.
    pub(super) fn stop(&mut self) {
        if let Some(fd) = self.watched.take()
            && let Err(error) = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())
        {
            log::debug!("could not end waiting for a control queue: {error}");
        }
    }
}

/// How many pairs of queues of a started interface are in use, and who is asked to change that.
pub(super) struct Control {
    memory: Memory,
    /// `None` with a driver that does not know of it.
    queue: Option<Virtqueue>,
    iovecs: ChainIovecs,
    /// Pairs that the driver enabled.
    pairs: usize,
    /// Pairs in use.
    active: usize,
}

impl Control {
    /// The first of `pairs` is in use, until the driver says how many (virtio 1.2, section 5.1.6.5.5).
    pub(super) fn new(memory: Memory, queue: Option<Virtqueue>, pairs: usize) -> Self {
        Self { memory, queue, iovecs: ChainIovecs::new(), pairs, active: 1 }
    }

    /// Pairs in use, 1 or more.
    pub(super) fn active(&self) -> usize {
        self.active
    }

    /// Whether the queue of this index is the control queue.
    pub(super) fn is_queue(&self, index: usize) -> bool {
        self.queue.as_ref().is_some_and(|queue| usize::from(queue.index()) == index)
    }

    /// Answers the next command. `set_active` is given how many pairs are in use and how many are to be; it says whether
    /// it has done that, and notes how many are.
    pub(super) fn serve(
        &mut self,
        mut set_active: impl FnMut(&mut usize, usize) -> bool,
    ) -> Result<(), QueueError> {
        let Self { memory, queue: Some(queue), iovecs, pairs, active } = self else { return Ok(()) };
        // Before what it announces is done, so that nothing announced meanwhile is lost.
        let _ = queue.kick().read();
        serve(queue, &memory.memory(), iovecs, |count| {
            let count = usize::from(count);
            (1..=*pairs).contains(&count) && set_active(active, count)
        })
    }
}

/// Answers the next command in `queue`; others wait for a kick of our own, because the host may take milliseconds for
/// one. `set_pairs` uses that many pairs from now on, or says that it does not.
fn serve(
    queue: &mut Virtqueue,
    memory: &GuestMemoryMmap,
    iovecs: &mut ChainIovecs,
    mut set_pairs: impl FnMut(u16) -> bool,
) -> Result<(), QueueError> {
    queue.serve_while(memory, |chain| {
        let Ok(buffers) = iovecs.fill(chain, memory) else { return Turn::Used(0) };
        // Nothing is done that cannot be answered.
        if buffers.writable_len() == 0 {
            return Turn::Used(0);
        }
        let done = pairs(&buffers).is_some_and(&mut set_pairs);
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        Turn::Last(buffers.write_at(0, &answer.to_le_bytes()[..1]).map_or(0, |()| 1))
    })
}

/// The number of pairs that a command asks for, if it does: class, command, and a number of 16 bits.
fn pairs(command: &ChainBuffers<'_>) -> Option<u16> {
    let mut bytes = [0; 4];
    command.read_at(0, &mut bytes).ok()?;
    let [class, code, low, high] = bytes;
    let known = u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(code) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    known.then(|| u16::from_le_bytes([low, high]))
}

#[cfg(test)]
mod tests;
