//! Steps by io_uring: those of one event are submitted together, and many are in flight.
//!
//! The drive's file is registered, which saves the kernel a look-up for each step. Guest memory is not: registered
//! buffers are pinned, and a balloon could not give their pages back.
//!
//! A ring belongs to no thread: whoever holds the device's lock waits for it. But steps are submitted on the thread
//! that serves the device, whose cgroup the kernel's workers (`iou-wrk-*`) inherit.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::disk::{Disk, Step};

/// Steps that may be in flight.
pub(super) const DEPTH: u16 = 256;

/// The most workers that the kernel may start for us where it cannot go on without waiting: for files and block
/// devices, and for all else, which we do not have.
const WORKERS: [u32; 2] = [8, 1];

/// The drive's file among the registered ones, which are no more.
const FILE: Fixed = Fixed(0);

/// IORING_ENTER_GETEVENTS of linux/io_uring.h.
const GETEVENTS: u32 = 1;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub(super) enum UringError {
    /// The kernel makes none.
    #[error("the kernel refused io_uring_setup{}", hint(source))]
    Setup { source: io::Error },
    /// It lacks something.
    #[error("the kernel's io_uring has no {0}; Linux 5.12 has all that is needed")]
    TooOld(&'static str),
    /// The kernel does not let us prepare it.
    #[error("the kernel refused {doing}")]
    Prepare { doing: &'static str, source: io::Error },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => " (see the sysctl kernel.io_uring_disabled, and seccomp filters)",
        Some(libc::ENOSYS) => " (this kernel has no io_uring, or a seccomp filter hides it)",
        Some(libc::ENOMEM) => " (before Linux 5.12 a ring counts as locked memory: see ulimit -l)",
        _ => "",
    }
}

/// A ring for one file.
pub(super) struct Uring {
    ring: IoUring,
    /// Steps that the kernel has and has not ended.
    in_flight: u32,
}

impl Uring {
    /// Makes a ring for the file `fd`; `completions` is ready to read whenever a step has ended. To be called on the
    /// thread that serves the device.
    pub(super) fn new(fd: RawFd, completions: &Epoll) -> Result<Self, UringError> {
        let setup = |source| UringError::Setup { source };
        let prepare = |doing| move |source| UringError::Prepare { doing, source };
        // From Linux 5.19 on completions need not interrupt what we are doing.
        let ring = match IoUring::builder().setup_coop_taskrun().build(DEPTH.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(DEPTH.into()),
            made => made,
        };
        let ring = ring.map_err(setup)?;
        check(&ring)?;
        let submitter = ring.submitter();
        submitter.register_files(&[fd]).map_err(prepare("to register the drive's file"))?;
        if let Err(error) = submitter.register_iowq_max_workers(&mut WORKERS.clone()) {
            // Before Linux 5.15. Then they are bounded by the CPUs.
            log::debug!("io_uring's workers cannot be bounded: {error}");
        }
        // Level triggered, through the device's own epoll: what has been taken from the ring before anybody waits
        // wakes nobody, and none is missed. An eventfd would be signalled for each.
        completions
            .ctl(ControlOperation::Add, ring.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))
            .map_err(prepare("to wait for the ring"))?;
        Ok(Self { ring, in_flight: 0 })
    }

    /// How many steps are in flight.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether there are steps that the kernel does not have yet.
    pub(super) fn has_prepared(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Whether a step has ended that was not taken yet.
    fn has_ended(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Prepares `step`, to be submitted with the others. Some are carried out at once instead, and the result is
    /// returned.
    ///
    /// # Safety
    /// What `step` names stays where it is until the step has ended.
    pub(super) unsafe fn push(
        &mut self,
        disk: &mut dyn Disk,
        token: u64,
        step: &Step<'_>,
    ) -> Option<io::Result<u64>> {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let entry = match (step, disk.fallocate_mode(step)) {
            (&Step::Read { offset, pieces }, _) => match pieces.as_slice() {
                [piece] => opcode::Read::new(FILE, piece.iov_base.cast(), count(piece.iov_len))
                    .offset(offset)
                    .build(),
                list => opcode::Readv::new(FILE, list.as_ptr(), count(list.len())).offset(offset).build(),
            },
            (&Step::Write { offset, pieces }, _) => match pieces.as_slice() {
                [piece] => opcode::Write::new(FILE, piece.iov_base.cast(), count(piece.iov_len))
                    .offset(offset)
                    .build(),
                list => opcode::Writev::new(FILE, list.as_ptr(), count(list.len())).offset(offset).build(),
            },
            (Step::Flush, _) => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
            (&(Step::Discard { offset, len } | Step::Zero { offset, len, .. }), Some(mode)) => {
                opcode::Fallocate::new(FILE, len).offset(offset).mode(mode).build()
            }
            // io_uring has no such operation on block devices.
            (Step::Discard { .. } | Step::Zero { .. }, None) => return Some(disk.carry_out(step)),
        };
        // SAFETY: as the caller promises.
        match unsafe { self.push_entry(&entry.user_data(token)) } {
            Ok(()) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// # Safety
    /// As for [`Self::push`].
    unsafe fn push_entry(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: as the caller promises.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full; what is there goes first. If that is impossible for now, so is this.
            if !self.submit()? {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }

    /// Hands all prepared steps to the kernel; `false` if it cannot take all of them for now.
    pub(super) fn submit(&mut self) -> io::Result<bool> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(0) => return Ok(false),
                Ok(count) => self.in_flight += u32::try_from(count).unwrap_or(u32::MAX),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EBUSY) => return Ok(false),
                    _ => return Err(error),
                },
            }
        }
        Ok(true)
    }

    /// The next step that has ended: its token and its result.
    pub(super) fn next_ended(&mut self) -> Option<(u64, io::Result<u64>)> {
        let entry = self.ring.completion().next()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        let result = entry.result();
        let moved = u64::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        Some((entry.user_data(), moved))
    }

    /// Waits until a step has ended, where one is in flight.
    pub(super) fn wait(&mut self) {
        while self.in_flight > 0 && !self.has_ended() {
            // SAFETY: nothing is submitted and no argument passed.
            match unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, GETEVENTS, None) } {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    // Nothing that we do leads here. What is in flight ends all the same.
                    log::debug!("could not wait for io_uring: {error}");
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => {}
            }
        }
    }

    /// Goes on with another file. Nothing is in flight.
    pub(super) fn set_file(&mut self, fd: RawFd) -> io::Result<()> {
        self.ring.submitter().register_files_update(0, &[fd]).map(drop)
    }
}

impl Drop for Uring {
    /// Returns when nothing is in flight, so that nothing touches guest memory any more.
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // From Linux 6.0 on. What cannot be cancelled, because it has begun, ends by itself.
            let _ = self.ring.submitter().register_sync_cancel(None, CancelBuilder::any());
        }
        while self.in_flight > 0 {
            self.wait();
            while self.next_ended().is_some() {}
        }
    }
}

/// Checks that the kernel can do all that we ask of a ring.
fn check(ring: &IoUring) -> Result<(), UringError> {
    let params = ring.params();
    if !params.is_feature_nodrop() {
        return Err(UringError::TooOld("completions that are never dropped"));
    }
    // Before them workers were kernel threads, outside of our cgroup.
    if !params.is_feature_native_workers() {
        return Err(UringError::TooOld("workers that stay in the cgroup of their process"));
    }
    let mut probe = Probe::new();
    let refused = |source| UringError::Prepare { doing: "to say what it can do", source };
    ring.submitter().register_probe(&mut probe).map_err(refused)?;
    for (code, name) in [
        (opcode::Read::CODE, "read"),
        (opcode::Write::CODE, "write"),
        (opcode::Readv::CODE, "readv"),
        (opcode::Writev::CODE, "writev"),
        (opcode::Fsync::CODE, "fsync"),
        (opcode::Fallocate::CODE, "fallocate"),
    ] {
        if !probe.is_supported(code) {
            return Err(UringError::TooOld(name));
        }
    }
    Ok(())
}
