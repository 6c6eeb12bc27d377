//! The devices of a Pinfold microVM: the bus that vCPUs reach them by, the few legacy devices of a PC that a
//! Linux guest needs, and virtio.
//!
//! A device knows neither cgroups nor phases, and opens no KVM file: the `vmm` crate hands it the eventfds
//! that are wired to KVM and runs its event source on the thread that it chooses.
//!
//! # The way of a request
//! ```text
//!  guest          KVM                 event loop                           device
//!  writes ring
//!  QueueNotify -> ioeventfd: kick --> virtio::worker hears of the kick
//!                                     virtio::slot: is it running? ------> queue_event
//!                                                                          Virtqueue::serve: pop, check,
//!                                                                          work, push, notify
//!  handler <----- irqfd <----------------------------------------------- Interrupt::trigger
//!  reads InterruptStatus -> bus -> virtio::mmio, without waiting for the device
//! ```
//! On PCI nobody reads InterruptStatus: the message that the irqfd sends says what it is about. With vhost, a kernel
//! worker stands in the place of the last two columns.
//!
//! # Threads
//! vCPU threads access registers: [`bus`], [`legacy`], [`pci`], [`virtio::mmio`], [`virtio::pci`]. They never start
//! a device, so that what comes to life with it does not belong to them; they do reset it, and wait for that.
//! Everything else happens on the thread of the event loop that the device's [`virtio::worker::Worker`] is registered
//! on. The order of locks is on [`bus::Bus`], [`pci::bus::PciBus`] and [`virtio::slot::Slot`].
//!
//! # The guest is hostile
//! Whatever it writes to a register, a ring or a descriptor leads to the effect that the specification names,
//! to no effect, or to a device that needs a reset: never to a panic, an access outside of guest memory, work
//! without bounds, or a log without end.

pub mod bus;
pub mod counter;
pub mod legacy;
pub mod mmds;
pub mod pci;
pub mod rate_limiter;
mod retry;
pub mod virtio;
