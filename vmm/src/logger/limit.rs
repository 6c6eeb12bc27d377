//! How many lines may be logged: what a guest can cause must not fill a disk.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a line costs: ten of them a second can be paid for without end.
const COST: Duration = Duration::from_millis(100);

/// What can be saved up: a hundred lines at once.
const SAVINGS: Duration = Duration::from_secs(10);

/// A token bucket whose tokens are time.
#[derive(Debug)]
pub struct Limit(Mutex<State>);

#[derive(Debug)]
struct State {
    credit: Duration,
    last: Option<Instant>,
    suppressed: u64,
}

impl Limit {
    pub const fn new() -> Self {
        Self(Mutex::new(State { credit: SAVINGS, last: None, suppressed: 0 }))
    }

    /// Whether a line may be logged at `now`; if so, how many could not since the last one that could.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let earned = state.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        // Threads may come here in another order than they looked at the clock.
        state.last = state.last.max(Some(now));
        state.credit = state.credit.saturating_add(earned).min(SAVINGS);
        match state.credit.checked_sub(COST) {
            Some(left) => {
                state.credit = left;
                Some(std::mem::take(&mut state.suppressed))
            }
            None => {
                state.suppressed += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let limit = Limit::new();
        let start = Instant::now();
        for _ in 0..100 {
            assert_eq!(limit.admit(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(limit.admit(start), None);
        }
        assert_eq!(limit.admit(start + COST - Duration::from_nanos(1)), None);
        assert_eq!(limit.admit(start + COST), Some(8));
        assert_eq!(limit.admit(start + COST), None);
        assert_eq!(limit.admit(start), None, "a clock read earlier earns nothing");
    }

    #[test]
    fn silence_earns_no_more_than_the_first_lines_had() {
        let limit = Limit::new();
        let start = Instant::now();
        let count = |now| (0..1000).filter(|_| limit.admit(now).is_some()).count();
        assert_eq!(count(start), 100);
        assert_eq!(count(start + Duration::from_secs(1)), 10);
        assert_eq!(count(start + Duration::from_secs(3600)), 100);
    }
}
