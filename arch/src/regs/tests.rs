use super::*;

#[test]
fn page_tables_map_four_gib_onto_themselves() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    write_boot_tables(&mem).unwrap();
    let entry = |table: u64, index: u64| -> u64 { mem.read_obj(GuestAddress(table + index * 8)).unwrap() };
    let walk = |address: u64| -> Option<u64> {
        let mut table = PML4.0;
        for shift in [39, 30] {
            let entry = entry(table, (address >> shift) & 511);
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 0xFFF, 3, "present, writable, not a large page");
            table = entry & !0xFFF;
        }
        let entry = entry(table, (address >> 21) & 511);
        assert_eq!(entry & 0xFFF, 0x83, "present, writable, large");
        Some((entry & !0xFFF) + (address & 0x1F_FFFF))
    };
    for address in [0, 0x7000, 0x10_0000, 0x100_0000, 0x3FFF_FFFF, 0x4000_0000, 0xBFFF_F000, 0xFFFF_FFFF] {
        assert_eq!(walk(address), Some(address));
    }
    assert_eq!(walk(1 << 32), None);
    assert_eq!(walk(1 << 39), None);
}

#[test]
fn descriptors_say_what_the_segments_say() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    write_boot_tables(&mem).unwrap();
    let mut sregs = kvm_sregs::default();
    set_long_mode(&mut sregs);
    for segment in [sregs.cs, sregs.ds, sregs.tr] {
        let descriptor: u64 =
            mem.read_obj(GuestAddress(sregs.gdt.base + u64::from(segment.selector))).unwrap();
        // SDM volume 3, figure 3-8.
        let field = |shift: u32, bits: u32| (descriptor >> shift) & ((1 << bits) - 1);
        assert_eq!(field(40, 4), u64::from(segment.type_));
        assert_eq!(field(44, 1), u64::from(segment.s));
        assert_eq!(field(47, 1), u64::from(segment.present));
        assert_eq!(field(53, 1), u64::from(segment.l));
        assert_eq!(field(54, 1), u64::from(segment.db));
        assert_eq!(field(55, 1), u64::from(segment.g));
        let limit = field(0, 16) | (field(48, 4) << 16);
        let limit = if segment.g == 1 { (limit << 12) | 0xFFF } else { limit };
        assert_eq!(limit, u64::from(segment.limit));
        assert!(segment.selector + 7 <= sregs.gdt.limit);
    }
    assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18), "as the boot protocol prescribes");
    assert_eq!(sregs.cr0, 0x8000_0001);
    assert_eq!(sregs.cr4, 0x20);
    assert_eq!(sregs.efer, 0x500);
    assert_eq!(sregs.cr3, 0x9000);
}

#[test]
fn registers_follow_the_64_bit_protocol() {
    let regs = boot_regs(GuestAddress(0x100_0200));
    assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
    assert_eq!(regs.rsp, 0x8FF0);
}

#[test]
fn local_interrupts() {
    let mut lapic = kvm_lapic_state::default();
    let read = |lapic: &kvm_lapic_state, offset: usize| {
        let bytes: Vec<u8> = lapic.regs[offset..offset + 4].iter().map(|b| b.cast_unsigned()).collect();
        u32::from_le_bytes(bytes.try_into().unwrap())
    };
    // What KVM starts the boot vCPU with: LINT0 open as ExtINT, LINT1 masked.
    change(&mut lapic, 0x350, |_| 0x700);
    change(&mut lapic, 0x360, |_| 0x1_0000);
    set_local_interrupts(&mut lapic);
    assert_eq!(read(&lapic, 0x350), 0x1_0700);
    assert_eq!(read(&lapic, 0x360), 0x400);
    assert!(lapic.regs[..0x350].iter().chain(&lapic.regs[0x364..]).all(|b| *b == 0));
}

#[test]
fn memory_without_room() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x9000)]).unwrap();
    assert!(matches!(write_boot_tables(&mem), Err(RegsError::Tables(_))));
}
