//! Interrupt lines: the one owner of GSIs and irqfds.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vm::Vm;

/// Why a device got no interrupt line.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// Every line is taken.
    #[error("no interrupt line is left: a microVM has room for {0} virtio-mmio devices; remove some")]
    Exhausted(usize),
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
}

impl IrqRouter {
    /// Every line that is not a legacy device's is free.
    pub fn new(vm: Arc<Vm>) -> Self {
        Self { vm, free: Box::new(arch::layout::device_gsis()) }
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
}
