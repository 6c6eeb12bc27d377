//! A descriptor chain as host memory: the buffers that the driver lent, checked, ready for `readv` and
//! `writev`.
//!
//! [`ChainIovecs`] is the storage, kept by a device so that no request allocates. [`ChainIovecs::fill`]
//! checks a chain and returns a [`ChainBuffers`], which borrows the storage and guest memory: neither the
//! mapping can go away nor the storage be refilled while the pointers are in use.

use libc::iovec;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileSlice};

use super::chain::Chain;
use super::lookup::in_one_piece;

/// The most pieces of host memory that one direction of a chain may have: what the kernel takes in one call
/// (UIO_MAXIOV). A buffer that crosses a border between memory regions counts once for each region.
pub const MAX_PIECES: usize = 1024;

/// What can be wrong with a descriptor chain. The driver broke the specification; no other chain is
/// concerned.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// Nothing can be read from the chain's first descriptor.
    #[error("the descriptor chain has no descriptor that can be read")]
    Empty,
    /// The last descriptor that could be read promises another one: an index out of range, a loop, a table
    /// outside of memory, an indirect table in an indirect table, or more than 4 GiB in total.
    #[error("the descriptor chain cannot be followed beyond {0} descriptors")]
    Cut(usize),
    /// A buffer for the device to read follows one to write (virtio 1.2, section 2.7.4.2).
    #[error("the descriptor chain has a readable buffer behind a writable one")]
    Order,
    /// More than [`MAX_PIECES`] in one direction.
    #[error("the descriptor chain has more than {MAX_PIECES} buffers in one direction")]
    TooLong,
    /// A buffer is not in guest memory.
    #[error("the descriptor chain has a buffer of {len} bytes at {address:#x}, not in guest memory")]
    Memory {
        /// Guest physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
        /// What vm-memory says.
        source: GuestMemoryError,
    },
    /// An access beyond the end of the chain's buffers in one direction.
    #[error("the descriptor chain has {have} bytes in this direction where {need} are needed")]
    Short {
        /// Bytes in the chain.
        have: u32,
        /// Bytes that the access needs, counted from the chain's start.
        need: u64,
    },
}

/// Storage for a chain's buffers; empty but for the time of a [`ChainBuffers`].
#[derive(Debug, Default)]
pub struct ChainIovecs {
    readable: Vec<iovec>,
    writable: Vec<iovec>,
}

// SAFETY: the pointers that make this type neither Send nor Sync are only handed out through ChainBuffers,
// after `fill` has replaced them by pointers into the memory that the ChainBuffers borrows; what stays behind
// after that borrow is never looked at again.
unsafe impl Send for ChainIovecs {}

impl ChainIovecs {
    /// Empty storage, which grows with the longest chain seen.
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks `chain` and turns its buffers into pieces of host memory. Buffers of no length are left out.
    pub fn fill<'m>(
        &'m mut self,
        chain: Chain<'_>,
        memory: &'m GuestMemoryMmap,
    ) -> Result<ChainBuffers<'m>, ChainError> {
        self.readable.clear();
        self.writable.clear();
        let (mut readable_len, mut writable_len) = (0u32, 0u32);
        let (mut count, mut more, mut writable_seen) = (0, false, false);
        for descriptor in chain {
            count += 1;
            more = descriptor.has_next();
            let (pieces, total) = if descriptor.is_write_only() {
                writable_seen = true;
                (&mut self.writable, &mut writable_len)
            } else if writable_seen {
                return Err(ChainError::Order);
            } else {
                (&mut self.readable, &mut readable_len)
            };
            let len = descriptor.len();
            // The iterator has checked this sum already: it ends a chain that exceeds 4 GiB.
            *total = total.checked_add(len).ok_or(ChainError::Cut(count))?;
            push_pieces(pieces, memory, descriptor.addr(), len)?;
        }
        match (count, more) {
            (0, _) => Err(ChainError::Empty),
            (_, true) => Err(ChainError::Cut(count)),
            (_, false) => Ok(ChainBuffers {
                readable: &self.readable,
                writable: &self.writable,
                readable_len,
                writable_len,
            }),
        }
    }
}

/// Appends the host memory of the guest's `len` bytes at `address`.
fn push_pieces(
    pieces: &mut Vec<iovec>,
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    len: u32,
) -> Result<(), ChainError> {
    let outside = |source| ChainError::Memory { address: address.0, len, source };
    let count = usize::try_from(len).map_err(|_| outside(GuestMemoryError::GuestAddressOverflow))?;
    // As good as always. The rest is for buffers across regions, empty ones, and those outside of memory.
    if count > 0
        && pieces.len() < MAX_PIECES
        && let Some(slice) = in_one_piece(memory, address, count)
    {
        pieces.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: count });
        return Ok(());
    }
    for slice in memory.get_slices(address, count) {
        let slice = slice.map_err(outside)?;
        if pieces.len() == MAX_PIECES {
            return Err(ChainError::TooLong);
        }
        pieces.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
    }
    Ok(())
}

/// The buffers of one chain, all of them in guest memory. The guest may change their contents at any time.
///
/// The pointers of the iovecs are good for as long as this borrow lives: memory regions are unmapped only
/// when nobody holds the map that `fill` was given. A copy of an iovec must not be used after it, and must
/// not be turned into a Rust slice.
#[derive(Debug)]
pub struct ChainBuffers<'m> {
    readable: &'m [iovec],
    writable: &'m [iovec],
    readable_len: u32,
    writable_len: u32,
}

impl ChainBuffers<'_> {
    /// What the device may read, in order; at most [`MAX_PIECES`].
    pub fn readable(&self) -> &[iovec] {
        self.readable
    }

    /// What the device may write, in order; at most [`MAX_PIECES`].
    pub fn writable(&self) -> &[iovec] {
        self.writable
    }

    /// Length of the readable part in bytes.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Length of the writable part in bytes.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// The readable bytes from `offset` on, at most `len` of them; fewer where the chain ends before.
    pub fn readable_range(&self, offset: u32, len: u32) -> impl Iterator<Item = iovec> + '_ {
        range(self.readable, offset, len)
    }

    /// The writable bytes from `offset` on, at most `len` of them; fewer where the chain ends before.
    pub fn writable_range(&self, offset: u32, len: u32) -> impl Iterator<Item = iovec> + '_ {
        range(self.writable, offset, len)
    }

    /// Copies bytes from `offset` of the readable part until `data` is full.
    pub fn read_at(&self, offset: u32, data: &mut [u8]) -> Result<(), ChainError> {
        let len = check(self.readable_len, offset, data.len())?;
        let mut data = data;
        for piece in range(self.readable, offset, len) {
            let (now, later) = data.split_at_mut(piece.iov_len);
            self.volatile(piece).copy_to(now);
            data = later;
        }
        Ok(())
    }

    /// Copies all of `data` to `offset` of the writable part.
    pub fn write_at(&self, offset: u32, data: &[u8]) -> Result<(), ChainError> {
        let len = check(self.writable_len, offset, data.len())?;
        let mut data = data;
        for piece in range(self.writable, offset, len) {
            let (now, later) = data.split_at(piece.iov_len);
            self.volatile(piece).copy_from(now);
            data = later;
        }
        Ok(())
    }

    /// A piece as memory that somebody else changes meanwhile.
    fn volatile(&self, piece: iovec) -> VolatileSlice<'_> {
        // SAFETY: `piece` is part of one of our iovecs, which `fill` made of a slice of guest memory; its
        // mapping lives as long as the borrow in `self`, and nobody makes Rust references to guest memory.
        unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }
    }
}

/// Checks that `len` bytes at `offset` are within `have`, and gives `len` back as the type of chain lengths.
fn check(have: u32, offset: u32, len: usize) -> Result<u32, ChainError> {
    let end = u32::try_from(len).ok().and_then(|len| offset.checked_add(len));
    match end {
        Some(end) if end <= have => Ok(end - offset),
        _ => {
            let len = u64::try_from(len).unwrap_or(u64::MAX);
            Err(ChainError::Short { have, need: u64::from(offset).saturating_add(len) })
        }
    }
}

/// The pieces that make up at most `len` bytes from `offset` on.
pub(super) fn range(pieces: &[iovec], offset: u32, len: u32) -> impl Iterator<Item = iovec> + '_ {
    // Lossless: usize has 64 bits on every machine that this runs on.
    let mut skip = usize::try_from(offset).unwrap_or(usize::MAX);
    let mut left = usize::try_from(len).unwrap_or(usize::MAX);
    pieces.iter().filter_map(move |piece| {
        let skipped = skip.min(piece.iov_len);
        skip -= skipped;
        let taken = left.min(piece.iov_len - skipped);
        left -= taken;
        // wrapping_byte_add: the result stays within the piece, and no dereference happens here.
        let iov_base = piece.iov_base.wrapping_byte_add(skipped);
        (taken > 0).then_some(iovec { iov_base, iov_len: taken })
    })
}

#[cfg(test)]
mod tests;
