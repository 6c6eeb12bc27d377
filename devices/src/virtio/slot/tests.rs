use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::fake_device::{Call, FakeDevice, Log, memory};
use crate::virtio::testing::{RecordedInterrupt, Ring};

struct Fixture {
    slot: Slot,
    log: Arc<Log>,
    interrupt: Arc<RecordedInterrupt>,
    memory: Memory,
}

impl Fixture {
    fn new() -> Self {
        Self::with(FakeDevice::new())
    }

    fn with((device, log): (FakeDevice, Arc<Log>)) -> Self {
        let (memory, interrupt) = (memory(), Arc::new(RecordedInterrupt::default()));
        let slot = Slot::new(Box::new(device), memory.clone(), interrupt.clone()).unwrap();
        Self { slot, log, interrupt, memory }
    }

    /// Rings of which only the second is enabled.
    fn rings(&self) -> Vec<Option<Queue>> {
        vec![None, Some(Ring::new(&self.memory.memory(), 0x1000).queue())]
    }

    fn start(&self) {
        self.slot.activate(5, self.rings());
        self.slot.start_pending();
        assert_eq!(self.log.take(), [Call::Start(5, vec![false, true]), Call::Queue(1)]);
    }

    fn assert_failed(&self) {
        assert!(self.slot.needs_reset());
        assert_eq!(self.interrupt.take(), [Vector::Config]);
        for index in [0, 1] {
            self.slot.queue_event(index);
        }
        self.slot.source_event(0);
        self.slot.start_pending();
        assert_eq!(self.log.take(), [], "a failed device has its peace");
    }
}

#[test]
fn the_device_starts_on_the_thread_that_serves_it() {
    let fixture = Fixture::new();
    fixture.slot.queue_event(1);
    fixture.slot.source_event(0);
    fixture.slot.start_pending();
    assert_eq!(fixture.log.take(), [], "idle");

    fixture.slot.activate(5, fixture.rings());
    assert_eq!(fixture.slot.activation().read().unwrap(), 1);
    fixture.slot.queue_event(1);
    assert_eq!(fixture.log.take(), [], "not on this thread");
    fixture.slot.start_pending();
    assert_eq!(fixture.log.take(), [Call::Start(5, vec![false, true]), Call::Queue(1)]);
    fixture.slot.start_pending();
    // Queue 0 is not enabled, and there is no queue 2.
    for index in [0, 1, 2] {
        fixture.slot.queue_event(index);
    }
    fixture.slot.source_event(7);
    assert_eq!(fixture.log.take(), [Call::Queue(1), Call::Source(7)]);
    fixture.slot.reset();
    assert_eq!(fixture.log.take(), [Call::Reset]);
    fixture.slot.reset();
    fixture.slot.queue_event(1);
    assert_eq!(fixture.log.take(), []);
    fixture.start();
}

#[test]
fn what_was_available_before_the_start_is_served() {
    let fixture = Fixture::new();
    fixture.slot.activate(0, fixture.rings());
    let memory = fixture.memory.memory();
    let ring = Ring::at(&memory, 0x1000);
    ring.store(0, Descriptor::new(0x8000, 1, 0, 0));
    ring.offer(0, 0);
    fixture.slot.start_pending();
    assert_eq!(ring.used_index(), 1);
    assert_eq!(fixture.interrupt.take(), [Vector::Queue(1)]);
}

#[test]
fn a_reset_before_the_start_drops_what_was_pending() {
    let fixture = Fixture::new();
    let references = Arc::strong_count(&fixture.interrupt);
    fixture.slot.activate(5, fixture.rings());
    assert!(Arc::strong_count(&fixture.interrupt) > references);
    fixture.slot.reset();
    assert_eq!(Arc::strong_count(&fixture.interrupt), references);
    fixture.slot.start_pending();
    assert_eq!(fixture.log.take(), []);
    fixture.start();
}

#[test]
fn a_change_in_an_event_is_told() {
    let fixture = Fixture::new();
    fixture.start();
    let generation = fixture.slot.config_generation();
    fixture.slot.source_event(7);
    assert_eq!((fixture.slot.config_generation(), fixture.interrupt.take()), (generation, vec![]));
    fixture.log.config_changes.store(true, Ordering::Relaxed);
    fixture.slot.source_event(7);
    assert_eq!(fixture.slot.config_generation(), generation + 1);
    assert_eq!(fixture.interrupt.take(), [Vector::Config]);
}

#[test]
fn a_start_that_fails_needs_a_reset() {
    let fixture = Fixture::new();
    fixture.log.fail_start.store(true, Ordering::Relaxed);
    fixture.slot.activate(5, fixture.rings());
    fixture.slot.start_pending();
    assert_eq!(fixture.log.take(), [Call::Start(5, vec![false, true]), Call::Reset]);
    fixture.assert_failed();

    fixture.log.fail_start.store(false, Ordering::Relaxed);
    fixture.slot.reset();
    assert_eq!(fixture.log.take(), [], "it is reset already");
    assert!(!fixture.slot.needs_reset());
    fixture.start();
}

#[test]
fn events_that_fail_need_a_reset() {
    for call in [Call::Queue(1), Call::Source(7)] {
        let fixture = Fixture::new();
        fixture.start();
        fixture.log.fail_events.store(true, Ordering::Relaxed);
        match call {
            Call::Queue(index) => fixture.slot.queue_event(index),
            _ => fixture.slot.source_event(7),
        }
        assert_eq!(fixture.log.take(), [call, Call::Reset]);
        fixture.assert_failed();
    }
}

#[test]
fn a_first_service_that_fails_needs_a_reset() {
    let fixture = Fixture::new();
    let rings = fixture.rings();
    Ring::at(&fixture.memory.memory(), 0x1000).set_available_index(1000);
    fixture.slot.activate(5, rings);
    fixture.slot.start_pending();
    assert_eq!(fixture.log.take().last(), Some(&Call::Reset));
    fixture.assert_failed();
}

#[test]
fn a_ring_outside_of_memory_needs_a_reset() {
    let fixture = Fixture::new();
    let mut ring = Ring::new(&fixture.memory.memory(), 0x1000).queue();
    ring.try_set_used_ring_address(GuestAddress(0x10_0000)).unwrap();
    fixture.slot.activate(5, vec![Some(ring), None]);
    assert!(fixture.slot.activation().read().is_err());
    assert_eq!(fixture.log.take(), []);
    fixture.assert_failed();
    fixture.slot.reset();
    fixture.start();
}

#[test]
fn others_take_the_kicks_of_vhost() {
    let (mut device, log) = FakeDevice::new();
    device.server = Server::Vhost;
    let fixture = Fixture::with((device, log));
    fixture.slot.activate(5, fixture.rings());
    fixture.slot.start_pending();
    assert_eq!(fixture.log.take(), [Call::Start(5, vec![false, true])]);
}

#[test]
fn configuration_space_is_bounded() {
    let fixture = Fixture::new();
    let read = |offset, len| {
        let mut data = vec![0x55; len];
        fixture.slot.read_config(offset, &mut data);
        data
    };
    assert_eq!(read(0, 4), [1, 2, 3, 4]);
    assert_eq!(read(4, 4), [5, 6, 0, 0]);
    assert_eq!(read(6, 1), [0]);
    assert_eq!(read(7, 2), [0, 0]);
    assert_eq!(read(usize::MAX, 8), [0; 8]);
    fixture.slot.write_config(2, &[7, 8]);
    for offset in [5, 6, 100, usize::MAX] {
        fixture.slot.write_config(offset, &[7, 8]);
    }
    assert_eq!(fixture.log.take(), [Call::WriteConfig(2, vec![7, 8])]);
}

#[test]
fn kicks_of_queues_that_do_not_exist_are_ignored() {
    let fixture = Fixture::new();
    fixture.slot.kick(1);
    fixture.slot.kick(2);
    fixture.slot.kick(usize::MAX);
    assert!(fixture.slot.kicks()[0].read().is_err());
    assert_eq!(fixture.slot.kicks()[1].read().unwrap(), 1);
}

#[test]
fn a_reset_waits_for_the_device() {
    /// Says when it is in a queue event, and stays there until told.
    struct Slow(mpsc::Sender<&'static str>, mpsc::Receiver<()>);
    impl VirtioDevice for Slow {
        fn device_type(&self) -> u32 {
            1
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &[16]
        }
        fn config(&self) -> &[u8] {
            &[]
        }
        fn start(&mut self, _: Activation) -> Result<(), DeviceError> {
            Ok(())
        }
        fn queue_event(&mut self, _: usize) -> Result<(), DeviceError> {
            self.0.send("busy").unwrap();
            self.1.recv().unwrap();
            self.0.send("done").unwrap();
            Ok(())
        }
        fn reset(&mut self) {
            self.0.send("reset").unwrap();
        }
    }
    let (told, says) = mpsc::channel();
    let (tell, listens) = mpsc::channel();
    let (memory, interrupt) = (memory(), Arc::new(RecordedInterrupt::default()));
    let slot = Slot::new(Box::new(Slow(told, listens)), memory.clone(), interrupt).unwrap();
    slot.activate(0, vec![Some(Ring::new(&memory.memory(), 0x1000).queue())]);
    thread::scope(|scope| {
        scope.spawn(|| slot.start_pending());
        assert_eq!(says.recv_timeout(Duration::from_secs(10)).unwrap(), "busy");
        let reset = scope.spawn(|| slot.reset());
        assert!(says.recv_timeout(Duration::from_millis(50)).is_err());
        assert!(!reset.is_finished());
        tell.send(()).unwrap();
        assert_eq!((says.recv().unwrap(), says.recv().unwrap()), ("done", "reset"));
    });
}

#[test]
fn a_change_of_the_configuration_is_numbered_and_told() {
    let fixture = Fixture::new();
    let set = |byte| fixture.slot.update(move |device: &mut FakeDevice| device.config[0] = byte);
    assert_eq!(set(7), Some(()));
    assert_eq!(fixture.slot.config_generation(), 1);
    assert_eq!(fixture.interrupt.take(), [], "nobody listens yet");
    fixture.start();
    assert_eq!(set(7), Some(()));
    assert_eq!(fixture.slot.config_generation(), 1, "nothing changed");
    assert_eq!(set(8), Some(()));
    assert_eq!(fixture.slot.config_generation(), 2);
    assert_eq!(fixture.interrupt.take(), [Vector::Config]);
    let mut byte = [0];
    fixture.slot.read_config(0, &mut byte);
    assert_eq!(byte, [8]);
    assert_eq!(fixture.slot.update(|_: &mut crate::virtio::net::Net| ()), None, "of another type");
}
