//! Waiting a bounded moment for several requests before asking to be woken by the next one.

use std::os::fd::AsRawFd;
use std::time::Duration;

use libc::{POLLIN, pollfd, timespec};
use vmm_sys_util::eventfd::EventFd;

/// How long a wait lasts at most. A driver that has something to add does so in a small part of it, and its kick ends the
/// wait.
const WINDOW: Duration = Duration::from_micros(200);

/// How many requests a wait is for. A wake-up that finds half as many is cheap enough.
pub(super) const BATCH: u16 = 8;

/// After how many wake-ups a wait that was in vain is tried anew, at first and at most.
const TRY_AFTER: (u32, u32) = (16, 1024);

/// Whether it pays to wait.
///
/// It does where the driver adds one request after another and each brings a kick, so that a wake-up finds one. A driver
/// that adds many and kicks once needs none of this, and one that adds nothing until it has its answer would only be kept
/// waiting: so a wait that did not bring a whole batch is tried again ever more seldom.
#[derive(Debug)]
pub(super) struct Polling {
    /// What the last wake-up found.
    woken_for: u32,
    /// What is found now came by a wait.
    waited: bool,
    /// Wake-ups until the next try.
    until_try: u32,
    /// The number of them after another wait in vain.
    pause: u32,
}

impl Default for Polling {
    fn default() -> Self {
        Self { woken_for: 0, waited: false, until_try: 0, pause: TRY_AFTER.0 }
    }
}

impl Polling {
    /// We were woken.
    pub(super) fn woken(&mut self) {
        self.waited = false;
        self.until_try = self.until_try.saturating_sub(1);
    }

    /// `count` requests were taken since we were woken or have waited.
    pub(super) fn found(&mut self, count: u32) {
        if !self.waited {
            self.woken_for = count;
        }
    }

    /// Whether to wait now.
    pub(super) fn pays(&self) -> bool {
        self.woken_for < u32::from(BATCH / 2) && self.until_try == 0
    }

    /// A wait has ended, with a whole batch or in vain.
    pub(super) fn waited(&mut self, whole: bool) {
        self.waited = true;
        if whole {
            self.pause = TRY_AFTER.0;
        } else {
            self.until_try = self.pause;
            self.pause = (2 * self.pause).min(TRY_AFTER.1);
        }
    }

    /// Waits for one of `kicks`, and takes it; `false` if none came.
    pub(super) fn wait<'k>(kicks: impl Iterator<Item = &'k EventFd> + Clone) -> bool {
        let mut fds: Vec<_> =
            kicks.clone().map(|kick| pollfd { fd: kick.as_raw_fd(), events: POLLIN, revents: 0 }).collect();
        let (Ok(count), Ok(tv_nsec)) =
            (libc::nfds_t::try_from(fds.len()), libc::c_long::try_from(WINDOW.as_nanos()))
        else {
            return false;
        };
        let window = timespec { tv_sec: 0, tv_nsec };
        // SAFETY: `fds` holds `count` elements, `window` outlives the call, and there is no signal mask.
        let ready = unsafe { libc::ppoll(fds.as_mut_ptr(), count, &raw const window, std::ptr::null()) };
        // With a signal the wait is over earlier.
        if ready <= 0 {
            return false;
        }
        for (kick, _) in kicks.zip(&fds).filter(|(_, fd)| fd.revents & POLLIN != 0) {
            // It is there.
            let _ = kick.read();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wake-up that finds `woken`, then waits that are `whole`: how many of these there were, 100 at most.
    fn waits(polling: &mut Polling, woken: u32, whole: bool) -> u32 {
        polling.woken();
        polling.found(woken);
        let mut made = 0;
        while made < 100 && polling.pays() {
            made += 1;
            polling.waited(whole);
            polling.found(u32::from(BATCH));
        }
        made
    }

    #[test]
    fn waits_that_bring_a_batch_go_on() {
        let mut polling = Polling::default();
        assert_eq!(waits(&mut polling, 1, true), 100);
        assert_eq!(waits(&mut polling, 3, true), 100);
        assert_eq!(waits(&mut polling, 4, true), 0, "a kick brings many");
        assert_eq!(waits(&mut polling, 1, true), 100);
    }

    #[test]
    fn waits_in_vain_become_rare() {
        let mut polling = Polling::default();
        let (first, most) = TRY_AFTER;
        assert_eq!(waits(&mut polling, 1, false), 1);
        let mut pause = first;
        for _ in 0..10 {
            assert_eq!((0..pause - 1).map(|_| waits(&mut polling, 1, false)).sum::<u32>(), 0);
            assert_eq!(waits(&mut polling, 1, false), 1);
            pause = (2 * pause).min(most);
        }
        assert_eq!(pause, most);
        // Once it pays it is done again.
        assert_eq!((0..most).map(|_| waits(&mut polling, 1, true)).max(), Some(100));
        assert_eq!(waits(&mut polling, 1, true), 100);
    }

    #[test]
    fn a_wait_ends_with_a_kick_or_with_its_window() {
        let kicks = [EventFd::new(libc::EFD_NONBLOCK).unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap()];
        assert!(!Polling::wait(kicks.iter()));
        kicks[1].write(1).unwrap();
        assert!(Polling::wait(kicks.iter()));
        assert!(kicks[1].read().is_err(), "the kick was taken");
    }
}
