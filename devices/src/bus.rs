//! The bus: which device answers at which address. One for port I/O, one for memory-mapped I/O.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A device that vCPUs reach by address. The offset counts from the start of the device's range, and the
/// access lies in that range as a whole.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes; every byte of `data` is to be written.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Addresses of a device; the last one included, so that a range may end where addresses do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    first: u64,
    last: u64,
}

impl Range {
    /// The range of `len` bytes from `first` on; `None` if it is empty or leaves the address space.
    fn new(first: u64, len: u64) -> Option<Self> {
        Some(Self { first, last: first.checked_add(len.checked_sub(1)?)? })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.first, self.last)
    }
}

/// Why a device cannot be put on a bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range has no length or leaves the address space.
    #[error("a device cannot have {len:#x} addresses from {first:#x} on")]
    Range {
        /// First address asked for.
        first: u64,
        /// Number of addresses asked for.
        len: u64,
    },
    /// Another device has some of the addresses.
    #[error("the addresses {new} of a device overlap with {old} of another one; remove that one first")]
    Overlap {
        /// The range asked for.
        new: Range,
        /// The range in the way.
        old: Range,
    },
}

struct Entry {
    range: Range,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Ranges, none overlapping another, and their devices. Devices may come and go while the guest runs.
///
/// # Locks
/// The lock of the map is taken first and is released before the device's lock is taken; neither is held when
/// an access returns. A device may therefore change the bus. An access that was on its way when its device
/// was removed may still reach the device.
#[derive(Default)]
pub struct Bus {
    /// By first address.
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// A bus with no device on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer at `len` addresses from `first` on.
    pub fn insert(&self, first: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let range = Range::new(first, len).ok_or(BusError::Range { first, len })?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        // Ranges do not overlap, so the one that starts last before our end is also the one that ends last.
        match entries.range(..=range.last).next_back() {
            Some((_, entry)) if entry.range.last >= range.first => {
                Err(BusError::Overlap { new: range, old: entry.range })
            }
            _ => {
                entries.insert(first, Entry { range, device });
                Ok(())
            }
        }
    }

    /// Takes the device whose range starts at `first` off the bus.
    pub fn remove(&self, first: u64) -> Option<Arc<Mutex<dyn BusDevice>>> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.remove(&first).map(|entry| entry.device)
    }

    /// The guest reads. Where no device has all of the addresses, every bit reads as one.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            // A device that panicked under its lock is still the only one that can answer.
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// The guest writes. Where no device has all of the addresses, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// The device that has all `len` addresses from `address` on, and the first one's offset in its range.
    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<Mutex<dyn BusDevice>>)> {
        let wanted = Range::new(address, u64::try_from(len).ok()?)?;
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let (_, entry) = entries.range(..=address).next_back()?;
        (wanted.last <= entry.range.last).then(|| (address - entry.range.first, Arc::clone(&entry.device)))
    }
}

#[cfg(test)]
mod tests;
