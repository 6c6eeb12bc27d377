//! Inputs from other inputs, without guidance by coverage; the same ones each time.

/// Numbers at which things change.
const INTERESTING: [u64; 12] =
    [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, i64::MAX as u64, u64::MAX];

/// The longest input.
const MAX_LEN: usize = 4096;

/// Numbers that look random (xorshift64).
pub struct Random(u64);

impl Random {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from((self.number() >> 8) % u64::try_from(end.max(1)).unwrap_or(1)).unwrap_or(0)
    }

    fn byte(&mut self) -> u8 {
        self.number().to_le_bytes()[3]
    }
}

/// One of `corpus`, changed in a few places; something of another one may be in it.
pub fn mutate(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let pick = |random: &mut Random| corpus.get(random.below(corpus.len())).map_or(&[][..], Vec::as_slice);
    let mut bytes = pick(random).to_vec();
    for _ in 0..=random.below(5) {
        let at = random.below(bytes.len() + 1);
        match random.below(8) {
            0 => bytes.insert(at, random.byte()),
            1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 if at < bytes.len() => bytes[at] = random.byte(),
            3 => {
                let number = INTERESTING[random.below(INTERESTING.len())].to_le_bytes();
                let width = 1 << random.below(4);
                let end = (at + width).min(bytes.len());
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            4 => {
                let end = at + random.below((bytes.len() - at).min(64) + 1);
                bytes.drain(at..end);
            }
            5 => {
                let end = at + random.below((bytes.len() - at).min(64) + 1);
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            6 => {
                let other = pick(random);
                let start = random.below(other.len() + 1);
                let end = start + random.below((other.len() - start).min(256) + 1);
                bytes.splice(at..at, other[start..end].iter().copied());
            }
            _ => bytes.truncate(at.max(1)),
        }
    }
    bytes.truncate(MAX_LEN);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_many_and_the_same_each_time() {
        let corpus = [b"one input".to_vec(), b"another".to_vec()];
        let make = |seed| {
            let mut random = Random::new(seed);
            (0..500).map(|_| mutate(&corpus, &mut random)).collect::<Vec<_>>()
        };
        let inputs = make(7);
        assert_eq!(inputs, make(7));
        assert_ne!(inputs, make(9));
        let different: std::collections::HashSet<_> = inputs.iter().collect();
        assert!(different.len() > 400, "{}", different.len());
        let mut random = Random::new(1);
        assert!(mutate(&[], &mut random).len() <= MAX_LEN);
    }
}
