//! Putting bytes of a file into guest memory, by copying or by mapping.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::layout::PAGE_SIZE;

/// How a file gets into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImagePlacement {
    /// The bytes are read into guest memory. Right everywhere.
    Copy,
    /// Whole pages of the file are mapped privately over the guest's memory, so that nothing is read that
    /// the guest does not touch, and unwritten pages are shared with everyone who has the file cached.
    /// What is not a whole page, or does not lie on page boundaries alike in file and memory, is copied.
    ///
    /// Only right for guest memory of ordinary private pages: not with vhost-user devices (the other
    /// process would see the memory below), not with huge pages, not over pages that a balloon may punch.
    /// The file must not change while the VM lives: writes to it may show in the guest, and if it is
    /// truncated, touching a page that is gone ends the process with SIGBUS.
    MapPrivate,
}

/// Writes `len` bytes of `file` from `offset` on to guest memory at `to`.
///
/// The caller has checked that the file holds them and that `to..to + len` is RAM.
pub(crate) fn place(
    mem: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    to: GuestAddress,
    len: u64,
    how: ImagePlacement,
) -> io::Result<()> {
    if how == ImagePlacement::Copy || offset % PAGE_SIZE != to.0 % PAGE_SIZE {
        return copy(mem, file, offset, to, len);
    }
    // All sums below stay within to + len, which the caller has checked to be RAM, and offset + len,
    // which is within the file.
    let head = (to.0.next_multiple_of(PAGE_SIZE) - to.0).min(len);
    let pages = (len - head) / PAGE_SIZE * PAGE_SIZE;
    let tail = len - head - pages;
    copy(mem, file, offset, to, head)?;
    map(mem, file, offset + head, GuestAddress(to.0 + head), pages)?;
    copy(mem, file, offset + head + pages, GuestAddress(to.0 + head + pages), tail)
}

fn copy(mem: &GuestMemoryMmap, mut file: &File, offset: u64, to: GuestAddress, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    file.seek(SeekFrom::Start(offset))?;
    let len = usize::try_from(len).map_err(io::Error::other)?;
    mem.read_exact_volatile_from(to, &mut file, len).map_err(io::Error::other)
}

/// Maps whole pages of the file over guest memory.
fn map(mem: &GuestMemoryMmap, file: &File, offset: u64, to: GuestAddress, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let outside = || io::Error::other("the range is not in one region of guest memory");
    let region = mem.find_region(to).ok_or_else(outside)?;
    let start = to.0 - region.start_addr().0;
    if start.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(outside());
    }
    let host = region.get_host_address(MemoryRegionAddress(start)).map_err(io::Error::other)?;
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: `host..host + len` lies within one live mapping of guest memory (checked above), to which no
    // Rust reference exists (vm-memory hands out raw pointers and volatile slices only), so replacing its
    // pages takes memory from nobody. The new mapping is readable and writable like the old one and is
    // unmapped with it, since the region unmaps its whole range.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The end of the RAM that starts at address 0; 0 if there is none.
pub(crate) fn low_ram_end(mem: &GuestMemoryMmap) -> u64 {
    mem.find_region(GuestAddress(0)).map_or(0, GuestMemoryRegion::len)
}

/// `bytes` in MiB, rounded up, for error texts.
pub(crate) fn mib_rounded_up(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
