//! Where guest memory is in our address space, found with as few instructions as that takes: a request needs it a
//! dozen times.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

/// The guest's `len` bytes at `address`, if one region of guest memory holds them all.
#[inline]
pub(super) fn in_one_piece(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    len: usize,
) -> Option<VolatileSlice<'_>> {
    let region = memory.find_region(address)?;
    let offset = usize::try_from(address.0.checked_sub(region.start_addr().0)?).ok()?;
    if offset.checked_add(len)? > region.size() {
        return None;
    }
    // SAFETY: the region's mapping has `size` bytes and lives as long as the borrow of `memory`; `offset` and what
    // follows are within it. Nobody makes Rust references to guest memory.
    Some(unsafe { VolatileSlice::new(region.as_ptr().add(offset), len) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn what_is_within_a_region_is_found_and_nothing_else() {
        let ranges =
            [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x2000), 0x1000), (GuestAddress(0x8000), 0x1000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        for (address, len) in [(0x1000, 0x1000), (0x1fff, 1), (0x2000, 8), (0x8ff8, 8), (0x8000, 0)] {
            let found = in_one_piece(&memory, GuestAddress(address), len).unwrap();
            let same = memory.get_slice(GuestAddress(address), len).unwrap();
            assert_eq!(found.ptr_guard().as_ptr(), same.ptr_guard().as_ptr(), "{address:#x}");
            assert_eq!(found.len(), len);
        }
        memory.write_obj(0x1234_5678u32, GuestAddress(0x8ffc)).unwrap();
        assert_eq!(
            in_one_piece(&memory, GuestAddress(0x8ffc), 4).unwrap().read_obj::<u32>(0).unwrap(),
            0x1234_5678
        );
        for (address, len) in [
            (0, 1),
            (0xfff, 1),
            (0xfff, 2),
            // In two regions, though they touch.
            (0x1fff, 2),
            (0x2fff, 2),
            (0x3000, 0),
            (0x8ffc, 5),
            (0x9000, 1),
            (0x8000, usize::MAX),
            (u64::MAX, 1),
        ] {
            assert!(in_one_piece(&memory, GuestAddress(address), len).is_none(), "{address:#x} {len:#x}");
        }
    }
}
