use event_manager::{EventManager, SubscriberOps};
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::virtio::fake_device::{Call, FEATURES, FakeDevice, Log, memory};
use crate::virtio::testing::Ring;
use crate::virtio::worker::Worker;

struct Fixture {
    transport: MmioTransport,
    irqfd: EventFd,
    log: Arc<Log>,
    memory: Memory,
    manager: EventManager<Worker>,
}

impl Fixture {
    fn new() -> Self {
        Self::with(FakeDevice::new())
    }

    fn with((device, log): (FakeDevice, Arc<Log>)) -> Self {
        let (memory, irqfd) = (memory(), EventFd::new(EFD_NONBLOCK).unwrap());
        let transport =
            MmioTransport::new(Box::new(device), memory.clone(), irqfd.try_clone().unwrap()).unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(Worker::new(Arc::clone(transport.slot())));
        Self { transport, irqfd, log, memory, manager }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0x55; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn run(&mut self) -> Vec<Call> {
        for _ in 0..100 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return self.log.take();
            }
        }
        panic!("the event loop does not come to rest");
    }

    /// What Linux does up to DRIVER_OK, with queue 0 only.
    fn drive(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for (select, shift) in [(0, 0), (1, 32)] {
            self.write(0x24, select);
            self.write(0x20, u32::try_from(features >> shift & 0xffff_ffff).unwrap());
        }
        self.write(0x70, 11);
        self.write(0x30, 0);
        self.write(0x38, Ring::SIZE.into());
        let memory = self.memory.memory();
        let ring = Ring::new(&memory, 0x1000);
        for (register, address) in [(0x80, ring.table()), (0x90, ring.available()), (0xa0, ring.used())] {
            self.write(register, u32::try_from(address).unwrap());
            self.write(register + 4, 0);
        }
        self.write(0x44, 1);
        self.write(0x70, 15);
    }

    fn start(&mut self) {
        self.drive(1 << 32);
        assert_eq!(self.read(0x70), 15);
        assert_eq!(self.run(), [Call::Start(1 << 32, vec![true, false]), Call::Queue(0)]);
    }
}

#[test]
fn the_device_can_be_recognised() {
    let mut fixture = Fixture::new();
    assert_eq!([0, 4, 8, 0xc].map(|offset| fixture.read(offset)), [0x7472_6976, 2, 42, VENDOR]);
    assert_eq!(fixture.read(0x10), 0x2000_0001);
    fixture.write(0x14, 1);
    assert_eq!(fixture.read(0x10), 1);
    fixture.write(0x14, 2);
    assert_eq!(fixture.read(0x10), 0);
    for (queue, size) in [(0, 16), (1, 16), (2, 0)] {
        fixture.write(0x30, queue);
        assert_eq!((fixture.read(0x34), fixture.read(0x44)), (size, 0));
    }
    fixture.write(0xac, 0);
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|offset| fixture.read(offset)), [u32::MAX; 4]);
    assert_eq!(fixture.read(0xfc), 0);
}

#[test]
fn a_driver_uses_the_device() {
    for features in [1 << 32, FEATURES] {
        let mut fixture = Fixture::new();
        fixture.drive(features);
        assert_eq!((fixture.read(0x70), fixture.read(0x44)), (15, 1));
        assert_eq!(fixture.run(), [Call::Start(features, vec![true, false]), Call::Queue(0)]);

        let memory = fixture.memory.memory();
        let ring = Ring::at(&memory, 0x1000);
        ring.store(0, Descriptor::new(0x8000, 1, 0, 0));
        ring.offer(0, 0);
        fixture.write(0x50, 0);
        assert_eq!(fixture.run(), [Call::Queue(0)]);
        assert_eq!(ring.used_index(), 1);
        assert_eq!(fixture.irqfd.read().unwrap(), 1);
        assert_eq!(fixture.read(0x60), 1);
        fixture.write(0x64, 2);
        assert_eq!(fixture.read(0x60), 1);
        fixture.write(0x64, 1);
        assert_eq!(fixture.read(0x60), 0);
    }
}

#[test]
fn a_reset_leaves_nothing() {
    let mut fixture = Fixture::new();
    fixture.start();
    fixture.transport.interrupt.trigger(Vector::Queue(0)).unwrap();
    assert_eq!(fixture.read(0x60), 1);
    fixture.write(0x70, 0);
    assert_eq!(fixture.log.take(), [Call::Reset], "before the write has ended");
    assert_eq!([0x60, 0x70, 0x44].map(|offset| fixture.read(offset)), [0; 3]);
    fixture.start();
    fixture.transport.slot().reset();
    assert_eq!(fixture.log.take(), [Call::Reset]);
    fixture.transport.slot().reset();
    assert_eq!(fixture.run(), []);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut fixture = Fixture::new();
    for features in [0, 1, 1 << 32 | 2, u64::MAX] {
        fixture.drive(features);
        assert_eq!(fixture.read(0x70), 3, "{features:#x}");
        assert_eq!(fixture.run(), []);
    }
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let mut fixture = Fixture::new();
    fixture.start();
    let memory = fixture.memory.memory();
    Ring::at(&memory, 0x1000).set_available_index(100);
    fixture.write(0x50, 0);
    assert_eq!(fixture.run(), [Call::Queue(0), Call::Reset]);
    assert_eq!(fixture.read(0x70), 0x4f);
    assert_eq!((fixture.irqfd.read().unwrap(), fixture.read(0x60)), (1, 2));
    fixture.write(0x50, 0);
    assert_eq!(fixture.run(), []);
    fixture.start();
}

#[test]
fn a_ring_outside_of_memory_needs_a_reset() {
    let mut fixture = Fixture::new();
    fixture.write(0x70, 3);
    fixture.write(0x24, 1);
    fixture.write(0x20, 1);
    fixture.write(0x70, 11);
    fixture.write(0x84, 1);
    fixture.write(0x44, 1);
    fixture.write(0x70, 15);
    assert_eq!((fixture.read(0x70), fixture.read(0x60)), (0x4f, 2));
    assert_eq!(fixture.run(), []);
}

#[test]
fn interrupts_of_vhost_always_have_a_reason() {
    let (mut device, log) = FakeDevice::new();
    device.server = Server::Vhost;
    let mut fixture = Fixture::with((device, log));
    assert_eq!(fixture.read(0x60), 0);
    fixture.drive(1 << 32);
    assert_eq!(fixture.read(0x60), 1, "the worker may be faster than we are");
    fixture.transport.interrupt.trigger(Vector::Config).unwrap();
    assert_eq!(fixture.read(0x60), 3);
    fixture.write(0x64, 3);
    assert_eq!(fixture.read(0x60), 1);
    fixture.write(0x70, 0);
    assert_eq!(fixture.read(0x60), 0);
}

#[test]
fn vhost_gets_the_line() {
    let fixture = Fixture::new();
    let interrupt = &fixture.transport.interrupt;
    interrupt.notifier(Vector::Queue(1)).unwrap().write(1).unwrap();
    assert_eq!(fixture.irqfd.read().unwrap(), 1);
    assert!(interrupt.notifier(Vector::Config).is_err());
}

#[test]
fn registers_are_accessed_as_a_whole() {
    let mut fixture = Fixture::new();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfc, 8), (0xff, 4)] {
        let mut data = [0x55; 8];
        fixture.transport.read(offset, &mut data[..len]);
        assert_eq!(data[..len], [0; 8][..len], "{offset:#x} {len}");
        fixture.transport.write(offset, &data[..len]);
    }
    fixture.transport.write(0x70, &[1]);
    fixture.transport.write(0x70, &[1, 0]);
    fixture.transport.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
    fixture.transport.write(0x71, &[1, 0, 0, 0]);
    assert_eq!(fixture.read(0x70), 0);
}

#[test]
fn configuration_space_has_any_width() {
    let mut fixture = Fixture::new();
    let mut read = |offset, len| {
        let mut data = vec![0x55; len];
        fixture.transport.read(offset, &mut data);
        data
    };
    assert_eq!(read(0x100, 1), [1]);
    assert_eq!(read(0x101, 2), [2, 3]);
    assert_eq!(read(0x100, 8), [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(read(0xffc, 4), [0; 4]);
    fixture.transport.write(0x103, &[9]);
    fixture.transport.write(0xff8, &[9; 8]);
    assert_eq!(fixture.log.take(), [Call::WriteConfig(3, vec![9])]);
}

#[test]
fn notifications_kick_the_queue_they_name() {
    let mut fixture = Fixture::new();
    for index in [1, 2, u32::MAX] {
        fixture.write(0x50, index);
    }
    let kicks = fixture.transport.slot().kicks();
    assert_eq!(kicks.len(), 2);
    assert!(kicks[0].read().is_err());
    assert_eq!(kicks[1].read().unwrap(), 1);
    assert_eq!(MmioTransport::QUEUE_NOTIFY, 0x50);
}

/// Accesses that a generator makes up, biased to get far.
#[test]
fn no_sequence_of_accesses_does_harm() {
    let mut fixture = Fixture::new();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let statuses = [0, 1, 3, 11, 15, 128, 64, u32::MAX];
    let mut calls = Vec::new();
    for round in 0..20_000 {
        if random(50) == 0 {
            fixture.drive([1 << 32, FEATURES][usize::try_from(random(2)).unwrap()]);
        }
        let offset = [random(0x40) * 4, random(0x1000), 0x70, 0x50][usize::try_from(random(4)).unwrap()];
        let value = u32::try_from(match random(3) {
            0 => u64::from(statuses[usize::try_from(random(8)).unwrap()]),
            1 => random(0x11) * 0x1_0000,
            _ => random(1 << 32),
        })
        .unwrap();
        match random(4) {
            0 => {
                fixture.read(offset);
            }
            1 => fixture.transport.write(offset, &value.to_le_bytes()[..1]),
            _ => fixture.write(offset, value),
        }
        let memory = fixture.memory.memory();
        let ring = Ring::at(&memory, 0x1000);
        ring.set_available_index(u16::try_from(random(40)).unwrap());
        let random16 = |value: u64| u16::try_from(value & 0xffff).unwrap();
        ring.store(random16(random(16)), Descriptor::new(random(1 << 21), value, random16(random(8)), 0));
        if round % 7 == 0 {
            calls.extend(fixture.run());
        }
    }
    let count = |wanted: fn(&Call) -> bool| calls.iter().filter(|call| wanted(call)).count();
    assert!(count(|call| matches!(call, Call::Start(..))) > 100, "the accesses get somewhere");
    assert!(count(|call| matches!(call, Call::Queue(_))) > 100);
    fixture.transport.slot().reset();
    fixture.run();
    fixture.start();
}
