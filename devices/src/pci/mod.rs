//! A PCI bus with its configuration space as memory (ECAM, PCI Express Base Specification 6.0 section 7.2.2).
//!
//! | module | what it is |
//! | --- | --- |
//! | [`bus`] | the functions and where they are: configuration accesses, and BARs that the guest moves |
//! | [`config`] | a function's configuration space: header, BAR, capabilities |
//! | [`msix`] | interrupts by message, with a vector for each reason |
//!
//! Functions interrupt by message only: no function has an interrupt pin. There are no bridges, and no
//! configuration space by ports (`0xCF8`): that takes two exits for each access, and a guest that finds it uses
//! it instead of this one.

pub mod bus;
pub mod config;
pub mod msix;

mod registers;

use crate::bus::BusDevice;

/// A function on the bus. As a [`BusDevice`] it is accessed by its BAR.
pub trait PciFunction: BusDevice {
    /// The guest reads `data.len()` bytes of configuration space from `offset` on; every byte of `data` is to be
    /// written.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);

    /// The guest writes `data` to configuration space from `offset` on.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// First address and length in bytes of the memory that the function decodes at present.
    fn decoded(&self) -> Option<(u64, u64)>;
}
