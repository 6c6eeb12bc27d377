//! Rate limiters as Firecracker declares them.

use serde::{Deserialize, Serialize};

/// A token bucket. A size or refill time of 0 means no limit. Unknown fields are tolerated, as in Firecracker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Tokens that the bucket holds: bytes or operations.
    pub size: u64,
    /// Milliseconds in which an empty bucket fills.
    pub refill_time: u64,
    /// Tokens that are there once, at the start, in addition.
    pub one_time_burst: Option<u64>,
}

/// Limits on bytes and on operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Whether nothing is limited, as in `{}` or with buckets of size or refill time 0.
    pub fn is_unlimited(&self) -> bool {
        [self.bandwidth, self.ops].iter().flatten().all(|bucket| bucket.size == 0 || bucket.refill_time == 0)
    }
}
