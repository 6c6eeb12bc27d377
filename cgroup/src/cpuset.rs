//! Sets of CPUs or memory nodes in the kernel's list format, `0-3,7`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// First number that is no CPU: the largest CONFIG_NR_CPUS on x86_64 is 8192.
const LIMIT: u16 = 8192;

/// Why a text is not a [`CpuSet`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuSetError {
    /// A part is neither a number nor a range.
    #[error("`{part}` in the CPU list `{list}` is neither a number nor a range: write such as 0-3,7")]
    Form {
        /// The part that could not be read.
        part: String,
        /// The whole list.
        list: String,
    },
    /// A number is too large.
    #[error("`{part}` in the CPU list `{list}` is too large: the highest CPU is {}", LIMIT - 1)]
    TooLarge {
        /// The part with the number.
        part: String,
        /// The whole list.
        list: String,
    },
    /// A range runs backwards.
    #[error("`{part}` in the CPU list `{list}` runs backwards")]
    Backwards {
        /// The range.
        part: String,
        /// The whole list.
        list: String,
    },
}

/// A set of CPU (or memory node) numbers below 8192. It reads the kernel's list format (cpuset(7)), also with
/// spaces and overlaps, and displays its canonical form. The empty text is the empty set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuSet(BTreeSet<u16>);

impl CpuSet {
    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many CPUs it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The CPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        self.0.iter().copied()
    }

    /// What is in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self(&self.0 | &other.0)
    }

    /// What is in this one only.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        Self(&self.0 - &other.0)
    }

    /// Whether all of it is in `other`.
    #[must_use]
    pub fn is_subset(&self, other: &Self) -> bool {
        self.0.is_subset(&other.0)
    }
}

impl FromIterator<u16> for CpuSet {
    /// Numbers of 8192 and above are left out: no CPU has them.
    fn from_iter<I: IntoIterator<Item = u16>>(numbers: I) -> Self {
        Self(numbers.into_iter().filter(|n| *n < LIMIT).collect())
    }
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    fn from_str(list: &str) -> Result<Self, CpuSetError> {
        let mut set = BTreeSet::new();
        if list.trim().is_empty() {
            return Ok(Self(set));
        }
        for part in list.trim().split(',').map(str::trim) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first, part, list)?, number(last, part, list)?);
            if first > last {
                return Err(CpuSetError::Backwards { part: part.to_owned(), list: list.to_owned() });
            }
            set.extend(first..=last);
        }
        Ok(Self(set))
    }
}

fn number(text: &str, part: &str, list: &str) -> Result<u16, CpuSetError> {
    // Rust's own parser takes `+1`, the kernel does not.
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        let escape = |text: &str| text.escape_debug().to_string();
        return Err(CpuSetError::Form { part: escape(part), list: escape(list) });
    }
    text.parse()
        .ok()
        .filter(|n| *n < LIMIT)
        .ok_or_else(|| CpuSetError::TooLarge { part: part.to_owned(), list: list.to_owned() })
}

impl TryFrom<String> for CpuSet {
    type Error = CpuSetError;

    fn try_from(list: String) -> Result<Self, CpuSetError> {
        list.parse()
    }
}

impl From<CpuSet> for String {
    fn from(set: CpuSet) -> Self {
        set.to_string()
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = numbers.next() {
            let mut last = first;
            while numbers.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    #[test]
    fn the_canonical_form_is_the_shortest() {
        for (given, canonical) in [
            ("", ""),
            (" \n", ""),
            ("7,0-3", "0-3,7"),
            ("0,1,2", "0-2"),
            ("3-3", "3"),
            (" 1 , 5-6 ,2-5\n", "1-6"),
            ("8190-8191", "8190-8191"),
        ] {
            assert_eq!(set(given).to_string(), canonical);
            assert_eq!(set(canonical), set(given));
        }
    }

    #[test]
    fn what_the_kernel_would_not_read_is_refused() {
        for bad in [",", "0,", "a", "1-", "-1", "1--2", "+1", "0x1", "1 2"] {
            assert!(matches!(bad.parse::<CpuSet>(), Err(CpuSetError::Form { .. })), "{bad}");
        }
        for bad in ["8192", "0-65535", "99999999999999999999"] {
            assert!(matches!(bad.parse::<CpuSet>(), Err(CpuSetError::TooLarge { .. })), "{bad}");
        }
        assert!(matches!("3-1".parse::<CpuSet>(), Err(CpuSetError::Backwards { .. })));
    }

    #[test]
    fn set_arithmetic() {
        assert_eq!(set("0-3").union(&set("2-5,9")).to_string(), "0-5,9");
        assert_eq!(set("0-7").difference(&set("2,4-5")).to_string(), "0-1,3,6-7");
        assert!(set("2").is_subset(&set("0-3")));
        assert!(!set("2,9").is_subset(&set("0-3")));
        assert_eq!(set("0-3").len(), 4);
        assert_eq!([1, 2, 9000].into_iter().collect::<CpuSet>(), set("1-2"));
    }
}
