//! Packets moved by us, between the TAP and guest memory without a copy of our own.
//!
//! A packet that cannot be passed on is dropped and counted, as a real network does: the TAP takes no more, its
//! interface is down or gone, the kernel finds its header wrong, or the driver's buffers are too short. Waiting for the
//! TAP to take more would need a queue that the guest fills at will; and its send buffer is unlimited unless somebody
//! set TUNSETSNDBUF.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestAddressSpace;

use super::detour::Detour;
use super::receive::{Receiver, Way};
use super::tap::{MAX_PACKET, MIN_PACKET, Tap};
use super::{HEADER_LEN, Queues};
use crate::counter::counters;
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
    counters: Arc<NetCounters>,
}

struct Running {
    memory: Memory,
    pairs: Vec<Pair>,
}

struct Pair {
    rx: Receiver,
    tx: Virtqueue,
}

counters! {
    /// What a network interface counts whose packets we move; "rx" is towards the guest.
    NetCounters {
        /// Packets to the guest.
        rx_packets_count,
        /// Bytes in them, without the virtio header.
        rx_bytes_count,
        /// Packets to the guest that were lost here.
        rx_fails,
        /// Packets to the guest that had to wait for the limiter.
        rx_rate_limiter_throttled,
        /// Packets from the guest, lost ones included.
        tx_packets_count,
        /// Bytes in them, without the virtio header.
        tx_bytes_count,
        /// Packets from the guest that were lost here.
        tx_fails,
        /// Packets from the guest that had to wait for the limiter.
        tx_rate_limiter_throttled,
    }
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
            counters: Arc::default(),
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

    /// What was counted.
    pub(super) fn counters(&self) -> &Arc<NetCounters> {
        &self.counters
    }

    /// Brings the guest what there is for it on `pair`. `taps` are as above; a pair beyond them rests.
    pub(super) fn receive(&mut self, pair: usize, taps: &[Tap]) -> Result<(), DeviceError> {
        let Self { rx_limiter: limiter, detour, running: Some(running), counters, .. } = self else {
            return Ok(());
        };
        let (Some(Pair { rx, .. }), Some(tap)) = (running.pairs.get_mut(pair), taps.get(pair)) else {
            return Ok(());
        };
        let mut detour = detour.as_mut().filter(|_| pair == SERVICE_PAIR);
        rx.receive(Way { tap, detour: detour.as_deref_mut(), limiter, counters })?;
        if let Some(detour) = detour {
            detour.arm();
        }
        Ok(())
    }

    /// Sends what the driver made available on `pair`, until the limiter says no or for one event's share.
    pub(super) fn send(&mut self, pair: usize, taps: &[Tap]) -> Result<(), DeviceError> {
        let Self { tx_limiter, detour, iovecs, running: Some(running), counters, .. } = self else {
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
                counters.tx_rate_limiter_throttled.inc();
                return Turn::Held;
            } else if let Err(error) = packet.and_then(|packet| tap.send(&packet)) {
                counters.tx_fails.inc();
                log::debug!("TAP {}: dropped a packet of the guest: {error}", tap.name());
            }
            counters.tx_packets_count.inc();
            counters.tx_bytes_count.add(len);
            moved += len;
            if moved < BYTES_PER_EVENT { Turn::Used(0) } else { Turn::Last(0) }
        })?;
        // The service may have answered, on a pair of its own.
        if taken { self.receive(SERVICE_PAIR, taps) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
