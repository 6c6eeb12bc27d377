//! How the guest's end becomes known.

use std::io;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// It asked for a reset, or had a triple fault.
    Reset,
    /// It switched itself off.
    PowerOff,
    /// It cannot go on; the text says why.
    Error(String),
}

/// An eventfd with the reason why it is signalled, shared by all who can end the guest.
#[derive(Debug)]
pub struct ExitSignal {
    event: EventFd,
    kind: Mutex<Option<ExitKind>>,
}

impl ExitSignal {
    /// A signal that is not raised.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(EFD_NONBLOCK)?, kind: Mutex::default() })
    }

    /// Raises the signal. Of several reasons the first one stands. Never blocks.
    pub fn raise(&self, kind: ExitKind) {
        self.kind.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(kind);
        // It fails only when the counter is full, and then whoever waits is awake.
        let _ = self.event.write(1);
    }

    /// Readable while the signal is raised; for an event loop.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Lowers the signal and says why it was raised; `None` if it was not.
    pub fn take(&self) -> Option<ExitKind> {
        // First the eventfd: a reason that comes between the two signals once too often, not once too little.
        let _ = self.event.read();
        self.kind.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stands() {
        let signal = ExitSignal::new().unwrap();
        assert_eq!(signal.take(), None);
        signal.raise(ExitKind::PowerOff);
        signal.raise(ExitKind::Reset);
        assert_eq!(signal.take(), Some(ExitKind::PowerOff));
        assert_eq!(signal.take(), None);
        assert!(signal.event().read().is_err(), "lowered");
        signal.raise(ExitKind::Reset);
        assert_eq!(signal.event().read().unwrap(), 1);
    }
}
