//! One bus: which function has which device number, and where on the memory bus its BAR is.

use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::PciFunction;
use super::config::{ConfigSpace, Identity};
use crate::bus::{Bus, BusDevice};

/// Device numbers on a bus; the host bridge has the first.
const DEVICES: usize = 32;
/// Functions that a device could have.
const FUNCTIONS: usize = 8;
/// Bytes of a function's configuration space in the ECAM.
const FUNCTION_LEN: usize = 4096;

/// What KVM is to do when the guest moves a function's BAR, so that the guest's notifications do not need us.
pub trait Doorbells: Send {
    /// The BAR is at `base` now.
    fn attach(&self, base: u64) -> io::Result<()>;

    /// The BAR is no longer at `base`, for which [`Self::attach`] succeeded.
    fn detach(&self, base: u64);
}

/// The bus. As a [`BusDevice`] it is the bus's configuration space in memory, [`Self::ECAM_LEN`] bytes.
///
/// # Locks
/// The bus's own lock comes first, then a function's, which is not held when the memory bus is changed.
pub struct PciBus {
    /// It has the ECAM on it, so it owns us.
    memory: Weak<Bus>,
    /// Where the guest may put BARs.
    windows: [RangeInclusive<u64>; 2],
    devices: [Option<Device>; DEVICES],
}

/// A device with one function, number 0.
struct Device {
    function: Arc<Mutex<dyn PciFunction>>,
    doorbells: Box<dyn Doorbells>,
    /// First address of the BAR on the memory bus.
    base: Option<u64>,
    /// Whether KVM knows the doorbells at that address.
    attached: bool,
}

impl PciBus {
    /// Bytes of the configuration space of a bus.
    pub const ECAM_LEN: u64 = (DEVICES * FUNCTIONS * FUNCTION_LEN) as u64;

    /// A bus with its host bridge. BARs that lie in one of `windows` are put on `memory`; others are not decoded.
    pub fn new(memory: &Arc<Bus>, windows: [RangeInclusive<u64>; 2]) -> Self {
        let mut devices = [const { None }; DEVICES];
        devices[0] = Some(Device {
            function: Arc::new(Mutex::new(HostBridge::new())),
            doorbells: Box::new(NoDoorbells),
            base: None,
            attached: false,
        });
        Self { memory: Arc::downgrade(memory), windows, devices }
    }

    /// The first device number that is free.
    pub fn free(&self) -> Option<usize> {
        self.devices.iter().position(Option::is_none)
    }

    /// Makes `function` the device of this number, which was free. It is found by a guest that looks afterwards.
    pub fn insert(
        &mut self,
        number: usize,
        function: Arc<Mutex<dyn PciFunction>>,
        doorbells: Box<dyn Doorbells>,
    ) {
        if let Some(place @ None) = self.devices.get_mut(number) {
            *place = Some(Device { function, doorbells, base: None, attached: false });
        }
    }

    /// The device that an access is for, and where in its configuration space.
    fn find(&mut self, offset: u64) -> Option<(&mut Device, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let (function, register) = (offset / FUNCTION_LEN, offset % FUNCTION_LEN);
        let device = self.devices.get_mut(function / FUNCTIONS)?.as_mut()?;
        function.is_multiple_of(FUNCTIONS).then_some((device, register))
    }
}

impl BusDevice for PciBus {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.find(offset) {
            Some((device, register)) => device.lock().read_config(register, data),
            None => data.fill(0xFF),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (memory, windows) = (self.memory.upgrade(), self.windows.clone());
        if let (Some(memory), Some((device, register))) = (memory, self.find(offset)) {
            let decoded = {
                let mut function = device.lock();
                function.write_config(register, data);
                function.decoded()
            };
            let inside = |(base, len): &(u64, u64)| {
                let last = base.checked_add(len - 1);
                windows
                    .iter()
                    .any(|window| window.contains(base) && last.is_some_and(|last| window.contains(&last)))
            };
            device.place(&memory, decoded.filter(inside));
        }
    }
}

impl Device {
    fn lock(&self) -> MutexGuard<'_, dyn PciFunction + 'static> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the BAR to these addresses, if nobody else has them.
    fn place(&mut self, memory: &Bus, to: Option<(u64, u64)>) {
        if self.base == to.map(|(base, _)| base) {
            return;
        }
        if let Some(old) = self.base.take() {
            memory.remove(old);
            if std::mem::take(&mut self.attached) {
                self.doorbells.detach(old);
            }
        }
        let Some((base, len)) = to else { return };
        match memory.insert(base, len, Arc::clone(&self.function) as Arc<Mutex<dyn BusDevice>>) {
            Ok(()) => {
                self.base = Some(base);
                match self.doorbells.attach(base) {
                    Ok(()) => self.attached = true,
                    // Notifications then take the long way, by the memory bus.
                    Err(error) => {
                        log::warn!("a PCI device's notifications at {base:#x} will be slow: {error}")
                    }
                }
            }
            Err(error) => log::debug!("a PCI device stays without its memory: {error}"),
        }
    }
}

/// What a guest expects at device 0: a bridge that does nothing.
struct HostBridge(ConfigSpace);

impl HostBridge {
    /// QEMU's generic PCI Express host bridge, which no driver wants anything of.
    fn new() -> Self {
        Self(ConfigSpace::new(Identity {
            vendor: 0x1B36,
            device: 0x0008,
            subsystem: 0,
            revision: 0,
            class: [6, 0, 0],
        }))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn decoded(&self) -> Option<(u64, u64)> {
        None
    }
}

impl BusDevice for HostBridge {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

/// Of a function without a BAR.
struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn attach(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _: u64) {}
}

#[cfg(test)]
mod tests;
