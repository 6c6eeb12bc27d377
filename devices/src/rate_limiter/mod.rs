//! Limits what a device does for its guest, in bytes and in operations per time, as Firecracker's rate limiters do.
//!
//! Each limit is a bucket that fills evenly: `size` tokens in `refill_time_ms` milliseconds, up to `size`. A request
//! takes a token for each operation and each byte, or waits until they are there; one that is larger than the bucket
//! waits for a full one and leaves a debt, so that nothing waits for ever.
//!
//! A device asks [`RateLimiter::consume`] before a request. If the answer is no, it keeps the request, takes no other
//! one, and asks again for the same request when the limiter's timer fires: that is, after [`RateLimiter::event`]
//! left [`RateLimiter::is_blocked`] false. Timers are late. A request that waited is charged for the moment when it
//! was covered and not for the one when we noticed, and a refill loses no fraction of a token: so the rate does not
//! drift.

mod bucket;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
#[cfg(test)]
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use bucket::TokenBucket;

/// A limit. Unlimited if the size or the refill time is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Tokens (bytes or operations) in a full bucket, which it begins with.
    pub size: u64,
    /// How long an empty bucket takes to fill, in milliseconds.
    pub refill_time_ms: u64,
    /// Tokens that are used before those of the bucket, and only once.
    pub one_time_burst: u64,
}

impl Bucket {
    /// Whether it lets everything pass.
    pub fn is_unlimited(&self) -> bool {
        self.size == 0 || self.refill_time_ms == 0
    }
}

/// The limits of a device, or of one of its directions, from the start. `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimiterConfig {
    /// Bytes.
    pub bandwidth: Option<Bucket>,
    /// Operations: requests of a drive, packets of a network interface.
    pub ops: Option<Bucket>,
}

impl LimiterConfig {
    /// Whether it lets everything pass.
    pub fn is_unlimited(&self) -> bool {
        [self.bandwidth, self.ops].into_iter().flatten().all(|bucket| bucket.is_unlimited())
    }
}

/// A change of limits. `None` leaves a limit as it is, an unlimited bucket removes it, any other one replaces it, full
/// and with its burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimiterUpdate {
    /// Bytes.
    pub bandwidth: Option<Bucket>,
    /// Operations.
    pub ops: Option<Bucket>,
}

impl LimiterUpdate {
    /// Whether it sets a limit, rather than to remove some or nothing at all.
    pub fn sets_a_limit(&self) -> bool {
        !LimiterConfig { bandwidth: self.bandwidth, ops: self.ops }.is_unlimited()
    }
}

/// Says whether a device may go on, and wakes it when it may. See the [module](self).
///
/// Its descriptor is a timer, to be waited for edge triggered: [`Self::event`] makes it unreadable again, but a
/// device that is not started is not told of it.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    timer: TimerFd,
    clock: Clock,
    wait: Wait,
}

/// Times in nanoseconds of the limiter's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// No request waits.
    No,
    /// One does; the timer is set to this time.
    Blocked(u64),
    /// One did until this time, and is to be tried again.
    Due(u64),
}

impl RateLimiter {
    /// Full buckets, and a timer that is not set.
    pub fn new(config: LimiterConfig) -> io::Result<Self> {
        Self::with_clock(config, Clock::Monotonic(Instant::now()))
    }

    fn with_clock(config: LimiterConfig, clock: Clock) -> io::Result<Self> {
        let now = clock.now();
        let bucket = |bucket: Option<Bucket>| TokenBucket::new(bucket?, now);
        Ok(Self {
            bytes: bucket(config.bandwidth),
            ops: bucket(config.ops),
            timer: TimerFd::new()?,
            clock,
            wait: Wait::No,
        })
    }

    /// A limiter whose clock stands where the test puts it, in nanoseconds. Its timer is the real one.
    #[cfg(test)]
    pub(crate) fn manual(config: LimiterConfig, clock: &Arc<AtomicU64>) -> Self {
        Self::with_clock(config, Clock::Manual(Arc::clone(clock))).unwrap()
    }

    /// Takes the tokens of a request, or takes none, sets the timer to when they will be there, and returns false.
    /// While that lasts, all is refused.
    pub fn consume(&mut self, ops: u64, bytes: u64) -> bool {
        match std::mem::replace(&mut self.wait, Wait::No) {
            Wait::Blocked(due) => {
                self.wait = Wait::Blocked(due);
                return false;
            }
            Wait::Due(at) if self.charge(at, ops, bytes).is_ok() => return true,
            Wait::Due(_) | Wait::No => {}
        }
        // Nothing to pay for the clock where there is no limit.
        if self.bytes.is_none() && self.ops.is_none() {
            return true;
        }
        let now = self.clock.now();
        match self.charge(now, ops, bytes) {
            Ok(()) => true,
            Err(delay) => {
                self.wait = Wait::Blocked(now.saturating_add(delay));
                self.arm(delay);
                !self.is_blocked()
            }
        }
    }

    /// The timer fired.
    pub fn event(&mut self) {
        let Wait::Blocked(due) = self.wait else { return };
        match due.checked_sub(self.clock.now()) {
            // The event of a time that has been changed since.
            Some(left @ 1..) => self.arm(left),
            _ => self.release_to(Wait::Due(due)),
        }
    }

    /// Whether a request waits for the timer.
    pub fn is_blocked(&self) -> bool {
        matches!(self.wait, Wait::Blocked(_))
    }

    /// Changes the limits. What waits is tried again: the timer fires at once.
    pub fn update(&mut self, update: LimiterUpdate) {
        let now = self.clock.now();
        for (current, bucket) in [(&mut self.bytes, update.bandwidth), (&mut self.ops, update.ops)] {
            if let Some(bucket) = bucket {
                *current = TokenBucket::new(bucket, now);
            }
        }
        if self.is_blocked() {
            self.wait = Wait::Blocked(now);
            self.arm(0);
        }
    }

    /// Forgets the request that waits, because the driver reset the device. What was used stays used.
    pub fn release(&mut self) {
        if self.wait != Wait::No {
            self.release_to(Wait::No);
        }
    }

    fn release_to(&mut self, wait: Wait) {
        self.wait = wait;
        if let Err(error) = self.timer.clear() {
            log::debug!("could not stop the timer of a rate limiter: {error}");
        }
    }

    /// Takes the tokens that there are at the time `at`, or says how long that is too early, in nanoseconds.
    fn charge(&mut self, at: u64, ops: u64, bytes: u64) -> Result<(), u64> {
        let mut costs = [(&mut self.bytes, bytes), (&mut self.ops, ops)];
        let mut delay = 0;
        for (bucket, cost) in &mut costs {
            if let Some(bucket) = bucket {
                bucket.refill(at);
                delay = delay.max(bucket.delay(*cost));
            }
        }
        if delay > 0 {
            return Err(delay);
        }
        for (bucket, cost) in costs {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
        Ok(())
    }

    /// Sets the timer to fire in `delay` nanoseconds.
    fn arm(&mut self, delay: u64) {
        // 0 would stop it.
        if let Err(error) = self.timer.reset(Duration::from_nanos(delay.max(1)), None) {
            // Nothing that we do leads here. Better no limit than a device that stands still.
            log::warn!("could not set the timer of a rate limiter, so it does not limit: {error}");
            (self.bytes, self.ops, self.wait) = (None, None, Wait::No);
        }
    }
}

impl AsRawFd for RateLimiter {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

/// Where the time comes from.
#[derive(Debug)]
enum Clock {
    /// CLOCK_MONOTONIC, as for the timer, counted from this moment.
    Monotonic(Instant),
    #[cfg(test)]
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// Nanoseconds; never less than before.
    fn now(&self) -> u64 {
        match self {
            Self::Monotonic(start) => u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
            #[cfg(test)]
            Self::Manual(now) => now.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
