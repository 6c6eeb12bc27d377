use std::sync::Mutex;

use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddressSpace;

use super::super::device::Server;
use super::super::interrupt::Vector;
use super::*;
use crate::bus::Bus;
use crate::pci::bus::{Doorbells, PciBus};
use crate::pci::fake_routes::FakeRoutes;
use crate::pci::msix::Message;
use crate::virtio::fake_device::{Call, FEATURES, FakeDevice, Log, memory};
use crate::virtio::testing::Ring;
use crate::virtio::worker::Worker;

const BASE: u64 = 0xC010_0000;
const PORTS: u64 = 0x1100;
const V1: u64 = 1 << 32;

/// What Linux does up to DRIVER_OK, with queue 0 only.
fn drive(function: &mut VirtioPci, memory: &Memory, features: u64) {
    let mut write = |offset: u64, len, value: u64| function.write(offset, &value.to_le_bytes()[..len]);
    for status in [0, 1, 3] {
        write(0x14, 1, status);
    }
    for (select, shift) in [(0, 0), (1, 32)] {
        write(0x08, 4, select);
        write(0x0C, 4, features >> shift);
    }
    write(0x14, 1, 11);
    write(0x10, 2, 0);
    write(0x16, 2, 0);
    write(0x18, 2, Ring::SIZE.into());
    let memory = memory.memory();
    let ring = Ring::new(&memory, 0x1000);
    for (field, address) in [(0x20, ring.table()), (0x28, ring.available()), (0x30, ring.used())] {
        write(field, 4, address);
        write(field + 4, 4, 0);
    }
    write(0x1A, 2, 1);
    write(0x1C, 2, 1);
    write(0x14, 1, 15);
}

struct Fixture {
    function: VirtioPci,
    routes: Arc<FakeRoutes>,
    log: Arc<Log>,
    memory: Memory,
    manager: EventManager<Worker>,
}

impl Fixture {
    fn new() -> Self {
        Self::with(FakeDevice::new())
    }

    fn with((device, log): (FakeDevice, Arc<Log>)) -> Self {
        let (memory, routes) = (memory(), Arc::new(FakeRoutes::new(VirtioPci::vectors(&device))));
        let function = VirtioPci::new(Box::new(device), memory.clone(), routes.clone(), BASE, PORTS).unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(Worker::new(Arc::clone(function.slot())));
        Self { function, routes, log, memory, manager }
    }

    fn read(&mut self, offset: u32, len: usize) -> u64 {
        let mut data = [0x55; 8];
        self.function.read(offset.into(), &mut data[..len]);
        data[len..].fill(0);
        u64::from_le_bytes(data)
    }

    fn write(&mut self, offset: u32, len: usize, value: u64) {
        self.function.write(offset.into(), &value.to_le_bytes()[..len]);
    }

    fn config(&mut self, offset: usize, len: usize) -> u64 {
        let mut data = [0x55; 8];
        self.function.read_config(offset, &mut data[..len]);
        data[len..].fill(0);
        u64::from_le_bytes(data)
    }

    fn set_config(&mut self, offset: usize, len: usize, value: u64) {
        self.function.write_config(offset, &value.to_le_bytes()[..len]);
    }

    /// Where each capability is, by its id and, of a vendor's, the type of its structure.
    fn capabilities(&mut self) -> Vec<(u64, u64, usize)> {
        let mut found = Vec::new();
        let mut at = usize::try_from(self.config(0x34, 1)).unwrap();
        while at != 0 {
            let id = self.config(at, 1);
            let kind = if id == 9 { self.config(at + 3, 1) } else { 0 };
            found.push((id, kind, at));
            at = usize::try_from(self.config(at + 1, 1)).unwrap();
        }
        found
    }

    fn capability(&mut self, kind: u64) -> usize {
        self.capabilities().into_iter().find(|(_, found, _)| *found == kind).unwrap().2
    }

    fn run(&mut self) -> Vec<Call> {
        for _ in 0..100 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return self.log.take();
            }
        }
        panic!("the event loop does not come to rest");
    }

    /// MSI-X on, every vector with a message of its own.
    fn enable_msix(&mut self) {
        let msix = self.capability(0);
        self.set_config(msix + 2, 2, 0xC000);
        for vector in 0..3 {
            self.write(TABLE + vector * 16, 8, 0xFEE0_0000);
            self.write(TABLE + vector * 16 + 8, 4, u64::from(0x40 + vector));
            self.write(TABLE + vector * 16 + 12, 4, 0);
        }
        self.set_config(msix + 2, 2, 0x8000);
    }

    fn drive(&mut self, features: u64) {
        drive(&mut self.function, &self.memory, features);
    }

    fn start(&mut self) {
        self.drive(V1);
        assert_eq!(self.read(0x14, 1), 15);
        assert_eq!(self.run(), [Call::Start(V1, vec![true, false]), Call::Queue(0)]);
    }
}

#[test]
fn the_structures_can_be_found() {
    let mut fixture = Fixture::new();
    let ids = [0, 8, 0x2C].map(|offset| fixture.config(offset, 4));
    assert_eq!(ids, [0x106A_1AF4, 0xFF00_0001, 0x106A_1AF4]);
    assert_eq!(fixture.config(0x3D, 1), 0, "no pin");
    let found = fixture.capabilities();
    let kinds: Vec<_> = found.iter().map(|(id, kind, _)| (*id, *kind)).collect();
    assert_eq!(kinds, [(0x11, 0), (9, 1), (9, 3), (9, 4), (9, 2), (9, 2), (9, 5)]);
    let msix = found[0].2;
    assert_eq!([2, 4, 8].map(|at| fixture.config(msix + at, 4)), [0x4000_0002, 0x4000, 0x5000]);
    for (index, size, bar, offset, len) in [
        (1, 16, 0, 0, 56),
        (2, 16, 0, 0x1000, 1),
        (3, 16, 0, 0x2000, 6),
        // By ports first: drivers take the first that they can use.
        (4, 20, 2, 0, 8),
        (5, 20, 0, 0x3000, 8),
        (6, 20, 0, 0, 0),
    ] {
        let at = found[index].2;
        let fields = [(2, 1), (4, 1), (8, 4), (12, 4)].map(|(field, len)| fixture.config(at + field, len));
        assert_eq!(fields, [size, bar, offset, len], "{index}");
    }
    assert_eq!([4, 5].map(|index| fixture.config(found[index].2 + 16, 4)), [4, 4]);
    assert_eq!([0, 1].map(|queue| VirtioPci::notify_offset(Space::Memory, queue)), [0x3000, 0x3004]);
    assert_eq!([0, 1].map(|queue| VirtioPci::notify_offset(Space::Ports, queue)), [0, 4]);
}

#[test]
fn what_the_driver_writes_can_be_read() {
    let mut fixture = Fixture::new();
    assert_eq!(
        [(4, 4), (0x12, 2), (0x10, 2)].map(|(at, len)| fixture.read(at, len)),
        [0x2000_0001, 2, 0xFFFF]
    );
    fixture.write(0, 4, 1);
    assert_eq!((fixture.read(0, 4), fixture.read(4, 4)), (1, 1));
    fixture.write(0, 4, 2);
    assert_eq!(fixture.read(4, 4), 0);
    for (queue, size, notify, vector) in [(0, 16, 0, 0xFFFF), (1, 16, 1, 0xFFFF), (2, 0, 2, 0xFFFF)] {
        fixture.write(0x16, 2, queue);
        let fields = [0x16, 0x18, 0x1E, 0x1A, 0x1C].map(|field| fixture.read(field, 2));
        assert_eq!(fields, [queue, size, notify, vector, 0]);
    }
    fixture.drive(FEATURES);
    let fields = [(8, 4), (0xC, 4), (0x10, 2), (0x14, 1), (0x18, 2), (0x1A, 2), (0x1C, 2)];
    assert_eq!(fields.map(|(at, len)| fixture.read(at, len)), [1, 1, 0, 15, 16, 1, 1]);
    assert_eq!([0x20, 0x28, 0x30].map(|at| fixture.read(at, 8)), [0x1000, 0x1100, 0x1200]);
    assert_eq!([0x20, 0x24, 0x34].map(|at| fixture.read(at, 4)), [0x1000, 0, 0]);
    // Halves at a time and whole.
    fixture.write(0x14, 1, 0);
    fixture.write(0x14, 1, 3);
    fixture.write(0x08, 4, 1);
    fixture.write(0x0C, 4, 1);
    fixture.write(0x14, 1, 11);
    fixture.write(0x28, 8, 0x1_0000_2000);
    assert_eq!(fixture.read(0x28, 8), 0x1_0000_2000);
    // Not as a whole: nothing.
    for (at, len) in
        [(0, 1), (0, 2), (2, 4), (0x14, 4), (0x18, 1), (0x16, 4), (0x21, 4), (0x38, 4), (0xFFF, 8)]
    {
        assert_eq!(fixture.read(at, len), 0, "{at:#x} {len}");
        fixture.write(at, len, u64::MAX);
    }
    assert_eq!((fixture.read(0x14, 1), fixture.read(0x28, 8)), (11, 0x1_0000_2000));
}

#[test]
fn a_driver_uses_the_device() {
    for features in [V1, FEATURES] {
        let mut fixture = Fixture::new();
        fixture.enable_msix();
        fixture.drive(features);
        assert_eq!(fixture.run(), [Call::Start(features, vec![true, false]), Call::Queue(0)]);
        let memory = fixture.memory.memory();
        let ring = Ring::at(&memory, 0x1000);
        ring.store(0, Descriptor::new(0x8000, 1, 0, 0));
        ring.offer(0, 0);
        fixture.write(NOTIFY, 2, 0);
        assert_eq!(fixture.run(), [Call::Queue(0)]);
        assert_eq!(ring.used_index(), 1);
        assert_eq!([0, 1, 2].map(|vector| fixture.routes.signals(vector)), [0, 1, 0]);
        assert_eq!(fixture.read(ISR, 1), 0, "the vector says it");
    }
}

#[test]
fn vectors_lead_where_the_table_says() {
    let mut fixture = Fixture::new();
    fixture.enable_msix();
    let all = |data: [u32; 3]| data.map(|data| Some(Message { address: 0xFEE0_0000, data })).to_vec();
    assert_eq!(fixture.routes.take(), [all([0x40, 0x41, 0x42])], "at once, when the function is unmasked");
    fixture.write(0x16, 2, 1);
    for (written, read) in [(2, 2), (3, 0xFFFF), (0, 0), (0xFFFF, 0xFFFF)] {
        fixture.write(0x1A, 2, written);
        assert_eq!(fixture.read(0x1A, 2), read);
    }
    // Two reasons may share a vector.
    fixture.write(0x1A, 2, 0);
    fixture.write(0x10, 2, 0);
    fixture.function.interrupt.trigger(Vector::Queue(1)).unwrap();
    fixture.function.interrupt.trigger(Vector::Config).unwrap();
    fixture.function.interrupt.trigger(Vector::Queue(7)).unwrap();
    assert_eq!(fixture.routes.signals(0), 2);
    // The queue that runs keeps its vector.
    fixture.start();
    fixture.write(0x16, 2, 0);
    fixture.write(0x1A, 2, 2);
    assert_eq!(fixture.read(0x1A, 2), 1);
}

#[test]
fn without_msix_the_isr_status_tells() {
    let mut fixture = Fixture::new();
    fixture.start();
    fixture.function.interrupt.trigger(Vector::Queue(0)).unwrap();
    fixture.function.interrupt.trigger(Vector::Config).unwrap();
    assert_eq!(fixture.read(ISR, 4), 3);
    assert_eq!(fixture.read(ISR, 1), 0, "reading clears it");
    assert_eq!([0, 1, 2].map(|vector| fixture.routes.signals(vector)), [0; 3]);
}

#[test]
fn a_reset_leaves_nothing() {
    let mut fixture = Fixture::new();
    fixture.enable_msix();
    fixture.start();
    fixture.function.interrupt.trigger(Vector::Queue(1)).unwrap();
    fixture.write(0x14, 1, 0);
    assert_eq!(fixture.log.take(), [Call::Reset], "before the write has ended");
    assert_eq!(
        [(0x14, 1), (0x10, 2), (0x1A, 2), (0x1C, 2)].map(|(at, len)| fixture.read(at, len)),
        [0, 0xFFFF, 0xFFFF, 0]
    );
    assert_eq!(fixture.read(ISR, 1), 0);
    fixture.start();
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let mut fixture = Fixture::new();
    fixture.enable_msix();
    fixture.start();
    let memory = fixture.memory.memory();
    Ring::at(&memory, 0x1000).set_available_index(100);
    fixture.write(NOTIFY, 2, 0);
    assert_eq!(fixture.run(), [Call::Queue(0), Call::Reset]);
    assert_eq!((fixture.read(0x14, 1), fixture.routes.signals(0)), (0x4F, 1));
}

#[test]
fn others_signal_the_queues_own_vector() {
    let (mut device, log) = FakeDevice::new();
    device.server = Server::Vhost;
    let mut fixture = Fixture::with((device, log));
    fixture.enable_msix();
    fixture.drive(V1);
    let interrupt = Arc::clone(&fixture.function.interrupt);
    interrupt.notifier(Vector::Queue(0)).unwrap().write(1).unwrap();
    assert_eq!(fixture.routes.signals(1), 1);
    interrupt.notifier(Vector::Queue(1)).unwrap().write(1).unwrap();
    assert_eq!([0, 1, 2].map(|vector| fixture.routes.signals(vector)), [0; 3], "it has none");
}

#[test]
fn notifications_kick_the_queue_they_name() {
    let mut fixture = Fixture::new();
    for (offset, len) in [(4, 2), (8, 2), (0xFFC, 4)] {
        fixture.write(NOTIFY + offset, len, 0xFFFF);
    }
    let kicks = fixture.function.slot().kicks();
    assert_eq!(kicks.len(), 2);
    assert!(kicks[0].read().is_err());
    assert_eq!(kicks[1].read().unwrap(), 1);
}

#[test]
fn device_configuration_has_any_width() {
    let mut fixture = Fixture::new();
    assert_eq!((fixture.read(DEVICE, 1), fixture.read(DEVICE + 1, 2)), (1, 0x302));
    assert_eq!((fixture.read(DEVICE, 8), fixture.read(DEVICE + 0xFFC, 4)), (0x0605_0403_0201, 0));
    fixture.write(DEVICE + 3, 1, 9);
    fixture.write(DEVICE + 0xFF8, 8, 9);
    assert_eq!(fixture.log.take(), [Call::WriteConfig(3, vec![9])]);
}

#[test]
fn configuration_space_has_a_window_to_the_bar() {
    let mut fixture = Fixture::new();
    let window = fixture.capability(5);
    let aim = |fixture: &mut Fixture, offset: u32, len: u64| {
        fixture.set_config(window + 8, 4, offset.into());
        fixture.set_config(window + 12, 4, len);
    };
    aim(&mut fixture, DEVICE + 2, 2);
    assert_eq!(fixture.config(window + 16, 4), 0x403);
    aim(&mut fixture, 0x14, 1);
    fixture.set_config(window + 16, 1, 3);
    assert_eq!((fixture.read(0x14, 1), fixture.config(window + 16, 1)), (3, 3));
    // Neither the wrong width, nor the wrong alignment, nor another BAR.
    for (offset, len, bar) in [(0x14, 0, 0), (0x14, 3, 0), (0x12, 4, 0), (0x14, 1, 1), (u32::MAX, 1, 0)] {
        aim(&mut fixture, offset, len);
        fixture.set_config(window + 4, 1, bar);
        fixture.set_config(window + 16, 4, 0);
        fixture.config(window + 16, 4);
        assert_eq!(fixture.read(0x14, 1), 3, "{offset:#x} {len} {bar}");
    }
}

#[test]
fn devices_that_cannot_be_are_refused() {
    let make = |vectors| {
        let routes = Arc::new(FakeRoutes::new(vectors));
        VirtioPci::new(Box::new(FakeDevice::new().0), memory(), routes, BASE, PORTS).is_ok()
    };
    assert!(make(1) && make(3) && make(256));
    assert!(!make(0) && !make(257));
}

struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn attach(&self, _: Space, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _: Space, _: u64) {}
}

/// What a guest does: which of its structures, where in it, how wide, and with what.
#[derive(Clone, Debug)]
enum Access {
    Ecam(u64, usize, u64),
    Bar(u64, usize, u64),
    Drive(bool),
    Ring(u16, u32, u64, u16),
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0_u64..16,
        Just(0),
        Just(u64::MAX),
        Just(BASE),
        (0_u64..17).prop_map(|n| n << 16)
    ]
}

fn access() -> impl Strategy<Value = Access> {
    let len = || 1_usize..9;
    let register = prop_oneof![0_u64..256, 0_u64..0x1000, Just(4), Just(0x10), Just(0x42), 0x88_u64..0xA8];
    let offset = prop_oneof![0_u64..56, 0x3000_u64..0x3010, 0x4000_u64..0x4040, 0_u64..0x8000];
    prop_oneof![
        4 => (prop_oneof![9 => Just(1_u64), 1 => 0_u64..32], register, len(), value())
            .prop_map(|(device, register, len, value)| Access::Ecam(device << 15 | register, len, value)),
        4 => (offset, len(), value()).prop_map(|(offset, len, value)| Access::Bar(offset, len, value)),
        1 => any::<bool>().prop_map(Access::Drive),
        1 => (0_u16..40, any::<u32>(), 0_u64..1 << 21, 0_u16..8)
            .prop_map(|(index, len, address, flags)| Access::Ring(index, len, address, flags)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever it does, and wherever the BAR goes meanwhile, the device can be used afterwards.
    #[test]
    fn no_sequence_of_accesses_does_harm(accesses in prop::collection::vec(access(), 1..200)) {
        let (memory, (device, log)) = (memory(), FakeDevice::new());
        let routes = Arc::new(FakeRoutes::new(3));
        let function = VirtioPci::new(Box::new(device), memory.clone(), routes.clone(), BASE, PORTS).unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(Worker::new(Arc::clone(function.slot())));
        let function = Arc::new(Mutex::new(function));
        let (bus, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = [BASE..=BASE + 0xF_FFFF, 1 << 40..=(1 << 40) + 0xF_FFFF];
        let mut pci = PciBus::new(&bus, windows, &ports, 0x1000..=0x2FFF);
        pci.insert(1, function.clone(), Box::new(NoDoorbells));
        let mut data = [0; 8];
        for access in accesses {
            match access {
                Access::Ecam(offset, len, value) => {
                    pci.write(offset, &value.to_le_bytes()[..len]);
                    pci.read(offset, &mut data[..len]);
                }
                Access::Bar(offset, len, value) => {
                    ports.write(PORTS + offset, &value.to_le_bytes()[..len]);
                    bus.write(BASE + offset, &value.to_le_bytes()[..len]);
                    let mut function = function.lock().unwrap();
                    function.write(offset, &value.to_le_bytes()[..len]);
                    function.read(offset, &mut data[..len]);
                }
                Access::Drive(events) => {
                    let function = &mut *function.lock().unwrap();
                    drive(function, &memory, if events { FEATURES } else { V1 });
                }
                Access::Ring(index, len, address, flags) => {
                    let map = memory.memory();
                    let ring = Ring::at(&map, 0x1000);
                    ring.set_available_index(index);
                    ring.store(index % 16, Descriptor::new(address, len, flags, index));
                }
            }
            while manager.run_with_timeout(0).unwrap() > 0 {}
        }
        for messages in routes.take() {
            prop_assert_eq!(messages.len(), 3);
        }
        function.lock().unwrap().write(0x14, &[0]);
        log.take();
        drive(&mut function.lock().unwrap(), &memory, V1);
        while manager.run_with_timeout(0).unwrap() > 0 {}
        prop_assert_eq!(log.take(), [Call::Start(V1, vec![true, false]), Call::Queue(0)]);
    }
}
