//! A device as its driver meets it, on whatever transport.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

use super::device::{Memory, VirtioDevice};
use super::driver::{DriverView, StatusChange};
use super::interrupt::Interrupt;
use super::slot::Slot;

/// What every transport has: the driver's view and the device in its place.
pub(super) struct Front {
    device_type: u32,
    /// What the driver has said.
    pub driver: DriverView,
    slot: Arc<Slot>,
}

impl Front {
    /// Gives `device` a place. Fails when no eventfd can be had, and for a device that offers queues that cannot be.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let driver = DriverView::new(device.features(), device.queue_max_sizes())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let device_type = device.device_type();
        Ok(Self { device_type, driver, slot: Arc::new(Slot::new(device, memory, interrupt)?) })
    }

    /// The device type.
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// The device in its place.
    pub fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// The status as the driver reads it.
    pub fn status(&self) -> u32 {
        let needs_reset = if self.slot.needs_reset() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
        self.driver.status() | needs_reset
    }

    /// The driver writes the status. What that asks of the device is done, or under way, when this returns; after a
    /// reset the device raises no more interrupts.
    pub fn set_status(&mut self, value: u32) -> StatusChange {
        let change = self.driver.set_status(value);
        match change {
            StatusChange::None => {}
            StatusChange::Reset => self.slot.reset(),
            StatusChange::DriverOk => self.slot.activate(self.driver.accepted(), self.driver.rings()),
        }
        change
    }
}
