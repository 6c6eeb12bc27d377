//! What the devices count.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::devices::counter::Counters;
use serde::{Serialize, Serializer};

/// The counters of all devices: for each kind of device a group with the sums, and for a device with a name its own
/// group `KIND_NAME`, as Firecracker has them.
#[derive(Debug)]
pub struct DeviceFigures(Mutex<Vec<Device>>);

#[derive(Debug)]
struct Device {
    kind: &'static str,
    name: Option<String>,
    counters: Arc<dyn Counters>,
}

impl DeviceFigures {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Forgets devices of a start that failed, before another is tried.
    pub fn clear(&self) {
        self.devices().clear();
    }

    /// Adds counters of a device. One may have several groups of them, each with names of its own.
    pub fn add(&self, kind: &'static str, name: Option<String>, counters: Arc<dyn Counters>) {
        self.devices().push(Device { kind, name, counters });
    }

    /// The line that the figures were serialised for has been written.
    pub(super) fn settle(&self) {
        for device in self.devices().iter() {
            device.counters.each(&mut |_, counter| counter.settle());
        }
    }

    fn devices(&self) -> MutexGuard<'_, Vec<Device>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Serialize for DeviceFigures {
    /// Tells the growth. One thread at a time does this.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut groups: BTreeMap<String, BTreeMap<&'static str, u64>> = BTreeMap::new();
        for Device { kind, name, counters } in self.devices().iter() {
            counters.each(&mut |counter_name, counter| {
                let growth = counter.tell();
                let own = name.as_ref().map(|name| format!("{kind}_{name}"));
                for group in own.into_iter().chain([(*kind).to_owned()]) {
                    let told = groups.entry(group).or_default().entry(counter_name).or_default();
                    *told = told.wrapping_add(growth);
                }
            });
        }
        groups.serialize(serializer)
    }
}
