//! Packets moved by the kernel's vhost-net worker, which knows the rings, the TAP and the eventfds, and needs us
//! only to start and to stop.
//!
//! Each pair of queues has a worker. It is made once, at the first start with that pair, on the thread that serves the
//! device, and inherits that thread's cgroup. It stays until the device goes, however often the driver resets: from
//! Linux 6.4 on it is a thread of this process, and whoever walks our threads does not expect one to vanish. Without
//! backends it touches nothing.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net as KernelNet;
use vhost::vhost_kern::vhost_binding::{VHOST_SET_VRING_ADDR, vhost_vring_addr};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::control::KickWatch;
use super::{Queues, tap::Tap};
use crate::virtio::device::{DeviceError, Memory};
use crate::virtio::interrupt::{Interrupt, Vector};
use crate::virtio::virtqueue::{Virtqueue, ring_addresses};

/// The crate wants guest memory in order to check and translate the addresses of rings. It refuses a ring at
/// the very end of memory and accepts one across regions, so that is done here, and it gets an empty map.
type Kernel = KernelNet<Arc<GuestMemoryMmap>>;

/// Indices of a pair's queues in the kernel, which knows each pair as a device of its own.
const RX: usize = 0;
const TX: usize = 1;

/// A device whose packets the kernel moves.
pub(super) struct Vhost {
    /// Before `memory`, because closing them stops the workers.
    pairs: Vec<Pair>,
    /// What the kernel offers.
    features: u64,
    /// Signalled by the kernel for a ring that it cannot follow.
    error: EventFd,
    /// The map that the running workers use.
    memory: Option<Arc<GuestMemoryMmap>>,
    /// The control queue is ours, and not the kernel's.
    pub(super) control: KickWatch,
}

/// What moves the packets of a pair of queues.
struct Pair {
    /// `None` only after a failed stop.
    kernel: Option<Kernel>,
    /// Whether the worker exists.
    owned: bool,
}

impl Vhost {
    /// Opens /dev/vhost-net for as many pairs of queues; makes no worker yet.
    pub(super) fn new(pairs: u8) -> io::Result<Self> {
        let kernels = (0..pairs).map(|_| open()).collect::<io::Result<Vec<_>>>()?;
        let features = kernels.first().map_or(Ok(0), VhostBackend::get_features).map_err(to_io)?;
        let error = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let pair = |kernel| Pair { kernel: Some(kernel), owned: false };
        let pairs = kernels.into_iter().map(pair).collect();
        Ok(Self { pairs, features, error, memory: None, control: KickWatch::new()? })
    }

    /// The virtio features that the kernel offers.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// The eventfd that becomes readable when the kernel gives up on a ring.
    pub(super) fn error_fd(&self) -> RawFd {
        self.error.as_raw_fd()
    }

    /// What to say when `error_fd` is readable.
    pub(super) fn error(&mut self) -> Result<(), DeviceError> {
        match self.error.read() {
            Ok(_) => Err(DeviceError::Driver("gave vhost-net a ring or a buffer that it cannot use")),
            // Read already, by a restart.
            Err(_) => Ok(()),
        }
    }

    /// Hands the workers `queues`, a pair for each; they touch nothing before [`Self::attach`]. `features` are what the
    /// driver accepted.
    pub(super) fn start(
        &mut self,
        memory: &Memory,
        queues: &[Queues],
        features: u64,
        interrupt: &dyn Interrupt,
    ) -> Result<(), DeviceError> {
        // A report of the time before the reset: this driver did nothing wrong yet.
        let _ = self.error.read();
        let map = memory.memory().into_inner();
        for (pair, queues) in self.pairs.iter_mut().zip(queues) {
            let kernel = pair.kernel()?;
            kernel.set_features(features & self.features).map_err(failed("set the features of vhost-net"))?;
            kernel.set_mem_table(&regions(&map)).map_err(failed("tell vhost-net where guest memory is"))?;
            prepare(kernel, RX, &map, &queues.rx, interrupt, &self.error)?;
            prepare(kernel, TX, &map, &queues.tx, interrupt, &self.error)?;
        }
        self.memory = Some(map);
        Ok(())
    }

    /// Has the worker of `pair`, which was started, move packets between its queues and `tap`.
    pub(super) fn attach(&self, pair: usize, tap: &Tap) -> Result<(), DeviceError> {
        let Some(kernel) = self.pairs.get(pair).and_then(|pair| pair.kernel.as_ref()) else { return Ok(()) };
        for index in [RX, TX] {
            kernel.set_backend(index, Some(tap.file())).map_err(failed("attach the TAP to vhost-net"))?;
        }
        Ok(())
    }

    /// Takes the TAP away from the worker of `pair`, which waits for what it is doing to finish: on return it touches
    /// neither the rings nor guest memory.
    pub(super) fn detach(&mut self, pair: usize) {
        if let Some(pair) = self.pairs.get_mut(pair) {
            pair.detach();
        }
    }

    /// Detaches all. To be called after a failed start or attachment as well.
    pub(super) fn stop(&mut self) {
        self.pairs.iter_mut().for_each(Pair::detach);
        self.memory = None;
        self.control.stop();
    }
}

impl Pair {
    /// The kernel's device, with its worker.
    fn kernel(&mut self) -> Result<&Kernel, DeviceError> {
        let kernel = match &mut self.kernel {
            Some(kernel) => kernel,
            none => none.insert(open().map_err(host("open /dev/vhost-net again"))?),
        };
        if !self.owned {
            kernel.set_owner().map_err(failed("make the vhost-net worker"))?;
            self.owned = true;
        }
        Ok(kernel)
    }

    fn detach(&mut self) {
        if let (Some(kernel), true) = (&self.kernel, self.owned) {
            let detached = [RX, TX].into_iter().try_for_each(|index| kernel.set_backend(index, None));
            if let Err(error) = detached {
                // Nothing that we do leads here. Closing the descriptor ends the worker in any case.
                log::warn!("could not detach a TAP from vhost-net, closing it: {error}");
                self.kernel = None;
                self.owned = false;
            }
        }
    }
}

fn open() -> io::Result<Kernel> {
    Kernel::new(Arc::new(GuestMemoryMmap::new())).map_err(to_io)
}

/// Sets up everything of a queue but its backend. `index` is the kernel's.
fn prepare(
    kernel: &Kernel,
    index: usize,
    memory: &GuestMemoryMmap,
    queue: &Virtqueue,
    interrupt: &dyn Interrupt,
    error: &EventFd,
) -> Result<(), DeviceError> {
    let ring = queue.ring();
    // The kernel adds offsets to these without looking at the memory table.
    let [desc_user_addr, avail_user_addr, used_user_addr] = ring_addresses(ring, memory)
        .ok_or(DeviceError::Driver("put a ring where guest memory is not contiguous"))?;
    let addresses = vhost_vring_addr {
        index: u32::try_from(index).unwrap_or(u32::MAX),
        flags: 0,
        desc_user_addr,
        used_user_addr,
        avail_user_addr,
        log_guest_addr: 0,
    };
    let call = interrupt
        .notifier(Vector::Queue(queue.index()))
        .map_err(host("get the interrupt of a queue for vhost-net"))?;

    kernel.set_vring_num(index, ring.size()).map_err(failed("set a ring's size in vhost-net"))?;
    kernel.set_vring_base(index, ring.next_avail()).map_err(failed("set a ring's position in vhost-net"))?;
    // SAFETY: the descriptor is open; VHOST_SET_VRING_ADDR reads a vhost_vring_addr, which outlives the call.
    // Its addresses are ranges of guest memory, long enough for the ring, and `Vhost::memory` keeps that mapped
    // while the worker uses them.
    if unsafe { ioctl_with_ref(kernel, VHOST_SET_VRING_ADDR(), &addresses) } < 0 {
        return Err(host("set a ring's addresses in vhost-net")(io::Error::last_os_error()));
    }
    kernel.set_vring_err(index, error).map_err(failed("set a ring's error eventfd in vhost-net"))?;
    kernel.set_vring_call(index, &call).map_err(failed("set a ring's interrupt in vhost-net"))?;
    kernel.set_vring_kick(index, queue.kick()).map_err(failed("set a ring's kick in vhost-net"))?;
    Ok(())
}

/// Where the kernel finds guest memory. Nothing is passed by descriptor here.
fn regions(memory: &GuestMemoryMmap) -> Vec<VhostUserMemoryRegionInfo> {
    memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: u64::try_from(region.as_ptr().addr()).unwrap_or(0),
            mmap_offset: 0,
            mmap_handle: -1,
        })
        .collect()
}

fn to_io(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::VhostOpen(error) | vhost::Error::IoctlError(error) => error,
        other => io::Error::other(other),
    }
}

fn host(doing: &str) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::Host { doing: format!("could not {doing}"), source }
}

fn failed(doing: &str) -> impl FnOnce(vhost::Error) -> DeviceError {
    move |error| host(doing)(to_io(error))
}

#[cfg(test)]
mod tests;
