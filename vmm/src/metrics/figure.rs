//! Figures of this process, and groups of them.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use ::devices::counter;
use serde::{Serialize, Serializer};

/// Counts what happens. Each line of metrics tells by how much it grew since the last line that was written.
#[derive(Debug)]
pub struct Counter(counter::Counter);

impl Counter {
    pub const fn new() -> Self {
        Self(counter::Counter::new())
    }
}

impl Deref for Counter {
    type Target = counter::Counter;

    fn deref(&self) -> &counter::Counter {
        &self.0
    }
}

impl Serialize for Counter {
    /// Tells the growth. One thread at a time does this.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.tell())
    }
}

/// A figure that stays until it is measured anew.
#[derive(Debug)]
pub struct Gauge(AtomicU64);

impl Gauge {
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Sets the figure.
    pub fn store(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Sets the figure to the microseconds since `start`.
    pub fn store_since(&self, start: Instant) {
        self.store(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
    }

    /// A line has been written; the figure stays.
    pub(super) fn settle(&self) {}
}

impl Serialize for Gauge {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0.load(Relaxed))
    }
}

/// Defines structs of figures, or of other groups. They begin at zero and are settled together.
macro_rules! groups {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ident,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, ::serde::Serialize)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)* }

        impl $name {
            /// All figures at zero.
            pub const fn new() -> Self {
                Self { $($field: $kind::new(),)* }
            }

            /// The line that the figures were serialised for has been written.
            pub(super) fn settle(&self) {
                $(self.$field.settle();)*
            }
        }
    )*};
}

pub(super) use groups;
