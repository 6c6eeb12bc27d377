//! The way of packets between the guest and the metadata service, past the TAP and the limiters.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::HEADER_LEN;
use super::lent::Lent;
use crate::mmds::MmdsPort;
use crate::virtio::iovec::ChainBuffers;

/// Bytes of a frame that tell whom it is for: up to the end of an ARP request.
const PEEK: usize = 42;

/// Bytes of the header before every packet.
const HEADER: usize = HEADER_LEN as usize;

/// The longest frame of the service.
const FRAME_MAX: usize = 1514;

/// The service, with the frame that is next in each direction and the timer that it needs.
pub(super) struct Detour {
    port: MmdsPort,
    timer: TimerFd,
    /// Whether the timer may have to be another since it was set.
    stale: bool,
    /// The frame that the guest sent last; kept so that not every one allocates.
    from_guest: Vec<u8>,
    /// The next frame for the guest, behind a header that leaves nothing to the guest: no checksum, no segmentation.
    to_guest: [u8; HEADER + FRAME_MAX],
    /// The frame's length if there is one.
    waiting: Option<usize>,
}

impl Detour {
    pub(super) fn new(port: MmdsPort) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        let (from_guest, to_guest) = (Vec::new(), [0; HEADER + FRAME_MAX]);
        Ok(Self { port, timer, stale: false, from_guest, to_guest, waiting: None })
    }

    /// Hands the service a packet of the guest's, of at least a header, if it is for it. Whether it is.
    pub(super) fn take(&mut self, packet: &ChainBuffers<'_>) -> bool {
        let Some(Ok(len)) = packet.readable_len().checked_sub(HEADER_LEN).map(usize::try_from) else {
            return false;
        };
        let mut start = [0; PEEK];
        let start = &mut start[..PEEK.min(len)];
        if packet.read_at(HEADER_LEN, start).is_err() || !self.port.takes(start) {
            return false;
        }
        self.from_guest.resize(len, 0);
        // Not an error: there are as many bytes. What the guest made of them meanwhile is looked at again.
        if packet.read_at(HEADER_LEN, &mut self.from_guest).is_ok() {
            self.port.from_guest(&self.from_guest);
            self.stale = true;
        }
        true
    }

    /// Whether the service has a packet for the guest.
    pub(super) fn is_ready(&mut self) -> bool {
        if self.waiting.is_none() {
            self.waiting = self.port.to_guest(&mut self.to_guest[HEADER..]);
        }
        self.waiting.is_some()
    }

    /// Writes that packet into `lent`, and what does not fit into `beyond`, as reading from a TAP does. Returns its
    /// bytes, header included; more than fit in both is lost.
    pub(super) fn receive(&mut self, lent: &mut Lent, beyond: &mut [u8]) -> u32 {
        self.stale = true;
        let len = HEADER + self.waiting.take().unwrap_or_default();
        let packet = self.to_guest.get(..len).unwrap_or_default();
        let kept = lent.write(0, packet);
        for (to, from) in beyond.iter_mut().zip(&packet[kept..]) {
            *to = *from;
        }
        u32::try_from(len).unwrap_or(u32::MAX)
    }

    /// The timer, to be waited for edge triggered.
    pub(super) fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// The timer fired.
    pub(super) fn event(&mut self) {
        self.port.poll();
        self.stale = true;
    }

    /// Sets the timer to when the service has something to do. To be called after everything else here.
    pub(super) fn arm(&mut self) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let set = match self.port.next_timer() {
            // 0 would stop it.
            Some(delay) => self.timer.reset(delay.max(Duration::from_nanos(1)), None),
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            log::warn!("could not set the timer of the metadata service: {error}");
        }
    }

    /// The driver is gone, and with it the packet for it. TCP sends it again.
    pub(super) fn stop(&mut self) {
        self.waiting = None;
    }
}
