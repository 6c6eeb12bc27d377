use super::*;
use vm_memory::Bytes;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn ranges(memory: u64, pci: bool) -> Vec<(u64, u64, u32)> {
    e820(&AddressMap::new(memory, 48).unwrap(), pci)
        .iter()
        .map(|e| (e.addr, e.addr + e.size, e.r#type))
        .collect()
}

#[test]
fn memory_maps() {
    let low = [(0, 0x9_FC00, 1), (0x9_FC00, 0xE_0000, 2), (0xE_0000, 0x10_0000, 3)];
    assert_eq!(ranges(128 * MIB, false), [&low[..], &[(MIB, 128 * MIB, 1)]].concat());
    assert_eq!(ranges(3 * GIB, false), [&low[..], &[(MIB, 3 * GIB, 1)]].concat());
    let high = [(MIB, 3 * GIB, 1), (4 * GIB, 6 * GIB, 1)];
    assert_eq!(ranges(5 * GIB, false), [&low[..], &high].concat());
    assert_eq!(ranges(5 * GIB, true), [&low[..], &high, &[(0xE000_0000, 0xE010_0000, 2)]].concat());
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap()
}

fn kernel(setup_header: Option<setup_header>) -> LoadedKernel {
    LoadedKernel { entry: GuestAddress(0x20_0000), setup_header, end: GuestAddress(0x30_0000) }
}

/// Offsets are those of the zero page's documentation, not those of a structure.
#[test]
fn zero_page_of_an_elf_kernel() {
    let mem = memory();
    let map = AddressMap::new(16 * MIB, 48).unwrap();
    let cmdline = crate::cmdline::build(Some("quiet"), None, Some(&[])).unwrap();
    let initrd = Some(LoadedInitrd { address: GuestAddress(0xF0_0000), size: 0x1234 });
    let info = BootInfo {
        map: &map,
        kernel: &kernel(None),
        initrd,
        cmdline: &cmdline,
        rsdp: GuestAddress(0xE_0000),
        pci: false,
    };
    write(&mem, &info).unwrap();

    let read = |offset: u64, len: usize| {
        let mut bytes = vec![0; len];
        mem.read_slice(&mut bytes, GuestAddress(0x7000 + offset)).unwrap();
        bytes
    };
    assert_eq!(read(0x70, 8), 0xE_0000_u64.to_le_bytes(), "acpi_rsdp_addr");
    assert_eq!(read(0x1E8, 1), [4], "e820_entries");
    assert_eq!(read(0x1EF, 1), [0], "sentinel");
    assert_eq!(read(0x1FE, 2), [0x55, 0xAA], "boot_flag");
    assert_eq!(read(0x202, 4), *b"HdrS");
    assert_eq!(read(0x210, 1), [0xFF], "type_of_loader");
    assert_eq!(read(0x218, 4), 0xF0_0000_u32.to_le_bytes(), "ramdisk_image");
    assert_eq!(read(0x21C, 4), 0x1234_u32.to_le_bytes(), "ramdisk_size");
    assert_eq!(read(0x228, 4), 0x2_0000_u32.to_le_bytes(), "cmd_line_ptr");
    assert_eq!(read(0x238, 4), 2047_u32.to_le_bytes(), "cmdline_size");
    let mut entry = 0x10_0000_u64.to_le_bytes().to_vec();
    entry.extend((15 * MIB).to_le_bytes());
    entry.extend(1_u32.to_le_bytes());
    assert_eq!(read(0x2D0 + 3 * 20, 20), entry, "fourth e820 entry");

    let mut line = [0; 14];
    mem.read_slice(&mut line, GuestAddress(0x2_0000)).unwrap();
    assert_eq!(&line, b"quiet pci=off\0");
}

#[test]
fn zero_page_of_a_bzimage() {
    let mem = memory();
    let map = AddressMap::new(16 * MIB, 48).unwrap();
    let header = setup_header {
        header: HEADER_MAGIC,
        version: 0x20D,
        cmdline_size: 13,
        init_size: 0x77,
        ..setup_header::default()
    };
    let kernel = kernel(Some(header));
    let cmdline = crate::cmdline::build(Some("quiet"), None, Some(&[])).unwrap();
    let info = BootInfo {
        map: &map,
        kernel: &kernel,
        initrd: None,
        cmdline: &cmdline,
        rsdp: GuestAddress(0xE_0000),
        pci: false,
    };
    write(&mem, &info).unwrap();
    let init_size: u32 = mem.read_obj(GuestAddress(0x7000 + 0x260)).unwrap();
    assert_eq!(init_size, 0x77, "the kernel's own header is passed on");
    let ramdisk: u64 = mem.read_obj(GuestAddress(0x7000 + 0x218)).unwrap();
    assert_eq!(ramdisk, 0);

    let cmdline = crate::cmdline::build(Some("quiet!"), None, Some(&[])).unwrap();
    let error = write(&mem, &BootInfo { cmdline: &cmdline, ..info }).unwrap_err();
    assert_eq!(error.to_string(), "the kernel command line has 14 characters; this kernel takes at most 13");
}

#[test]
fn memory_without_room() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
    let map = AddressMap::new(16 * MIB, 48).unwrap();
    let cmdline = crate::cmdline::build(None, None, Some(&[])).unwrap();
    let kernel = kernel(None);
    let info = BootInfo {
        map: &map,
        kernel: &kernel,
        initrd: None,
        cmdline: &cmdline,
        rsdp: GuestAddress(0xE_0000),
        pci: false,
    };
    assert!(matches!(write(&mem, &info), Err(BootParamsError::Cmdline(_))));
}
