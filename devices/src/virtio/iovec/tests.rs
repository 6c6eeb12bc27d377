use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::Bytes;

use super::*;
use crate::virtio::testing::{INDIRECT, NEXT, WRITE};

/// Two regions that touch at 64 KiB, and a hole above 128 KiB.
fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x1_0000)]).unwrap()
}

/// Fills from a chain that starts at descriptor 0 of a ring of 16 with these (address, len, flags, next).
fn fill<'m>(
    iovecs: &'m mut ChainIovecs,
    memory: &'m GuestMemoryMmap,
    descriptors: &[(u64, u32, u16, u16)],
) -> Result<ChainBuffers<'m>, ChainError> {
    let mock = MockSplitQueue::new(memory, 16);
    for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags, next));
        mock.desc_table().store(index, descriptor).unwrap();
    }
    iovecs.fill(Chain::new(memory, mock.desc_table_addr().0, 16, 0), memory)
}

#[test]
fn parts_keep_their_order_and_lengths() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    let buffers = fill(
        &mut iovecs,
        &memory,
        &[(0x2000, 16, NEXT, 1), (0x3000, 32, NEXT, 2), (0x4000, 64, NEXT | WRITE, 3), (0x5000, 1, WRITE, 0)],
    )
    .unwrap();
    assert_eq!((buffers.readable_len(), buffers.writable_len()), (48, 65));
    assert_eq!(buffers.readable().iter().map(|piece| piece.iov_len).collect::<Vec<_>>(), [16, 32]);
    assert_eq!(buffers.writable().iter().map(|piece| piece.iov_len).collect::<Vec<_>>(), [64, 1]);
}

#[test]
fn copies_cross_buffers_and_stop_at_the_end() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    memory.write_slice(b"abcd", GuestAddress(0x2000)).unwrap();
    memory.write_slice(b"efgh", GuestAddress(0x3000)).unwrap();
    let buffers = fill(
        &mut iovecs,
        &memory,
        &[(0x2000, 4, NEXT, 1), (0x3000, 4, NEXT, 2), (0x4000, 2, NEXT | WRITE, 3), (0x5000, 2, WRITE, 0)],
    )
    .unwrap();
    let mut data = [0; 4];
    buffers.read_at(2, &mut data).unwrap();
    assert_eq!(&data, b"cdef");
    buffers.read_at(8, &mut []).unwrap();
    assert!(matches!(buffers.read_at(5, &mut data), Err(ChainError::Short { have: 8, need: 9 })));
    assert!(matches!(buffers.read_at(u32::MAX, &mut data), Err(ChainError::Short { .. })));

    buffers.write_at(1, b"XY").unwrap();
    assert!(buffers.write_at(3, b"XY").is_err());
    let mut written = [0; 2];
    memory.read_slice(&mut written, GuestAddress(0x4000)).unwrap();
    assert_eq!(&written, b"\0X");
    memory.read_slice(&mut written, GuestAddress(0x5000)).unwrap();
    assert_eq!(&written, b"Y\0");
}

#[test]
fn ranges_are_cut_at_both_ends() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    let buffers = fill(&mut iovecs, &memory, &[(0x2000, 16, NEXT, 1), (0x3000, 16, 0, 0)]).unwrap();
    let bases: Vec<_> = buffers.readable().iter().map(|piece| piece.iov_base).collect();
    let ranges = |offset, len| -> Vec<_> {
        buffers.readable_range(offset, len).map(|piece| (piece.iov_base, piece.iov_len)).collect()
    };
    assert_eq!(ranges(0, 16), [(bases[0], 16)]);
    assert_eq!(ranges(12, 8), [(bases[0].wrapping_byte_add(12), 4), (bases[1], 4)]);
    assert_eq!(ranges(16, u32::MAX), [(bases[1], 16)]);
    assert_eq!(ranges(32, 1), []);
    assert_eq!(ranges(0, 0), []);
    assert_eq!(buffers.writable_range(0, 5).count(), 0);
}

#[test]
fn a_buffer_across_regions_becomes_two_pieces() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    let buffers = fill(&mut iovecs, &memory, &[(0xfffc, 8, 0, 0)]).unwrap();
    assert_eq!(buffers.readable().len(), 2);
    assert_eq!(buffers.readable_len(), 8);
}

#[test]
fn buffers_outside_of_memory_are_refused() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    for (address, len) in [(0x1_fffc, 8), (0x2_0000, 1), (u64::MAX, 1), (u64::MAX - 3, 8), (0, u32::MAX)] {
        let result = fill(&mut iovecs, &memory, &[(address, len, 0, 0)]);
        assert!(matches!(result, Err(ChainError::Memory { .. })), "{address:#x} {len:#x}: {result:?}");
    }
}

#[test]
fn empty_buffers_are_left_out_wherever_they_point() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    let buffers = fill(&mut iovecs, &memory, &[(u64::MAX, 0, NEXT, 1), (0x3000, 4, 0, 0)]).unwrap();
    assert_eq!((buffers.readable().len(), buffers.readable_len()), (1, 4));
}

#[test]
fn a_readable_buffer_behind_a_writable_one_is_refused() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    let result = fill(&mut iovecs, &memory, &[(0x2000, 4, NEXT | WRITE, 1), (0x3000, 4, 0, 0)]);
    assert!(matches!(result, Err(ChainError::Order)));
}

#[test]
fn loops_and_bad_indices_are_refused() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    let result = fill(&mut iovecs, &memory, &[(0x2000, 4, NEXT, 0)]);
    assert!(matches!(result, Err(ChainError::Cut(16))));
    let result = fill(&mut iovecs, &memory, &[(0x2000, 4, NEXT, 16)]);
    assert!(matches!(result, Err(ChainError::Cut(1))));
}

#[test]
fn more_than_4_gib_is_refused() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 3 << 30)]).unwrap();
    let mut iovecs = ChainIovecs::new();
    let result = fill(&mut iovecs, &memory, &[(0x0, 3 << 30, NEXT, 1), (0x0, 3 << 30, 0, 0)]);
    assert!(matches!(result, Err(ChainError::Cut(1))));
}

#[test]
fn indirect_tables_are_checked() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    let table = |index: u64, descriptor: Descriptor| {
        memory.write_obj(descriptor, GuestAddress(0x8000 + index * 16)).unwrap();
    };
    table(0, Descriptor::new(0x2000, 4, NEXT, 1));
    table(1, Descriptor::new(0x3000, 4, 0, 0));
    assert_eq!(fill(&mut iovecs, &memory, &[(0x8000, 32, INDIRECT, 0)]).unwrap().readable_len(), 8);

    // A table of no entries, of half an entry, and outside of memory.
    for (address, len) in [(0x8000, 0), (0x8000, 24), (0x2_0000, 32)] {
        let result = fill(&mut iovecs, &memory, &[(address, len, INDIRECT, 0)]);
        assert!(matches!(result, Err(ChainError::Empty)), "{result:?}");
    }

    table(1, Descriptor::new(0x8000, 32, INDIRECT, 0));
    let result = fill(&mut iovecs, &memory, &[(0x8000, 32, INDIRECT, 0)]);
    assert!(matches!(result, Err(ChainError::Cut(1))));
}

#[test]
fn a_chain_longer_than_the_kernel_takes_is_refused() {
    let (memory, mut iovecs) = (memory(), ChainIovecs::new());
    let pieces = u16::try_from(MAX_PIECES).unwrap();
    for (entries, fits) in [(pieces, true), (pieces + 1, false)] {
        for index in 0..entries {
            let last = index + 1 == entries;
            let descriptor = Descriptor::new(0x2000, 1, if last { 0 } else { NEXT }, index + 1);
            memory.write_obj(descriptor, GuestAddress(0x8000 + u64::from(index) * 16)).unwrap();
        }
        let result = fill(&mut iovecs, &memory, &[(0x8000, u32::from(entries) * 16, INDIRECT, 0)]);
        assert_eq!(result.is_ok(), fits, "{result:?}");
    }
}
