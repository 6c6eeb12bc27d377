//! The buffers that the driver lent for packets, as one run of host memory that a packet is read into.
//!
//! A chain is checked and translated once, when it is taken from the ring, and waits here for its packet. With merged
//! buffers (VIRTIO_NET_F_MRG_RXBUF) as many wait as the longest packet needs, and each packet takes those that it
//! fills; otherwise one waits, and is the packet's alone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use libc::iovec;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap, VolatileSlice};

use super::HEADER_LEN;
use super::tap::{MAX_PACKET, MIN_PACKET};
use crate::retry::retry;
use crate::virtio::device::Memory;
use crate::virtio::iovec::{ChainIovecs, MAX_PIECES, range};
use crate::virtio::virtqueue::{QueueError, Virtqueue};

/// Where the header says over how many buffers a packet is spread (virtio 1.2, section 5.1.6). The TAP leaves this
/// field alone.
const NUM_BUFFERS_AT: u32 = HEADER_LEN - 2;

/// Pieces of memory that are kept: what one `readv` takes, with one that is not the guest's.
const PIECES: usize = MAX_PIECES - 1;

/// Whether more buffers may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// There is room for the longest packet, or for one if buffers are not merged.
    Enough,
    /// The driver has not lent more.
    Empty,
    /// A chain held nothing and was given back; others may follow.
    Useless,
    /// More are not kept: all of the ring waits here, or it is in too many pieces.
    Full,
}

/// A chain that waits.
#[derive(Clone, Copy)]
struct Waiting {
    head: u16,
    /// Bytes of it that are used, at most [`MAX_PACKET`].
    len: u32,
    /// Its part of the pieces.
    pieces: usize,
}

/// Buffers of a driver's that wait for packets.
pub(super) struct Lent {
    merged: bool,
    chains: VecDeque<Waiting>,
    pieces: VecDeque<iovec>,
    /// Bytes in all of them.
    room: u32,
    storage: ChainIovecs,
    /// What the pieces point into.
    map: Arc<GuestMemoryMmap>,
}

// SAFETY: the pointers in `pieces` point into `map`, which is held as long as they are and may be used on any thread.
unsafe impl Send for Lent {}

impl Lent {
    /// None yet. `merged` is whether a packet may be spread over several.
    pub(super) fn new(memory: &Memory, merged: bool) -> Self {
        Self {
            merged,
            chains: VecDeque::new(),
            pieces: VecDeque::new(),
            room: 0,
            storage: ChainIovecs::new(),
            map: memory.memory().into_inner(),
        }
    }

    /// Bytes that fit now.
    pub(super) fn room(&self) -> u32 {
        self.room
    }

    /// Guest memory may have been exchanged: then the chains that wait are taken anew. Not to be called while a packet
    /// is in them.
    pub(super) fn follow(&mut self, rx: &mut Virtqueue, memory: &Memory) {
        let now = memory.memory();
        if !std::ptr::eq(&raw const *now, Arc::as_ptr(&self.map)) {
            rx.undo_pops(u16::try_from(self.chains.len()).unwrap_or(u16::MAX));
            self.chains.clear();
            self.pieces.clear();
            self.room = 0;
            self.map = now.into_inner();
        }
    }

    /// Takes chains from the ring until the longest packet fits, or one chain waits if buffers are not merged.
    pub(super) fn fill(&mut self, rx: &mut Virtqueue) -> Result<Filled, QueueError> {
        let (least, enough) = if self.merged { (1, MAX_PACKET) } else { (MIN_PACKET, MIN_PACKET) };
        while self.room < enough {
            if self.chains.len() >= usize::from(rx.ring().size()) || self.pieces.len() >= PIECES {
                return Ok(Filled::Full);
            }
            let Some(chain) = rx.pop(&self.map)? else { return Ok(Filled::Empty) };
            let head = chain.head_index();
            let waiting = self.pieces.len();
            let mut len = 0;
            if let Ok(buffers) = self.storage.fill(chain, &self.map) {
                len = buffers.writable_len().min(MAX_PACKET);
                self.pieces.extend(buffers.writable_range(0, len));
            }
            let pieces = self.pieces.len() - waiting;
            if len >= least && self.pieces.len() <= PIECES {
                self.room += len;
                self.chains.push_back(Waiting { head, len, pieces });
                continue;
            }
            self.pieces.truncate(waiting);
            if len >= least && pieces <= PIECES {
                rx.undo_pop();
                return Ok(Filled::Full);
            }
            rx.push_used(&self.map, head, 0)?;
            return Ok(Filled::Useless);
        }
        Ok(Filled::Enough)
    }

    /// Reads once from `file` into the buffers, and what does not fit into `beyond`. Returns the bytes read.
    pub(super) fn read(&mut self, file: BorrowedFd<'_>, beyond: &mut [u8]) -> io::Result<u32> {
        self.pieces.push_back(iovec { iov_base: beyond.as_mut_ptr().cast(), iov_len: beyond.len() });
        let pieces = self.pieces.make_contiguous();
        let result = libc::c_int::try_from(pieces.len()).map_err(io::Error::other).and_then(|count| {
            // SAFETY: the pieces are writable guest memory, which `map` keeps mapped, and `beyond`.
            retry(|| unsafe { libc::readv(file.as_raw_fd(), pieces.as_ptr(), count) })
        });
        self.pieces.pop_back();
        u32::try_from(result?).map_err(io::Error::other)
    }

    /// Copies `data` into the buffers from `offset` on, as much as fits, and returns how much that was.
    pub(super) fn write(&mut self, offset: u32, data: &[u8]) -> usize {
        let mut left = data;
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        for piece in range(self.pieces.make_contiguous(), offset, len) {
            let (now, later) = left.split_at(piece.iov_len);
            // SAFETY: the piece is part of guest memory, which `map` keeps mapped, and nobody makes Rust references
            // to that.
            unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }.copy_from(now);
            left = later;
        }
        data.len() - left.len()
    }

    /// Takes out the chains that hold a packet of `len` bytes, at most [`Self::room`], and says in its header how many
    /// they are. `used` gets their heads, and how much of the packet is in each.
    pub(super) fn take(&mut self, len: u32, used: &mut Vec<(u16, u32)>) {
        used.clear();
        let mut left = len;
        for chain in &self.chains {
            if left == 0 {
                break;
            }
            let here = left.min(chain.len);
            used.push((chain.head, here));
            left -= here;
        }
        // A ring has at most 32768 chains.
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        self.write(NUM_BUFFERS_AT, &count.to_le_bytes());
        for chain in self.chains.drain(..used.len()) {
            self.pieces.drain(..chain.pieces);
            self.room -= chain.len;
        }
    }
}
