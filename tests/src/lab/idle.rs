//! A guest that does nothing, for tests of what is around it: any KVM runs it, at once.

/// An ELF file whose one segment is `cli; 1: hlt; jmp 1b`, at 16 MiB (elf(5)).
pub(super) fn kernel() -> Vec<u8> {
    const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
    const HEADERS: u16 = 64;
    const ADDRESS: u64 = 16 << 20;
    let (at, size) = (4096_u64, CODE.len() as u64);
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64; one program header right behind this one.
    file.extend([2_u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1_u32.to_le_bytes());
    file.extend([ADDRESS, u64::from(HEADERS), 0].map(u64::to_le_bytes).concat());
    file.extend(0_u32.to_le_bytes());
    file.extend([HEADERS, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    // PT_LOAD, readable and executable.
    file.extend([1_u32, 5].map(u32::to_le_bytes).concat());
    file.extend([at, ADDRESS, ADDRESS, size, size, at].map(u64::to_le_bytes).concat());
    file.resize(4096, 0);
    file.extend(CODE);
    file
}
