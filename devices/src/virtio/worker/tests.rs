use event_manager::{EventManager, SubscriberOps};
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::device::{EventSource, Memory};
use crate::virtio::fake_device::{Call, FakeDevice, Log, memory};
use crate::virtio::testing::{RecordedInterrupt, Ring};

struct Fixture {
    slot: Arc<Slot>,
    log: Arc<Log>,
    memory: Memory,
    manager: EventManager<Worker>,
}

impl Fixture {
    fn new((device, log): (FakeDevice, Arc<Log>)) -> Self {
        let memory = memory();
        let interrupt = Arc::new(RecordedInterrupt::default());
        let slot = Arc::new(Slot::new(Box::new(device), memory.clone(), interrupt).unwrap());
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(Worker::new(slot.clone()));
        Self { slot, log, memory, manager }
    }

    fn activate(&self) {
        let ring = Ring::new(&self.memory.memory(), 0x1000).queue();
        self.slot.activate(0, vec![Some(ring), None]);
    }

    /// Handles what there is to handle; says what the device was asked.
    fn run(&mut self) -> Vec<Call> {
        // A loop that never has nothing to do would be one that does not drain its events.
        for _ in 0..100 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return self.log.take();
            }
        }
        panic!("the event loop does not come to rest");
    }
}

#[test]
fn kicks_reach_a_running_device_only() {
    let mut fixture = Fixture::new(FakeDevice::new());
    fixture.slot.kick(0);
    assert_eq!(fixture.run(), []);
    fixture.activate();
    fixture.slot.kick(0);
    let calls = fixture.run();
    assert_eq!(calls[..2], [Call::Start(0, vec![true, false]), Call::Queue(0)]);
    fixture.slot.kick(0);
    fixture.slot.kick(0);
    assert_eq!(fixture.run(), [Call::Queue(0)]);
    fixture.slot.reset();
    fixture.slot.kick(0);
    assert_eq!(fixture.run(), [Call::Reset]);
}

#[test]
fn a_busy_ring_is_served_to_the_end() {
    let mut fixture = Fixture::new(FakeDevice::new());
    fixture.activate();
    fixture.run();
    let memory = fixture.memory.memory();
    let ring = Ring::at(&memory, 0x1000);
    for index in 0..Ring::SIZE {
        ring.store(index, Descriptor::new(0x8000, 1, 0, 0));
        ring.offer(index, index);
    }
    fixture.slot.kick(0);
    assert_eq!(fixture.run(), [Call::Queue(0), Call::Queue(0)]);
    assert_eq!(ring.used_index(), Ring::SIZE);
}

#[test]
fn sources_reach_a_running_device_only() {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let (mut device, log) = FakeDevice::new();
    device.sources =
        vec![EventSource { fd: event.as_raw_fd(), events: EventSet::IN | EventSet::EDGE_TRIGGERED }];
    let mut fixture = Fixture::new((device, log));
    event.write(1).unwrap();
    assert_eq!(fixture.run(), []);
    fixture.activate();
    fixture.run();
    event.write(1).unwrap();
    assert_eq!(fixture.run(), [Call::Source(event.as_raw_fd())]);
}

#[test]
fn the_kicks_of_vhost_are_left_alone() {
    let (mut device, log) = FakeDevice::new();
    device.server = Server::Vhost;
    let mut fixture = Fixture::new((device, log));
    fixture.activate();
    fixture.slot.kick(0);
    assert_eq!(fixture.run(), [Call::Start(0, vec![true, false])]);
    assert_eq!(fixture.slot.kicks()[0].read().unwrap(), 1);
}
