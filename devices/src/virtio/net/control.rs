//! The control queue (virtio 1.2, section 5.1.6.5), on which one command is known: how many pairs of queues are in use.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::GuestMemoryMmap;

use crate::virtio::iovec::{ChainBuffers, ChainIovecs};
use crate::virtio::virtqueue::{QueueError, Virtqueue};

/// Answers what waits in `queue`. `set_pairs` uses that many pairs from now on, or says that it does not.
pub(super) fn serve(
    queue: &mut Virtqueue,
    memory: &GuestMemoryMmap,
    iovecs: &mut ChainIovecs,
    mut set_pairs: impl FnMut(u16) -> bool,
) -> Result<(), QueueError> {
    queue.serve(memory, |chain| {
        let Ok(buffers) = iovecs.fill(chain, memory) else { return 0 };
        // Nothing is done that cannot be answered.
        if buffers.writable_len() == 0 {
            return 0;
        }
        let done = pairs(&buffers).is_some_and(&mut set_pairs);
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        buffers.write_at(0, &answer.to_le_bytes()[..1]).map_or(0, |()| 1)
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
