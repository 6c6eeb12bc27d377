//! Loading a Linux kernel: `vmlinux` (ELF) or `bzImage`, to be entered by the 64-bit boot protocol
//! (Linux Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use vm_memory::{GuestAddress, GuestMemoryMmap};

pub use crate::image::ImagePlacement;
use crate::image::{low_ram_end, mib_rounded_up};

mod bzimage;
mod elf;
#[cfg(test)]
mod tests;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Not a regular file.
    #[error("the kernel is not a regular file")]
    NotAFile,
    /// The file could not be read.
    #[error("cannot read the kernel")]
    Read(#[source] io::Error),
    /// Neither of the formats that we load.
    #[error("the file is not a kernel: it is {found}; give an uncompressed vmlinux (ELF) or a bzImage")]
    NotAKernel {
        /// What it looks like.
        found: &'static str,
    },
    /// The file ends before what its headers promise.
    #[error("the kernel is truncated: its {what} needs {needed} bytes of file, it has {size}")]
    Truncated {
        /// Which part is cut.
        what: &'static str,
        /// The file size that the part needs.
        needed: u64,
        /// The size of the file.
        size: u64,
    },
    /// An ELF file for another machine.
    #[error("the kernel is an ELF file for {what}; it must be a 64-bit little-endian x86_64 one")]
    WrongMachine {
        /// What it is made for.
        what: String,
    },
    /// An ELF file that is not an executable.
    #[error("the kernel is an ELF file of type {e_type}; it must be an executable (type 2)")]
    WrongType {
        /// The ELF header's `e_type`.
        e_type: u16,
    },
    /// Header fields that contradict each other.
    #[error("the kernel's headers are wrong: {what}")]
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
    /// A bzImage that cannot be entered in 64-bit mode.
    #[error("the bzImage cannot be started in 64-bit mode: {what}; build it for x86_64, Linux 3.8 or newer")]
    No64BitEntry {
        /// What is missing.
        what: &'static str,
    },
    /// More memory is needed.
    #[error(
        "the kernel does not fit in guest memory: it needs at least {needed_mib} MiB, there are \
         {available_mib} MiB below the 32-bit hole"
    )]
    DoesNotFit {
        /// Guest memory needed, in MiB.
        needed_mib: u64,
        /// Guest memory available below 4 GiB, in MiB.
        available_mib: u64,
    },
    /// Part of it would lie where boot data is, or on another part.
    #[error("the kernel's segment at {start:#x} overlaps {with}")]
    Overlap {
        /// Guest physical address of the segment.
        start: u64,
        /// What is there already.
        with: &'static str,
    },
    /// The loader refused it.
    #[error("cannot load the kernel")]
    Load(#[source] linux_loader::loader::Error),
    /// The file could not be placed in guest memory.
    #[error("cannot place the kernel in guest memory")]
    Place(#[source] io::Error),
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct LoadedKernel {
    /// Where the boot vCPU starts in 64-bit mode.
    pub entry: GuestAddress,
    /// The bzImage's setup header, to be passed on in the zero page; an ELF kernel has none.
    pub setup_header: Option<setup_header>,
    /// First address behind everything the kernel needs before it has read its memory map.
    pub end: GuestAddress,
}

/// Loads `file` into guest memory, which must be fresh: what the image leaves zero is not written. Moves
/// the file's position.
///
/// An ELF kernel goes where its program headers say, a bzImage to its preferred address. All of it must
/// lie in RAM between 1 MiB and the 32-bit hole.
///
/// # Errors
/// See [`KernelError`]; guest memory may have been written to, and the VM should be given up.
pub fn load(mem: &GuestMemoryMmap, file: &File, how: ImagePlacement) -> Result<LoadedKernel, KernelError> {
    let metadata = file.metadata().map_err(KernelError::Read)?;
    if !metadata.is_file() {
        return Err(KernelError::NotAFile);
    }
    let size = metadata.len();
    let mut magic = [0; 8];
    let read = file.read_at(&mut magic, 0).map_err(KernelError::Read)?;
    if magic.starts_with(b"\x7FELF") {
        return elf::load(mem, file, size, how);
    }
    if bzimage::has_magic(file, size)? {
        return bzimage::load(mem, file, size, how);
    }
    Err(KernelError::NotAKernel { found: describe(magic.get(..read).unwrap_or_default()) })
}

/// What a file with these first bytes is.
fn describe(magic: &[u8]) -> &'static str {
    const KNOWN: [(&[u8], &str); 9] = [
        (b"\x1F\x8B", "gzip data, to be uncompressed first"),
        (b"\xFD7zXZ\0", "xz data, to be uncompressed first"),
        (b"\x28\xB5\x2F\xFD", "zstd data, to be uncompressed first"),
        (b"BZh", "bzip2 data, to be uncompressed first"),
        (b"\x02\x21\x4C\x18", "lz4 data, to be uncompressed first"),
        (b"\x04\x22\x4D\x18", "lz4 data, to be uncompressed first"),
        (b"MZ", "a PE program"),
        (b"#!", "a script"),
        (b"0707", "a cpio archive (an initrd?)"),
    ];
    if magic.is_empty() {
        return "empty";
    }
    KNOWN.iter().find(|(start, _)| magic.starts_with(start)).map_or("of no known format", |(_, name)| name)
}

/// Reads a plain structure from the file.
fn read_struct<T: vm_memory::ByteValued + Default>(
    file: &File,
    size: u64,
    offset: u64,
    what: &'static str,
) -> Result<T, KernelError> {
    let mut value = T::default();
    let len = value.as_slice().len() as u64;
    check_in_file(offset, len, size, what)?;
    file.read_exact_at(value.as_mut_slice(), offset).map_err(KernelError::Read)?;
    Ok(value)
}

/// Checks that the file holds `len` bytes at `offset`.
fn check_in_file(offset: u64, len: u64, size: u64, what: &'static str) -> Result<(), KernelError> {
    let needed = offset.checked_add(len).ok_or(KernelError::Malformed { what: "a file offset overflows" })?;
    if needed > size { Err(KernelError::Truncated { what, needed, size }) } else { Ok(()) }
}

/// Checks that `start..start + len` is low RAM behind the first megabyte; gives its end.
fn check_in_ram(mem: &GuestMemoryMmap, start: u64, len: u64) -> Result<u64, KernelError> {
    let end = start.checked_add(len).ok_or(KernelError::Malformed { what: "a memory range overflows" })?;
    if start < crate::layout::HIMEM.0 {
        return Err(KernelError::Overlap { start, with: "the first megabyte, which holds boot data" });
    }
    let available = low_ram_end(mem);
    if end > available {
        return Err(KernelError::DoesNotFit {
            needed_mib: mib_rounded_up(end),
            available_mib: available >> 20,
        });
    }
    Ok(end)
}
