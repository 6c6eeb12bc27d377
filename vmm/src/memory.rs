//! Guest memory.

use std::fs::File;
use std::io;
use std::sync::Arc;

use arch::layout::AddressMap;
use vm_memory::{FileOffset, GuestMemoryMmap};

use crate::memfd;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
#[error("machine-config.mem_size_mib: cannot map {mib} MiB of guest memory: {reason}")]
pub struct MemoryError {
    mib: u64,
    reason: String,
}

/// Who reaches the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// This process alone: private anonymous memory.
    Private,
    /// The servers of vhost-user devices, too: one memfd.
    Shared,
}

/// Maps the guest's RAM, of which the host pays for what is touched.
pub fn allocate(map: &AddressMap, sharing: Sharing) -> Result<GuestMemoryMmap, MemoryError> {
    let bytes: u64 = map.ram.iter().map(|(_, size)| *size as u64).sum();
    let failed = |reason| MemoryError { mib: bytes >> 20, reason };
    match sharing {
        Sharing::Private => GuestMemoryMmap::from_ranges(&map.ram).map_err(|error| failed(error.to_string())),
        Sharing::Shared => {
            let file = memfd(bytes).map_err(|error| failed(format!("no memfd of that size: {error}")))?;
            let mut offset = 0;
            let ranges = map.ram.iter().map(|(start, size)| {
                let part = FileOffset::from_arc(Arc::clone(&file), offset);
                offset += *size as u64;
                (*start, *size, Some(part))
            });
            GuestMemoryMmap::from_ranges_with_files(ranges).map_err(|error| failed(error.to_string()))
        }
    }
}

/// A memfd of this size, which cannot be cut off under those who map it.
fn memfd(bytes: u64) -> io::Result<Arc<File>> {
    let file = memfd::create(c"pinfold-guest")?;
    file.set_len(bytes)?;
    memfd::seal(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL)?;
    Ok(Arc::new(file))
}
