//! Guest memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use arch::layout::AddressMap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

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

/// What the host's processors and KVM map guest memory by where they can, in bytes.
const HUGE_PAGE: usize = 2 << 20;

/// The host's policy of huge pages.
const POLICY: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Maps the guest's RAM, of which the host pays for what is touched. It stays mapped as long as the process lives.
pub fn allocate(map: &AddressMap, sharing: Sharing) -> Result<GuestMemoryMmap, MemoryError> {
    let bytes: u64 = map.ram.iter().map(|(_, size)| *size as u64).sum();
    let failed = |reason: String| MemoryError { mib: bytes >> 20, reason };
    let file = match sharing {
        Sharing::Private => None,
        Sharing::Shared => {
            Some(memfd(bytes).map_err(|error| failed(format!("no memfd of that size: {error}")))?)
        }
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, size) in &map.ram {
        let part = file.as_ref().map(|file| FileOffset::from_arc(Arc::clone(file), offset));
        let region = region(*size, part).map_err(|error| failed(error.to_string()))?;
        regions.push(
            GuestRegionMmap::new(region, *start).ok_or_else(|| failed("it does not fit there".to_owned()))?,
        );
        offset += *size as u64;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| failed(error.to_string()))
}

/// What is known of the host's policy by who cannot see it.
static HUGE_PAGES: OnceLock<bool> = OnceLock::new();

/// Notes what [`has_huge_pages`] says from now on.
pub fn know_huge_pages(has: bool) {
    let _ = HUGE_PAGES.set(has);
}

/// Whether the host backs private memory with huge pages without being asked to
/// (Documentation/admin-guide/mm/transhuge.rst).
pub fn has_huge_pages() -> bool {
    let look = || fs::read_to_string(POLICY).is_ok_and(|policy| policy.contains("[always]"));
    HUGE_PAGES.get().copied().unwrap_or_else(look)
}

/// Maps `size` bytes, private or of a file.
///
/// They begin on a huge page's boundary, as the guest's RAM does at its own address: else KVM could map none of it by
/// huge pages, and each 4 KiB that the guest touches would be a fault of its own (`kvm_alloc_memslot_metadata`,
/// arch/x86/kvm/x86.c). Whether the host backs it with huge pages is the host's affair.
fn region(size: usize, file: Option<FileOffset>) -> io::Result<MmapRegion> {
    let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
    let (flags, fd, offset) = match &file {
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        Some(file) => {
            (libc::MAP_SHARED, file.file().as_raw_fd(), file.start().try_into().map_err(io::Error::other)?)
        }
    };
    let flags = flags | libc::MAP_NORESERVE;
    let room = size.checked_add(HUGE_PAGE).ok_or_else(too_large)?;
    // SAFETY: a mapping where nothing else is, which nobody can access.
    let reserved = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0)
    };
    if reserved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let ahead = reserved.addr().next_multiple_of(HUGE_PAGE) - reserved.addr();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: it replaces a part of what has just been reserved: `ahead` is less than the huge page by which that is
    // longer than `size`.
    let address = unsafe {
        libc::mmap(reserved.byte_add(ahead), size, protection, flags | libc::MAP_FIXED, fd, offset)
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mut builder = MmapRegionBuilder::new(size).with_mmap_prot(protection).with_mmap_flags(flags);
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    // SAFETY: `size` bytes are mapped there, and stay mapped.
    let builder = unsafe { builder.with_raw_mmap_pointer(address.cast()) };
    builder.build().map_err(io::Error::other)
}

/// A memfd of this size, which cannot be cut off under those who map it.
fn memfd(bytes: u64) -> io::Result<Arc<File>> {
    let file = memfd::create(c"pinfold-guest")?;
    file.set_len(bytes)?;
    memfd::seal(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL)?;
    Ok(Arc::new(file))
}
