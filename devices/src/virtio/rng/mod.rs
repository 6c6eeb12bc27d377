//! virtio-rng, the entropy device (virtio 1.2, section 5.4): one queue of buffers that the guest lends to have
//! them filled with random bytes from the host's generator.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::device::{Activation, DeviceError, EventSource, Memory, VirtioDevice};
use super::iovec::{ChainBuffers, ChainIovecs};
use super::virtqueue::{Turn, Virtqueue};
use crate::counter::{Counters, counters};
use crate::rate_limiter::{LimiterConfig, RateLimiter};

/// Descriptors in the request queue. A turn of the event loop serves at most as many requests, so with
/// [`REQUEST_MAX`] it hands out 1 MiB at most, which takes a few milliseconds.
const QUEUE_SIZE: u16 = 16;

/// The most bytes that one request gets; longer buffers are filled in part, as section 5.4.6.1 allows.
const REQUEST_MAX: u32 = 64 << 10;

/// Why there is no entropy device.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// getrandom(2) gave nothing.
    #[error(
        "could not get random bytes from the host for the entropy device: wait until the host's generator is \
         initialised, and let the seccomp filter pass getrandom"
    )]
    Host {
        /// What the host said.
        source: io::Error,
    },
    /// The timer of the limits could not be made.
    #[error("could not make the timer of the entropy device's rate limiter")]
    Limiter {
        /// What the host said.
        source: io::Error,
    },
}

counters! {
    /// What the entropy device counts.
    EntropyCounters {
        /// Kicks of the queue.
        entropy_event_count,
        /// Requests that cannot be followed.
        entropy_event_fails,
        /// Bytes given.
        entropy_bytes,
        /// Requests that the host had no bytes for.
        host_rng_fails,
        /// Requests that had to wait for the limiter.
        entropy_rate_limiter_throttled,
        /// Times that the limiter let waiting requests go on.
        rate_limiter_event_count,
    }
}

/// A virtio entropy device.
pub struct Rng {
    iovecs: ChainIovecs,
    running: Option<Running>,
    limiter: RateLimiter,
    counters: Arc<EntropyCounters>,
}

struct Running {
    memory: Memory,
    queue: Virtqueue,
}

impl Rng {
    /// A device that hands out no more than `limits`. Makes sure that the host has random bytes to give: once its
    /// generator is ready, it stays so.
    pub fn new(limits: LimiterConfig) -> Result<Self, RngError> {
        let mut byte = [0u8; 1];
        let piece = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
        // SAFETY: the piece is `byte`, which nobody else refers to here.
        unsafe { fill(piece) }.map_err(|source| RngError::Host { source })?;
        let limiter = RateLimiter::new(limits).map_err(|source| RngError::Limiter { source })?;
        Ok(Self { iovecs: ChainIovecs::new(), running: None, limiter, counters: Arc::default() })
    }

    /// Serves what is available, as far as the limiter goes.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(Running { memory, queue }) = &mut self.running else {
            return Ok(());
        };
        if self.limiter.is_blocked() {
            return Ok(());
        }
        let memory = memory.memory();
        queue.serve_while(&memory, |chain| {
            let buffers = self.iovecs.fill(chain, &memory);
            let len = buffers.as_ref().map_or(0, |buffers| buffers.writable_len().min(REQUEST_MAX));
            if !self.limiter.consume(1, len.into()) {
                self.counters.entropy_rate_limiter_throttled.inc();
                return Turn::Held;
            }
            let written = match buffers {
                Ok(buffers) => serve(&buffers, &self.counters),
                Err(error) => {
                    self.counters.entropy_event_fails.inc();
                    log::debug!("entropy: {error}");
                    0
                }
            };
            self.counters.entropy_bytes.add(written.into());
            Turn::Used(written)
        })?;
        Ok(())
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queue = activation
            .queues
            .into_iter()
            .next()
            .flatten()
            .ok_or(DeviceError::Driver("did not enable the request queue of an entropy device"))?;
        self.running = Some(Running { memory: activation.memory, queue });
        Ok(())
    }

    fn event_sources(&self) -> Vec<EventSource> {
        vec![EventSource { fd: self.limiter.as_raw_fd(), events: EventSet::IN | EventSet::EDGE_TRIGGERED }]
    }

    fn queue_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.counters.entropy_event_count.inc();
        self.serve()
    }

    fn source_event(&mut self, _fd: RawFd) -> Result<(), DeviceError> {
        self.counters.rate_limiter_event_count.inc();
        self.limiter.event();
        self.serve()
    }

    fn reset(&mut self) {
        self.running = None;
        self.limiter.release();
    }
}

/// Fills `buffers` up to [`REQUEST_MAX`] and returns the number of bytes.
fn serve(buffers: &ChainBuffers<'_>, counters: &EntropyCounters) -> u32 {
    // Virtio 1.2, section 5.4.6.1: a driver lends no readable buffers.
    if buffers.readable_len() > 0 {
        counters.entropy_event_fails.inc();
        log::debug!("entropy: a request has a buffer that cannot be written");
        return 0;
    }
    let mut written = 0;
    for piece in buffers.writable_range(0, REQUEST_MAX) {
        // SAFETY: the piece is writable guest memory, kept mapped by the borrow of `buffers`; nobody makes
        // Rust references to it.
        if let Err(error) = unsafe { fill(piece) } {
            // Only the first one loudly, because the guest may repeat it at will.
            let level =
                if counters.host_rng_fails.count() > 0 { log::Level::Debug } else { log::Level::Warn };
            counters.host_rng_fails.inc();
            log::log!(level, "entropy: could not get random bytes from the host: {error}");
            break;
        }
        // Lossless: no more than REQUEST_MAX.
        written += u32::try_from(piece.iov_len).unwrap_or(0);
    }
    written
}

/// Fills `piece` with random bytes, without waiting for the host's generator to be initialised.
///
/// # Safety
/// All of `piece` must be mapped and writable, and no Rust reference to it may be in use.
unsafe fn fill(piece: libc::iovec) -> io::Result<()> {
    let mut done = 0;
    while done < piece.iov_len {
        let at = piece.iov_base.wrapping_byte_add(done);
        // SAFETY: what is left of `piece` may be written, as the caller promises.
        let count = unsafe { libc::getrandom(at, piece.iov_len - done, libc::GRND_NONBLOCK) };
        match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
