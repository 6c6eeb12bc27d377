use std::io::Write;

use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;
const BOTH: [ImagePlacement; 2] = [ImagePlacement::Copy, ImagePlacement::MapPrivate];

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20), (GuestAddress(1 << 32), 1 << 20)]).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn load_copy(bytes: &[u8]) -> Result<LoadedKernel, KernelError> {
    load(&memory(), &file(bytes), ImagePlacement::Copy)
}

/// One PT_LOAD: file offset, physical address, bytes in file, bytes in memory.
#[derive(Clone, Copy)]
struct Segment(u64, u64, u64, u64);

/// A small ELF file; byte n of it, behind the headers, is n modulo 251.
fn elf(entry: u64, segments: &[Segment], len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let mut header = b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    header.extend(entry.to_le_bytes());
    header.extend(64_u64.to_le_bytes());
    header.extend([0; 12]);
    header.extend([64, 0, 56, 0, u8::try_from(segments.len()).unwrap(), 0, 64, 0, 0, 0, 0, 0]);
    for Segment(offset, address, in_file, in_memory) in segments {
        header.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        for word in [*offset, u64::MAX, *address, *in_file, *in_memory, 0x1000] {
            header.extend(word.to_le_bytes());
        }
    }
    bytes[..header.len()].copy_from_slice(&header);
    bytes
}

/// A kernel like Linux': one aligned segment that ends within a page, one that starts there, bss.
fn good_elf() -> Vec<u8> {
    let segments = [
        Segment(0x1000, 16 * MIB, 0x2345, 0x2345),
        Segment(0x3345, 16 * MIB + 0x2345, 0x3000, 0x8000),
        // Not on the same place within a page.
        Segment(0x2001, 20 * MIB, 0x2000, 0x2000),
    ];
    elf(16 * MIB, &segments, 0x6400)
}

#[test]
fn elf_is_where_it_says() {
    let bytes = good_elf();
    for how in BOTH {
        let mem = memory();
        let kernel = load(&mem, &file(&bytes), how).unwrap();
        assert_eq!(kernel.entry, GuestAddress(16 * MIB));
        assert_eq!(kernel.end, GuestAddress(20 * MIB + 0x2000));
        assert!(kernel.setup_header.is_none());
        let check = |at: u64, expected: &[u8]| {
            let mut got = vec![0; expected.len()];
            mem.read_slice(&mut got, GuestAddress(at)).unwrap();
            assert!(got == expected, "{how:?}: memory at {at:#x}");
        };
        check(16 * MIB, &bytes[0x1000..0x6345]);
        check(16 * MIB + 0x5345, &[0; 0x5000]);
        check(20 * MIB, &bytes[0x2001..0x4001]);
        check(20 * MIB + 0x2000, &[0; 0x1000]);
        check(16 * MIB - 0x1000, &[0; 0x1000]);
    }
}

#[test]
fn mapped_pages_are_private() {
    let bytes = good_elf();
    let file = file(&bytes);
    let mem = memory();
    load(&mem, &file, ImagePlacement::MapPrivate).unwrap();
    mem.write_slice(&[0xEE; 0x4000], GuestAddress(16 * MIB)).unwrap();
    let mut now = vec![0; bytes.len()];
    file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == bytes, "writes of the guest do not reach the file");
}

#[test]
fn not_kernels() {
    for (bytes, what) in [
        (&b""[..], "empty"),
        (b"\x1F\x8B\x08 and so on", "gzip"),
        (b"\xFD7zXZ\0", "xz"),
        (b"\x28\xB5\x2F\xFD", "zstd"),
        (b"\x02\x21\x4C\x18", "lz4"),
        (b"MZ", "PE"),
        (b"#!/bin/sh", "script"),
        (b"070701", "cpio"),
        (b"hello", "no known format"),
        (&[0; 4096], "no known format"),
    ] {
        let error = load_copy(bytes).unwrap_err();
        assert!(matches!(error, KernelError::NotAKernel { found } if found.contains(what)), "{error}");
        assert!(error.to_string().contains("vmlinux (ELF) or a bzImage"));
    }
    let directory = File::open(std::env::temp_dir()).unwrap();
    assert!(matches!(load(&memory(), &directory, ImagePlacement::Copy), Err(KernelError::NotAFile)));
}

#[test]
fn truncated_elf() {
    let bytes = good_elf();
    for how in BOTH {
        for len in [4, 8, 63, 64, 100, 64 + 3 * 56 - 1, 0x1000, 0x6344] {
            let error = load(&memory(), &file(&bytes[..len]), how).unwrap_err();
            assert!(matches!(error, KernelError::Truncated { .. }), "{len}: {error:?}");
        }
        load(&memory(), &file(&bytes[..0x6345]), how).unwrap();
    }
    assert_eq!(
        load_copy(&bytes[..0x1000]).unwrap_err().to_string(),
        "the kernel is truncated: its ELF segment needs 13125 bytes of file, it has 4096"
    );
}

#[test]
fn other_elf_files() {
    let patched = |at: usize, value: u8| {
        let mut bytes = good_elf();
        bytes[at] = value;
        load_copy(&bytes).unwrap_err()
    };
    assert!(matches!(patched(4, 1), KernelError::WrongMachine { .. }), "32 bits");
    assert!(matches!(patched(5, 2), KernelError::WrongMachine { .. }), "big endian");
    assert!(matches!(patched(18, 183), KernelError::WrongMachine { .. }), "arm64");
    assert!(matches!(patched(16, 3), KernelError::WrongType { e_type: 3 }), "shared object");
    assert!(matches!(patched(54, 32), KernelError::Malformed { .. }), "size of headers");
    assert!(matches!(patched(56, 0), KernelError::Malformed { .. }), "no headers");
    assert!(matches!(patched(57, 255), KernelError::Malformed { .. }), "too many headers");
    assert!(matches!(patched(32, 63), KernelError::Malformed { .. }), "headers over the header");
    assert!(matches!(patched(39, 255), KernelError::Truncated { .. }), "headers far behind the end");
}

fn one_segment(entry: u64, segment: Segment) -> KernelError {
    let bytes = elf(entry, &[segment], 0x4000);
    let error = load(&memory(), &file(&bytes), ImagePlacement::MapPrivate).unwrap_err();
    assert_eq!(
        std::mem::discriminant(&error),
        std::mem::discriminant(&load(&memory(), &file(&bytes), ImagePlacement::Copy).unwrap_err())
    );
    error
}

#[test]
fn absurd_segments() {
    let address = 16 * MIB;
    // Beyond memory, in the hole, in memory that is not mapped at the start.
    for at in [31 * MIB + 0xF_F000, 64 * MIB, 0xC000_0000, 1 << 32, 1 << 52] {
        let error = one_segment(at, Segment(0x1000, at, 0x2000, 0x2000));
        assert!(matches!(error, KernelError::DoesNotFit { .. }), "{error}");
    }
    let error = one_segment(address, Segment(0x1000, address, 0x1000, 17 * MIB));
    assert_eq!(
        error.to_string(),
        "the kernel does not fit in guest memory: it needs at least 33 MiB, there are 32 MiB below the \
         32-bit hole"
    );
    for in_memory in [u64::MAX, u64::MAX - address + 1] {
        let error = one_segment(address, Segment(0x1000, address, 0x1000, in_memory));
        assert!(matches!(error, KernelError::Malformed { what: "a memory range overflows" }), "{error}");
    }
    let error = one_segment(address, Segment(u64::MAX, address, 2, 2));
    assert!(matches!(error, KernelError::Malformed { .. }), "{error}");
    let error = one_segment(address, Segment(0x1000, address, u64::MAX - 0x1000, u64::MAX));
    assert!(matches!(error, KernelError::Truncated { .. }), "{error}");
    let error = one_segment(address, Segment(0x1000, address, 0x2000, 0x1000));
    assert!(matches!(error, KernelError::Malformed { .. }), "{error}");
    let error = one_segment(address, Segment(0x1000, address, 0, 0));
    assert!(matches!(error, KernelError::Malformed { what: "no ELF segment to load" }), "{error}");
    for entry in [0, address - 1, address + 0x1000, u64::MAX] {
        let error = one_segment(entry, Segment(0x1000, address, 0x1000, 0x1000));
        assert!(matches!(error, KernelError::Malformed { .. }), "{error}");
    }
}

#[test]
fn overlapping_segments() {
    for at in [0, 0x7000, MIB - 1] {
        let error = one_segment(at, Segment(0x1000, at, 0x1000, 0x1000));
        assert!(matches!(error, KernelError::Overlap { .. }), "{error}");
    }
    let segments =
        [Segment(0x1000, 16 * MIB + 0xFFF, 0x1000, 0x1000), Segment(0x1000, 16 * MIB, 0x1000, 0x1000)];
    let error = load_copy(&elf(16 * MIB, &segments, 0x4000)).unwrap_err();
    assert_eq!(error.to_string(), "the kernel's segment at 0x1000fff overlaps another of its segments");
}

#[test]
fn endless_notes() {
    let mut bytes = elf(
        16 * MIB,
        &[Segment(0x1000, 16 * MIB, 0x1000, 0x1000), Segment(0x1000, 0, 0x1_0001, 0x1_0001)],
        0x1000,
    );
    bytes[64 + 56] = 4;
    bytes.resize(0x2_0000, 0);
    assert!(matches!(load_copy(&bytes), Err(KernelError::Malformed { .. })));
}

/// A bzImage with a setup of one sector more than `setup_sects` and `kernel_len` bytes behind.
fn bzimage(setup_sects: u8, kernel_len: usize) -> Vec<u8> {
    let setup_len = (usize::from(setup_sects) + 1) * 512;
    let mut bytes: Vec<u8> = (0..setup_len + kernel_len).map(|n| u8::try_from(n % 251).unwrap()).collect();
    bytes[..1024].fill(0);
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0x1F1, &[setup_sects]);
    put(0x1F4, &u32::try_from(kernel_len / 16).unwrap().to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20F_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22C, &0x7FFF_FFFF_u32.to_le_bytes());
    put(0x236, &3_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &(16 * MIB).to_le_bytes());
    put(0x260, &0x20_0000_u32.to_le_bytes());
    bytes
}

#[test]
fn bzimage_is_at_its_preferred_address() {
    // Seven and one sectors are a page, so that the first can be mapped and the second cannot.
    for (setup_sects, how) in [7, 8].into_iter().flat_map(|s| BOTH.map(|how| (s, how))) {
        let bytes = bzimage(setup_sects, 0x3210);
        let mem = memory();
        let kernel = load(&mem, &file(&bytes), how).unwrap();
        assert_eq!(kernel.entry, GuestAddress(16 * MIB + 0x200));
        assert_eq!(kernel.end, GuestAddress(18 * MIB), "room to unpack");
        let header = kernel.setup_header.unwrap();
        assert_eq!({ header.code32_start }, 16 << 20);
        assert_eq!({ header.init_size }, 0x20_0000);
        let mut got = vec![0; 0x3210];
        mem.read_slice(&mut got, GuestAddress(16 * MIB)).unwrap();
        assert!(got == bytes[(usize::from(setup_sects) + 1) * 512..], "{setup_sects} {how:?}");
        let after: u64 = mem.read_obj(GuestAddress(16 * MIB + 0x3210)).unwrap();
        assert_eq!(after, 0);
    }
}

#[test]
fn truncated_bzimage() {
    let bytes = bzimage(7, 0x3210);
    for len in [0x206, 0x250, 0x26B, 0x26C, 0x1000, 0x1200, bytes.len() - 1] {
        let error = load_copy(&bytes[..len]).unwrap_err();
        assert!(matches!(error, KernelError::Truncated { .. }), "{len:#x}: {error:?}");
    }
    let mut tiny = bzimage(7, 0x200);
    tiny[0x1F4..0x1F8].fill(0);
    assert!(matches!(load_copy(&tiny), Err(KernelError::Truncated { .. })), "no 64-bit entry");
}

#[test]
fn other_bzimages() {
    let patched = |at: usize, field: &[u8]| {
        let mut bytes = bzimage(7, 0x3210);
        bytes[at..at + field.len()].copy_from_slice(field);
        load_copy(&bytes)
    };
    assert!(matches!(patched(0x206, &[0x0B, 2]), Err(KernelError::No64BitEntry { .. })), "old");
    assert!(matches!(patched(0x211, &[0]), Err(KernelError::No64BitEntry { .. })), "zImage");
    assert!(matches!(patched(0x236, &[2]), Err(KernelError::No64BitEntry { .. })), "32 bits");
    assert!(matches!(patched(0x1F4, &[0xFF; 4]), Err(KernelError::Truncated { .. })), "syssize");
    assert!(matches!(patched(0x260, &[0xFF; 4]), Err(KernelError::DoesNotFit { .. })), "init_size");
    assert!(matches!(patched(0x258, &[0xFF; 8]), Err(KernelError::Malformed { .. })), "pref_address");
    assert!(matches!(patched(0x258, &[1, 0, 0, 0]), Err(KernelError::Overlap { .. })), "pref_address");
    assert!(matches!(patched(0x214, &[0; 4]), Err(KernelError::Load(_))), "code32_start");
    let kernel = patched(0x258, &[0; 8]).unwrap();
    assert_eq!(kernel.entry, GuestAddress(0x10_0200), "without a preferred address");
    // No sectors means four, so the kernel starts elsewhere.
    assert_eq!(patched(0x1F1, &[0]).unwrap().entry, GuestAddress(16 * MIB + 0x200));
    assert!(matches!(patched(0x1F1, &[255]), Err(KernelError::Truncated { .. })));
}
