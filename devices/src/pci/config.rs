//! Configuration space of an endpoint (PCI Local Bus Specification 3.0 chapter 6): a header of type 0, one 64-bit
//! memory BAR and one BAR of ports at most, and capabilities.

use super::Space;
use super::registers::Registers;

/// Bytes of configuration space. The extended part of PCI Express behind it reads as 0: no capabilities.
const LEN: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const BAR2: usize = 0x18;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
/// Where capabilities may begin.
const HEADER_LEN: usize = 0x40;

/// I/O space: the BAR of ports is decoded.
const COMMAND_PORTS: u8 = 1 << 0;
/// Memory space: the BAR in memory is decoded.
const COMMAND_MEMORY: u8 = 1 << 1;
/// Bus master; nothing depends on it.
const COMMAND_MASTER: u8 = 1 << 2;
/// Interrupt disable; there is no pin.
const COMMAND_NO_INTX: u8 = 1 << 2;
/// Capabilities list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// A memory BAR of 64 bits, not prefetchable.
const MEMORY_FLAGS: u64 = 0b0100;
/// A BAR of ports.
const PORTS_FLAGS: u64 = 0b0001;

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
    /// What the BAR in memory decodes, a power of two of bytes; 0 if there is none.
    memory_size: u64,
    /// Likewise, of ports.
    ports_size: u64,
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
        Self { registers, memory_size: 0, ports_size: 0, link: CAPABILITIES, free: HEADER_LEN }
    }

    /// Gives the function its BAR in `space`: `size` bytes (a power of two, at least 16) from `base` on, a multiple of
    /// `size`. In memory that is BAR 0, of 64 bits; of ports it is BAR 2, of 32 bits, for at most 256. The guest switches
    /// decoding on, having moved it or not.
    pub fn set_bar(&mut self, space: Space, base: u64, size: u64) {
        let mask = !(size - 1);
        let (at, len, flags) = match space {
            Space::Memory => (BAR0, 8, MEMORY_FLAGS),
            Space::Ports => (BAR2, 4, PORTS_FLAGS),
        };
        self.registers.set(at, &(base & mask | flags).to_le_bytes()[..len]);
        self.registers.allow(at, &mask.to_le_bytes()[..len]);
        match space {
            Space::Memory => self.memory_size = size,
            Space::Ports => self.ports_size = size,
        }
        let memory = if self.memory_size > 0 { COMMAND_MEMORY } else { 0 };
        let ports = if self.ports_size > 0 { COMMAND_PORTS } else { 0 };
        self.registers.allow(COMMAND, &[memory | ports | COMMAND_MASTER, COMMAND_NO_INTX]);
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

    /// First address and length of what the BAR in `space` decodes; `None` if decoding is off.
    pub fn decoded(&self, space: Space) -> Option<(u64, u64)> {
        let (at, len, size, bit) = match space {
            Space::Memory => (BAR0, 8, self.memory_size, COMMAND_MEMORY),
            Space::Ports => (BAR2, 4, self.ports_size, COMMAND_PORTS),
        };
        let on = self.registers.get(COMMAND, 1) & u64::from(bit) != 0;
        (on && size > 0).then(|| (self.registers.get(at, len) & !(size - 1), size))
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
        space.set_bar(Space::Memory, BASE, 0x8000);
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
        assert_eq!((space.get(0x10, 8), space.decoded(Space::Memory)), (BASE | 4, None));
        write(&mut space, 4, 2);
        assert_eq!(space.decoded(Space::Memory), Some((BASE, 0x8000)));
        // As Linux sizes it: decoding off, all ones, and back.
        write(&mut space, 4, 0);
        write(&mut space, 0x10, u32::MAX);
        write(&mut space, 0x14, u32::MAX);
        assert_eq!(space.get(0x10, 8), !0x7FFF | 4);
        assert_eq!(space.decoded(Space::Memory), None);
        write(&mut space, 0x10, 0x1234_5678);
        write(&mut space, 0x14, 0x7F);
        space.write(5, &[0]);
        assert_eq!(space.decoded(Space::Memory), None);
        space.write(4, &[6, 4]);
        assert_eq!(space.decoded(Space::Memory), Some((0x7F_1234_0000, 0x8000)));
    }

    #[test]
    fn ports_are_sized_and_moved_likewise() {
        let mut space = space();
        assert_eq!(space.decoded(Space::Ports), None);
        write(&mut space, 4, 3);
        assert_eq!((space.get(4, 2), space.decoded(Space::Ports)), (2, None), "there are none");
        space.set_bar(Space::Ports, 0x1100, 0x100);
        write(&mut space, 4, 1);
        assert_eq!(space.get(0x18, 8), 0x1101);
        assert_eq!(space.decoded(Space::Ports), Some((0x1100, 0x100)));
        assert_eq!(space.decoded(Space::Memory), None);
        write(&mut space, 0x18, u32::MAX);
        write(&mut space, 0x1C, u32::MAX);
        assert_eq!(space.get(0x18, 8), 0xFFFF_FF01);
        write(&mut space, 0x18, 0x1234);
        write(&mut space, 4, 7);
        let both = [Space::Memory, Space::Ports].map(|kind| space.decoded(kind));
        assert_eq!(both, [Some((BASE, 0x8000)), Some((0x1200, 0x100))]);
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
        assert_eq!((space.get(4, 4), space.get(0x10, 4), space.decoded(Space::Memory)), (0, 0, None));
    }

    const ID: Identity = Identity { vendor: 1, device: 2, subsystem: 3, revision: 4, class: [5, 6, 7] };
}
