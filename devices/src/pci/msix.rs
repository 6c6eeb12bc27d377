//! Message-signalled interrupts (MSI-X, PCI Local Bus Specification 3.0 section 6.8.2).

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::registers::Registers;

/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of an entry of the table.
const ENTRY: usize = 16;
/// An entry's address is that of a dword; its data; of the vector control only the mask.
const ENTRY_WRITABLE: [u8; ENTRY] =
    [0xFC, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, MASKED, 0, 0, 0];
const MASKED: u8 = 1;
/// Of the message control: the whole function is masked, MSI-X is on.
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;

/// What is written where to interrupt the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Message {
    /// Where: a local APIC.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Who turns vectors into interrupts: KVM, as the VMM sets it up.
pub trait MsixRoutes: Send + Sync {
    /// The eventfd of each vector, the same for the function's whole life. Signalling one sends its message, or
    /// is remembered in it while the vector has none.
    fn irqfds(&self) -> &[EventFd];

    /// Gives each vector its message, or none. One that was signalled while it had none sends at once.
    fn route(&self, messages: &[Option<Message>]);
}

/// A function's vectors.
pub struct Msix {
    table: Registers,
    control: u16,
    routes: Arc<dyn MsixRoutes>,
    /// What was last asked of `routes`.
    routed: Vec<Option<Message>>,
}

impl Msix {
    /// As many vectors as `routes` has, 1 to 2048, all masked.
    pub fn new(routes: Arc<dyn MsixRoutes>) -> Self {
        let count = routes.irqfds().len();
        let mut table = Registers::new(count * ENTRY);
        for vector in 0..count {
            table.allow(vector * ENTRY, &ENTRY_WRITABLE);
            table.set(vector * ENTRY + 12, &[MASKED]);
        }
        Self { table, control: 0, routes, routed: vec![None; count] }
    }

    /// The capability's bytes behind its header, and the bits that the guest can change: message control, and where
    /// table and pending bits are in BAR 0.
    pub fn capability(&self, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        let last = u16::try_from(self.routed.len().saturating_sub(1)).unwrap_or(u16::MAX);
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pending.to_le_bytes());
        (body, (ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// Whether MSI-X is on.
    pub fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// The guest has set the message control to this.
    pub fn set_control(&mut self, control: u16) {
        let was_enabled = self.is_enabled();
        self.control = control;
        if self.is_enabled() && !was_enabled {
            // What happened while it was off was nobody's interrupt. Reading fails when there is nothing to read.
            self.routes.irqfds().iter().for_each(|irqfd| drop(irqfd.read()));
        }
        self.route();
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        self.table.read(offset, data);
    }

    /// The guest writes the table.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        self.table.write(offset, data);
        self.route();
    }

    /// The guest reads the pending bits, of which there is one for each vector.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            let vectors = (0..8).map(|bit| (bit, at.saturating_mul(8).saturating_add(bit)));
            *byte = vectors
                .filter(|(_, vector)| self.is_pending(*vector))
                .fold(0, |all, (bit, _)| all | 1 << bit);
        }
    }

    fn is_pending(&self, vector: usize) -> bool {
        self.is_enabled()
            && self.routed.get(vector) == Some(&None)
            && self.routes.irqfds().get(vector).is_some_and(is_signalled)
    }

    fn message(&self, vector: usize) -> Option<Message> {
        let at = vector * ENTRY;
        let silent = self.control & (ENABLE | FUNCTION_MASK) != ENABLE
            || self.table.get(at + 12, 1) & u64::from(MASKED) != 0;
        // Four bytes always fit.
        let data = u32::try_from(self.table.get(at + 8, 4)).unwrap_or(u32::MAX);
        (!silent).then(|| Message { address: self.table.get(at, 8), data })
    }

    fn route(&mut self) {
        let messages: Vec<_> = (0..self.routed.len()).map(|vector| self.message(vector)).collect();
        if messages != self.routed {
            self.routes.route(&messages);
            self.routed = messages;
        }
    }
}

/// Whether somebody has written to an eventfd and nobody has read it.
fn is_signalled(event: &EventFd) -> bool {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: it is one valid pollfd, and the descriptor is open while `event` is borrowed.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

#[cfg(test)]
mod tests;
