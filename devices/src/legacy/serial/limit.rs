//! How much a guest may send.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use resources::TokenBucket;

use super::UartCounters;

/// The time, which tests make up.
pub(super) type Clock = Box<dyn Fn() -> Instant + Send>;

/// An output for as many bytes as a bucket has tokens. What is beyond is counted, and taken for written: it is the
/// guest's loss and not an error.
pub(super) struct Limited {
    output: Box<dyn Write + Send>,
    bucket: Option<(Bucket, Clock)>,
    counters: Arc<UartCounters>,
}

impl Limited {
    /// An output for all bytes, if there is no limit or one of nothing.
    pub fn new(
        output: Box<dyn Write + Send>,
        limit: Option<TokenBucket>,
        clock: Clock,
        counters: Arc<UartCounters>,
    ) -> Self {
        let limit = limit.filter(|limit| !limit.is_unlimited());
        let bucket = limit.map(|limit| (Bucket::new(limit, clock()), clock));
        Self { output, bucket, counters }
    }
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some((bucket, clock)) = &mut self.bucket
            && !bytes.is_empty()
            && !bucket.take(clock())
        {
            // Once: the guest decides how many there are.
            if self.counters.rate_limiter_dropped_bytes.count() == 0 {
                log::warn!(
                    "serial port: the guest sends more than its rate limiter allows; the rest is lost"
                );
            }
            self.counters.rate_limiter_dropped_bytes.inc();
            return Ok(1);
        }
        // A token is a byte.
        self.output.write(bytes.get(..1).unwrap_or_default())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// Tokens that come back with time. They are counted in parts, so that none is lost to rounding however often time
/// is looked at: a nanosecond brings `size` parts, and a token has as many as the bucket takes nanoseconds to fill.
struct Bucket {
    /// Parts that are there.
    parts: u128,
    /// Parts that there is room for.
    room: u128,
    /// Parts of a token.
    token: u128,
    /// Parts that a nanosecond brings.
    rate: u128,
    /// Tokens that are there once.
    burst: u64,
    /// When time was looked at.
    seen: Instant,
}

impl Bucket {
    /// A full bucket. Neither its size nor its refill time is 0.
    fn new(limit: TokenBucket, now: Instant) -> Self {
        let token = u128::from(limit.refill_time) * 1_000_000;
        // It saturates beyond 2^44 tokens with refill times of millennia.
        let room = token.saturating_mul(u128::from(limit.size));
        let (rate, burst) = (u128::from(limit.size), limit.one_time_burst.unwrap_or(0));
        Self { parts: room, room, token, rate, burst, seen: now }
    }

    /// Takes a token, first of those that do not come back; `false` if there is none.
    fn take(&mut self, now: Instant) -> bool {
        if let Some(burst) = self.burst.checked_sub(1) {
            self.burst = burst;
            return true;
        }
        let passed = now.saturating_duration_since(self.seen).as_nanos();
        self.seen = now;
        self.parts = self.parts.saturating_add(passed.saturating_mul(self.rate)).min(self.room);
        match self.parts.checked_sub(self.token) {
            Some(parts) => {
                self.parts = parts;
                true
            }
            None => false,
        }
    }
}
