//! Packets moved by us, between the TAP and guest memory without a copy of our own.
//!
//! A packet that cannot be passed on is dropped and counted, as a real network does: the TAP takes no more, its
//! interface is down or gone, the kernel finds its header wrong, or the driver's buffers are too short. Waiting for the
//! TAP to take more would need a queue that the guest fills at will; and its send buffer is unlimited unless somebody
//! set TUNSETSNDBUF.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vm_memory::GuestAddressSpace;

use super::detour::Detour;
use super::receive::{Receiver, Way};
use super::tap::{MAX_PACKET, MIN_PACKET, Tap};
use super::{HEADER_LEN, Queues};
use crate::mmds::MmdsPort;
use crate::rate_limiter::{LimiterConfig, LimiterUpdate, RateLimiter};
use crate::virtio::device::{DeviceError, Memory};
use crate::virtio::iovec::ChainIovecs;
use crate::virtio::virtqueue::{BYTES_PER_EVENT, Turn, Virtqueue};

/// The pair that the metadata service sends its packets on.
const SERVICE_PAIR: usize = 0;

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
    pairs: Vec<Pair>,
}

struct Pair {
    rx: Receiver,
    tx: Virtqueue,
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

    /// Begins to serve these pairs of queues. `merged` is whether a packet to the guest may be spread over several
    /// buffers.
    pub(super) fn start(&mut self, memory: &Memory, pairs: Vec<Queues>, merged: bool) {
        let pair = |Queues { rx, tx }| Pair { rx: Receiver::new(rx, memory.clone(), merged), tx };
        self.running = Some(Running { memory: memory.clone(), pairs: pairs.into_iter().map(pair).collect() });
    }

    pub(super) fn stop(&mut self) {
        self.running = None;
        self.rx_limiter.release();
        self.tx_limiter.release();
        if let Some(detour) = &mut self.detour {
            detour.stop();
        }
    }

    /// One of the timers is ready. `taps` are the queues of the TAP that are in use, one for each pair of ours.
    pub(super) fn timer_event(&mut self, fd: RawFd, taps: &[Tap]) -> Result<(), DeviceError> {
        if fd == self.tx_limiter.as_raw_fd() {
            self.tx_limiter.event();
            return (0..taps.len()).try_for_each(|pair| self.send(pair, taps));
        }
        if fd == self.rx_limiter.as_raw_fd() {
            self.rx_limiter.event();
            return (0..taps.len()).try_for_each(|pair| self.receive(pair, taps));
        }
        if let Some(detour) = &mut self.detour
            && fd == detour.timer()
        {
            detour.event();
        }
        self.receive(SERVICE_PAIR, taps)
    }

    /// How many packets were dropped since the device exists.
    pub(super) fn dropped(&self) -> Dropped {
        self.dropped
    }

    /// Brings the guest what there is for it on `pair`. `taps` are as above; a pair beyond them rests.
    pub(super) fn receive(&mut self, pair: usize, taps: &[Tap]) -> Result<(), DeviceError> {
        let Self { rx_limiter: limiter, detour, running: Some(running), dropped, .. } = self else {
            return Ok(());
        };
        let (Some(Pair { rx, .. }), Some(tap)) = (running.pairs.get_mut(pair), taps.get(pair)) else {
            return Ok(());
        };
        let dropped = &mut dropped.to_guest;
        let mut detour = detour.as_mut().filter(|_| pair == SERVICE_PAIR);
        rx.receive(Way { tap, detour: detour.as_deref_mut(), limiter, dropped })?;
        if let Some(detour) = detour {
            detour.arm();
        }
        Ok(())
    }

    /// Sends what the driver made available on `pair`, until the limiter says no or for one event's share.
    pub(super) fn send(&mut self, pair: usize, taps: &[Tap]) -> Result<(), DeviceError> {
        let Self { tx_limiter, detour, iovecs, running: Some(running), dropped, .. } = self else {
            return Ok(());
        };
        let (Some(Pair { tx, .. }), Some(tap)) = (running.pairs.get_mut(pair), taps.get(pair)) else {
            return Ok(());
        };
        if tx_limiter.is_blocked() {
            return Ok(());
        }
        let memory = running.memory.memory();
        let mut moved = 0;
        let mut taken = false;
        tx.serve_while(&memory, |chain| {
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
        // The service may have answered, on a pair of its own.
        if taken { self.receive(SERVICE_PAIR, taps) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
