//! The contract between a virtio device and everything generic around it.

use std::any::Any;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::interrupt::Interrupt;
use super::iovec::ChainError;
use super::virtqueue::{QueueError, Virtqueue};
use crate::counter::Counters;

/// Guest memory as devices hold it: a handle whose map may be exchanged while the guest runs.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Who takes the kicks of a device's queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// The event loop that the device's worker is registered on.
    EventLoop,
    /// A kernel worker or another process (vhost, vhost-user). Our event loop keeps away from the kick
    /// eventfds, and used buffers are announced without us: the MMIO transport then reports the used-buffer
    /// bit on every read of InterruptStatus, because nobody sets it.
    Vhost,
}

/// A descriptor other than the queues' kicks that wakes the device (a TAP, a timer).
#[derive(Clone, Copy, Debug)]
pub struct EventSource {
    /// Owned by the device, which outlives its registration.
    pub fd: RawFd,
    /// What to wait for. Use edge triggering for whatever the device does not always drain.
    pub events: EventSet,
}

/// What a driver negotiated, handed over when it sets DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// The queues that the driver made ready, checked to lie in guest memory, in order of their index. A
    /// queue that the driver did not enable is `None`.
    pub queues: Vec<Option<Virtqueue>>,
    /// The accepted subset of [`VirtioDevice::features`].
    pub features: u64,
    /// For configuration changes, and for vhost.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device stopped serving its driver. The generic code then sets DEVICE_NEEDS_RESET and raises a
/// configuration interrupt (virtio 1.2, section 2.1.2).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver wrote a ring or a descriptor that cannot be followed.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A chain that a device cannot answer with an error of its own.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The host refused something that the device cannot go on without.
    #[error("{doing}")]
    Host {
        /// What was being done, to what, in words.
        doing: String,
        /// What the host said.
        source: io::Error,
    },
    /// The driver left out something that the device cannot work without.
    #[error("the driver {0}")]
    Driver(&'static str),
}

/// What is special about one kind of virtio device.
///
/// # Life cycle
/// `start` and `reset` alternate, beginning with `start`. The generic code holds the device's lock around
/// every call, so no two calls overlap. Between `start` and `reset` queue and source events arrive; at other
/// times none does. Pausing, saving and restoring will join the same contract.
///
/// Whoever made the device reaches what only its type offers through [`Slot::update`](super::slot::Slot::update),
/// at any time of its life.
pub trait VirtioDevice: Send + Any {
    /// The device type (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Every feature bit offered, VIRTIO_F_VERSION_1 and ring features included.
    fn features(&self) -> u64;

    /// The greatest size of each queue in descriptors, each a power of two; fixes the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// The device-specific configuration space as the driver reads it, little endian.
    fn config(&self) -> &[u8];

    /// The driver writes `data` at `offset` of the configuration space. Most devices have nothing writable.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        log::debug!("ignored a write of {} bytes at {offset} to a read-only configuration space", data.len());
    }

    /// Whether the configuration space is another since the last call, by what happened in an event. The generic
    /// code then tells the driver.
    fn config_changed(&mut self) -> bool {
        false
    }

    /// Who takes this device's kicks; the same for its whole life.
    fn server(&self) -> Server {
        Server::EventLoop
    }

    /// What this device counts, under Firecracker's names where it has them.
    fn counters(&self) -> Arc<dyn Counters> {
        Arc::new(())
    }

    /// Descriptors besides the kicks; the same for the device's whole life. Registered once, on the device's
    /// event loop, even while the device is not started.
    fn event_sources(&self) -> Vec<EventSource> {
        Vec::new()
    }

    /// The driver is ready. Runs on the thread that serves the device, never on a vCPU thread: kernel workers
    /// that come to life here inherit that thread's cgroup. Afterwards each queue is served once as if
    /// kicked.
    fn start(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Queue `index`, one that the driver enabled, was kicked. Not called for [`Server::Vhost`].
    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError>;

    /// The source `fd` is ready.
    fn source_event(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        log::debug!("unexpected event on descriptor {fd}");
        Ok(())
    }

    /// The driver reset the device, or the VM ends. On return nothing touches guest memory any more, on no
    /// thread, in no kernel worker. May run on a vCPU thread.
    fn reset(&mut self);
}
