//! A driver's side of a queue in guest memory, for the tests of devices.

use std::sync::Arc;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::{Descriptor, VirtqUsedElem};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::Interrupt;
use super::testing::{NEXT, WRITE};
use super::virtqueue::Virtqueue;

/// Descriptors in the ring.
pub const SIZE: u16 = 16;

const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

/// A buffer that a driver lends: guest physical address and length.
#[derive(Clone, Copy)]
pub enum Lent {
    /// The device may read it.
    Read(u64, u32),
    /// The device may write it.
    Write(u64, u32),
}

/// A ring of [`SIZE`] descriptors at a 4 KiB page of guest memory.
pub struct DriverRing {
    memory: GuestMemoryMmap,
    page: u64,
    descriptors: u16,
    available: u16,
    used: u16,
}

impl DriverRing {
    pub fn new(memory: &GuestMemoryMmap, page: u64) -> Self {
        Self { memory: memory.clone(), page, descriptors: 0, available: 0, used: 0 }
    }

    /// The ring as a device is given it.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        let low = |offset| u32::try_from(self.page + offset).unwrap();
        queue.set_desc_table_address(Some(low(0)), Some(0));
        queue.set_avail_ring_address(Some(low(AVAILABLE)), Some(0));
        queue.set_used_ring_address(Some(low(USED)), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    /// The ring as a started device holds it, and its kick.
    pub fn virtqueue(&self, index: u16, interrupt: Arc<dyn Interrupt>) -> (Virtqueue, Arc<EventFd>) {
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        (Virtqueue::new(index, self.queue(), Arc::clone(&kick), interrupt), kick)
    }

    /// Makes a chain of `buffers` available and returns its head. Descriptors are used round robin: at most
    /// [`SIZE`] of them at a time.
    pub fn lend(&mut self, buffers: &[Lent]) -> u16 {
        let head = self.descriptors % SIZE;
        for (left, buffer) in (0..buffers.len()).rev().zip(buffers) {
            let (address, len, flags) = match *buffer {
                Lent::Read(address, len) => (address, len, 0),
                Lent::Write(address, len) => (address, len, WRITE),
            };
            let flags = if left > 0 { flags | NEXT } else { flags };
            self.raw(address, len, flags);
        }
        self.publish(head);
        head
    }

    /// Writes the next descriptor, whose successor is the one after it.
    pub fn raw(&mut self, address: u64, len: u32, flags: u16) {
        let index = self.descriptors % SIZE;
        self.descriptors += 1;
        let descriptor = Descriptor::new(address, len, flags, self.descriptors % SIZE);
        let at = GuestAddress(self.page + 16 * u64::from(index));
        self.memory.write_obj(RawDescriptor::from(descriptor), at).unwrap();
    }

    /// Makes `head` available.
    pub fn publish(&mut self, head: u16) {
        let slot = self.page + AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available += 1;
        self.memory.write_obj(self.available, GuestAddress(self.page + AVAILABLE + 2)).unwrap();
    }

    /// The next chain that came back: its head and how many bytes the device says it wrote.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let slot = self.page + USED + 4 + 8 * u64::from(self.used % SIZE);
        let element: VirtqUsedElem = self.memory.read_obj(GuestAddress(slot)).unwrap();
        self.used += 1;
        Some((u16::try_from(element.id()).unwrap(), element.len()))
    }

    /// How many chains came back in total.
    pub fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.page + USED + 2)).unwrap()
    }
}
