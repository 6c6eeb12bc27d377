use super::*;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
}

fn platform(cpus: u8, max_cpus: u8, devices: u64) -> Platform {
    let virtio_mmio = (0..devices)
        .zip((5..24).cycle())
        .map(|(index, gsi)| {
            let window = crate::layout::virtio_mmio_window(index).unwrap();
            MmioDevice { base: window.start, size: window.size, gsi }
        })
        .collect();
    Platform { cpus, max_cpus, virtio_mmio, pci: None }
}

fn read(mem: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// A table with its header checked.
fn table(mem: &GuestMemoryMmap, at: u64, signature: &[u8; 4], revision: u8) -> Vec<u8> {
    assert_eq!(at % 16, 0);
    let len = u32_at(&read(mem, at + 4, 4), 0);
    let bytes = read(mem, at, usize::try_from(len).unwrap());
    assert_eq!(&bytes[..4], signature);
    assert_eq!(bytes[8], revision);
    assert_eq!(sum(&bytes), 0, "checksum");
    assert_eq!(&bytes[10..16], b"PINFLD");
    bytes
}

struct Tables {
    fadt: Vec<u8>,
    madt: Vec<u8>,
    mcfg: Option<Vec<u8>>,
    dsdt: Vec<u8>,
}

/// Finds the tables as a guest does (section 5.2.5 and on).
fn tables(platform: &Platform) -> Tables {
    let mem = memory();
    let rsdp_at = write_tables(&mem, platform).unwrap();
    assert_eq!(rsdp_at, GuestAddress(0xE_0000));
    let rsdp = read(&mem, rsdp_at.0, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(sum(&rsdp[..20]), 0);
    assert_eq!(sum(&rsdp), 0);
    assert_eq!((rsdp[15], u32_at(&rsdp, 20)), (2, 36), "revision and length");
    let xsdt = table(&mem, u64_at(&rsdp, 24), b"XSDT", 1);
    assert_eq!(xsdt.len(), 36 + if platform.pci.is_some() { 3 } else { 2 } * 8);
    let fadt = table(&mem, u64_at(&xsdt, 36), b"FACP", 6);
    let madt = table(&mem, u64_at(&xsdt, 44), b"APIC", 5);
    let dsdt = table(&mem, u64_at(&fadt, 140), b"DSDT", 2);
    let mcfg = xsdt.get(52..60).map(|entry| table(&mem, u64_at(entry, 0), b"MCFG", 1));
    Tables { fadt, madt, mcfg, dsdt }
}

#[test]
fn fixed_table() {
    let fadt = tables(&platform(1, 1, 1)).fadt;
    assert_eq!(fadt.len(), 276);
    assert_eq!(u32_at(&fadt, 40), 0, "only the 64-bit address of the DSDT is used");
    assert_eq!(fadt[109..111], [0x36, 0], "8042, no VGA, no ASPM, no CMOS clock; no legacy devices");
    let flags = u32_at(&fadt, 112);
    assert_ne!(flags & (1 << 20), 0, "hardware-reduced");
    assert_ne!(flags & (1 << 10), 0, "reset register");
    assert_eq!(flags & 0b11_0001, 0b11_0001, "no fixed buttons, WBINVD works");
    // Generic addresses (section 5.2.3.2): I/O, 8 bits at 0, byte access.
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 0x02, 6, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[128], RESET_VALUE);
    assert_eq!(fadt[244..256], [1, 8, 0, 1, 0x00, 6, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[256..268], [1, 8, 0, 1, 0x01, 6, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&fadt[268..276], b"PINFOLD\0");
    assert_eq!(fadt[46..109], [0; 63], "no SCI, no fixed hardware");
}

#[test]
fn processors() {
    let madt = tables(&platform(2, 3, 0)).madt;
    assert_eq!(u32_at(&madt, 36), 0xFEE0_0000);
    assert_eq!(u32_at(&madt, 40), 0, "no 8259s");
    let entries = [
        &[0, 8, 0, 0, 1, 0, 0, 0][..],
        &[0, 8, 1, 1, 1, 0, 0, 0],
        &[0, 8, 2, 2, 2, 0, 0, 0],
        &[1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0],
        &[4, 6, 0xFF, 0, 0, 1],
    ];
    assert_eq!(madt[44..], entries.concat());
    assert_eq!(tables(&platform(32, 32, 0)).madt.len(), 44 + 32 * 8 + 12 + 6);
    assert_eq!(tables(&platform(2, 0, 0)).madt.len(), 44 + 2 * 8 + 12 + 6);
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn devices() {
    let dsdt = tables(&platform(1, 1, 2)).dsdt;
    for (name, base, gsi) in [(b"V000", 0xC000_1000_u32, 5), (b"V001", 0xC000_2000, 6)] {
        assert!(contains(&dsdt, name));
        // Section 6.4.3.4: fixed 32-bit memory, writable; section 6.4.3.6: an interrupt, consumer, edge,
        // active high, exclusive.
        let mut crs = vec![0x86, 9, 0, 1];
        crs.extend(base.to_le_bytes());
        crs.extend(0x1000_u32.to_le_bytes());
        crs.extend([0x89, 6, 0, 0b0011, 1, gsi, 0, 0, 0, 0x79]);
        assert!(contains(&dsdt, &crs), "{name:?}");
    }
    assert!(contains(&dsdt, b"\x08_HID\x0DLNRO0005\0"));
    assert!(contains(&dsdt, b"\x08_CCA\x01"));
    assert!(contains(&dsdt, b"\x08_UID\x01"));
    // PNP0501 as a compressed EISA id, then the serial port's resources.
    assert!(contains(&dsdt, b"\x08_HID\x0C\x41\xD0\x05\x01"));
    assert!(contains(&dsdt, &[0x47, 1, 0xF8, 3, 0xF8, 3, 1, 8, 0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0, 0x79]));
    // PNP0303 with the data port, the command port and the interrupt, in the order that Linux' driver expects.
    assert!(contains(&dsdt, b"\x08_HID\x0C\x41\xD0\x03\x03"));
    let ports = [0x47, 1, 0x60, 0, 0x60, 0, 1, 1, 0x47, 1, 0x64, 0, 0x64, 0, 1, 1];
    let interrupt = [0x89, 6, 0, 0b0011, 1, 1, 0, 0, 0, 0x79];
    assert!(contains(&dsdt, &[&ports[..], &interrupt].concat()));
    assert!(!contains(&dsdt, b"\x0C\x41\xD0\x0F\x13"), "no mouse");
    // Name (_S5, Package (4) {5, 0, 0, 0})
    assert!(contains(&dsdt, b"\x08_S5_\x12\x07\x04\x0A\x05\0\0\0"));
}

#[test]
fn a_pci_root_bridge() {
    let without = tables(&platform(1, 1, 2));
    assert!(without.mcfg.is_none() && !contains(&without.dsdt, b"PCI0"));

    let map = crate::layout::AddressMap::new(1 << 30, 48).unwrap();
    let Tables { mcfg, dsdt, fadt, .. } = tables(&Platform { pci: Some(map.mmio64), ..platform(1, 1, 0) });
    // Eight reserved bytes, then the ECAM's address, segment 0, buses 0 to 0.
    assert_eq!(mcfg.unwrap()[36..], [&[0; 8][..], &0xE000_0000_u64.to_le_bytes(), &[0; 8]].concat());
    assert_eq!(fadt[109] & (1 << 3), 0, "messages are supported");

    assert!(contains(&dsdt, b"PCI0\x08_HID\x0C\x41\xD0\x0A\x08\x08_CID\x0C\x41\xD0\x0A\x03"));
    for name in [&b"\x08_UID\0"[..], b"\x08_BBN\0", b"\x08_CCA\x01"] {
        assert!(contains(&dsdt, name), "{name:?}");
    }
    // Address space descriptors (section 6.4.3.5): type, both ends fixed, flags of the type; granularity, first, last,
    // translation, length.
    let bus = [0x88, 13, 0, 2, 0xC, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let mut low = vec![0x87, 23, 0, 0, 0xC, 1, 0, 0, 0, 0];
    for value in [0xC010_0000_u32, 0xDFFF_FFFF, 0, 0x1FF0_0000] {
        low.extend(value.to_le_bytes());
    }
    let mut high = vec![0x8A, 43, 0, 0, 0xC, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    for value in [map.mmio64.start.0, map.mmio64.end().0 - 1, 0, 1 << 40] {
        high.extend(value.to_le_bytes());
    }
    let mut ports = vec![0x47, 1, 0xF8, 0xC, 0xF8, 0xC, 1, 8];
    ports.extend([0x88, 13, 0, 1, 0xC, 3, 0, 0, 0, 0x10, 0xFF, 0x2F, 0, 0, 0, 0x20]);
    assert!(contains(&dsdt, &[&bus[..], &ports, &low, &high].concat()));
    // Method (_OSC, 4, Serialized) {If (LEqual (Arg0, Buffer (16) {..})) {Return (Arg3)} ..
    assert!(contains(&dsdt, b"_OSC\x0C\xA0\x19\x93\x68\x11\x13\x0A\x10\x5B\x4D\xDB\x33"));
    assert!(contains(&dsdt, b"\xA4\x6B\x8A\x6B\0CDW1\x7DCDW1\x0A\x04CDW1\xA4\x6B"));
    // PNP0C02 with the whole of the ECAM.
    assert!(contains(&dsdt, b"MBRD\x08_HID\x0C\x41\xD0\x0C\x02"));
    assert!(contains(&dsdt, &[0x86, 9, 0, 1, 0, 0, 0, 0xE0, 0, 0, 0x10, 0]));
}

#[test]
fn all_windows_fit() {
    assert!(tables(&platform(32, 32, 255)).dsdt.len() > 255 * 60);
}

#[test]
fn impossible_platforms() {
    let mem = memory();
    let device = |base, size| Platform {
        virtio_mmio: vec![MmioDevice { base: GuestAddress(base), size, gsi: 5 }],
        ..platform(1, 1, 0)
    };
    for (base, size) in [(1 << 32, 0x1000), (0xC000_0000, 1 << 32), (0xFFFF_F000, 0x2000)] {
        assert!(matches!(write_tables(&mem, &device(base, size)), Err(AcpiError::DeviceAddress { .. })));
    }
    let many = Platform {
        virtio_mmio: vec![MmioDevice { base: GuestAddress(0xC000_0000), size: 0x1000, gsi: 5 }; 3000],
        ..platform(1, 1, 0)
    };
    assert!(matches!(write_tables(&mem, &many), Err(AcpiError::TooLarge)));
    for (start, size) in [(1 << 40, 0), (u64::MAX, 2)] {
        let pci = Some(Window { start: GuestAddress(start), size });
        let windowed = Platform { pci, ..platform(1, 1, 0) };
        assert!(matches!(write_tables(&mem, &windowed), Err(AcpiError::PciWindow { .. })));
    }
    let small = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0xE_0000)]).unwrap();
    assert!(matches!(write_tables(&small, &platform(1, 1, 1)), Err(AcpiError::Write(_))));
}
