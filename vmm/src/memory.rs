//! Guest memory.

use arch::layout::AddressMap;
use vm_memory::GuestMemoryMmap;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
#[error("machine-config.mem_size_mib: cannot map {mib} MiB of guest memory: {reason}")]
pub struct MemoryError {
    mib: u64,
    reason: String,
}

/// Maps the guest's RAM: private anonymous memory, of which the host pays for what the guest touches.
pub fn allocate(map: &AddressMap) -> Result<GuestMemoryMmap, MemoryError> {
    let mib = map.ram.iter().map(|(_, size)| (*size as u64) >> 20).sum();
    GuestMemoryMmap::from_ranges(&map.ram).map_err(|error| MemoryError { mib, reason: error.to_string() })
}
