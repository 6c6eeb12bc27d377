//! The common configuration structure (virtio 1.2, section 4.1.4.3). Fields are accessed as a whole, those of 64
//! bits also by halves; any other access reads 0 or does nothing.

use super::VirtioPci;
use super::interrupt::NO_VECTOR;
use crate::virtio::driver::{Half, RingPart, StatusChange};
use crate::virtio::interrupt::Vector;

/// Bytes of the structure, up to what belongs to features that are not offered.
pub const LEN: u32 = 56;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0C;
const CONFIG_MSIX_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_MSIX_VECTOR: usize = 0x1A;
const QUEUE_ENABLE: usize = 0x1C;
const QUEUE_NOTIFY_OFF: usize = 0x1E;
/// Three addresses of 64 bits follow each other.
const QUEUE_DESC: usize = 0x20;
const QUEUE_END: usize = 0x38;

impl VirtioPci {
    /// The driver reads; `data` is zeros.
    pub(super) fn read_common(&self, offset: usize, data: &mut [u8]) {
        if let (true, Some((low, high))) = (is_address(offset), data.split_at_mut_checked(4))
            && high.len() == 4
        {
            self.read_common(offset, low);
            return self.read_common(offset + 4, high);
        }
        let driver = &self.front.driver;
        let value = match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => driver.offered_select(),
            (DEVICE_FEATURE, 4) => driver.offered(),
            (DRIVER_FEATURE_SELECT, 4) => driver.accepted_select(),
            (DRIVER_FEATURE, 4) => driver.accepted_selected(),
            (CONFIG_MSIX_VECTOR, 2) => self.interrupt.mapped(Vector::Config).into(),
            // At most as many as there are vectors.
            (NUM_QUEUES, 2) => u32::try_from(driver.queue_count()).unwrap_or(0),
            (DEVICE_STATUS, 1) => self.front.status(),
            (CONFIG_GENERATION, 1) => self.front.slot().config_generation(),
            (QUEUE_SELECT, 2) => driver.queue_select(),
            (QUEUE_SIZE, 2) => driver.queue_size().into(),
            (QUEUE_MSIX_VECTOR, 2) => {
                self.selected().map_or(NO_VECTOR, |queue| self.interrupt.mapped(queue)).into()
            }
            (QUEUE_ENABLE, 2) => driver.is_queue_ready().into(),
            (QUEUE_NOTIFY_OFF, 2) => driver.queue_select(),
            (offset, 4) => match address(offset) {
                Some((part, half)) => driver.queue_address(part, half),
                None => return,
            },
            _ => return,
        };
        let len = data.len();
        data.copy_from_slice(&value.to_le_bytes()[..len]);
    }

    /// The driver writes.
    pub(super) fn write_common(&mut self, offset: usize, data: &[u8]) {
        if let (true, Some((low, high))) = (is_address(offset), data.split_at_checked(4))
            && high.len() == 4
        {
            self.write_common(offset, low);
            return self.write_common(offset + 4, high);
        }
        let driver = &mut self.front.driver;
        match (offset, data) {
            (DEVICE_FEATURE_SELECT, &[a, b, c, d]) => driver.select_offered(u32::from_le_bytes([a, b, c, d])),
            (DRIVER_FEATURE_SELECT, &[a, b, c, d]) => {
                driver.select_accepted(u32::from_le_bytes([a, b, c, d]))
            }
            (DRIVER_FEATURE, &[a, b, c, d]) => driver.accept(u32::from_le_bytes([a, b, c, d])),
            (CONFIG_MSIX_VECTOR, &[a, b]) => self.interrupt.map(Vector::Config, u16::from_le_bytes([a, b])),
            (DEVICE_STATUS, &[status]) => {
                let change = self.front.set_status(status.into());
                if change == StatusChange::Reset {
                    self.interrupt.reset();
                }
            }
            (QUEUE_SELECT, &[a, b]) => driver.select_queue(u16::from_le_bytes([a, b]).into()),
            (QUEUE_SIZE, &[a, b]) => driver.set_queue_size(u16::from_le_bytes([a, b]).into()),
            // A running device's stays: a kernel worker that serves it knows no other.
            (QUEUE_MSIX_VECTOR, &[a, b]) if !driver.is_driver_ok() => {
                if let Some(queue) = self.selected() {
                    self.interrupt.map(queue, u16::from_le_bytes([a, b]));
                }
            }
            // Only a reset makes a queue not ready.
            (QUEUE_ENABLE, &[1, 0]) => driver.set_queue_ready(true),
            (offset, &[a, b, c, d]) => {
                if let Some((part, half)) = address(offset) {
                    driver.set_queue_address(part, half, u32::from_le_bytes([a, b, c, d]));
                }
            }
            _ => {}
        }
    }

    /// The queue that the driver selected, if it exists.
    fn selected(&self) -> Option<Vector> {
        let index = u16::try_from(self.front.driver.queue_select()).ok()?;
        (usize::from(index) < self.front.driver.queue_count()).then_some(Vector::Queue(index))
    }
}

/// Whether an address of 64 bits starts at `offset`.
fn is_address(offset: usize) -> bool {
    (QUEUE_DESC..QUEUE_END).contains(&offset) && offset.is_multiple_of(8)
}

/// Which half of which address is at `offset`.
fn address(offset: usize) -> Option<(RingPart, Half)> {
    let parts = [RingPart::Descriptors, RingPart::Available, RingPart::Used];
    let at = offset.checked_sub(QUEUE_DESC)?;
    let half = match at % 8 {
        0 => Half::Low,
        4 => Half::High,
        _ => return None,
    };
    Some((*parts.get(at / 8)?, half))
}
