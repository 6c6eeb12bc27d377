//! A driver that lends buffers to a device and takes them back, for the tests of devices.

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::Interrupt;
use super::testing::{NEXT, Ring, WRITE};
use super::virtqueue::Virtqueue;

/// A buffer that a driver lends: guest physical address and length.
#[derive(Clone, Copy)]
pub enum Lent {
    /// The device may read it.
    Read(u64, u32),
    /// The device may write it.
    Write(u64, u32),
}

/// The driver's side of a [`Ring`], with what a driver remembers of it. Descriptors are used round robin.
pub struct DriverRing {
    memory: GuestMemoryMmap,
    base: u64,
    descriptors: u16,
    available: u16,
    used: u16,
}

impl DriverRing {
    /// An empty ring at `base`.
    pub fn new(memory: &GuestMemoryMmap, base: u64) -> Self {
        Ring::new(memory, base);
        Self { memory: memory.clone(), base, descriptors: 0, available: 0, used: 0 }
    }

    /// The ring itself.
    pub fn ring(&self) -> Ring<'_> {
        Ring::at(&self.memory, self.base)
    }

    /// The ring as a started device holds it, and its kick.
    pub fn virtqueue(&self, index: u16, interrupt: Arc<dyn Interrupt>) -> (Virtqueue, Arc<EventFd>) {
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        (Virtqueue::new(index, self.ring().queue(), Arc::clone(&kick), interrupt), kick)
    }

    /// Makes a chain of `buffers` available and returns its head.
    pub fn lend(&mut self, buffers: &[Lent]) -> u16 {
        let head = self.descriptors % Ring::SIZE;
        for (left, buffer) in (0..buffers.len()).rev().zip(buffers) {
            let (address, len, flags) = match *buffer {
                Lent::Read(address, len) => (address, len, 0),
                Lent::Write(address, len) => (address, len, WRITE),
            };
            let flags = if left > 0 { flags | NEXT } else { flags };
            let index = self.descriptors % Ring::SIZE;
            self.descriptors += 1;
            let descriptor = Descriptor::new(address, len, flags, self.descriptors % Ring::SIZE);
            self.ring().store(index, descriptor);
        }
        self.publish(head);
        head
    }

    /// Makes `head` available.
    pub fn publish(&mut self, head: u16) {
        self.ring().offer(self.available, head);
        self.available += 1;
    }

    /// The next chain that came back: its head and how many bytes the device says it wrote.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let ring = Ring::at(&self.memory, self.base);
        if ring.used_index() == self.used {
            return None;
        }
        let (head, len) = ring.used_entry(self.used);
        self.used += 1;
        Some((u16::try_from(head).unwrap(), len))
    }
}
