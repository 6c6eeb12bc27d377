//! The PCI transport (virtio 1.2, section 4.1), modern devices only.
//!
//! BAR 0 has a page for each structure, in this order: common configuration, ISR status, device configuration,
//! notifications, MSI-X table, pending bits. There is a vector for each queue and one for the configuration.
//! BAR 2 has the notifications as ports, which drivers are to prefer (section 4.1.4.1): where KVM has to look at the
//! instruction that touched memory, as it does on AMD processors, a port costs it far less.
//! Without MSI-X a driver gets no interrupts: there is no pin; the ISR status tells it what it would have been told.

mod common;
mod interrupt;

use std::io;
use std::sync::{Arc, Mutex};

use self::interrupt::PciInterrupt;
use super::device::{Memory, VirtioDevice};
use super::front::Front;
use super::interrupt::Interrupt;
use super::slot::Slot;
use crate::bus::BusDevice;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{self, Msix, MsixRoutes};
use crate::pci::{PciFunction, Space};

/// Vendor of all virtio devices (section 4.1.2).
const VENDOR: u16 = 0x1AF4;
/// Device of a modern device of type 0.
const FIRST_DEVICE: u16 = 0x1040;
/// Vendor-specific capability.
const CAPABILITY: u8 = 0x09;
/// `cfg_type` of the structures (section 4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
/// Offsets in a capability.
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const CAP_DATA: usize = 16;

/// Bytes for each structure in the BAR.
const PAGE: u32 = 0x1000;
const COMMON: u32 = 0;
const ISR: u32 = PAGE;
const DEVICE: u32 = 2 * PAGE;
const NOTIFY: u32 = 3 * PAGE;
const TABLE: u32 = 4 * PAGE;
const PENDING: u32 = 5 * PAGE;
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Vectors that the table's page has room for.
const MAX_VECTORS: usize = 256;
/// BARs by their numbers.
const MEMORY_BAR: u8 = 0;
const PORTS_BAR: u8 = 2;

/// One device with its function.
pub struct VirtioPci {
    config: ConfigSpace,
    msix: Msix,
    /// Where the capabilities are that have state.
    msix_at: usize,
    window_at: usize,
    front: Front,
    interrupt: Arc<PciInterrupt>,
    /// Behind BAR 2; `None` if the device has more queues than that has room for.
    notify_ports: Option<Arc<Mutex<NotifyPorts>>>,
}

/// The notifications by ports. KVM has most of them.
struct NotifyPorts(Arc<Slot>);

impl BusDevice for NotifyPorts {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, _: &[u8]) {
        notify(&self.0, offset);
    }
}

/// The driver has written at `offset` of the notifications.
fn notify(slot: &Slot, offset: u64) {
    if let Ok(queue) = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)) {
        slot.kick(queue);
    }
}

impl VirtioPci {
    /// Bytes of BAR 0.
    pub const BAR_LEN: u64 = 0x8000;
    /// Ports of BAR 2: as many as a BAR may have.
    pub const PORTS_LEN: u64 = 0x100;

    /// Where in the BAR in `space` a write of any value notifies queue `index`. It may signal the queue's kick without
    /// us.
    pub fn notify_offset(space: Space, index: u16) -> u64 {
        let first = match space {
            Space::Memory => NOTIFY,
            Space::Ports => 0,
        };
        u64::from(first) + u64::from(index) * u64::from(NOTIFY_MULTIPLIER)
    }

    /// How many vectors the function of `device` has.
    pub fn vectors(device: &dyn VirtioDevice) -> usize {
        device.queue_max_sizes().len() + 1
    }

    /// A function for `device`, whose BARs are at `base` and `ports` until the guest moves them. `routes` has as many
    /// vectors as [`Self::vectors`] says. Fails when no eventfd can be had, and for a device that offers queues that cannot be.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        routes: Arc<dyn MsixRoutes>,
        base: u64,
        ports: u64,
    ) -> io::Result<Self> {
        let (queues, config_len) = (device.queue_max_sizes().len(), device.config().len());
        let device_type = u16::try_from(device.device_type()).ok().filter(|kind| *kind < 0x40);
        let (Some(device_type), true) = (device_type, (1..=MAX_VECTORS).contains(&routes.irqfds().len()))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let interrupt = Arc::new(PciInterrupt::new(Arc::clone(&routes), queues));
        let front = Front::new(device, memory, Arc::clone(&interrupt) as Arc<dyn Interrupt>)?;
        let msix = Msix::new(routes);

        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + device_type,
            subsystem: FIRST_DEVICE + device_type,
            revision: 1,
            class: class(device_type),
        });
        config.set_bar(Space::Memory, base, Self::BAR_LEN);
        let (body, writable) = msix.capability(TABLE, PENDING);
        let msix_at = config.add_capability(msix::CAPABILITY, &body, &writable);
        config.add_capability(CAPABILITY, &structure(COMMON_CFG, MEMORY_BAR, COMMON, common::LEN, &[]), &[]);
        config.add_capability(CAPABILITY, &structure(ISR_CFG, MEMORY_BAR, ISR, 1, &[]), &[]);
        if let Ok(len @ 1..) = u32::try_from(config_len) {
            let place = structure(DEVICE_CFG, MEMORY_BAR, DEVICE, len.min(PAGE), &[]);
            config.add_capability(CAPABILITY, &place, &[]);
        }
        // At most as many queues as vectors: they fit.
        let len = u32::try_from(queues).unwrap_or(0) * NOTIFY_MULTIPLIER;
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        let has_ports = u64::from(len) <= Self::PORTS_LEN;
        if has_ports {
            // Before the other: a driver takes the first that it can use.
            config.set_bar(Space::Ports, ports, Self::PORTS_LEN);
            config.add_capability(CAPABILITY, &structure(NOTIFY_CFG, PORTS_BAR, 0, len, &multiplier), &[]);
        }
        config.add_capability(CAPABILITY, &structure(NOTIFY_CFG, MEMORY_BAR, NOTIFY, len, &multiplier), &[]);
        // Of the window the guest chooses BAR, offset and length, and exchanges data.
        let mut writable = [0xFF; 18];
        writable[..2].fill(0);
        writable[3..6].fill(0);
        let window_at =
            config.add_capability(CAPABILITY, &structure(PCI_CFG, MEMORY_BAR, 0, 0, &[0; 4]), &writable);
        let notify_ports = has_ports.then(|| Arc::new(Mutex::new(NotifyPorts(Arc::clone(front.slot())))));
        Ok(Self { config, msix, msix_at, window_at, front, interrupt, notify_ports })
    }

    /// The device in its place, for who wires its kicks, serves it, or changes it while the guest runs.
    pub fn slot(&self) -> &Arc<Slot> {
        self.front.slot()
    }

    /// What the access window of the configuration space leads to: an offset in a BAR and a width (section
    /// 4.1.4.9).
    fn window(&self) -> Option<(Space, u64, usize)> {
        let field = |offset, len| self.config.get(self.window_at + offset, len);
        let (bar, offset, len) = (field(CAP_BAR, 1), field(CAP_OFFSET, 4), field(CAP_LENGTH, 4));
        let space = match u8::try_from(bar) {
            Ok(MEMORY_BAR) => Space::Memory,
            Ok(PORTS_BAR) if self.notify_ports.is_some() && offset < Self::PORTS_LEN => Space::Ports,
            _ => return None,
        };
        let valid = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
        valid.then_some((space, offset, usize::try_from(len).ok()?))
    }

    /// Whether an access touches the window's data.
    fn is_window_data(&self, offset: usize, len: usize) -> bool {
        let data = self.window_at + CAP_DATA;
        offset < data + 4 && data < offset.saturating_add(len)
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if self.is_window_data(offset, data.len())
            && let Some((space, from, len)) = self.window()
        {
            let mut bytes = [0; 4];
            // Notifications read as 0.
            if space == Space::Memory {
                self.read(from, &mut bytes[..len]);
            }
            self.config.write(self.window_at + CAP_DATA, &bytes);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let control = self.config.get(self.msix_at + 2, 2);
        self.config.write(offset, data);
        if self.is_window_data(offset, data.len())
            && let Some((space, to, len)) = self.window()
        {
            let bytes = self.config.get(self.window_at + CAP_DATA, 4).to_le_bytes();
            match space {
                Space::Memory => self.write(to, &bytes[..len]),
                Space::Ports => notify(self.front.slot(), to),
            }
        }
        let now = self.config.get(self.msix_at + 2, 2);
        if now != control {
            // Two bytes always fit.
            self.msix.set_control(u16::try_from(now).unwrap_or(0));
            self.interrupt.set_enabled(self.msix.is_enabled());
        }
    }

    fn decoded(&self, space: Space) -> Option<(u64, u64)> {
        self.config.decoded(space)
    }

    fn ports(&self) -> Option<Arc<Mutex<dyn BusDevice>>> {
        self.notify_ports.clone().map(|ports| ports as _)
    }
}

impl BusDevice for VirtioPci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match place(offset) {
            Some((COMMON, offset)) => self.read_common(offset, data),
            Some((ISR, 0)) => data.iter_mut().take(1).for_each(|byte| *byte = self.interrupt.take_isr()),
            Some((DEVICE, offset)) => self.front.slot().read_config(offset, data),
            Some((TABLE, offset)) => self.msix.read_table(offset, data),
            Some((PENDING, offset)) => self.msix.read_pending(offset, data),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match place(offset) {
            Some((COMMON, offset)) => self.write_common(offset, data),
            Some((DEVICE, offset)) => self.front.slot().write_config(offset, data),
            // KVM has these of a driver that does without ports, but for the moment in which the BAR is being moved.
            Some((NOTIFY, offset)) => notify(self.front.slot(), offset as u64),
            Some((TABLE, offset)) => self.msix.write_table(offset, data),
            _ => {}
        }
    }
}

/// The structure that an offset in the BAR is of, and the offset in it.
fn place(offset: u64) -> Option<(u32, usize)> {
    let offset = u32::try_from(offset).ok()?;
    let within = offset % PAGE;
    Some((offset - within, usize::try_from(within).ok()?))
}

/// A capability that says where a structure is (section 4.1.4), behind its header, with what more it holds.
fn structure(kind: u8, bar: u8, offset: u32, len: u32, more: &[u8]) -> Vec<u8> {
    let size = 16 + more.len().to_le_bytes()[0];
    let mut body = vec![size, kind, bar, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(more);
    body
}

/// PCI's class of a virtio device type, for people: drivers do not look at it.
fn class(device_type: u16) -> [u8; 3] {
    match device_type {
        // Ethernet.
        1 => [0x02, 0x00, 0],
        // Other mass storage: blocks, and file systems.
        2 | 26 => [0x01, 0x80, 0],
        // Other communication.
        19 => [0x07, 0x80, 0],
        // None of the classes.
        _ => [0xFF, 0x00, 0],
    }
}

#[cfg(test)]
mod tests;
