//! When to tell the driver of what is done, while more of the same event is not.

use std::time::{Duration, Instant};

/// How long a driver waits at most for requests of its that are done, but for the few between two looks at the clock.
const TELL_AFTER: Duration = Duration::from_micros(200);

/// Looks at the clock that are no further apart than this are too frequent: the host has the data in memory, and the
/// clock is a noticeable part of a request.
const TOO_FREQUENT: Duration = Duration::from_micros(50);

/// How many requests go without a look at the clock then.
const UNSEEN: u32 = 3;

/// One event of a drive that is served by blocking calls.
#[derive(Default)]
pub(super) struct Pace {
    /// When the driver was told last; before that, when the first request was done.
    told: Option<Instant>,
    /// When the clock was looked at last.
    looked: Option<Instant>,
    /// How many requests are still to go without a look.
    unseen: u32,
}

impl Pace {
    /// Another request is done. Whether the driver is to be told now; `clock` says what time it is.
    pub(super) fn is_time_to_tell(&mut self, clock: impl FnOnce() -> Instant) -> bool {
        if self.unseen > 0 {
            self.unseen -= 1;
            return false;
        }
        let now = clock();
        let is_time = now - *self.told.get_or_insert(now) >= TELL_AFTER;
        if is_time {
            self.told = Some(now);
        }
        if self.looked.replace(now).is_some_and(|looked| now - looked <= TOO_FREQUENT) {
            self.unseen = UNSEEN;
        }
        is_time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Serves `count` requests that take `micros` each: after which the driver was told, and how often the clock was
    /// looked at.
    fn serve(count: u64, micros: impl Fn(u64) -> u64) -> (Vec<u64>, u64) {
        let (mut pace, start, mut looks) = (Pace::default(), Instant::now(), 0);
        let (mut at, mut told) = (0, Vec::new());
        for request in 0..count {
            at += micros(request);
            let clock = || {
                looks += 1;
                start + Duration::from_micros(at)
            };
            if pace.is_time_to_tell(clock) {
                told.push(request);
            }
        }
        (told, looks)
    }

    #[test]
    fn slow_requests_are_told_of_in_time() {
        assert_eq!(serve(7, |_| 100), (vec![2, 4, 6], 7));
        assert_eq!(serve(4, |_| 1_000_000), (vec![1, 2, 3], 4));
    }

    #[test]
    fn fast_requests_are_told_of_together_and_the_clock_is_spared() {
        let (told, looks) = serve(200, |_| 4);
        assert_eq!(looks, 2 + 198 / 4);
        // After 200 us, which are 50 requests, or up to three more.
        assert_eq!(told, [53, 105, 157]);
        // Some that are fast are followed by slow ones.
        assert_eq!(serve(9, |request| if request < 3 { 4 } else { 1000 }).0, [5, 6, 7, 8]);
    }
}
