//! A token bucket in whole numbers: what is left over from one refill counts in the next, so that its rate is exact
//! over any time.

use super::Bucket;

const NS_PER_MS: u128 = 1_000_000;

/// The state of a [`Bucket`] that limits. Times are nanoseconds of the limiter's clock.
#[derive(Debug)]
pub(super) struct TokenBucket {
    size: u64,
    refill_ns: u128,
    /// At most `size`; less than 0 while a request larger than the bucket is paid off, by at most `u64::MAX`.
    level: i128,
    /// What is on its way to the next token: that many parts of `refill_ns`.
    fraction: u128,
    burst: u64,
    /// When `level` was right.
    at: u64,
}

impl TokenBucket {
    /// A full bucket, if `bucket` limits anything.
    pub(super) fn new(bucket: Bucket, now: u64) -> Option<Self> {
        (!bucket.is_unlimited()).then(|| Self {
            size: bucket.size,
            refill_ns: u128::from(bucket.refill_time_ms) * NS_PER_MS,
            level: i128::from(bucket.size),
            fraction: 0,
            burst: bucket.one_time_burst,
            at: now,
        })
    }

    /// Adds the tokens of the time until `now`; nothing if that is in the past.
    pub(super) fn refill(&mut self, now: u64) {
        let Some(elapsed) = now.checked_sub(self.at) else { return };
        self.at = now;
        // The product of two u64 fits. The sum may not, after centuries; then the bucket is full in any case.
        let parts = (u128::from(self.size) * u128::from(elapsed)).saturating_add(self.fraction);
        let tokens = i128::try_from(parts / self.refill_ns).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(tokens);
        self.fraction = parts % self.refill_ns;
        if self.level >= i128::from(self.size) {
            self.level = i128::from(self.size);
            self.fraction = 0;
        }
    }

    /// How many nanoseconds after the last refill `cost` is covered, 0 if it is already. A cost larger than the
    /// bucket is covered by a full one.
    pub(super) fn delay(&self, cost: u64) -> u64 {
        if cost == 0 {
            return 0;
        }
        let needed = i128::from(cost.saturating_sub(self.burst).min(self.size));
        // Not covered: a difference less than 0 becomes 0.
        let missing = u128::try_from(needed - self.level).unwrap_or(0);
        // Where it saturates, the quotient is more than 500 years all the same.
        let parts = missing.saturating_mul(self.refill_ns).saturating_sub(self.fraction);
        u64::try_from(parts.div_ceil(u128::from(self.size))).unwrap_or(u64::MAX)
    }

    /// Takes a `cost` that is covered: from the burst first.
    pub(super) fn take(&mut self, cost: u64) {
        let from_burst = self.burst.min(cost);
        self.burst -= from_burst;
        self.level -= i128::from(cost - from_burst);
    }
}
