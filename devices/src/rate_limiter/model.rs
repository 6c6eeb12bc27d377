//! The limiter against a reference in exact fractions, over every short sequence of requests and times.

use super::*;

const MS: u64 = 1_000_000;

/// A bucket of which everything is counted in tokens / `refill` (nanoseconds for a full bucket), so that nothing is
/// rounded.
#[derive(Clone, Copy, Debug)]
struct Reference {
    size: i128,
    refill: i128,
    level: i128,
    burst: i128,
    at: i128,
}

impl Reference {
    fn new(bucket: Bucket) -> Self {
        let (size, refill) = (i128::from(bucket.size), i128::from(bucket.refill_time_ms) * i128::from(MS));
        Self { size, refill, level: size * refill, burst: bucket.one_time_burst.into(), at: 0 }
    }

    /// The bucket at the time `now`.
    fn later(mut self, now: u64) -> Self {
        let now = i128::from(now).max(self.at);
        self.level = (self.level + self.size * (now - self.at)).min(self.size * self.refill);
        self.at = now;
        self
    }

    fn covers(&self, cost: u64) -> bool {
        let needed = (i128::from(cost) - self.burst).clamp(0, self.size);
        cost == 0 || self.level >= needed * self.refill
    }

    fn take(&mut self, cost: u64) {
        let from_burst = self.burst.min(cost.into());
        self.burst -= from_burst;
        self.level -= (i128::from(cost) - from_burst) * self.refill;
    }
}

/// A limiter beside its reference.
struct Pair {
    limit: Bucket,
    clock: Arc<AtomicU64>,
    limiter: RateLimiter,
    reference: Reference,
    /// What a request costs that waits.
    waiting: Option<u64>,
    passed: u64,
    /// What the largest request cost that passed.
    largest: u64,
}

impl Pair {
    fn new(limit: Bucket) -> Self {
        let clock = Arc::new(AtomicU64::new(0));
        let limiter = RateLimiter::manual(LimiterConfig { bandwidth: Some(limit), ops: None }, &clock);
        Self { limit, clock, limiter, reference: Reference::new(limit), waiting: None, passed: 0, largest: 0 }
    }

    /// As new, without another timer.
    fn begin_anew(&mut self) {
        self.clock.store(0, Ordering::Relaxed);
        (self.limiter.bytes, self.limiter.wait) = (TokenBucket::new(self.limit, 0), Wait::No);
        (self.reference, self.waiting) = (Reference::new(self.limit), None);
        (self.passed, self.largest) = (0, 0);
    }

    /// At the time `now` the timer has fired, if it was to, and there is a request, unless one waits.
    fn step(&mut self, now: u64, cost: u64) {
        self.clock.store(now, Ordering::Relaxed);
        let due = if let Wait::Blocked(due) = self.limiter.wait { Some(due) } else { None };
        self.limiter.event();
        assert_eq!(self.limiter.is_blocked(), due.is_some_and(|due| due > now), "at {now}, due at {due:?}");
        if self.limiter.is_blocked() {
            return assert!(!self.limiter.consume(1, cost), "nothing passes what waits");
        }
        let cost = self.waiting.take().unwrap_or(cost);
        // What waited is charged for the moment when it was covered.
        let mut then = self.reference.later(due.unwrap_or(now));
        if self.limiter.consume(1, cost) {
            assert!(then.covers(cost), "{cost} passed at {now}: {then:?}");
            then.take(cost);
            (self.reference, self.passed, self.largest) = (then, self.passed + cost, self.largest.max(cost));
            return self.check_bound(now);
        }
        assert!(due.is_none() && !then.covers(cost), "{cost} was refused at {now}: {then:?}");
        let Wait::Blocked(due) = self.limiter.wait else { panic!("refused, and does not wait") };
        assert!(then.later(due).covers(cost) && !then.later(due - 1).covers(cost), "{cost} is due at {due}");
        (self.reference, self.waiting) = (then, Some(cost));
    }

    /// Never more than the bucket, the burst and the rate allow; but a request larger than the bucket leaves a debt.
    fn check_bound(&self, now: u64) {
        let debt = self.largest.saturating_sub(self.limit.size);
        let whole = self.limit.size + self.limit.one_time_burst + debt;
        let bound = i128::from(whole) * self.reference.refill + i128::from(self.limit.size) * i128::from(now);
        assert!(i128::from(self.passed) * self.reference.refill <= bound, "{} at {now}", self.passed);
    }
}

#[test]
fn every_short_sequence_is_as_the_fractions_say() {
    let delays = [0, 333_333, MS / 2, MS + 1];
    let costs = [1, 2, 5];
    let choices = delays.len() * costs.len();
    let depth = 4;
    let (mut passed, mut waited) = (0, 0);
    for size in 1..=3 {
        for refill_time_ms in 1..=2 {
            for one_time_burst in 0..=2 {
                let mut pair = Pair::new(Bucket { size, refill_time_ms, one_time_burst });
                for sequence in 0..choices.pow(depth) {
                    pair.begin_anew();
                    let (mut now, mut left) = (0, sequence);
                    for _ in 0..depth {
                        let (delay, cost) = (left % delays.len(), left / delays.len() % costs.len());
                        left /= choices;
                        now += delays[delay];
                        pair.step(now, costs[cost]);
                    }
                    waited += u64::from(pair.waiting.is_some());
                    passed += u64::from(pair.passed > 0);
                }
            }
        }
    }
    assert!(passed > 300_000 && waited > 100_000, "{passed} {waited}");
}

/// Ten seconds, for every limit of a grid; timers are late by up to 2 ms.
#[test]
fn ten_seconds_are_within_two_percent() {
    let mut limits = 0;
    for size in [1_u64, 2, 3, 7, 10, 64, 1000, 4096, 1_000_000] {
        for refill_time_ms in [1, 3, 10, 100, 1000] {
            for cost in [1, size.div_ceil(2), size, 3 * size] {
                let tokens = size * 10_000 / refill_time_ms;
                if !(200..=5000).contains(&(tokens / cost)) {
                    continue;
                }
                limits += 1;
                let mut pair = Pair::new(Bucket { size, refill_time_ms, one_time_burst: 0 });
                // The full bucket that it begins with belongs to no time.
                while pair.waiting.is_none() {
                    pair.step(0, cost);
                }
                let before = pair.passed;
                let mut now = 0;
                while now < 10_000 * MS {
                    let Wait::Blocked(due) = pair.limiter.wait else {
                        pair.step(now, cost);
                        continue;
                    };
                    now = due + due % (2 * MS);
                    pair.step(now, cost);
                }
                let expected = u128::from(size) * u128::from(now) / u128::from(refill_time_ms * MS);
                let got = u128::from(pair.passed - before);
                assert!(got.abs_diff(expected) * 50 <= expected, "{:?}: {got} of {expected}", pair.limit);
            }
        }
    }
    assert!(limits > 20, "{limits}");
}
