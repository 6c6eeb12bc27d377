//! A device in its place: its life between what the driver asks for on a vCPU thread and the thread that
//! serves it.

use std::any::Any;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, DeviceError, EventSource, Memory, Server, VirtioDevice};
use super::interrupt::{Interrupt, Vector};
use super::virtqueue::{Virtqueue, check_ring, signal};
use crate::counter::{Counter, Counters, counters};

/// How many failures of one device are worth a line in the log: a driver can cause as many as it likes.
const LOGGED_FAILURES: u64 = 8;

/// Where a device is in its life.
enum Life {
    /// No driver has it.
    Idle,
    /// The driver set DRIVER_OK; the thread that serves the device has not noticed yet.
    Starting(Activation),
    /// Started, with these queues enabled, by index.
    Running(Vec<bool>),
    /// Reset by us because it could not go on; DEVICE_NEEDS_RESET is set.
    Failed,
}

struct Served {
    device: Box<dyn VirtioDevice>,
    life: Life,
}

counters! {
    /// What went wrong with a device of any kind.
    SlotCounters {
        /// Drivers whose device could not be started.
        activate_fails,
        /// Started devices that could not go on.
        event_fails,
    }
}

/// A device, shared by its transport (vCPU threads) and its [`Worker`](super::worker::Worker).
///
/// ```text
///            activate             start_pending
///   Idle -------------> Starting ---------------> Running
///    ^                  |      |                    |
///    |                  |      +--> Failed <--------+   an error
///    +------------------+-------------+-------------+   reset
/// ```
///
/// # Locks
/// A transport's lock (held by the bus around an access) comes first, then the lock in here, which is held
/// around every call of the device and every step of its life. A device takes no lock of a transport: it
/// reaches the driver only through [`Interrupt`], which takes none. So a reset on a vCPU thread waits for the
/// device to finish what it is doing, and on return the device is at rest.
pub struct Slot {
    served: Mutex<Served>,
    needs_reset: AtomicBool,
    generation: AtomicU32,
    activation: EventFd,
    kicks: Vec<Arc<EventFd>>,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    server: Server,
    counters: Arc<SlotCounters>,
}

impl Slot {
    /// Gives `device` a place, and makes the eventfds for its kicks.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let kick = |_: &u16| EventFd::new(EFD_NONBLOCK).map(Arc::new);
        let kicks = device.queue_max_sizes().iter().map(kick).collect::<io::Result<_>>()?;
        let server = device.server();
        Ok(Self {
            served: Mutex::new(Served { device, life: Life::Idle }),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            activation: EventFd::new(EFD_NONBLOCK)?,
            kicks,
            memory,
            interrupt,
            server,
            counters: Arc::default(),
        })
    }

    /// The kick eventfd of each queue, in order of the index, the same for the device's whole life.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// What the device counts, and what is counted for it.
    pub fn counters(&self) -> [Arc<dyn Counters>; 2] {
        [self.lock().device.counters(), Arc::clone(&self.counters) as _]
    }

    /// Who takes the kicks.
    pub fn server(&self) -> Server {
        self.server
    }

    /// Whether DEVICE_NEEDS_RESET is set (virtio 1.2, section 2.1.2).
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The driver kicks queue `index`, on a way that KVM does not shorten. One that does not exist is
    /// ignored.
    pub fn kick(&self, index: usize) {
        if let Some(kick) = self.kicks.get(index)
            && let Err(error) = signal(kick)
        {
            log::debug!("queue {index}: could not signal the kick: {error}");
        }
    }

    /// The driver set DRIVER_OK, with these features and rings. The thread that serves the device starts it.
    pub fn activate(&self, features: u64, rings: Vec<Option<Queue>>) {
        let mut served = self.lock();
        let activation = match self.build(features, rings) {
            Ok(activation) => activation,
            Err(error) => return self.fail(&mut served, &error, &self.counters.activate_fails),
        };
        served.life = Life::Starting(activation);
        if let Err(source) = signal(&self.activation) {
            let doing = "waking the thread that serves the device".to_owned();
            let error = DeviceError::Host { doing, source };
            self.fail(&mut served, &error, &self.counters.activate_fails);
        }
    }

    /// The driver reset the device, or the VM ends. On return nothing touches guest memory any more.
    pub fn reset(&self) {
        let mut served = self.lock();
        if let Life::Running(_) = std::mem::replace(&mut served.life, Life::Idle) {
            served.device.reset();
        }
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// Copies configuration space from `offset` on; what is not there reads as 0.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let served = self.lock();
        let there = served.device.config().get(offset..).unwrap_or_default();
        let len = there.len().min(data.len());
        data[..len].copy_from_slice(&there[..len]);
    }

    /// The driver writes configuration space. A write that is not wholly inside is ignored.
    pub fn write_config(&self, offset: usize, data: &[u8]) {
        let mut served = self.lock();
        let len = served.device.config().len();
        if offset.checked_add(data.len()).is_some_and(|end| end <= len) {
            served.device.write_config(offset, data);
        }
    }

    /// Changes with every change of the configuration space that the device makes (virtio 1.2, section 2.5.2).
    pub fn config_generation(&self) -> u32 {
        // A change is made under the lock: whoever reads in between waits for both its bytes and its number.
        let _served = self.lock();
        self.generation.load(Ordering::SeqCst)
    }

    /// Lets `change` change the device, which is of type `D`, while nothing else happens to it, and tells the
    /// driver if the configuration space is another afterwards. `None` if it is of another type.
    pub fn update<D: VirtioDevice, R>(&self, change: impl FnOnce(&mut D) -> R) -> Option<R> {
        let mut served = self.lock();
        let before = served.device.config().to_vec();
        let device: &mut dyn Any = &mut *served.device;
        let result = change(device.downcast_mut::<D>()?);
        if served.device.config() != before {
            self.config_changed(&served);
        }
        Some(result)
    }

    /// Tells the driver that the configuration space is another.
    fn config_changed(&self, served: &Served) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if let Life::Starting(_) | Life::Running(_) = served.life
            && let Err(error) = self.interrupt.trigger(Vector::Config)
        {
            log::debug!("could not tell the driver of a change of its device: {error}");
        }
    }

    /// Signalled when [`Self::start_pending`] has something to do.
    pub(super) fn activation(&self) -> &EventFd {
        &self.activation
    }

    pub(super) fn event_sources(&self) -> Vec<EventSource> {
        self.lock().device.event_sources()
    }

    /// Starts the device if the driver is waiting for that, and serves each queue once.
    pub(super) fn start_pending(&self) {
        let mut served = self.lock();
        served.life = match std::mem::replace(&mut served.life, Life::Idle) {
            Life::Starting(activation) => {
                let enabled: Vec<bool> = activation.queues.iter().map(Option::is_some).collect();
                // Running before the call: if it fails, the device is reset.
                served.life = Life::Running(enabled.clone());
                if let Err(error) = served.device.start(activation) {
                    return self.fail(&mut served, &error, &self.counters.activate_fails);
                }
                let mut result = Ok(());
                if self.server == Server::EventLoop {
                    for (index, _) in enabled.iter().enumerate().filter(|(_, enabled)| **enabled) {
                        result = result.and_then(|()| served.device.queue_event(index));
                    }
                }
                return self.settle(served, result);
            }
            // The driver was faster and has reset the device.
            life => life,
        };
    }

    /// Queue `index` was kicked. Drivers can kick what they did not enable.
    pub(super) fn queue_event(&self, index: usize) {
        let mut served = self.lock();
        if let Life::Running(enabled) = &served.life
            && enabled.get(index) == Some(&true)
        {
            let result = served.device.queue_event(index);
            self.settle(served, result);
        }
    }

    /// The device's own descriptor `fd` is ready.
    pub(super) fn source_event(&self, fd: std::os::fd::RawFd) {
        let mut served = self.lock();
        if let Life::Running(_) = served.life {
            let result = served.device.source_event(fd);
            self.settle(served, result);
        }
    }

    fn settle(&self, mut served: MutexGuard<'_, Served>, result: Result<(), DeviceError>) {
        if served.device.config_changed() {
            self.config_changed(&served);
        }
        if let Err(error) = result {
            self.fail(&mut served, &error, &self.counters.event_fails);
        }
    }

    /// The device cannot go on until the driver resets it.
    fn fail(&self, served: &mut Served, error: &DeviceError, counter: &Counter) {
        counter.inc();
        let SlotCounters { activate_fails, event_fails } = &*self.counters;
        if activate_fails.count() + event_fails.count() <= LOGGED_FAILURES {
            let kind = served.device.device_type();
            log::warn!("virtio device of type {kind}: {}; it needs a reset", resources::chain(error));
        }
        if let Life::Running(_) = std::mem::replace(&mut served.life, Life::Failed) {
            served.device.reset();
        }
        self.needs_reset.store(true, Ordering::SeqCst);
        if let Err(error) = self.interrupt.trigger(Vector::Config) {
            log::debug!("could not tell the driver that its device needs a reset: {error}");
        }
    }

    /// Checks the rings and puts together what the device gets.
    fn build(&self, features: u64, rings: Vec<Option<Queue>>) -> Result<Activation, DeviceError> {
        let memory = self.memory.memory();
        let queues = (0..)
            .zip(rings)
            .zip(&self.kicks)
            .map(|((index, ring), kick)| {
                let Some(ring) = ring else { return Ok(None) };
                check_ring(index, &ring, &memory)?;
                Ok(Some(Virtqueue::new(index, ring, Arc::clone(kick), Arc::clone(&self.interrupt))))
            })
            .collect::<Result<_, DeviceError>>()?;
        let (memory, interrupt) = (self.memory.clone(), Arc::clone(&self.interrupt));
        Ok(Activation { memory, queues, features, interrupt })
    }

    fn lock(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
