//! What the tests of the devices share.

use std::io;
use std::sync::Mutex;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::{Interrupt, Vector};

/// VIRTQ_DESC_F_NEXT (virtio 1.2, section 2.7.5).
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// Remembers what it was triggered with.
#[derive(Default)]
pub struct RecordedInterrupt(Mutex<Vec<Vector>>);

impl RecordedInterrupt {
    /// What was triggered since the last call.
    pub fn take(&self) -> Vec<Vector> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Interrupt for RecordedInterrupt {
    fn trigger(&self, vector: Vector) -> io::Result<()> {
        self.0.lock().unwrap().push(vector);
        Ok(())
    }

    fn notifier(&self, _: Vector) -> io::Result<EventFd> {
        EventFd::new(libc::EFD_NONBLOCK)
    }
}

/// A driver's view of a ring of [`Self::SIZE`] descriptors that takes less than a page. (The mock of
/// virtio-queue lays the used ring over the end of the available ring.)
pub struct Ring<'m> {
    pub memory: &'m GuestMemoryMmap,
    base: u64,
}

impl<'m> Ring<'m> {
    pub const SIZE: u16 = 16;

    /// A ring at `base`, a multiple of 16, with nothing in it.
    pub fn new(memory: &'m GuestMemoryMmap, base: u64) -> Self {
        memory.write_slice(&[0; 0x300], GuestAddress(base)).unwrap();
        Self { memory, base }
    }

    /// A view of the ring that is already at `base`.
    pub fn at(memory: &'m GuestMemoryMmap, base: u64) -> Self {
        Self { memory, base }
    }

    pub fn table(&self) -> u64 {
        self.base
    }

    pub fn available(&self) -> u64 {
        self.base + 0x100
    }

    pub fn used(&self) -> u64 {
        self.base + 0x200
    }

    /// The device's side, ready.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(Self::SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.table())).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.available())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used())).unwrap();
        queue.set_ready(true);
        queue
    }

    /// Writes descriptor `index` of the table.
    pub fn store(&self, index: u16, descriptor: Descriptor) {
        self.memory.write_obj(descriptor, GuestAddress(self.table() + 16 * u64::from(index))).unwrap();
    }

    /// Makes the chain that starts at `head` available as entry `position`, and sets the index behind it.
    pub fn offer(&self, position: u16, head: u16) {
        let entry = self.available() + 4 + 2 * u64::from(position % Self::SIZE);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.set_available_index(position.wrapping_add(1));
    }

    pub fn set_available_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.available() + 2)).unwrap();
    }

    pub fn set_available_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.available())).unwrap();
    }

    pub fn set_used_event(&self, index: u16) {
        let address = self.available() + 4 + 2 * u64::from(Self::SIZE);
        self.memory.write_obj(index, GuestAddress(address)).unwrap();
    }

    pub fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.used() + 2)).unwrap()
    }

    pub fn used_flags(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.used())).unwrap()
    }

    pub fn available_event(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.used() + 4 + 8 * u64::from(Self::SIZE))).unwrap()
    }

    /// The head and the length of the used entry at `position`.
    pub fn used_entry(&self, position: u16) -> (u32, u32) {
        let entry = self.used() + 4 + 8 * u64::from(position % Self::SIZE);
        let [id, len]: [u32; 2] = self.memory.read_obj(GuestAddress(entry)).unwrap();
        (id, len)
    }
}
