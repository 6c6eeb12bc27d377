//! Interrupt lines and messages: the one owner of GSIs and irqfds.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use devices::pci::msix::{Message, MsixRoutes};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vm::Vm;

/// Why a device got no interrupt line.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// Every line is taken.
    #[error("no interrupt line is left: a microVM has room for {0} virtio-mmio devices; remove some")]
    Exhausted(usize),
    /// KVM has no room for more messages.
    #[error("this host's KVM routes {0} interrupts at most (KVM_CAP_IRQ_ROUTING); remove some PCI devices")]
    Routes(usize),
    /// No eventfd could be made.
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
    /// KVM does not take the irqfd.
    #[error("KVM refused KVM_IRQFD for GSI {gsi}")]
    Irqfd {
        /// The line.
        gsi: u32,
        /// What the host said.
        source: kvm_ioctls::Error,
    },
}

/// A line into the guest's IOAPIC.
pub struct Line {
    /// Global system interrupt: the IOAPIC's pin.
    pub gsi: u32,
    /// Writing to it is a rising edge on the line.
    pub irqfd: EventFd,
}

/// Hands out lines.
pub struct IrqRouter {
    vm: Arc<Vm>,
    free: Box<dyn Iterator<Item = u32> + Send>,
    messages: Arc<Messages>,
}

impl IrqRouter {
    /// Every line that is not a legacy device's is free.
    pub fn new(vm: Arc<Vm>) -> Self {
        let messages = Arc::new(Messages { vm: Arc::downgrade(&vm), routes: Mutex::new(Vec::new()) });
        Self { vm, free: Box::new(arch::layout::device_gsis()), messages }
    }

    /// A line for a device.
    pub fn allocate(&mut self) -> Result<Line, IrqError> {
        let gsi = self.free.next().ok_or(IrqError::Exhausted(arch::layout::device_gsis().count()))?;
        self.line(gsi)
    }

    /// The line `gsi` of a legacy device.
    pub fn line(&self, gsi: u32) -> Result<Line, IrqError> {
        let irqfd = EventFd::new(EFD_NONBLOCK).map_err(IrqError::EventFd)?;
        self.vm.fd().register_irqfd(&irqfd, gsi).map_err(|source| IrqError::Irqfd { gsi, source })?;
        Ok(Line { gsi, irqfd })
    }

    /// `count` vectors of a PCI device, none routed yet.
    pub fn vectors(&self, count: usize) -> Result<Vectors, IrqError> {
        let irqfds = (0..count)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<_, _>>()
            .map_err(IrqError::EventFd)?;
        let gsis = self.messages.reserve(count, self.vm.max_routes())?;
        let live = gsis.iter().map(|_| false).collect();
        Ok(Vectors { messages: Arc::clone(&self.messages), gsis, irqfds, live: Mutex::new(live) })
    }
}

/// The first GSI that is no pin of the IOAPIC.
const FIRST_MESSAGE: u32 = arch::layout::IOAPIC_PINS;

/// The routes of all messages, which KVM takes only as a whole.
struct Messages {
    /// Devices outlive it on the event loop, and then interrupt nobody.
    vm: Weak<Vm>,
    /// Of each GSI from [`FIRST_MESSAGE`] on.
    routes: Mutex<Vec<Option<Message>>>,
}

impl Messages {
    /// GSIs without a route, in all no more than KVM has room for.
    fn reserve(&self, count: usize, max: usize) -> Result<Vec<u32>, IrqError> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let first = routes.len();
        let gsis: Vec<u32> = (FIRST_MESSAGE..).skip(first).take(count).collect();
        if gsis.last().is_some_and(|gsi| usize::try_from(*gsi).map_or(true, |gsi| gsi >= max)) {
            return Err(IrqError::Routes(max));
        }
        routes.resize(first + count, None);
        Ok(gsis)
    }

    /// Gives each of `gsis` that has a message its route. The others keep theirs, which nobody uses.
    fn route(&self, vm: &Vm, gsis: &[u32], messages: &[Option<Message>]) -> Result<(), kvm_ioctls::Error> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = routes.clone();
        for (gsi, message) in gsis.iter().zip(messages).filter(|(_, message)| message.is_some()) {
            // Lossless: usize is no smaller than u32 here.
            let index = usize::try_from(gsi - FIRST_MESSAGE).unwrap_or(usize::MAX);
            if let Some(route) = next.get_mut(index) {
                *route = *message;
            }
        }
        if next != *routes {
            vm.route_messages((FIRST_MESSAGE..).zip(&next).filter_map(|(gsi, to)| Some((gsi, (*to)?))))?;
            *routes = next;
        }
        Ok(())
    }
}

/// The vectors of one PCI device: a GSI and an irqfd for each. The irqfd is KVM's while the vector is routed; else
/// it keeps what was signalled.
pub struct Vectors {
    messages: Arc<Messages>,
    gsis: Vec<u32>,
    irqfds: Vec<EventFd>,
    /// Which are KVM's.
    live: Mutex<Vec<bool>>,
}

impl Vectors {
    fn try_route(&self, messages: &[Option<Message>]) -> Result<(), kvm_ioctls::Error> {
        let Some(vm) = self.messages.vm.upgrade() else { return Ok(()) };
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let vectors = || self.irqfds.iter().zip(&self.gsis).zip(messages);
        for (((irqfd, gsi), message), live) in vectors().zip(live.iter_mut()) {
            if *live && message.is_none() {
                vm.fd().unregister_irqfd(irqfd, *gsi)?;
                *live = false;
            }
        }
        self.messages.route(&vm, &self.gsis, messages)?;
        for (((irqfd, gsi), message), live) in vectors().zip(live.iter_mut()) {
            if !*live && message.is_some() {
                // KVM would send what is in the eventfd, but leave it there.
                let pending = irqfd.read().is_ok();
                vm.fd().register_irqfd(irqfd, *gsi)?;
                *live = true;
                if pending {
                    // It cannot be full.
                    drop(irqfd.write(1));
                }
            }
        }
        Ok(())
    }
}

impl MsixRoutes for Vectors {
    fn irqfds(&self) -> &[EventFd] {
        &self.irqfds
    }

    fn route(&self, messages: &[Option<Message>]) {
        if let Err(error) = self.try_route(messages) {
            log::warn!("KVM refused to route the interrupts of a PCI device as its driver wants: {error}");
        }
    }
}
