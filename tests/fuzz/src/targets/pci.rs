//! The PCI bus: configuration space by memory and by ports, BARs that move, MSI-X.

use std::io;
use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusDevice};
use devices::pci::Space;
use devices::pci::bus::{Doorbells, PciBus};
use devices::pci::ports::ConfigPorts;
use devices::rate_limiter::LimiterConfig;
use devices::virtio::device::{Memory, VirtioDevice};
use devices::virtio::pci::VirtioPci;
use devices::virtio::rng::Rng;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::guest::access;
use crate::input::Input;
use crate::transport::DeafRoutes;

/// Where BARs may be, and the configuration space.
const LOW: u64 = 0xC000_0000;
const HIGH: u64 = 0x1_0000_0000;
const WINDOW: u64 = 0x10_0000;
const ECAM: u64 = 0xE000_0000;
const FIRST_PORT: u64 = 0x1000;
const LAST_PORT: u64 = 0x13FF;

/// Every other one is refused.
struct Refusing(Mutex<bool>);

impl Doorbells for Refusing {
    fn attach(&self, _: Space, _: u64) -> io::Result<()> {
        let mut refuses = self.0.lock().expect("nobody panicked with it");
        *refuses = !*refuses;
        if *refuses { Ok(()) } else { Err(io::ErrorKind::Other.into()) }
    }

    fn detach(&self, _: Space, _: u64) {}
}

fn function(index: u64) -> Arc<Mutex<VirtioPci>> {
    let rng: Box<dyn VirtioDevice> =
        Box::new(Rng::new(LimiterConfig::default()).expect("the host has random bytes"));
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("the host has memory");
    let routes =
        Arc::new(DeafRoutes::new(VirtioPci::vectors(rng.as_ref())).expect("the host has descriptors"));
    let base = HIGH + index * VirtioPci::BAR_LEN;
    let ports = FIRST_PORT + index * VirtioPci::PORTS_LEN;
    let function =
        VirtioPci::new(rng, Memory::new(memory), routes, base, ports).expect("the device is right");
    Arc::new(Mutex::new(function))
}

/// Accesses by a guest to a bus with three functions.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let memory = Arc::new(Bus::new());
    let ports = Arc::new(Bus::new());
    let windows = [LOW..=LOW + WINDOW - 1, HIGH..=HIGH + WINDOW - 1];
    let bus = PciBus::new(&memory, windows, &ports, FIRST_PORT..=LAST_PORT);
    let bus = Arc::new(Mutex::new(bus));
    for index in 0..3 {
        let mut bus = bus.lock().expect("nobody panicked with it");
        let free = bus.free().expect("the bus has room");
        bus.insert(free, function(index), Box::new(Refusing(Mutex::new(false))));
    }
    let ecam = Arc::clone(&bus) as Arc<Mutex<dyn BusDevice>>;
    memory.insert(ECAM, PciBus::ECAM_LEN, ecam).expect("the memory bus is empty");
    let config = Arc::new(Mutex::new(ConfigPorts::new(bus)));
    ports.insert(0xCF8, ConfigPorts::LEN, config).expect("the port bus is empty");
    for _ in 0..500 {
        if input.is_empty() {
            break;
        }
        let choice = input.u8();
        let (bus, address) = match choice >> 4 & 7 {
            0..=2 => (&memory, ECAM + (u64::from(input.u8() & 3) << 15) + u64::from(input.u16() & 0xFFF)),
            3 => (&memory, HIGH + u64::from(input.u32() & 0x1F_FFFF)),
            4 => (&memory, LOW + u64::from(input.u32() & 0x1F_FFFF)),
            5 => (&memory, input.u64()),
            part => {
                let port = match part {
                    6 => 0xCF8 + u64::from(input.u8() & 7),
                    _ => FIRST_PORT + u64::from(input.u16() & 0x7FF),
                };
                access(choice, &mut input, |data, write| match write {
                    true => ports.write(port, data),
                    false => ports.read(port, data),
                });
                continue;
            }
        };
        access(choice, &mut input, |data, write| match write {
            true => bus.write(address, data),
            false => bus.read(address, data),
        });
    }
}
