//! One bus: which function has which device number, and where its BARs are, in memory and among the ports.

use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::config::{ConfigSpace, Identity};
use super::{PciFunction, Space};
use crate::bus::{Bus, BusDevice};

/// Device numbers on a bus; the host bridge has the first.
const DEVICES: usize = 32;
/// Functions that a device could have.
const FUNCTIONS: usize = 8;
/// Bytes of a function's configuration space in the ECAM.
const FUNCTION_LEN: usize = 4096;

/// What KVM is to do when the guest moves a function's BAR, so that the guest's notifications do not need us. They are
/// in one BAR at a time: in that of ports if it is there, because a driver that knows ports prefers them.
pub trait Doorbells: Send {
    /// They are in the BAR in `space` now, which is at `base`.
    fn attach(&self, space: Space, base: u64) -> io::Result<()>;

    /// They are no longer there, where [`Self::attach`] had succeeded.
    fn detach(&self, space: Space, base: u64);
}

/// The bus. As a [`BusDevice`] it is the bus's configuration space in memory, [`Self::ECAM_LEN`] bytes.
///
/// # Locks
/// The bus's own lock comes first, then a function's, which is not held when the buses of memory and ports are changed.
pub struct PciBus {
    memory: Windows,
    ports: Windows,
    devices: [Option<Device>; DEVICES],
}

/// Where the guest may put BARs in one space.
struct Windows {
    /// It has our configuration space on it, so it owns us.
    bus: Weak<Bus>,
    ranges: Vec<RangeInclusive<u64>>,
}

/// A device with one function, number 0.
struct Device {
    function: Arc<Mutex<dyn PciFunction>>,
    doorbells: Box<dyn Doorbells>,
    /// First address of the BAR on the memory bus.
    memory: Option<u64>,
    /// First port of the other BAR.
    ports: Option<u64>,
    /// Whether KVM knows the doorbells where they are.
    attached: bool,
}

impl PciBus {
    /// Bytes of the configuration space of a bus.
    pub const ECAM_LEN: u64 = (DEVICES * FUNCTIONS * FUNCTION_LEN) as u64;

    /// A bus with its host bridge. BARs that lie in one of `memory_windows` are put on `memory`, those in `port_window` on
    /// `ports`; others are not decoded.
    pub fn new(
        memory: &Arc<Bus>,
        memory_windows: [RangeInclusive<u64>; 2],
        ports: &Arc<Bus>,
        port_window: RangeInclusive<u64>,
    ) -> Self {
        let mut devices = [const { None }; DEVICES];
        devices[0] = Some(Device::new(Arc::new(Mutex::new(HostBridge::new())), Box::new(NoDoorbells)));
        Self {
            memory: Windows { bus: Arc::downgrade(memory), ranges: memory_windows.into() },
            ports: Windows { bus: Arc::downgrade(ports), ranges: vec![port_window] },
            devices,
        }
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
            *place = Some(Device::new(function, doorbells));
        }
    }
}

/// The device that an access is for, and where in its configuration space.
fn find(devices: &mut [Option<Device>], offset: u64) -> Option<(&mut Device, usize)> {
    let offset = usize::try_from(offset).ok()?;
    let (function, register) = (offset / FUNCTION_LEN, offset % FUNCTION_LEN);
    let device = devices.get_mut(function / FUNCTIONS)?.as_mut()?;
    function.is_multiple_of(FUNCTIONS).then_some((device, register))
}

impl BusDevice for PciBus {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match find(&mut self.devices, offset) {
            Some((device, register)) => device.lock().read_config(register, data),
            None => data.fill(0xFF),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((device, register)) = find(&mut self.devices, offset) {
            device.lock().write_config(register, data);
            device.place(&self.memory, &self.ports);
        }
    }
}

impl Device {
    fn new(function: Arc<Mutex<dyn PciFunction>>, doorbells: Box<dyn Doorbells>) -> Self {
        Self { function, doorbells, memory: None, ports: None, attached: false }
    }

    fn lock(&self) -> MutexGuard<'_, dyn PciFunction + 'static> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the doorbells are.
    fn rung(&self) -> Option<(Space, u64)> {
        let ports = self.ports.map(|base| (Space::Ports, base));
        ports.or(self.memory.map(|base| (Space::Memory, base)))
    }

    /// Moves the BARs to where they are decoded, if nobody else is there, and the doorbells with them.
    fn place(&mut self, memory: &Windows, ports: &Windows) {
        let (by_memory, by_ports, behind_ports) = {
            let function = self.lock();
            (function.decoded(Space::Memory), function.decoded(Space::Ports), function.ports())
        };
        let function = Arc::clone(&self.function) as Arc<Mutex<dyn BusDevice>>;
        let before = self.rung();
        memory.place(&mut self.memory, by_memory, Some(function));
        ports.place(&mut self.ports, by_ports, behind_ports);

        let rung = self.rung();
        if rung == before {
            return;
        }
        if let (Some((space, base)), true) = (before, std::mem::take(&mut self.attached)) {
            self.doorbells.detach(space, base);
        }
        let Some((space, base)) = rung else { return };
        match self.doorbells.attach(space, base) {
            Ok(()) => self.attached = true,
            // Notifications then take the long way, by the bus.
            Err(error) => log::warn!("a PCI device's notifications at {base:#x} will be slow: {error}"),
        }
    }
}

impl Windows {
    /// Moves the BAR with `device` behind it from `from` to the range `to`, if that is within the windows and nobody
    /// else is there.
    fn place(
        &self,
        from: &mut Option<u64>,
        to: Option<(u64, u64)>,
        device: Option<Arc<Mutex<dyn BusDevice>>>,
    ) {
        let to = to.filter(|range| self.hold(*range));
        let Some(bus) = self.bus.upgrade().filter(|_| *from != to.map(|(base, _)| base)) else { return };
        if let Some(old) = from.take() {
            bus.remove(old);
        }
        let (Some((base, len)), Some(device)) = (to, device) else { return };
        match bus.insert(base, len, device) {
            Ok(()) => *from = Some(base),
            Err(error) => log::debug!("a PCI device is not where its BAR is: {error}"),
        }
    }

    fn hold(&self, (base, len): (u64, u64)) -> bool {
        let last = base.checked_add(len - 1);
        let holds = |range: &RangeInclusive<u64>| {
            range.contains(&base) && last.is_some_and(|last| range.contains(&last))
        };
        self.ranges.iter().any(holds)
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

    fn decoded(&self, _: Space) -> Option<(u64, u64)> {
        None
    }

    fn ports(&self) -> Option<Arc<Mutex<dyn BusDevice>>> {
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
    fn attach(&self, _: Space, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _: Space, _: u64) {}
}

#[cfg(test)]
mod tests;
