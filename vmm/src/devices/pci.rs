//! Virtio devices on PCI: their places, and what KVM is to know of them.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use ::devices::bus::Bus;
use ::devices::pci::Space;
use ::devices::pci::bus::{Doorbells, PciBus};
use ::devices::pci::ports::ConfigPorts;
use ::devices::virtio::device::{Memory, VirtioDevice};
use ::devices::virtio::pci::VirtioPci;
use ::devices::virtio::slot::Slot;
use arch::layout::{PCI_CONFIG_PORT, PCI_ECAM, PCI_FIRST_PORT, PCI_LAST_PORT, PCI_MMIO32, Window};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceError;
use crate::irq::IrqRouter;
use crate::vm::Vm;

// What `arch` tells the guest is what `devices` does.
const _: () = assert!(PCI_ECAM.size == PciBus::ECAM_LEN && PCI_MMIO32.size >= 32 * VirtioPci::BAR_LEN);
const _: () = assert!((PCI_LAST_PORT - PCI_FIRST_PORT) as u64 + 1 == 32 * VirtioPci::PORTS_LEN);

/// The bus of a microVM.
pub struct Pci {
    vm: Arc<Vm>,
    bus: Arc<Mutex<PciBus>>,
}

impl Pci {
    /// A bus, configured by memory and by ports, whose BARs may be in its windows below 4 GiB and of ports, and in
    /// `mmio64`.
    pub fn new(
        vm: &Arc<Vm>,
        memory: &Arc<Bus>,
        ports: &Arc<Bus>,
        mmio64: Window,
    ) -> Result<Self, DeviceError> {
        vm.check_pci()?;
        let windows = [PCI_MMIO32, mmio64].map(|window| window.start.0..=window.last().0);
        let port_window = PCI_FIRST_PORT.into()..=PCI_LAST_PORT.into();
        let bus = Arc::new(Mutex::new(PciBus::new(memory, windows, ports, port_window)));
        memory.insert(PCI_ECAM.start.0, PCI_ECAM.size, Arc::clone(&bus) as _)?;
        let config = Arc::new(Mutex::new(ConfigPorts::new(Arc::clone(&bus))));
        ports.insert(u64::from(PCI_CONFIG_PORT), ConfigPorts::LEN, config)?;
        Ok(Self { vm: Arc::clone(vm), bus })
    }

    /// Puts a device on the bus, behind those that are there, and wires it to KVM.
    pub fn add(
        &self,
        device: Box<dyn VirtioDevice>,
        memory: &Memory,
        irqs: &IrqRouter,
    ) -> Result<Arc<Slot>, DeviceError> {
        let mut bus = self.bus.lock().unwrap_or_else(PoisonError::into_inner);
        let number = bus.free().ok_or(DeviceError::NoRoom("PCI"))?;
        let vectors = irqs.vectors(VirtioPci::vectors(&*device))?;
        let base = PCI_MMIO32.start.0 + number as u64 * VirtioPci::BAR_LEN;
        let ports = u64::from(PCI_FIRST_PORT) + number as u64 * VirtioPci::PORTS_LEN;
        let function = VirtioPci::new(device, memory.clone(), Arc::new(vectors), base, ports)
            .map_err(DeviceError::EventFd)?;
        let slot = Arc::clone(function.slot());
        let kicks = Kicks { vm: Arc::clone(&self.vm), kicks: slot.kicks().to_vec() };
        bus.insert(number, Arc::new(Mutex::new(function)), Box::new(kicks));
        Ok(slot)
    }
}

/// The kicks of a device's queues, each an ioeventfd for writes of any width and value to an address of its own.
struct Kicks {
    vm: Arc<Vm>,
    kicks: Vec<Arc<EventFd>>,
}

impl Kicks {
    fn places(&self, space: Space, base: u64) -> impl Iterator<Item = (&EventFd, IoEventAddress)> {
        let address = move |queue| {
            let at = base + VirtioPci::notify_offset(space, queue);
            match space {
                Space::Memory => IoEventAddress::Mmio(at),
                Space::Ports => IoEventAddress::Pio(at),
            }
        };
        (0..).zip(&self.kicks).map(move |(queue, kick)| (&**kick, address(queue)))
    }

    fn remove(&self, kick: &EventFd, address: &IoEventAddress) {
        if let Err(error) = self.vm.fd().unregister_ioevent(kick, address, NoDatamatch) {
            log::warn!("KVM refused to forget an ioeventfd at {address:?}: {error}");
        }
    }
}

impl Doorbells for Kicks {
    fn attach(&self, space: Space, base: u64) -> io::Result<()> {
        for (done, (kick, address)) in self.places(space, base).enumerate() {
            if let Err(error) = self.vm.fd().register_ioevent(kick, &address, NoDatamatch) {
                self.places(space, base).take(done).for_each(|(kick, address)| self.remove(kick, &address));
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn detach(&self, space: Space, base: u64) {
        self.places(space, base).for_each(|(kick, address)| self.remove(kick, &address));
    }
}
