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

impl TokenBucket {
    /// Whether it limits nothing.
    pub fn is_unlimited(&self) -> bool {
        self.size == 0 || self.refill_time == 0
    }
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
        [self.bandwidth, self.ops].iter().flatten().all(TokenBucket::is_unlimited)
    }

    /// What these limits are after a PATCH: a bucket that it leaves out stays, an unlimited one is taken away.
    pub(crate) fn patched(self, patch: Self) -> Self {
        let bucket = |old: Option<TokenBucket>, new: Option<TokenBucket>| {
            new.or(old).filter(|bucket| !bucket.is_unlimited())
        };
        Self { bandwidth: bucket(self.bandwidth, patch.bandwidth), ops: bucket(self.ops, patch.ops) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_keeps_what_it_leaves_out_and_takes_away_what_it_zeroes() {
        let bucket = |size| Some(TokenBucket { size, refill_time: 100, one_time_burst: None });
        let old = RateLimiter { bandwidth: bucket(1), ops: bucket(2) };
        assert_eq!(old.patched(RateLimiter::default()), old);
        let new = old.patched(RateLimiter { bandwidth: bucket(0), ops: bucket(3) });
        assert_eq!(new, RateLimiter { bandwidth: None, ops: bucket(3) });
    }
}
