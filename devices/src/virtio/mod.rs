//! Virtio 1.2, split rings. Negotiation, activation, queue events, interrupts and reset are done once for all
//! devices; what is special about one kind is in its own folder.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`device`] | the contract: what a device says of itself, and what is asked of it when |
//! | [`driver`] | what the driver has said: status, features, queues; for any transport |
//! | [`slot`] | a device's life between its transport and its worker |
//! | [`worker`] | the device on an event loop |
//! | [`mmio`], [`pci`] | the transports: registers, and the [`interrupt`] |
//! | [`virtqueue`], [`chain`], [`iovec`] | a running ring, and a chain of it as descriptors and as host memory |
//! | [`block`], [`net`] | drives, and network interfaces |
//! | [`rng`] | an entropy source |
//! | [`balloon`] | memory that the host takes back from the guest |
//! | [`fs`] | folders of the host's, which another process serves |
//! | [`vhost_user`] | what devices have in common that another process serves |
//! | [`vsock`] | streams between the guest and unix sockets of the host |
//!
//! A new device implements [`device::VirtioDevice`]; `vmm` puts it into an [`mmio::MmioTransport`] or a
//! [`pci::VirtioPci`], that on the bus, its kicks into KVM, and its worker on an event loop.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod device;
pub mod driver;
pub mod fs;
pub mod interrupt;
pub mod iovec;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod rng;
pub mod slot;
pub mod vhost_user;
pub mod virtqueue;
pub mod vsock;
pub mod worker;

mod front;
mod lookup;

#[cfg(test)]
pub(crate) mod driver_ring;
#[cfg(test)]
pub(crate) mod fake_device;
#[cfg(test)]
pub(crate) mod testing;
