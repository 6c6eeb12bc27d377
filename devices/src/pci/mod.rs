//! A PCI bus with its configuration space as memory (ECAM, PCI Express Base Specification 6.0 section 7.2.2) and by
//! ports.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`bus`] | the functions and where they are: configuration accesses, and BARs that the guest moves |
//! | [`config`] | a function's configuration space: header, BARs, capabilities |
//! | [`msix`] | interrupts by message, with a vector for each reason |
//! | [`ports`] | configuration space by ports |
//!
//! Functions interrupt by message only: no function has an interrupt pin. There are no bridges.

pub mod bus;
pub mod config;
pub mod msix;
pub mod ports;

#[cfg(test)]
pub(crate) mod fake_routes;
mod registers;

use std::sync::{Arc, Mutex};

use crate::bus::BusDevice;

/// What a BAR is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Memory.
    Memory,
    /// I/O ports.
    Ports,
}

/// A function on the bus. As a [`BusDevice`] it is accessed by its BAR in memory.
pub trait PciFunction: BusDevice {
    /// The guest reads `data.len()` bytes of configuration space from `offset` on; every byte of `data` is to be
    /// written.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);

    /// The guest writes `data` to configuration space from `offset` on.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// First address and length of what the function decodes in `space` at present.
    fn decoded(&self, space: Space) -> Option<(u64, u64)>;

    /// What is accessed by its BAR of ports, if it has one.
    fn ports(&self) -> Option<Arc<Mutex<dyn BusDevice>>>;
}
