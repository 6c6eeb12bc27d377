//! What the tests of the devices share.

use std::io;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use super::interrupt::{Interrupt, Vector};

/// VIRTQ_DESC_F_NEXT (virtio 1.2, section 2.7.5).
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// Remembers what it was triggered with.
#[derive(Default)]
pub struct RecordedInterrupt(Mutex<Vec<Vector>>);

impl RecordedInterrupt {
    /// What was triggered since the last call.
    pub fn take(&self) -> Vec<Vector> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Interrupt for RecordedInterrupt {
    fn trigger(&self, vector: Vector) -> io::Result<()> {
        self.0.lock().unwrap().push(vector);
        Ok(())
    }

    fn notifier(&self, _: Vector) -> io::Result<EventFd> {
        EventFd::new(libc::EFD_NONBLOCK)
    }
}
