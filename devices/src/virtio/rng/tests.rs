use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::*;
use crate::virtio::driver_ring::{DriverRing, Lent, Lent::Read, Lent::Write};
use crate::virtio::interrupt::Vector;
use crate::virtio::testing::{RecordedInterrupt, Ring};

const RING: u64 = 0x1000;
const DATA: u64 = 0x4000;
const END: u64 = 0x4_0000;

struct Bench {
    memory: GuestMemoryMmap,
    ring: DriverRing,
    interrupt: Arc<RecordedInterrupt>,
    rng: Rng,
}

impl Bench {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), END.try_into().unwrap())]).unwrap();
        let ring = DriverRing::new(&memory, RING);
        let interrupt = Arc::new(RecordedInterrupt::default());
        let mut bench = Self { memory, ring, interrupt, rng: Rng::new(LimiterConfig::default()).unwrap() };
        bench.start();
        bench
    }

    /// Starts the device on an empty ring.
    fn start(&mut self) {
        self.ring = DriverRing::new(&self.memory, RING);
        let (queue, _kick) = self.ring.virtqueue(0, self.interrupt.clone());
        self.rng.start(self.activation(vec![Some(queue)])).unwrap();
    }

    fn activation(&self, queues: Vec<Option<Virtqueue>>) -> Activation {
        Activation {
            memory: GuestMemoryAtomic::new(self.memory.clone()),
            queues,
            features: self.rng.features(),
            interrupt: self.interrupt.clone(),
        }
    }

    /// Has one chain served and returns its used length.
    fn request(&mut self, buffers: &[Lent]) -> u32 {
        let head = self.ring.lend(buffers);
        self.rng.queue_event(0).unwrap();
        assert_eq!(self.interrupt.take(), [Vector::Queue(0)]);
        let (used, len) = self.ring.used().unwrap();
        assert_eq!(used, head);
        len
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Whether nothing but zeros is there.
    fn untouched(&self, at: u64, len: usize) -> bool {
        self.bytes(at, len).iter().all(|byte| *byte == 0)
    }
}

#[test]
fn type_features_and_configuration_space() {
    let rng = Rng::new(LimiterConfig::default()).unwrap();
    assert_eq!(rng.device_type(), 4);
    assert_eq!(rng.features(), 1 << 32 | 1 << 29 | 1 << 28);
    assert_eq!(rng.queue_max_sizes(), [16]);
    assert!(rng.config().is_empty());
}

#[test]
fn buffers_are_filled_and_nothing_around_them() {
    let mut bench = Bench::new();
    assert_eq!(bench.request(&[Write(DATA, 64), Write(DATA + 0x1000, 32)]), 96);
    let (first, second) = (bench.bytes(DATA, 64), bench.bytes(DATA + 0x1000, 32));
    // Each comes true by chance once in 2^256 times.
    assert!(!bench.untouched(DATA, 32) && !bench.untouched(DATA + 32, 32));
    assert!(!bench.untouched(DATA + 0x1000, 32));
    assert_ne!(first[..32], second[..]);
    assert!(bench.untouched(DATA + 64, 0x1000 - 64) && bench.untouched(DATA + 0x1000 + 32, 0x1000));
    // The next request gets other bytes.
    assert_eq!(bench.request(&[Write(DATA, 64)]), 64);
    assert_ne!(bench.bytes(DATA, 64), first);
}

#[test]
fn a_request_gets_64_kib_at_most() {
    let mut bench = Bench::new();
    assert_eq!(bench.request(&[Write(DATA, 0x8000), Write(DATA + 0x8000, 0x9000)]), 0x1_0000);
    assert!(!bench.untouched(DATA + 0x1_0000 - 32, 32));
    assert!(bench.untouched(DATA + 0x1_0000, 0x1000));
}

#[test]
fn hostile_chains_come_back_empty() {
    let mut bench = Bench::new();
    for buffers in [
        &[Read(DATA, 64)][..],
        &[Read(DATA, 1), Write(DATA + 64, 64)],
        &[Write(DATA, 64), Read(DATA + 64, 64)],
        &[Write(DATA, 0)],
        &[Write(DATA, 64), Write(END - 63, 64)],
        &[Write(u64::MAX - 31, 32)],
    ] {
        assert_eq!(bench.request(buffers), 0);
        assert!(bench.untouched(DATA, 0x1000));
    }
    assert_eq!(bench.request(&[Write(DATA, 64)]), 64);
    bench.ring.publish(Ring::SIZE);
    assert!(matches!(bench.rng.queue_event(0), Err(DeviceError::Queue(_))));
}

#[test]
fn it_rests_between_reset_and_start() {
    let mut bench = Bench::new();
    bench.rng.reset();
    bench.ring.lend(&[Write(DATA, 64)]);
    bench.rng.queue_event(0).unwrap();
    assert_eq!((bench.ring.used(), bench.untouched(DATA, 64)), (None, true));
    let nothing = bench.activation(vec![None]);
    assert!(matches!(bench.rng.start(nothing), Err(DeviceError::Driver(_))));
    bench.start();
    assert_eq!(bench.request(&[Write(DATA, 64)]), 64);
}

#[test]
fn what_is_beyond_the_limits_waits() {
    let mut bench = Bench::new();
    let bucket = crate::rate_limiter::Bucket { size: 64, refill_time_ms: 3_600_000, one_time_burst: 0 };
    bench.rng = Rng::new(LimiterConfig { bandwidth: Some(bucket), ops: None }).unwrap();
    bench.start();
    assert_eq!(bench.request(&[Write(DATA, 64)]), 64);
    bench.ring.lend(&[Write(DATA, 64)]);
    bench.rng.queue_event(0).unwrap();
    assert_eq!(bench.ring.used(), None);
    bench.rng.reset();
    bench.start();
    assert!(!bench.rng.limiter.is_blocked(), "what waited is forgotten");
}
