//! `bzImage`: a setup header, real-mode code that we skip, and a kernel that unpacks itself.

use std::fs::File;

use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{KernelError, LoadedKernel, check_in_file, check_in_ram, read_struct};
use crate::image::{ImagePlacement, place};
use crate::layout::{HIMEM, PAGE_SIZE};

/// Where the setup header is, in the file and in the zero page.
const HEADER_OFFSET: u64 = 0x1F1;
const MAGIC_OFFSET: u64 = 0x202;
/// "HdrS"
const MAGIC: u32 = 0x5372_6448;
/// The first protocol version with `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020C;
/// The 64-bit entry is this far behind the 32-bit one, which is the first byte.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

pub(super) fn has_magic(file: &File, size: u64) -> Result<bool, KernelError> {
    if size < MAGIC_OFFSET + 4 {
        return Ok(false);
    }
    let magic: u32 = read_struct(file, size, MAGIC_OFFSET, "magic number")?;
    Ok(magic == MAGIC)
}

pub(super) fn load(
    mem: &GuestMemoryMmap,
    mut file: &File,
    size: u64,
    how: ImagePlacement,
) -> Result<LoadedKernel, KernelError> {
    let mut header: setup_header = read_struct(file, size, HEADER_OFFSET, "setup header")?;
    check_header(&header)?;

    // A header from before the field was written means four sectors, and the boot sector comes on top.
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup_len = (sectors + 1) * SECTOR;
    check_in_file(setup_len, u64::from(header.syssize) * 16, size, "compressed kernel")?;
    let kernel_len = size
        .checked_sub(setup_len)
        .filter(|len| *len > ENTRY_64)
        .ok_or(KernelError::Truncated { what: "setup code", needed: setup_len + ENTRY_64 + 1, size })?;

    // At the preferred address it unpacks without moving itself out of the way twice.
    let to = if header.pref_address != 0 { header.pref_address } else { u64::from(header.code32_start) };
    let end = check_in_ram(mem, to, kernel_len.max(u64::from(header.init_size)))?;

    // RAM below the hole ends below 4 GiB, and `to` is in it.
    header.code32_start =
        u32::try_from(to).map_err(|_| KernelError::Malformed { what: "its load address" })?;
    if how == ImagePlacement::MapPrivate && setup_len % PAGE_SIZE == to % PAGE_SIZE {
        place(mem, file, setup_len, GuestAddress(to), kernel_len, how).map_err(KernelError::Place)?;
    } else {
        BzImage::load(mem, Some(GuestAddress(to)), &mut file, Some(HIMEM)).map_err(KernelError::Load)?;
    }
    // `to + ENTRY_64` is within the kernel, whose end was computed without overflow.
    Ok(LoadedKernel {
        entry: GuestAddress(to + ENTRY_64),
        setup_header: Some(header),
        end: GuestAddress(end),
    })
}

fn check_header(header: &setup_header) -> Result<(), KernelError> {
    if header.version < VERSION_XLOADFLAGS {
        return Err(KernelError::No64BitEntry { what: "its boot protocol is older than 2.12" });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::No64BitEntry { what: "it is a zImage" });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry { what: "it is a 32-bit kernel" });
    }
    Ok(())
}
