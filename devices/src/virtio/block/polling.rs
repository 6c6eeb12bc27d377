//! Looking again for a bounded moment before asking to be woken.

use std::time::{Duration, Instant};

/// How long at most. A kick costs the guest an exit and us a wake-up; this is a few times their price.
const WINDOW: Duration = Duration::from_micros(50);

/// Whether, and for how long, it pays to look again once all is done: it does while the driver comes back within the
/// window, as one with a steady stream of requests does.
#[derive(Debug, Default)]
pub(super) struct Polling {
    pays: bool,
    idle_since: Option<Instant>,
}

impl Polling {
    /// We were woken.
    pub(super) fn woken(&mut self) {
        if let Some(since) = self.idle_since.take() {
            self.pays = since.elapsed() < WINDOW;
        }
    }

    /// We go to sleep.
    pub(super) fn sleeps(&mut self) {
        self.idle_since = Some(Instant::now());
    }

    /// Looks for something to do. Between two looks others on this CPU have their turn, the guest among them.
    pub(super) fn find(&mut self, mut found: impl FnMut() -> bool) -> bool {
        if !self.pays {
            return false;
        }
        let start = Instant::now();
        while !found() {
            if start.elapsed() >= WINDOW {
                self.pays = false;
                return false;
            }
            std::thread::yield_now();
        }
        true
    }
}
