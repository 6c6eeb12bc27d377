//! Counters of what devices do. Whoever writes metrics asks each device for its counters once, and reads them from
//! then on while the device counts.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts what happens, and knows how much of it has been told.
#[derive(Debug, Default)]
pub struct Counter {
    total: AtomicU64,
    /// The total when it was told last.
    told: AtomicU64,
    /// The total when what was told had arrived.
    settled: AtomicU64,
}

impl Counter {
    /// A counter at 0.
    pub const fn new() -> Self {
        Self { total: AtomicU64::new(0), told: AtomicU64::new(0), settled: AtomicU64::new(0) }
    }

    /// It happened once more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// It happened `n` times more.
    pub fn add(&self, n: u64) {
        self.total.fetch_add(n, Relaxed);
    }

    /// How often it has happened since the counter exists.
    pub fn count(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// Takes a total that was counted elsewhere.
    pub fn set_total(&self, total: u64) {
        self.total.store(total, Relaxed);
    }

    /// By how much it has grown since the growth was told and settled. One thread at a time tells.
    pub fn tell(&self) -> u64 {
        let total = self.count();
        self.told.store(total, Relaxed);
        total.wrapping_sub(self.settled.load(Relaxed))
    }

    /// What was told last has arrived; the next growth is counted from there.
    pub fn settle(&self) {
        self.settled.store(self.told.load(Relaxed), Relaxed);
    }
}

/// A group of counters, such as a device's.
pub trait Counters: Debug + Send + Sync {
    /// Hands each counter to `visit`, with its name.
    fn each(&self, visit: &mut dyn FnMut(&'static str, &Counter));
}

/// For what counts nothing.
impl Counters for () {
    fn each(&self, _: &mut dyn FnMut(&'static str, &Counter)) {}
}

/// Defines groups of counters that begin at 0.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $name { $($(#[$field_doc])* pub(crate) $field: $crate::counter::Counter,)* }

        impl $crate::counter::Counters for $name {
            fn each(&self, visit: &mut dyn FnMut(&'static str, &$crate::counter::Counter)) {
                $(visit(stringify!($field), &self.$field);)*
            }
        }
    )*};
}

pub(crate) use counters;

#[cfg(test)]
mod tests {
    use super::*;

    counters! {
        Two {
            one,
            other,
        }
    }

    #[test]
    fn groups_name_their_counters_and_growth_is_told_until_it_is_settled() {
        let group = Two::default();
        group.other.add(3);
        let told = |group: &Two| {
            let mut told = Vec::new();
            group.each(&mut |name, counter| told.push((name, counter.tell())));
            told
        };
        assert_eq!(told(&group), [("one", 0), ("other", 3)]);
        assert_eq!(told(&group), [("one", 0), ("other", 3)], "it did not arrive");
        group.one.inc();
        group.each(&mut |_, counter| counter.settle());
        assert_eq!(told(&group), [("one", 1), ("other", 0)]);
        assert_eq!(group.other.count(), 3);
    }
}
