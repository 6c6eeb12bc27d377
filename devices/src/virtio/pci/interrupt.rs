//! Interrupts by MSI-X.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::pci::msix::MsixRoutes;
use crate::virtio::interrupt::{Interrupt, Vector};
use crate::virtio::virtqueue::signal;

/// What a driver reads where it has mapped no vector (virtio 1.2, section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xFFFF;
/// Bits of the ISR status (section 4.1.4.5).
const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// Which of the function's vectors tells what, as the driver maps them.
pub struct PciInterrupt {
    routes: Arc<dyn MsixRoutes>,
    enabled: AtomicBool,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
}

impl PciInterrupt {
    /// For a device with this many queues, none mapped.
    pub fn new(routes: Arc<dyn MsixRoutes>, queues: usize) -> Self {
        Self {
            routes,
            enabled: AtomicBool::new(false),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
        }
    }

    /// MSI-X is switched on or off.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::SeqCst);
    }

    /// The vector for `what`.
    pub fn mapped(&self, what: Vector) -> u16 {
        self.map_of(what).map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// The driver maps `what` to a vector; one that does not exist unmaps it.
    pub fn map(&self, what: Vector, vector: u16) {
        let vector = if usize::from(vector) < self.routes.irqfds().len() { vector } else { NO_VECTOR };
        if let Some(place) = self.map_of(what) {
            place.store(vector, Ordering::Relaxed);
        }
    }

    /// The driver reads the ISR status, which clears it.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// The device was reset: nothing is mapped, and nothing happened.
    pub fn reset(&self) {
        self.config.store(NO_VECTOR, Ordering::Relaxed);
        self.queues.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::Relaxed));
        self.isr.store(0, Ordering::SeqCst);
    }

    fn map_of(&self, what: Vector) -> Option<&AtomicU16> {
        match what {
            Vector::Config => Some(&self.config),
            Vector::Queue(index) => self.queues.get(usize::from(index)),
        }
    }

    fn irqfd(&self, what: Vector) -> Option<&EventFd> {
        self.routes.irqfds().get(usize::from(self.mapped(what)))
    }
}

impl Interrupt for PciInterrupt {
    fn trigger(&self, what: Vector) -> io::Result<()> {
        match self.irqfd(what) {
            Some(irqfd) if self.enabled.load(Ordering::SeqCst) => signal(irqfd),
            // Without MSI-X there is only the ISR status to look at, now and then.
            _ => {
                let bit = match what {
                    Vector::Config => ISR_CONFIG,
                    Vector::Queue(_) => ISR_QUEUE,
                };
                self.isr.fetch_or(bit, Ordering::SeqCst);
                Ok(())
            }
        }
    }

    fn notifier(&self, what: Vector) -> io::Result<EventFd> {
        match self.irqfd(what) {
            Some(irqfd) => irqfd.try_clone(),
            // A driver that maps no vector polls: nobody needs to hear of it.
            None => EventFd::new(EFD_NONBLOCK),
        }
    }
}
