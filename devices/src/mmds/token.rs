//! Session tokens. A token says itself when it expires and carries a keyed hash of that, so that a guest that
//! asks for tokens without end fills no table and drives out no token of another program.

use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// The least and the greatest lifetime of a token, in seconds.
const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21_600;

/// Bytes of the hash's key, which is what SHA-256 takes at once.
const KEY_LEN: usize = 64;
/// Bytes of a token: a nonce, so that no two are the same, when it expires, and the hash of both.
const NONCE_LEN: usize = 16;
const EXPIRY_LEN: usize = 8;
const HASH_LEN: usize = 32;
const SIGNED_LEN: usize = NONCE_LEN + EXPIRY_LEN;
const TOKEN_LEN: usize = SIGNED_LEN + HASH_LEN;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub(super) enum TokenError {
    // The text is Firecracker's.
    #[error(
        "Invalid time to live value provided for token: {0}. Please provide a value between {min} and {max}.",
        min = TTL_SECONDS.start(),
        max = TTL_SECONDS.end()
    )]
    Ttl(u32),
    #[error("The host has no random numbers for a token; try again.")]
    Random(#[from] getrandom::Error),
}

/// Makes tokens, and knows them again. They are valid for all interfaces of a microVM, and for no other.
pub(super) struct Tokens {
    /// Made with the first token, since only then can its failure be reported to whoever asked.
    key: Option<[u8; KEY_LEN]>,
    /// What expiries count from.
    epoch: Instant,
}

impl Tokens {
    pub(super) fn new() -> Self {
        Self { key: None, epoch: Instant::now() }
    }

    /// Makes a token that is valid for `ttl` seconds from `now` on.
    pub(super) fn issue(&mut self, ttl: u32, now: Instant) -> Result<String, TokenError> {
        if !TTL_SECONDS.contains(&ttl) {
            return Err(TokenError::Ttl(ttl));
        }
        let key = match self.key {
            Some(key) => key,
            None => {
                let mut key = [0; KEY_LEN];
                getrandom::fill(&mut key)?;
                *self.key.insert(key)
            }
        };
        let expiry = self.milliseconds(now + Duration::from_secs(u64::from(ttl)));
        let mut token = [0; TOKEN_LEN];
        let (signed, hash) = token.split_at_mut(SIGNED_LEN);
        let (nonce, expires) = signed.split_at_mut(NONCE_LEN);
        getrandom::fill(nonce)?;
        expires.copy_from_slice(&expiry.to_le_bytes());
        hash.copy_from_slice(&hasher(&key, signed).finalize().into_bytes());
        Ok(token.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Whether `token` is one of ours and has not expired.
    pub(super) fn is_valid(&self, token: &[u8], now: Instant) -> bool {
        let (Some(key), Some(token)) = (&self.key, decode(token)) else {
            return false;
        };
        let (signed, hash) = token.split_at(SIGNED_LEN);
        let mut expires = [0; EXPIRY_LEN];
        expires.copy_from_slice(&signed[NONCE_LEN..]);
        // The comparison takes the same time wherever the difference is.
        hasher(key, signed).verify_slice(hash).is_ok() && self.milliseconds(now) < u64::from_le_bytes(expires)
    }

    fn milliseconds(&self, at: Instant) -> u64 {
        // Not reached in 500 million years.
        u64::try_from(at.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX)
    }
}

fn hasher(key: &[u8; KEY_LEN], signed: &[u8]) -> Hmac<Sha256> {
    let mut hasher = Hmac::<Sha256>::new(&(*key).into());
    hasher.update(signed);
    hasher
}

/// The bytes that `token` writes as hexadecimal digits, in either case.
fn decode(token: &[u8]) -> Option<[u8; TOKEN_LEN]> {
    let (digits, []) = token.as_chunks::<2>() else {
        return None;
    };
    let bytes: Option<Vec<u8>> =
        digits.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect();
    bytes?.try_into().ok()
}

fn digit(character: u8) -> Option<u8> {
    char::from(character).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests;
