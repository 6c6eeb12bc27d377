//! Configuration space by ports (PCI Local Bus Specification 3.0 section 3.2.2.3.2), where guests look first.

use std::sync::{Arc, Mutex, PoisonError};

use super::bus::PciBus;
use crate::bus::BusDevice;

/// Configuration accesses are enabled.
const ENABLE: u32 = 1 << 31;
/// Bits of the address register that there are: enable, bus, device, function, dword.
const ADDRESS: u32 = ENABLE | 0x00FF_FFFC;
/// Offset of the data register, which has four bytes like the address register before it.
const DATA: u64 = 4;

/// The two registers, for all buses.
pub struct ConfigPorts {
    bus: Arc<Mutex<PciBus>>,
    address: u32,
}

impl ConfigPorts {
    /// Number of ports.
    pub const LEN: u64 = 8;

    /// Ports to the configuration space of `bus`.
    pub fn new(bus: Arc<Mutex<PciBus>>) -> Self {
        Self { bus, address: 0 }
    }

    /// Where in the ECAM an access to the data register goes.
    fn target(&self, offset: u64) -> Option<u64> {
        let within = offset.checked_sub(DATA)?;
        let [register, function, bus, _] = self.address.to_le_bytes();
        let ecam = u64::from(bus) << 20 | u64::from(function) << 12 | u64::from(register);
        (self.address & ENABLE != 0).then_some(ecam + within)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (self.target(offset), offset, data.len()) {
            (_, 0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (Some(target), ..) => {
                self.bus.lock().unwrap_or_else(PoisonError::into_inner).read(target, data);
            }
            _ => data.fill(0xFF),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (self.target(offset), offset, data) {
            (_, 0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & ADDRESS,
            (Some(target), ..) => self.bus.lock().unwrap_or_else(PoisonError::into_inner).write(target, data),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Bus;

    fn ports() -> ConfigPorts {
        let bus = PciBus::new(&Arc::new(Bus::new()), [0..=0, 0..=0], &Arc::new(Bus::new()), 0..=0);
        ConfigPorts::new(Arc::new(Mutex::new(bus)))
    }

    fn read(ports: &mut ConfigPorts, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        data[..len].fill(0x55);
        ports.read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    #[test]
    fn the_address_says_what_the_data_is() {
        let mut ports = ports();
        assert_eq!(read(&mut ports, 4, 4), 0xFFFF_FFFF, "not enabled");
        ports.write(0, &0x8000_0000_u32.to_le_bytes());
        assert_eq!(read(&mut ports, 0, 4), 0x8000_0000);
        assert_eq!(read(&mut ports, 4, 4), 0x0008_1B36);
        assert_eq!((read(&mut ports, 6, 2), read(&mut ports, 5, 1)), (8, 0x1B));
        ports.write(0, &0xFF00_000B_u32.to_le_bytes());
        assert_eq!((read(&mut ports, 0, 4), read(&mut ports, 6, 2)), (0x8000_0008, 0x0600));
        ports.write(0, &0x8000_003C_u32.to_le_bytes());
        ports.write(4, &[7]);
        assert_eq!(read(&mut ports, 4, 4), 7);
    }

    #[test]
    fn nobody_is_elsewhere() {
        let mut ports = ports();
        for address in [0x8000_0800_u32, 0x8000_0100, 0x8001_0000, 0x80FF_FFFC, 0x0000_0000] {
            ports.write(0, &address.to_le_bytes());
            ports.write(4, &[0; 4]);
            assert_eq!(read(&mut ports, 4, 4), 0xFFFF_FFFF, "{address:#x}");
        }
    }

    #[test]
    fn parts_of_the_address_are_something_else() {
        let mut ports = ports();
        ports.write(0, &0x8000_0000_u32.to_le_bytes());
        for (offset, len) in [(3, 1), (1, 1), (0, 2), (0, 1), (2, 4), (0, 8)] {
            ports.write(offset, &[1; 8][..len]);
            assert_eq!(read(&mut ports, offset, len), u64::MAX >> (64 - 8 * len), "{offset} {len}");
        }
        assert_eq!(read(&mut ports, 0, 4), 0x8000_0000);
    }
}
