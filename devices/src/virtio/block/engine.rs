//! The two ways in which steps are carried out.

use std::io;

use super::disk::{Disk, Step};
use super::uring::{DEPTH, Uring};

/// What carries out steps.
pub(super) enum Engine {
    /// Blocking calls.
    Blocking,
    /// io_uring.
    Uring(Box<Uring>),
}

impl Engine {
    /// How many requests may be under way.
    pub(super) fn depth(&self) -> usize {
        match self {
            Self::Blocking => 1,
            Self::Uring(_) => DEPTH.into(),
        }
    }

    /// Begins `step`; its result if it has ended with that.
    ///
    /// # Safety
    /// What `step` names stays where it is until the step has ended.
    pub(super) unsafe fn begin(
        &mut self,
        disk: &mut dyn Disk,
        token: u64,
        step: &Step<'_>,
    ) -> Option<io::Result<u64>> {
        match self {
            Self::Blocking => Some(disk.carry_out(step)),
            // SAFETY: as the caller promises.
            Self::Uring(ring) => unsafe { ring.push(disk, token, step) },
        }
    }

    /// Has what was begun carried out; `false` if that must be tried again later.
    pub(super) fn submit(&mut self) -> io::Result<bool> {
        match self {
            Self::Blocking => Ok(true),
            Self::Uring(ring) => ring.submit(),
        }
    }

    /// Whether something was begun that waits for [`Self::submit`].
    pub(super) fn has_prepared(&mut self) -> bool {
        match self {
            Self::Blocking => false,
            Self::Uring(ring) => ring.has_prepared(),
        }
    }

    /// A step that has ended since it began: its token and its result.
    pub(super) fn next_ended(&mut self) -> Option<(u64, io::Result<u64>)> {
        match self {
            Self::Blocking => None,
            Self::Uring(ring) => ring.next_ended(),
        }
    }

    /// Waits for a step to end; `false` if none is in flight.
    pub(super) fn wait(&mut self) -> bool {
        match self {
            Self::Blocking => false,
            Self::Uring(ring) => {
                ring.wait();
                ring.in_flight() > 0
            }
        }
    }

    /// Goes on with `disk`. Nothing is in flight.
    pub(super) fn set_disk(&mut self, id: &str, disk: &dyn Disk) {
        if let Self::Uring(ring) = self
            && let Err(error) = ring.set_file(disk.fd())
        {
            log::warn!("drive {id}: io_uring does not take the new file, so requests are blocking: {error}");
            *self = Self::Blocking;
        }
    }
}
