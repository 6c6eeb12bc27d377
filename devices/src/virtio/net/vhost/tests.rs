use virtio_queue::Queue;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::testing::Ring;

/// Two regions that touch at 64 KiB, each of its own host memory.
fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x1_0000)]).unwrap()
}

fn queue(table: u64, available: u64, used: u64) -> Queue {
    let mut queue = Queue::new(Ring::SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(available)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
    queue.set_ready(true);
    queue
}

#[test]
fn rings_are_translated_one_part_at_a_time() {
    let memory = memory();
    let host = |address| memory.get_host_address(GuestAddress(address)).unwrap().addr();
    let addresses = ring_addresses(&queue(0x1000, 0x1_2000, 0x3000), &memory).unwrap();
    let expected = [host(0x1000), host(0x1_2000), host(0x3000)];
    assert_eq!(addresses.map(|address| usize::try_from(address).unwrap()), expected);
}

#[test]
fn a_ring_may_end_where_memory_ends() {
    let memory = memory();
    for (table, available, used) in [
        (0x2_0000 - 256, 0x1000, 0x2000),
        (0x1000, 0x2_0000 - 38, 0x2000),
        // Of 134 bytes, aligned to four.
        (0x1000, 0x2000, 0x2_0000 - 136),
    ] {
        assert!(ring_addresses(&queue(table, available, used), &memory).is_some());
    }
}

#[test]
fn a_ring_across_regions_or_outside_of_memory_is_refused() {
    let memory = memory();
    for (table, available, used) in [
        (0x1_0000 - 16, 0x1000, 0x2000),
        (0x1000, 0x1_0000 - 2, 0x2000),
        (0x1000, 0x2000, 0x1_0000 - 4),
        (0x2_0000, 0x1000, 0x2000),
        (0x2_0000 - 240, 0x1000, 0x2000),
        (0x1000, u64::MAX - 1, 0x2000),
    ] {
        assert!(ring_addresses(&queue(table, available, used), &memory).is_none());
    }
}

#[test]
fn the_kernel_is_told_of_every_region() {
    let memory = memory();
    let regions = regions(&memory);
    let seen: Vec<_> = regions.iter().map(|region| (region.guest_phys_addr, region.memory_size)).collect();
    assert_eq!(seen, [(0, 0x1_0000), (0x1_0000, 0x1_0000)]);
    for region in regions {
        let host = memory.get_host_address(GuestAddress(region.guest_phys_addr)).unwrap().addr();
        assert_eq!(usize::try_from(region.userspace_addr).unwrap(), host);
    }
}
