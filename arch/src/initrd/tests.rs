use std::io::Write;

use linux_loader::bootparam::setup_header;
use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20), (GuestAddress(1 << 32), 16 << 20)]).unwrap()
}

fn file(len: usize) -> File {
    let bytes: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

fn kernel(end: u64, initrd_addr_max: Option<u32>) -> LoadedKernel {
    LoadedKernel {
        entry: GuestAddress(MIB),
        setup_header: initrd_addr_max.map(|max| setup_header { initrd_addr_max: max, ..Default::default() }),
        end: GuestAddress(end),
    }
}

#[test]
fn at_the_top_of_low_ram() {
    for how in [ImagePlacement::Copy, ImagePlacement::MapPrivate] {
        let mem = memory();
        let initrd = load(&mem, &file(0x2345), &kernel(2 * MIB, None), how).unwrap();
        assert_eq!(initrd, LoadedInitrd { address: GuestAddress(16 * MIB - 0x3000), size: 0x2345 });
        let mut got = vec![0; 0x3000];
        mem.read_slice(&mut got, initrd.address).unwrap();
        assert!(got[..0x2345].iter().enumerate().all(|(n, byte)| usize::from(*byte) == n % 251));
        assert!(got[0x2345..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn below_what_the_kernel_allows() {
    let load = |max| load(&memory(), &file(0x1000), &kernel(2 * MIB, Some(max)), ImagePlacement::Copy);
    assert_eq!(load(0x7FFF_FFFF).unwrap().address, GuestAddress(16 * MIB - 0x1000));
    assert_eq!(load(u32::MAX).unwrap().address, GuestAddress(16 * MIB - 0x1000));
    assert_eq!(load(0x7F_FFFF).unwrap().address, GuestAddress(0x7F_F000));
    assert!(matches!(load(0), Err(InitrdError::DoesNotFit { .. })));
}

#[test]
fn behind_the_kernel() {
    let load = |len, end| load(&memory(), &file(len), &kernel(end, None), ImagePlacement::Copy);
    assert_eq!(load(1 << 20, 15 * MIB).unwrap().address, GuestAddress(15 * MIB));
    let error = load((1 << 20) + 1, 15 * MIB).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the initrd of 1048577 bytes does not fit behind the kernel: the guest needs at least 17 MiB of \
         memory below 0x1000000"
    );
    assert!(matches!(load(17 << 20, 2 * MIB), Err(InitrdError::DoesNotFit { .. })));
}

#[test]
fn not_initrds() {
    let load = |file: &File| load(&memory(), file, &kernel(2 * MIB, None), ImagePlacement::Copy);
    assert!(matches!(load(&file(0)), Err(InitrdError::Empty)));
    assert!(matches!(load(&File::open(std::env::temp_dir()).unwrap()), Err(InitrdError::NotAFile)));
    let sparse = tempfile::tempfile().unwrap();
    sparse.set_len(1 << 40).unwrap();
    assert!(matches!(load(&sparse), Err(InitrdError::DoesNotFit { .. })));
}
