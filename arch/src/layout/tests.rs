use super::*;

#[test]
fn fixed_windows_do_not_overlap() {
    let mut windows = [
        GDT,
        Window { start: ZERO_PAGE, size: PAGE_SIZE },
        Window { start: GuestAddress(0x8000), size: PAGE_SIZE },
        Window { start: PML4, size: PAGE_SIZE },
        Window { start: PDPT, size: PAGE_SIZE },
        Window { start: PAGE_DIRECTORIES, size: 4 * PAGE_SIZE },
        CMDLINE,
        EBDA,
        ACPI,
        BOOT_TIMER,
        VIRTIO_MMIO,
        PCI_MMIO32,
        PCI_ECAM,
        IOAPIC,
        LAPIC,
        KVM_IDENTITY_MAP,
        KVM_TSS,
    ];
    windows.sort_by_key(|w| w.start);
    for pair in windows.windows(2) {
        assert!(pair[0].end() <= pair[1].start, "{pair:x?}");
    }
    assert!(ACPI.end() <= HIMEM);
    assert!(KVM_TSS.end() <= HIGH_RAM);
    assert!(BOOT_STACK_TOP < PML4);
    assert_eq!(PCI_MMIO32.end(), PCI_ECAM.start);
    assert_eq!(BOOT_TIMER.start, GuestAddress(0xC000_0000), "what Firecracker's guests write to");
}

#[test]
fn ram_below_the_hole() {
    let map = AddressMap::new(128 * MIB, 48).unwrap();
    assert_eq!(map.ram, [(GuestAddress(0), 128 << 20)]);
    assert_eq!(map.hotplug.start, HIGH_RAM);
    assert_eq!(map.hotplug.end(), map.mmio64.start);

    let map = AddressMap::new(3 * GIB, 48).unwrap();
    assert_eq!(map.ram, [(GuestAddress(0), 3 << 30)]);
}

#[test]
fn ram_around_the_hole() {
    let map = AddressMap::new(5 * GIB, 48).unwrap();
    assert_eq!(map.ram, [(GuestAddress(0), 3 << 30), (GuestAddress(4 * GIB), 2 << 30)]);
    assert_eq!(map.hotplug.start, GuestAddress(6 * GIB));

    let map = AddressMap::new(3 * GIB + PAGE_SIZE, 48).unwrap();
    assert_eq!(map.ram[1], (GuestAddress(4 * GIB), 4096));
    assert_eq!(map.hotplug.start, GuestAddress(5 * GIB), "a GiB boundary");
}

#[test]
fn the_64_bit_window_is_near_the_top() {
    let map = AddressMap::new(GIB, 48).unwrap();
    assert_eq!(map.mmio64.size, 1 << 40);
    assert_eq!(map.mmio64.end().0, (1 << 48) - 16 * GIB);
    let map = AddressMap::new(GIB, 40).unwrap();
    assert_eq!(map.mmio64.size, 1 << 38);
    assert_eq!(map.mmio64.end().0, (1 << 40) - 16 * GIB, "clear of HyperTransport");
    let map = AddressMap::new(GIB, 36).unwrap();
    assert_eq!((map.mmio64.start.0, map.mmio64.end().0), (48 * GIB, 64 * GIB));
    assert_eq!(AddressMap::new(GIB, 52).unwrap(), AddressMap::new(GIB, 48).unwrap());
}

#[test]
fn impossible_sizes() {
    assert_eq!(AddressMap::new(0, 48), Err(LayoutError::TooSmall { bytes: 0 }));
    assert_eq!(AddressMap::new(2 * MIB + 1, 48), Err(LayoutError::NotPages { bytes: 2 * MIB + 1 }));
    assert_eq!(AddressMap::new(GIB, 32), Err(LayoutError::PhysicalBits { bits: 32 }));
    let largest = (64 - 16 - 4 + 3) * GIB;
    let map = AddressMap::new(largest, 36).unwrap();
    assert_eq!(map.hotplug.size, 0);
    let error = AddressMap::new(largest + PAGE_SIZE, 36).unwrap_err();
    assert_eq!(
        error.to_string(),
        "guest memory of 48128 MiB does not fit in 36 bits of physical address: give it at most 48128 MiB"
    );
    for bits in [36, 48, 255] {
        assert!(matches!(AddressMap::new(u64::MAX - 4095, bits), Err(LayoutError::TooLarge { .. })));
    }
}

#[test]
fn device_lines_and_windows() {
    let lines: Vec<u32> = device_gsis().collect();
    assert_eq!(lines, [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]);
    assert!([I8042_GSI, COM1_GSI, RTC_GSI, GED_GSI].iter().all(|gsi| !lines.contains(gsi)));
    assert_eq!(virtio_mmio_window(0).unwrap().start, VIRTIO_MMIO.start);
    assert_eq!(virtio_mmio_window(254).unwrap().end(), VIRTIO_MMIO.end());
    assert_eq!(virtio_mmio_window(255), None);
    assert_eq!(virtio_mmio_window(u64::MAX), None);
}
