//! Requests that are being worked on: a long one goes step by step, and io_uring has many of them in flight.

use libc::iovec;
use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap};

use super::disk::Step;
use super::drive::Work;
use super::request::{HEADER_LEN, Status};
use crate::virtio::iovec::{ChainBuffers, MAX_PIECES};
use crate::virtio::virtqueue::BYTES_PER_EVENT;

/// The greatest number of bytes moved by one step, so that no request, however large, holds up its thread.
const MOVED_PER_STEP: u64 = BYTES_PER_EVENT;

/// The greatest number of bytes that one step gives back or zeroes. File systems change their maps for that; a
/// block device without a command of its own for zeros is written to.
const CLEARED_PER_STEP: u64 = 16 << 20;

/// Pieces whose storage a finished task keeps for the next one; more is given back.
const KEPT_PIECES: usize = 256;

const _: () = assert!(MAX_PIECES <= 1024, "one step takes all pieces of a chain: UIO_MAXIOV");

/// Pieces of guest memory that stay mapped for the lifetime of the borrow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces<'a>(&'a [iovec]);

impl Pieces<'_> {
    /// All of them, at most UIO_MAXIOV.
    pub(super) fn as_slice(&self) -> &[iovec] {
        self.0
    }

    /// How many bytes they have together.
    pub(super) fn bytes(&self) -> u64 {
        // Lossless: no more than a chain has.
        self.0.iter().map(|piece| u64::try_from(piece.iov_len).unwrap_or_default()).sum()
    }
}

/// A request on its way, or the storage of one that has ended.
pub(super) struct Task {
    /// Which queue its chain came from, and its head.
    pub queue: usize,
    pub head: u16,
    pub work: Work,
    /// Bytes done, of those of `work`.
    pub done: u64,
    /// How many times the host asked to try again.
    pub retries: u8,
    /// The guest memory of the data.
    data: Vec<iovec>,
    /// The part of it that the step under way moves.
    step: Vec<iovec>,
    status: *mut u8,
    /// Keeps all of these mapped.
    memory: Option<GuestMemoryLoadGuard<GuestMemoryMmap>>,
}

// SAFETY: the pointers are to guest memory, which `memory` keeps mapped; whichever thread has the task may use them.
unsafe impl Send for Task {}

impl Task {
    fn empty() -> Self {
        Self {
            queue: 0,
            head: 0,
            work: Work::Flush,
            done: 0,
            retries: 0,
            data: Vec::new(),
            step: Vec::new(),
            status: std::ptr::null_mut(),
            memory: None,
        }
    }

    /// Whether nothing is left to do but to flush and to tell the driver.
    pub(super) fn is_done(&self) -> bool {
        self.done >= self.work.len()
    }

    /// The step under way has ended well, and moved `count` bytes if it moves any.
    pub(super) fn progress(&mut self, count: u64) {
        self.done += match self.work {
            // Such a step does all or nothing, and io_uring does not say how much that is.
            Work::Discard { .. } | Work::Zero { .. } => CLEARED_PER_STEP,
            Work::Read { .. } | Work::Write { .. } | Work::Flush => count,
        };
    }

    /// The next step.
    pub(super) fn next_step(&mut self) -> Step<'_> {
        let done = self.done;
        let left = self.work.len().saturating_sub(done);
        match self.work {
            Work::Read { offset, .. } => Step::Read { offset: offset + done, pieces: self.pieces() },
            Work::Write { offset, .. } => Step::Write { offset: offset + done, pieces: self.pieces() },
            Work::Flush => Step::Flush,
            Work::Discard { offset, .. } => {
                Step::Discard { offset: offset + done, len: left.min(CLEARED_PER_STEP) }
            }
            Work::Zero { offset, unmap, .. } => {
                Step::Zero { offset: offset + done, len: left.min(CLEARED_PER_STEP), unmap }
            }
        }
    }

    /// The pieces of the next step: those behind what is done, but not too many bytes.
    fn pieces(&mut self) -> Pieces<'_> {
        if self.done == 0 && self.work.len() <= MOVED_PER_STEP {
            return Pieces(&self.data);
        }
        // Lossless: usize has 64 bits on every machine that this runs on.
        let mut skip = usize::try_from(self.done).unwrap_or(usize::MAX);
        let mut room = usize::try_from(MOVED_PER_STEP).unwrap_or(usize::MAX);
        self.step.clear();
        for piece in &self.data {
            let skipped = skip.min(piece.iov_len);
            skip -= skipped;
            let len = room.min(piece.iov_len - skipped);
            room -= len;
            if len > 0 {
                // wrapping_byte_add: the result stays within the piece.
                let iov_base = piece.iov_base.wrapping_byte_add(skipped);
                self.step.push(iovec { iov_base, iov_len: len });
            }
            if room == 0 {
                break;
            }
        }
        Pieces(&self.step)
    }

    /// Writes the status, and returns how many bytes were written into the chain.
    pub(super) fn conclude(&self, status: Status) -> u32 {
        if self.memory.is_some() {
            // SAFETY: `status` points to a byte of guest memory that `memory` keeps mapped, and nobody makes Rust
            // references to guest memory.
            unsafe { self.status.write_volatile(status as u8) };
        }
        match self.work {
            Work::Read { len, .. } if status == Status::Ok => len + 1,
            _ => 1,
        }
    }
}

/// The tasks under way, at most as many as there may be.
pub(super) struct Tasks {
    slots: Vec<Task>,
    free: Vec<usize>,
    limit: usize,
}

impl Tasks {
    pub(super) fn new(limit: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), limit }
    }

    /// Whether none is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Whether no other one may begin.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() >= self.limit
    }

    /// Begins a task for the chain `head` of `queue`, whose buffers are in `memory`. `None` if the chain has no room
    /// for a status. There must be room for a task.
    pub(super) fn begin(
        &mut self,
        (queue, head): (usize, u16),
        work: Work,
        buffers: &ChainBuffers<'_>,
        memory: &GuestMemoryLoadGuard<GuestMemoryMmap>,
    ) -> Option<usize> {
        let status = buffers.writable_range(buffers.writable_len().checked_sub(1)?, 1).next()?;
        let token = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Task::empty());
            self.slots.len() - 1
        });
        let task = &mut self.slots[token];
        task.data.clear();
        match work {
            Work::Read { len, .. } => task.data.extend(buffers.writable_range(0, len)),
            Work::Write { len, .. } => task.data.extend(buffers.readable_range(HEADER_LEN, len)),
            Work::Flush | Work::Discard { .. } | Work::Zero { .. } => {}
        }
        task.queue = queue;
        task.head = head;
        task.work = work;
        task.done = 0;
        task.retries = 0;
        task.status = status.iov_base.cast();
        task.memory = Some(memory.clone());
        Some(token)
    }

    /// A task that has begun and not ended; `None` for what is none.
    pub(super) fn get(&mut self, token: usize) -> Option<&mut Task> {
        self.slots.get_mut(token).filter(|task| task.memory.is_some())
    }

    /// The task has ended.
    pub(super) fn end(&mut self, token: usize) {
        if let Some(task) = self.get(token) {
            task.memory = None;
            for pieces in [&mut task.data, &mut task.step] {
                pieces.clear();
                if pieces.capacity() > KEPT_PIECES {
                    pieces.shrink_to(KEPT_PIECES);
                }
            }
            self.free.push(token);
        }
    }
}
