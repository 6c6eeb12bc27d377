use super::*;
use vm_memory::GuestAddress;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn written(cpus: u8) -> Vec<u8> {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    write(&mem, cpus).unwrap();
    let mut bytes = vec![0; 1024];
    mem.read_slice(&mut bytes, GuestAddress(0x9_FC00)).unwrap();
    bytes
}

#[test]
fn pointer() {
    let bytes = written(2);
    assert_eq!(&bytes[..4], b"_MP_");
    assert_eq!(bytes[4..8], 0x9_FC10_u32.to_le_bytes());
    assert_eq!((bytes[8], bytes[9]), (1, 4), "one paragraph, version 1.4");
    assert_eq!(bytes[11..16], [0; 5], "a table, no IMCR");
    assert_eq!(sum(&bytes[..16]), 0);
}

#[test]
fn table_for_each_number_of_cpus() {
    for cpus in [1_u8, 2, 8, 32] {
        let bytes = &written(cpus)[16..];
        let length = usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
        assert_eq!(length, 44 + usize::from(cpus) * 20 + 28 * 8);
        assert!(length + 16 <= 1024);
        assert_eq!(&bytes[..4], b"PCMP");
        assert_eq!(bytes[6], 4);
        assert_eq!(sum(&bytes[..length]), 0);
        assert_eq!(bytes[34..36], (u16::from(cpus) + 28).to_le_bytes(), "entry count");
        assert_eq!(bytes[36..40], 0xFEE0_0000_u32.to_le_bytes());

        for id in 0..cpus {
            let entry = &bytes[44 + usize::from(id) * 20..][..20];
            assert_eq!(entry[..4], [0, id, 0x14, if id == 0 { 3 } else { 1 }]);
            assert_eq!(entry[8..12], 0x201_u32.to_le_bytes());
        }
        let rest = &bytes[44 + usize::from(cpus) * 20..length];
        assert_eq!(&rest[..8], b"\x01\0ISA   ");
        assert_eq!(rest[8..16], [2, cpus, 0x11, 1, 0, 0, 0xC0, 0xFE]);
        for line in 0..24_u8 {
            let entry = &rest[16 + usize::from(line) * 8..][..8];
            assert_eq!(entry, [3, 0, 0, 0, 0, line, cpus, line]);
        }
        assert_eq!(rest[16 + 24 * 8..], [4, 3, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0, 0xFF, 1]);
    }
}

#[test]
fn impossible_numbers_of_cpus() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    for cpus in [0, 33, 255] {
        assert!(matches!(write(&mem, cpus), Err(MpTableError::Cpus { .. })));
    }
}

#[test]
fn memory_without_room() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x9_F000)]).unwrap();
    assert!(matches!(write(&mem, 1), Err(MpTableError::Write(_))));
}
