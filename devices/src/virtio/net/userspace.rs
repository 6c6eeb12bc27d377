//! Packets moved by us, between the TAP and guest memory without a copy of our own.
//!
//! A packet that cannot be passed on is dropped and counted, as a real network does: the TAP takes no more, its
//! interface is down or gone, or the driver's buffer is too short. Waiting for the TAP to take more would need
//! a queue that the guest fills at will; and its send buffer is unlimited unless somebody set TUNSETSNDBUF.

use std::io;

use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::tap::{MAX_PACKET, MIN_PACKET, Received, Tap};
use super::{HEADER_LEN, Queues};
use crate::virtio::device::{DeviceError, Memory};
use crate::virtio::iovec::ChainIovecs;
use crate::virtio::virtqueue::{QueueError, Virtqueue, signal};

/// Where the header says over how many buffers a packet is spread: always 1, because we do not offer
/// VIRTIO_NET_F_MRG_RXBUF (virtio 1.2, section 5.1.6.4.1). The TAP leaves this field alone.
const NUM_BUFFERS_AT: u32 = HEADER_LEN - 2;

/// The state of a device that moves its packets itself.
#[derive(Default)]
pub(super) struct Userspace {
    iovecs: ChainIovecs,
    running: Option<Running>,
    dropped: Dropped,
}

struct Running {
    memory: Memory,
    queues: Queues,
}

/// Packets that were lost here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Dropped {
    /// On their way to the guest.
    pub(super) to_guest: u64,
    /// On their way from the guest.
    pub(super) from_guest: u64,
}

impl Userspace {
    pub(super) fn start(&mut self, memory: Memory, queues: Queues) {
        self.running = Some(Running { memory, queues });
    }

    pub(super) fn stop(&mut self) {
        self.running = None;
    }

    /// How many packets were dropped since the device exists.
    pub(super) fn dropped(&self) -> Dropped {
        self.dropped
    }

    /// Takes packets out of the TAP until it is empty or the driver has lent no more buffers. After one
    /// ring's worth the rest waits for a kick that is sent to ourselves, so that others have their turn.
    pub(super) fn receive(&mut self, tap: &Tap) -> Result<(), DeviceError> {
        let Self { iovecs, running: Some(Running { memory, queues }), dropped } = self else {
            return Ok(());
        };
        let memory = memory.memory();
        let rx = &mut queues.rx;
        rx.disable_kicks(&memory)?;
        let mut left = rx.ring().size();
        while receive_one(tap, rx, &memory, iovecs, dropped)? {
            left -= 1;
            if left == 0 {
                signal(rx.kick()).map_err(|source| QueueError::Signal { queue: rx.index(), source })?;
                break;
            }
        }
        rx.notify(&memory)?;
        Ok(())
    }

    /// Sends what the driver made available.
    pub(super) fn send(&mut self, tap: &Tap) -> Result<(), DeviceError> {
        let Self { iovecs, running: Some(Running { memory, queues }), dropped } = self else {
            return Ok(());
        };
        let memory = memory.memory();
        queues.tx.serve(&memory, |chain| {
            let sent = match iovecs.fill(chain, &memory) {
                Ok(packet) if (MIN_PACKET..=MAX_PACKET).contains(&packet.readable_len()) => tap.send(&packet),
                Ok(packet) => Err(io::Error::other(format!("a packet of {} bytes", packet.readable_len()))),
                Err(error) => Err(io::Error::other(error)),
            };
            if let Err(error) = sent {
                dropped.from_guest += 1;
                log::debug!("TAP {}: dropped a packet of the guest: {error}", tap.name());
            }
            0
        })?;
        Ok(())
    }
}

/// Receives a packet into the next buffer that the driver lent. Returns whether it is worth trying again at
/// once: not if there is no packet, where the TAP's next event resumes, and not if there is no buffer, where the
/// driver's next kick does.
fn receive_one(
    tap: &Tap,
    rx: &mut Virtqueue,
    memory: &GuestMemoryMmap,
    iovecs: &mut ChainIovecs,
    dropped: &mut Dropped,
) -> Result<bool, DeviceError> {
    let Some(chain) = rx.pop(memory)? else {
        return Ok(rx.enable_kicks(memory)?);
    };
    let head = chain.head_index();
    let buffers = match iovecs.fill(chain, memory) {
        Ok(buffers) if buffers.writable_len() >= MIN_PACKET => buffers,
        useless => {
            log::debug!("TAP {}: gave back a buffer that holds no packet: {useless:?}", tap.name());
            rx.push_used(memory, head, 0)?;
            return Ok(true);
        }
    };
    let received = match tap.receive(&buffers) {
        Ok(Received::Packet(len)) => buffers.write_at(NUM_BUFFERS_AT, &1u16.to_le_bytes()).map(|()| len),
        Ok(Received::TooLong) => {
            dropped.to_guest += 1;
            rx.undo_pop();
            return Ok(true);
        }
        Err(error) => {
            if error.kind() != io::ErrorKind::WouldBlock {
                log::debug!("TAP {}: could not read a packet: {error}", tap.name());
            }
            rx.undo_pop();
            return Ok(false);
        }
    };
    // Not an error: the buffers have room for more than the header.
    rx.push_used(memory, head, received.unwrap_or(0))?;
    Ok(true)
}

#[cfg(test)]
mod tests;
