//! Virtio 1.2, split rings. See [`device::VirtioDevice`] for what a device must say of itself; negotiation,
//! activation, queue events, interrupts and reset are done once for all of them.

pub mod device;
pub mod interrupt;
pub mod iovec;
pub mod virtqueue;

#[cfg(test)]
pub(crate) mod testing;
