//! The two transports of a virtio device as a driver uses them.

use std::io;
use std::sync::Arc;

use devices::bus::BusDevice;
use devices::pci::msix::{Message, MsixRoutes};
use devices::virtio::mmio::MmioTransport;
use devices::virtio::pci::VirtioPci;
use devices::virtio::slot::Slot;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Vectors that nobody listens to.
pub struct DeafRoutes(Vec<EventFd>);

impl DeafRoutes {
    /// As many vectors.
    pub fn new(vectors: usize) -> io::Result<Self> {
        Ok(Self((0..vectors).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>()?))
    }
}

impl MsixRoutes for DeafRoutes {
    fn irqfds(&self) -> &[EventFd] {
        &self.0
    }

    fn route(&self, messages: &[Option<Message>]) {
        assert_eq!(messages.len(), self.0.len());
    }
}

/// A device on one of its transports.
pub enum Transport {
    /// By MMIO.
    Mmio(MmioTransport),
    /// By PCI.
    Pci(Box<VirtioPci>),
}

impl Transport {
    /// The device in its place.
    pub fn slot(&self) -> &Arc<Slot> {
        match self {
            Self::Mmio(mmio) => mmio.slot(),
            Self::Pci(pci) => pci.slot(),
        }
    }

    /// Its registers.
    pub fn bus(&mut self) -> &mut dyn BusDevice {
        match self {
            Self::Mmio(mmio) => mmio,
            Self::Pci(pci) => &mut **pci,
        }
    }

    /// Writes to its registers.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.bus().write(offset, data);
    }

    fn read_u32(&mut self, offset: u64) -> u32 {
        let mut data = [0x55; 4];
        self.bus().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes the status.
    pub fn set_status(&mut self, status: u8) {
        match self {
            Self::Mmio(_) => self.write(0x70, &u32::from(status).to_le_bytes()),
            Self::Pci(_) => self.write(0x14, &[status]),
        }
    }

    /// Accepts the features of `mask` that are offered.
    pub fn negotiate(&mut self, mask: u64) {
        let [select_offered, offered, select, accept] = match self {
            Self::Mmio(_) => [0x14, 0x10, 0x24, 0x20],
            Self::Pci(_) => [0, 4, 8, 0xC],
        };
        for half in 0..2_u32 {
            self.write(select_offered, &half.to_le_bytes());
            let [low, high] = [mask & 0xFFFF_FFFF, mask >> 32];
            let wanted = u32::try_from(if half == 0 { low } else { high }).unwrap_or_default();
            let accepted = self.read_u32(offered) & wanted;
            self.write(select, &half.to_le_bytes());
            self.write(accept, &accepted.to_le_bytes());
        }
    }

    /// Makes a queue ready whose parts are at these addresses: table, available ring, used ring.
    pub fn set_up_queue(&mut self, index: u16, size: u16, addresses: [u64; 3]) {
        match self {
            Self::Mmio(_) => {
                self.write(0x30, &u32::from(index).to_le_bytes());
                self.write(0x38, &u32::from(size).to_le_bytes());
                for (register, address) in [0x80, 0x90, 0xA0].into_iter().zip(addresses) {
                    let bytes = address.to_le_bytes();
                    self.write(register, &bytes[..4]);
                    self.write(register + 4, &bytes[4..]);
                }
                self.write(0x44, &1_u32.to_le_bytes());
            }
            Self::Pci(_) => {
                self.write(0x16, &index.to_le_bytes());
                self.write(0x18, &size.to_le_bytes());
                self.write(0x1A, &index.to_le_bytes());
                for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(addresses) {
                    let bytes = address.to_le_bytes();
                    self.write(register, &bytes[..4]);
                    self.write(register + 4, &bytes[4..]);
                }
                self.write(0x1C, &1_u16.to_le_bytes());
            }
        }
    }
}
