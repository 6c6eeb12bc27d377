//! A descriptor chain as the driver wrote it (virtio 1.2, section 2.7.5), followed with every check that a hostile
//! one needs. Drives take several chains in the time of one system call, so this looks each table up once.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileMemory, VolatileSlice};

use super::lookup::in_one_piece;

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// A descriptor chain that the driver made available: an iterator over its descriptors, those of an indirect table
/// in the place of the one that names it.
///
/// It ends early where it cannot be followed: at an index out of range, in a loop, at a table outside of memory, at
/// an indirect table in an indirect table, of no entries or of half an entry, and where the buffers have more than
/// 4 GiB together (section 2.7.5.2).
#[derive(Clone, Debug)]
pub struct Chain<'m> {
    memory: &'m GuestMemoryMmap,
    head: u16,
    table: Table<'m>,
    /// The index of the next descriptor.
    next: u16,
    /// How many may follow: no more than there are in the table, else it is a loop.
    left: u16,
    bytes: u32,
    indirect: bool,
}

/// A table of descriptors.
#[derive(Clone, Debug)]
struct Table<'m> {
    address: u64,
    entries: u16,
    /// All of it, if it is in one piece of our address space.
    whole: Option<VolatileSlice<'m>>,
}

impl<'m> Table<'m> {
    fn new(memory: &'m GuestMemoryMmap, address: u64, entries: u16) -> Self {
        let len = usize::from(entries) * size_of::<Descriptor>();
        Self { address, entries, whole: in_one_piece(memory, GuestAddress(address), len) }
    }

    /// The descriptor at `index`, below `entries`.
    #[inline]
    fn get(&self, memory: &GuestMemoryMmap, index: u16) -> Option<Descriptor> {
        if let Some(whole) = &self.whole {
            let entry = whole.get_ref::<Descriptor>(usize::from(index) * size_of::<Descriptor>());
            return entry.ok().map(|entry| entry.load());
        }
        let address = self.address.checked_add(u64::from(index) * u64::from(DESCRIPTOR))?;
        memory.read_obj(GuestAddress(address)).ok()
    }
}

impl<'m> Chain<'m> {
    /// The chain that begins with `head` of the table of `entries` descriptors at `table`.
    pub(super) fn new(memory: &'m GuestMemoryMmap, table: u64, entries: u16, head: u16) -> Self {
        let table = Table::new(memory, table, entries);
        Self { memory, head, table, next: head, left: entries, bytes: 0, indirect: false }
    }

    /// The index of its first descriptor, which is how the driver knows it.
    pub fn head_index(&self) -> u16 {
        self.head
    }

    /// Goes on with the table that `descriptor` names; `None` if that cannot be.
    fn enter(&mut self, descriptor: &Descriptor) -> Option<()> {
        let len = descriptor.len();
        if self.indirect || !len.is_multiple_of(DESCRIPTOR) {
            return None;
        }
        let entries = u16::try_from(len / DESCRIPTOR).ok()?;
        self.table = Table::new(self.memory, descriptor.addr().0, entries);
        self.indirect = true;
        self.next = 0;
        self.left = entries;
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    #[inline]
    fn next(&mut self) -> Option<Descriptor> {
        loop {
            if self.left == 0 || self.next >= self.table.entries {
                return None;
            }
            // Read once: the driver may change it at any time.
            let descriptor = self.table.get(self.memory, self.next)?;
            if descriptor.refers_to_indirect_table() {
                self.enter(&descriptor)?;
                continue;
            }
            self.bytes = self.bytes.checked_add(descriptor.len())?;
            if descriptor.has_next() {
                self.next = descriptor.next();
                self.left -= 1;
            } else {
                self.left = 0;
            }
            return Some(descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{INDIRECT, NEXT};

    const READ: u16 = 0;

    fn lengths(memory: &GuestMemoryMmap, table: u64, entries: u16, head: u16) -> Vec<u32> {
        Chain::new(memory, table, entries, head).map(|descriptor| descriptor.len()).collect()
    }

    #[test]
    fn a_table_across_regions_is_followed_as_far_as_it_is_memory() {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        // The third descriptor is half in one region and half in the other.
        for table in [0x200, 0x1000 - 40, 0x2000 - 64] {
            let descriptors = [(1, NEXT, 1), (2, NEXT, 2), (3, NEXT, 3), (4, READ, 0)];
            for (at, (len, flags, next)) in (0u64..).zip(descriptors) {
                let address = GuestAddress(table + 16 * at);
                memory.write_obj(Descriptor::new(0x100, len, flags, next), address).unwrap();
            }
            assert_eq!(lengths(&memory, table, 4, 0), [1, 2, 3, 4], "{table:#x}");
            assert_eq!(lengths(&memory, table, 8, 2), [3, 4], "more entries than memory: {table:#x}");
            // The same as an indirect table.
            let head = Descriptor::new(table, 64, INDIRECT, 0);
            memory.write_obj(head, GuestAddress(0x100)).unwrap();
            assert_eq!(lengths(&memory, 0x100, 1, 0), [1, 2, 3, 4], "{table:#x}");
        }
        assert_eq!(lengths(&memory, 0x2000, 4, 0), [0; 0]);
        assert_eq!(lengths(&memory, u64::MAX - 15, 4, 1), [0; 0]);
    }
}
