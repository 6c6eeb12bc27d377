//! Loading an initrd: at the top of low RAM, away from the kernel.

use std::fs::File;
use std::io;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::image::{ImagePlacement, low_ram_end, mib_rounded_up, place};
use crate::kernel::LoadedKernel;
use crate::layout::PAGE_SIZE;

#[cfg(test)]
mod tests;

/// Why an initrd could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// Not a regular file.
    #[error("the initrd is not a regular file")]
    NotAFile,
    /// An empty file.
    #[error("the initrd is empty: leave it out, or give one with contents")]
    Empty,
    /// The file could not be read.
    #[error("cannot read the initrd")]
    Read(#[source] io::Error),
    /// No room between the kernel and the end of what the kernel can reach.
    #[error(
        "the initrd of {} bytes does not fit behind the kernel: the guest needs at least {needed_mib} MiB \
         of memory below {limit:#x}",
        size
    )]
    DoesNotFit {
        /// Bytes of the initrd.
        size: u64,
        /// Guest memory needed, in MiB.
        needed_mib: u64,
        /// The address below which it must lie: the end of low RAM, or what the kernel's header allows.
        limit: u64,
    },
    /// The file could not be placed in guest memory.
    #[error("cannot place the initrd in guest memory")]
    Place(#[source] io::Error),
}

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedInitrd {
    /// First address, on a page boundary.
    pub address: GuestAddress,
    /// Bytes; always below 4 GiB, since low RAM is.
    pub size: u32,
}

/// Loads `file` as high as possible below the 32-bit hole (and below the kernel's `initrd_addr_max`, boot
/// protocol 2.03), on a page boundary and behind `kernel`. Moves the file's position.
///
/// # Errors
/// See [`InitrdError`].
pub fn load(
    mem: &GuestMemoryMmap,
    file: &File,
    kernel: &LoadedKernel,
    how: ImagePlacement,
) -> Result<LoadedInitrd, InitrdError> {
    let metadata = file.metadata().map_err(InitrdError::Read)?;
    if !metadata.is_file() {
        return Err(InitrdError::NotAFile);
    }
    let size = metadata.len();
    if size == 0 {
        return Err(InitrdError::Empty);
    }
    let ram = low_ram_end(mem);
    let limit = kernel.setup_header.map_or(ram, |header| ram.min(u64::from(header.initrd_addr_max) + 1));
    let does_not_fit = || InitrdError::DoesNotFit {
        size,
        needed_mib: mib_rounded_up(kernel.end.0.saturating_add(size)),
        limit,
    };
    let address = limit.checked_sub(size).ok_or_else(does_not_fit)? & !(PAGE_SIZE - 1);
    if address < kernel.end.0 {
        return Err(does_not_fit());
    }
    let size_32 = u32::try_from(size).map_err(|_| does_not_fit())?;
    place(mem, file, 0, GuestAddress(address), size, how).map_err(InitrdError::Place)?;
    Ok(LoadedInitrd { address: GuestAddress(address), size: size_32 })
}
