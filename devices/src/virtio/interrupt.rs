//! How a device reaches its driver without knowing its transport.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// What an interrupt tells the driver (virtio 1.2, section 2.3 and 2.7.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vector {
    /// The configuration space changed, or the device needs a reset.
    Config,
    /// Buffers of this queue were used.
    Queue(u16),
}

/// The device's way to its driver, given to it by the transport.
pub trait Interrupt: Send + Sync {
    /// Tells the driver. May be called from any thread; does not block.
    fn trigger(&self, vector: Vector) -> io::Result<()>;

    /// A descriptor of the eventfd that a kernel worker (vhost) signals in our place for `vector`.
    fn notifier(&self, vector: Vector) -> io::Result<EventFd>;
}
