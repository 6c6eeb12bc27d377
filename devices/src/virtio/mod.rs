//! Virtio 1.2, split rings. See [`device::VirtioDevice`] for what a device must say of itself; negotiation,
//! activation, queue events, interrupts and reset are done once for all of them.

pub mod block;
pub mod device;
pub mod driver;
pub mod interrupt;
pub mod iovec;
pub mod mmio;
pub mod net;
pub mod slot;
pub mod virtqueue;
pub mod worker;

#[cfg(test)]
pub(crate) mod driver_ring;
#[cfg(test)]
pub(crate) mod fake_device;
#[cfg(test)]
pub(crate) mod testing;
