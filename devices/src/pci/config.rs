//! Configuration space of an endpoint (PCI Local Bus Specification 3.0 chapter 6): a header of type 0, one 64-bit
//! memory BAR at most, and capabilities.

use super::registers::Registers;

/// Bytes of configuration space. The extended part of PCI Express behind it reads as 0: no capabilities.
const LEN: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
/// Where capabilities may begin.
const HEADER_LEN: usize = 0x40;

/// Memory space: the BAR is decoded.
const COMMAND_MEMORY: u8 = 1 << 1;
/// Bus master; nothing depends on it.
const COMMAND_MASTER: u8 = 1 << 2;
/// Interrupt disable; there is no pin.
const COMMAND_NO_INTX: u8 = 1 << 2;
/// Capabilities list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// A memory BAR of 64 bits, not prefetchable.
const BAR_FLAGS: u64 = 0b0100;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor, of the subsystem too.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Device of the subsystem.
    pub subsystem: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, sub-class and programming interface.
    pub class: [u8; 3],
}

/// A function's configuration space.
#[derive(Debug)]
pub struct ConfigSpace {
    registers: Registers,
    /// Bytes that the BAR decodes, a power of two; 0 if there is none.
    bar_size: u64,
    /// The pointer to the next capability, and where it will be.
    link: usize,
    free: usize,
}

impl ConfigSpace {
    /// A function without a BAR or capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut registers = Registers::new(LEN);
        let [base, sub, interface] = identity.class;
        registers.set(0x00, &identity.vendor.to_le_bytes());
        registers.set(0x02, &identity.device.to_le_bytes());
        registers.set(0x08, &[identity.revision, interface, sub, base]);
        registers.set(0x2C, &identity.vendor.to_le_bytes());
        registers.set(0x2E, &identity.subsystem.to_le_bytes());
        registers.allow(INTERRUPT_LINE, &[0xFF]);
        Self { registers, bar_size: 0, link: CAPABILITIES, free: HEADER_LEN }
    }

    /// Gives the function BAR 0, of 64 bits: `size` bytes (a power of two, at least 16) of memory, which `base`
    /// is a multiple of. The guest switches decoding on, having moved it or not.
    pub fn set_bar(&mut self, base: u64, size: u64) {
        self.bar_size = size;
        let mask = !(size - 1);
        self.registers.set(BAR0, &(base & mask | BAR_FLAGS).to_le_bytes());
        self.registers.allow(BAR0, &mask.to_le_bytes());
        self.registers.allow(COMMAND, &[COMMAND_MEMORY | COMMAND_MASTER, COMMAND_NO_INTX]);
    }

    /// Adds a capability: its bytes behind the id and the pointer to the next one, and which bits of them the
    /// guest can change. Returns where it is; all of a function's must have room in 192 bytes.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.free;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        debug_assert!(self.free <= LEN, "no room for capability {id:#x}");
        self.registers.set(self.link, &[at.to_le_bytes()[0]]);
        self.link = at + 1;
        self.registers.set(at, &[id, 0]);
        self.registers.set(at + 2, body);
        self.registers.allow(at + 2, writable);
        self.registers.set(STATUS, &[STATUS_CAPABILITIES]);
        at
    }

    /// First address and length of the memory that the BAR decodes; `None` if decoding is off.
    pub fn decoded(&self) -> Option<(u64, u64)> {
        let on = self.registers.get(COMMAND, 1) & u64::from(COMMAND_MEMORY) != 0;
        (on && self.bar_size > 0).then(|| (self.registers.get(BAR0, 8) & !(self.bar_size - 1), self.bar_size))
    }

    /// What is at `offset`, at most 8 bytes, as a little-endian number.
    pub fn get(&self, offset: usize, len: usize) -> u64 {
        self.registers.get(offset, len)
    }

    /// The guest reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    /// The guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        self.registers.write(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xC010_0000;

    fn space() -> ConfigSpace {
        let identity =
            Identity { vendor: 0x1AF4, device: 0x1042, subsystem: 0x1142, revision: 1, class: [1, 0x80, 2] };
        let mut space = ConfigSpace::new(identity);
        space.set_bar(BASE, 0x8000);
        space
    }

    fn write(space: &mut ConfigSpace, offset: usize, value: u32) {
        space.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn a_function_says_what_it_is() {
        let space = space();
        let dwords = [0, 8, 0xC, 0x2C, 0x30, 0x3C].map(|offset| space.get(offset, 4));
        assert_eq!(dwords, [0x1042_1AF4, 0x0180_0201, 0, 0x1142_1AF4, 0, 0]);
        assert_eq!((space.get(0x0E, 1), space.get(0x03, 1)), (0, 0x10), "one function; any width");
        assert_eq!((space.get(0x34, 1), space.get(0x06, 2)), (0, 0), "no capabilities");
    }

    #[test]
    fn only_what_can_be_changed_changes() {
        let mut space = space();
        let before: Vec<u64> = (0..64).map(|dword| space.get(dword * 4, 4)).collect();
        for offset in 0..0x110 {
            space.write(offset, &[0xFF]);
        }
        let changed: Vec<_> = (0..64)
            .filter(|dword| space.get(dword * 4, 4) != before[*dword])
            .map(|dword| (dword * 4, space.get(dword * 4, 4)))
            .collect();
        assert_eq!(changed, [(4, 0x406), (0x10, 0xFFFF_8004), (0x14, 0xFFFF_FFFF), (0x3C, 0xFF)]);
        assert_eq!(space.get(0x100, 8), 0, "no extended capabilities");
    }

    #[test]
    fn the_bar_is_sized_and_moved() {
        let mut space = space();
        assert_eq!((space.get(0x10, 8), space.decoded()), (BASE | 4, None));
        write(&mut space, 4, 2);
        assert_eq!(space.decoded(), Some((BASE, 0x8000)));
        // As Linux sizes it: decoding off, all ones, and back.
        write(&mut space, 4, 0);
        write(&mut space, 0x10, u32::MAX);
        write(&mut space, 0x14, u32::MAX);
        assert_eq!(space.get(0x10, 8), !0x7FFF | 4);
        assert_eq!(space.decoded(), None);
        write(&mut space, 0x10, 0x1234_5678);
        write(&mut space, 0x14, 0x7F);
        space.write(5, &[0]);
        assert_eq!(space.decoded(), None);
        space.write(4, &[6, 4]);
        assert_eq!(space.decoded(), Some((0x7F_1234_0000, 0x8000)));
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        assert_eq!(space.add_capability(0x11, &[1, 2, 3], &[0, 0xF0]), 0x40);
        assert_eq!(space.add_capability(9, &[4; 6], &[]), 0x48);
        assert_eq!((space.get(0x34, 1), space.get(6, 1)), (0x40, 0x10));
        assert_eq!(space.get(0x40, 8), 0x0003_0201_4811);
        assert_eq!(space.get(0x48, 8), 0x0404_0404_0404_0009);
        space.write(0x40, &[0xFF; 8]);
        assert_eq!(space.get(0x40, 8), 0x0003_F201_4811);
    }

    #[test]
    fn a_function_may_have_no_memory() {
        let mut space = ConfigSpace::new(Identity { class: [6, 0, 0], ..ID });
        write(&mut space, 4, u32::MAX);
        write(&mut space, 0x10, u32::MAX);
        assert_eq!((space.get(4, 4), space.get(0x10, 4), space.decoded()), (0, 0, None));
    }

    const ID: Identity = Identity { vendor: 1, device: 2, subsystem: 3, revision: 4, class: [5, 6, 7] };
}
