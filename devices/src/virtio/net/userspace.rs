//! Packets moved by us, between the TAP and guest memory without a copy of our own.
//!
//! A packet that cannot be passed on is dropped and counted, as a real network does: the TAP takes no more, its
//! interface is down or gone, or the driver's buffer is too short. Waiting for the TAP to take more would need
//! a queue that the guest fills at will; and its send buffer is unlimited unless somebody set TUNSETSNDBUF.

mod detour;

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use detour::Detour;

use super::tap::{MAX_PACKET, MIN_PACKET, Received, Tap};
use super::{HEADER_LEN, Queues};
use crate::mmds::MmdsPort;
use crate::rate_limiter::{LimiterConfig, LimiterUpdate, RateLimiter};
use crate::virtio::device::{DeviceError, Memory};
use crate::virtio::iovec::{ChainBuffers, ChainIovecs};
use crate::virtio::virtqueue::{BYTES_PER_EVENT, Turn, Virtqueue};

/// Where the header says over how many buffers a packet is spread: always 1, because we do not offer
/// VIRTIO_NET_F_MRG_RXBUF (virtio 1.2, section 5.1.6.4.1). The TAP leaves this field alone.
const NUM_BUFFERS_AT: u32 = HEADER_LEN - 2;

/// The state of a device that moves its packets itself.
pub(super) struct Userspace {
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    /// To the metadata service, if the guest has it on this interface.
    detour: Option<Detour>,
    iovecs: ChainIovecs,
    running: Option<Running>,
    dropped: Dropped,
}

struct Running {
    memory: Memory,
    queues: Queues,
    /// What the limiter holds back.
    held: Option<Packet>,
}

/// A packet in a buffer of the guest's that has not been given back yet.
#[derive(Clone, Copy)]
struct Packet {
    /// The buffer's head.
    head: u16,
    /// Bytes, with the header.
    len: u32,
}

/// What came of an attempt to receive.
enum Step {
    /// A packet, in a buffer of the guest's that is to be given back.
    Packet(Packet),
    /// None, but the next attempt may find one.
    Again,
    /// Nothing to do until the next event: of the TAP if there is no packet, of the driver if there is no buffer.
    Stop,
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
    /// Limits each direction by packets, and by their bytes without the virtio header; those of and to `mmds` do not
    /// count.
    pub(super) fn new(rx: LimiterConfig, tx: LimiterConfig, mmds: Option<MmdsPort>) -> io::Result<Self> {
        Ok(Self {
            rx_limiter: RateLimiter::new(rx)?,
            tx_limiter: RateLimiter::new(tx)?,
            detour: mmds.map(Detour::new).transpose()?,
            iovecs: ChainIovecs::new(),
            running: None,
            dropped: Dropped::default(),
        })
    }

    pub(super) fn set_limiters(&mut self, rx: LimiterUpdate, tx: LimiterUpdate) {
        self.rx_limiter.update(rx);
        self.tx_limiter.update(tx);
    }

    /// The timers of the limiters and of the metadata service, to be waited for edge triggered.
    pub(super) fn timers(&self) -> impl Iterator<Item = RawFd> + use<> {
        let limiters = [self.rx_limiter.as_raw_fd(), self.tx_limiter.as_raw_fd()];
        limiters.into_iter().chain(self.detour.as_ref().map(Detour::timer))
    }

    pub(super) fn start(&mut self, memory: Memory, queues: Queues) {
        self.running = Some(Running { memory, queues, held: None });
    }

    pub(super) fn stop(&mut self) {
        self.running = None;
        self.rx_limiter.release();
        self.tx_limiter.release();
        if let Some(detour) = &mut self.detour {
            detour.stop();
        }
    }

    /// The TAP or one of the timers is ready.
    pub(super) fn source_event(&mut self, fd: RawFd, tap: &Tap) -> Result<(), DeviceError> {
        if fd == self.tx_limiter.as_raw_fd() {
            self.tx_limiter.event();
            return self.send(tap);
        }
        if fd == self.rx_limiter.as_raw_fd() {
            self.rx_limiter.event();
        } else if let Some(detour) = &mut self.detour
            && fd == detour.timer()
        {
            detour.event();
        }
        self.receive(tap)
    }

    /// How many packets were dropped since the device exists.
    pub(super) fn dropped(&self) -> Dropped {
        self.dropped
    }

    /// Gives the guest what the metadata service has for it, then takes packets out of the TAP until that is empty or
    /// the limiter says no, all that as long as the driver lends buffers. After one ring's worth, or many bytes, the
    /// rest waits for a kick that is sent to ourselves, so that others have their turn.
    pub(super) fn receive(&mut self, tap: &Tap) -> Result<(), DeviceError> {
        let Self {
            rx_limiter, detour, iovecs, running: Some(Running { memory, queues, held }), dropped, ..
        } = self
        else {
            return Ok(());
        };
        let memory = memory.memory();
        let rx = &mut queues.rx;
        rx.disable_kicks(&memory)?;
        let (mut left, mut moved) = (rx.ring().size(), 0);
        loop {
            let service = detour.as_mut().and_then(Detour::ready);
            let limited = service.is_none();
            let step = match (service, *held) {
                (Some(service), _) => {
                    receive_one(|buffers| service.receive(buffers), tap, rx, &memory, iovecs, dropped)?
                }
                (None, Some(packet)) => Step::Packet(packet),
                (None, None) => {
                    receive_one(|buffers| tap.receive(buffers), tap, rx, &memory, iovecs, dropped)?
                }
            };
            match step {
                Step::Packet(packet) => {
                    let len = u64::from(packet.len.saturating_sub(HEADER_LEN));
                    if limited {
                        *held = (!rx_limiter.consume(1, len)).then_some(packet);
                        if held.is_some() {
                            break;
                        }
                    }
                    rx.push_used(&memory, packet.head, packet.len)?;
                    moved += len;
                }
                Step::Again => {}
                Step::Stop => break,
            }
            left -= 1;
            if left == 0 || moved >= BYTES_PER_EVENT {
                rx.kick_again()?;
                break;
            }
        }
        rx.notify(&memory)?;
        if let Some(detour) = detour {
            detour.arm();
        }
        Ok(())
    }

    /// Sends what the driver made available, until the limiter says no or for one event's share.
    pub(super) fn send(&mut self, tap: &Tap) -> Result<(), DeviceError> {
        let Self {
            tx_limiter, detour, iovecs, running: Some(Running { memory, queues, .. }), dropped, ..
        } = self
        else {
            return Ok(());
        };
        if tx_limiter.is_blocked() {
            return Ok(());
        }
        let memory = memory.memory();
        let mut moved = 0;
        let mut taken = false;
        queues.tx.serve_while(&memory, |chain| {
            let packet = match iovecs.fill(chain, &memory) {
                Ok(packet) if (MIN_PACKET..=MAX_PACKET).contains(&packet.readable_len()) => Ok(packet),
                Ok(packet) => Err(io::Error::other(format!("a packet of {} bytes", packet.readable_len()))),
                Err(error) => Err(io::Error::other(error)),
            };
            let len = packet.as_ref().map_or(0, |packet| u64::from(packet.readable_len() - HEADER_LEN));
            if let (Ok(packet), Some(detour)) = (&packet, &mut *detour)
                && detour.take(packet)
            {
                taken = true;
            } else if !tx_limiter.consume(1, len) {
                return Turn::Held;
            } else if let Err(error) = packet.and_then(|packet| tap.send(&packet)) {
                dropped.from_guest += 1;
                log::debug!("TAP {}: dropped a packet of the guest: {error}", tap.name());
            }
            moved += len;
            if moved < BYTES_PER_EVENT { Turn::Used(0) } else { Turn::Last(0) }
        })?;
        // The service may have answered.
        if taken { self.receive(tap) } else { Ok(()) }
    }
}

/// Receives a packet into the next buffer that the driver lent, from `source`, which is that TAP or stands in for it.
fn receive_one(
    source: impl FnOnce(&ChainBuffers<'_>) -> io::Result<Received>,
    tap: &Tap,
    rx: &mut Virtqueue,
    memory: &GuestMemoryMmap,
    iovecs: &mut ChainIovecs,
    dropped: &mut Dropped,
) -> Result<Step, DeviceError> {
    let Some(chain) = rx.pop(memory)? else {
        return Ok(if rx.enable_kicks(memory)? { Step::Again } else { Step::Stop });
    };
    let head = chain.head_index();
    let buffers = match iovecs.fill(chain, memory) {
        Ok(buffers) if buffers.writable_len() >= MIN_PACKET => buffers,
        useless => {
            log::debug!("TAP {}: gave back a buffer that holds no packet: {useless:?}", tap.name());
            rx.push_used(memory, head, 0)?;
            return Ok(Step::Again);
        }
    };
    match source(&buffers) {
        Ok(Received::Packet(len)) => {
            // Not an error: the buffers have room for more than the header.
            let len = buffers.write_at(NUM_BUFFERS_AT, &1u16.to_le_bytes()).map_or(0, |()| len);
            Ok(Step::Packet(Packet { head, len }))
        }
        Ok(Received::TooLong) => {
            dropped.to_guest += 1;
            rx.undo_pop();
            Ok(Step::Again)
        }
        Err(error) => {
            if error.kind() != io::ErrorKind::WouldBlock {
                log::debug!("TAP {}: could not read a packet: {error}", tap.name());
            }
            rx.undo_pop();
            Ok(Step::Stop)
        }
    }
}

#[cfg(test)]
mod tests;
