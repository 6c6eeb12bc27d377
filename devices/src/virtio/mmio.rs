//! The MMIO transport (virtio 1.2, section 4.2.2).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Memory, Server, VirtioDevice};
use super::driver::{Half, RingPart, StatusChange};
use super::front::Front;
use super::interrupt::{Interrupt, Vector};
use super::slot::Slot;
use super::virtqueue::signal;
use crate::bus::BusDevice;

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
/// The register layout of virtio 1.0 and later.
const VERSION: u32 = 2;
/// "PNFD": no driver cares who made the device.
const VENDOR: u32 = u32::from_le_bytes(*b"PNFD");
/// A shared memory region that does not exist has a length and an address of all ones.
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// The interrupt line of a device, and the register that says what it was raised for.
struct MmioInterrupt {
    status: AtomicU32,
    irqfd: EventFd,
}

impl Interrupt for MmioInterrupt {
    fn trigger(&self, vector: Vector) -> io::Result<()> {
        let bit = match vector {
            Vector::Config => VIRTIO_MMIO_INT_CONFIG,
            Vector::Queue(_) => VIRTIO_MMIO_INT_VRING,
        };
        // First the reason, then the edge: whoever takes the interrupt finds it.
        self.status.fetch_or(bit, Ordering::SeqCst);
        signal(&self.irqfd)
    }

    fn notifier(&self, vector: Vector) -> io::Result<EventFd> {
        match vector {
            Vector::Queue(_) => self.irqfd.try_clone(),
            // Nobody but us can say in the status register that it is about the configuration.
            Vector::Config => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// One device with its 4 KiB of registers.
pub struct MmioTransport {
    front: Front,
    interrupt: Arc<MmioInterrupt>,
}

impl MmioTransport {
    /// Bytes of address space.
    pub const LEN: u64 = 0x1000;
    /// Offset of QueueNotify: a 4-byte write of a queue's index there may signal its kick eventfd without us.
    pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

    /// Registers for `device`, whose interrupts are written to `irqfd`: each write is an edge on its line.
    /// Fails when no eventfd can be had, and for a device that offers queues that cannot be.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory, irqfd: EventFd) -> io::Result<Self> {
        let interrupt = Arc::new(MmioInterrupt { status: AtomicU32::new(0), irqfd });
        let front = Front::new(device, memory, Arc::clone(&interrupt) as Arc<dyn Interrupt>)?;
        Ok(Self { front, interrupt })
    }

    /// The device in its place, for who wires its kicks, serves it, or changes it while the guest runs.
    pub fn slot(&self) -> &Arc<Slot> {
        self.front.slot()
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.front.device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => self.front.driver.offered(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => u32::from(self.front.driver.queue_max_size()),
            VIRTIO_MMIO_QUEUE_READY => u32::from(self.front.driver.is_queue_ready()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status(),
            VIRTIO_MMIO_STATUS => self.front.status(),
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            VIRTIO_MMIO_CONFIG_GENERATION => self.front.slot().config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        let driver = &mut self.front.driver;
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => driver.select_offered(value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => driver.select_accepted(value),
            VIRTIO_MMIO_DRIVER_FEATURES => driver.accept(value),
            VIRTIO_MMIO_QUEUE_SEL => driver.select_queue(value),
            VIRTIO_MMIO_QUEUE_NUM => driver.set_queue_size(value),
            VIRTIO_MMIO_QUEUE_READY => driver.set_queue_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => driver.set_queue_address(RingPart::Descriptors, Half::Low, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => driver.set_queue_address(RingPart::Descriptors, Half::High, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => driver.set_queue_address(RingPart::Available, Half::Low, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => driver.set_queue_address(RingPart::Available, Half::High, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => driver.set_queue_address(RingPart::Used, Half::Low, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => driver.set_queue_address(RingPart::Used, Half::High, value),
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Ok(index) = usize::try_from(value) {
                    self.front.slot().kick(index);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS => {
                let change = self.front.set_status(value);
                if change == StatusChange::Reset {
                    // After the device: it raises nothing more.
                    self.interrupt.status.store(0, Ordering::SeqCst);
                }
            }
            _ => {}
        }
    }

    /// Nobody sets the used-buffer bit for a device that others serve, and its driver ignores an interrupt
    /// without a reason. So the bit reads as set for as long as that driver may have buffers there.
    fn interrupt_status(&self) -> u32 {
        let others = self.front.slot().server() == Server::Vhost && self.front.driver.is_driver_ok();
        self.interrupt.status.load(Ordering::SeqCst) | if others { VIRTIO_MMIO_INT_VRING } else { 0 }
    }
}

/// An access, as the register map sees it.
enum Place {
    /// An aligned access of 4 bytes to the register at this offset.
    Register(u32),
    /// The configuration space, from this offset on.
    Config(usize),
    /// Neither: registers can only be accessed as a whole.
    Nowhere,
}

impl Place {
    fn of(offset: u64, len: usize) -> Self {
        let Ok(offset) = u32::try_from(offset) else { return Place::Nowhere };
        match offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            // Lossless: usize is no smaller than u32 here.
            Some(offset) => usize::try_from(offset).map_or(Place::Nowhere, Place::Config),
            None if len == 4 && offset.is_multiple_of(4) => Place::Register(offset),
            None => Place::Nowhere,
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match Place::of(offset, data.len()) {
            Place::Register(offset) => data.copy_from_slice(&self.read_register(offset).to_le_bytes()),
            Place::Config(offset) => self.front.slot().read_config(offset, data),
            Place::Nowhere => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (Place::of(offset, data.len()), data) {
            (Place::Register(offset), &[a, b, c, d]) => {
                self.write_register(offset, u32::from_le_bytes([a, b, c, d]));
            }
            (Place::Config(offset), data) => self.front.slot().write_config(offset, data),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
