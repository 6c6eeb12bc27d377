use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use libc::c_int;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::disk::Step;
use super::*;
use crate::rate_limiter::Bucket;
use crate::virtio::driver_ring::{DriverRing, Lent::Read, Lent::Write};
use crate::virtio::interrupt::Vector;
use crate::virtio::testing::{INDIRECT, NEXT, RecordedInterrupt, Ring, WRITE};
use crate::virtio::virtqueue::BYTES_PER_EVENT;

const PAGE: u64 = 0x1000;
const HEADER: u64 = 0x2000;
const STATUS: u64 = 0x3000;
const DATA: u64 = 0x4000;
const END: u64 = 0x2_0000;

/// A status that no request ends with.
const UNTOUCHED: u8 = 0xee;

struct Bench {
    memory: GuestMemoryMmap,
    ring: DriverRing,
    kick: Arc<EventFd>,
    interrupt: Arc<RecordedInterrupt>,
    block: Block,
}

impl Bench {
    /// Starts `block` with all its features but `without`.
    fn start(memory: GuestMemoryMmap, mut block: Block, without: u64) -> Self {
        let ring = DriverRing::new(&memory, PAGE);
        let interrupt = Arc::new(RecordedInterrupt::default());
        let (queue, kick) = ring.virtqueue(0, interrupt.clone());
        let activation = Activation {
            memory: GuestMemoryAtomic::new(memory.clone()),
            queues: vec![Some(queue)],
            features: block.features() & !without,
            interrupt: interrupt.clone(),
        };
        block.start(activation).unwrap();
        Self { memory, ring, kick, interrupt, block }
    }

    /// Limits the drive by a clock that stands where the test puts it, in nanoseconds.
    fn limit(&mut self, config: LimiterConfig) -> Arc<AtomicU64> {
        let clock = Arc::new(AtomicU64::new(0));
        self.block.limiter = RateLimiter::manual(config, &clock);
        clock
    }

    /// The limiter's timer fires at the time `now`.
    fn timer(&mut self, clock: &AtomicU64, now: u64) {
        clock.store(now, Ordering::Relaxed);
        let fd = self.block.event_sources()[0].fd;
        self.block.source_event(fd).unwrap();
    }

    fn used_index(&self) -> u16 {
        self.ring.ring().used_index()
    }

    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(HEADER + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Waits until `count` chains have come back since the start, as the event loop would.
    fn wait_for(&mut self, count: u16) {
        while self.used_index() != count {
            let fd = self.block.completions.as_ref().expect("nothing is in flight").as_raw_fd();
            let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: `poll` is an array of one, and lives through the call.
            assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 60_000) }, 1, "nothing ends");
            self.block.source_event(fd).unwrap();
        }
    }

    /// Serves the available chain and returns its used length.
    fn serve(&mut self) -> u32 {
        let count = self.used_index() + 1;
        self.block.queue_event(0).unwrap();
        self.wait_for(count);
        assert_eq!(self.interrupt.take(), [Vector::Queue(0)]);
        self.ring.used().unwrap().1
    }

    /// A request with `data` between header and status; returns its status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[crate::virtio::driver_ring::Lent]) -> (u8, u32) {
        self.header(kind, sector);
        let mut buffers = vec![Read(HEADER, 16)];
        buffers.extend(data);
        buffers.push(Write(STATUS, 1));
        self.ring.lend(&buffers);
        let used = self.serve();
        (self.status(), used)
    }
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), END.try_into().unwrap())]).unwrap()
}

fn config(path: &std::path::Path, read_only: bool, cache: CacheType) -> BlockConfig {
    let (limiter, engine) = (LimiterConfig::default(), IoEngine::Sync);
    BlockConfig { id: "rootfs".into(), path: path.into(), read_only, cache, engine, queues: 1, limiter }
}

/// Runs a test with each engine that this machine has.
fn with_each_engine(test: impl Fn(IoEngine)) {
    test(IoEngine::Sync);
    let file = tempfile::tempfile().unwrap();
    match Uring::new(file.as_raw_fd(), &Epoll::new().unwrap()) {
        Ok(_) => test(IoEngine::Async),
        Err(error) => eprintln!("not tried with io_uring: {}", resources::chain(&error)),
    }
}

/// A drive of four sectors, each filled with its number plus one.
fn four_sectors(read_only: bool, cache: CacheType) -> (tempfile::NamedTempFile, Bench) {
    four_sectors_by(IoEngine::Sync, read_only, cache)
}

fn four_sectors_by(engine: IoEngine, read_only: bool, cache: CacheType) -> (tempfile::NamedTempFile, Bench) {
    let file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..4u8 {
        file.as_file().write_all_at(&[sector + 1; 512], u64::from(sector) * 512).unwrap();
    }
    let config = BlockConfig { engine, ..config(file.path(), read_only, cache) };
    (file, Bench::start(memory(), Block::new(config).unwrap(), 0))
}

#[test]
fn features_and_configuration_space() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(0x1234 * 512 + 1).unwrap();
    let common = 1u64 << 32 | 1 << 29 | 1 << 2;
    let clearing = 1 << 13 | 1 << 14;
    for (read_only, cache, special) in [
        (false, CacheType::Unsafe, clearing),
        (true, CacheType::Unsafe, 1 << 5),
        (false, CacheType::Writeback, clearing | 1 << 9),
        (true, CacheType::Writeback, 1 << 5 | 1 << 9),
    ] {
        let block = Block::new(config(file.path(), read_only, cache)).unwrap();
        assert_eq!(block.features(), common | special);
        assert_eq!(block.device_type(), 2);
        assert_eq!(block.queue_max_sizes(), [256]);
        let mut expected = [0; 60];
        expected[..2].copy_from_slice(&[0x34, 0x12]);
        expected[12] = 254;
        if !read_only {
            // 1 GiB in one segment, by multiples of 4 KiB.
            (expected[38], expected[40], expected[44]) = (0x20, 1, 8);
            (expected[50], expected[52], expected[56]) = (0x20, 1, 1);
        }
        assert_eq!(block.config(), expected);
    }
    let many = BlockConfig { queues: 3, ..config(file.path(), true, CacheType::Unsafe) };
    let block = Block::new(many).unwrap();
    assert_eq!(block.features(), common | 1 << 5 | 1 << 12);
    assert_eq!(block.queue_max_sizes(), [256; 3]);
    assert_eq!(block.config()[34..36], [3, 0]);
    // Indirect tables are for those that have many requests in flight.
    let many = BlockConfig { engine: IoEngine::Async, ..config(file.path(), true, CacheType::Unsafe) };
    assert_eq!(Block::new(many).unwrap().features(), common | 1 << 5 | 1 << 28);
}

#[test]
fn reads_into_scattered_buffers() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, true, CacheType::Unsafe);
        let data = [Write(DATA, 100), Write(DATA + 0x1000, 924)];
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, &data), (0, 1025));
        assert_eq!(bench.bytes(DATA, 100), [3; 100]);
        assert_eq!(bench.bytes(DATA + 0x1000, 412), [3; 412]);
        assert_eq!(bench.bytes(DATA + 0x1000 + 412, 512), [4; 512]);
    });
}

#[test]
fn what_is_done_and_what_fails_is_counted() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, false, CacheType::Writeback);
        bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 1024)]);
        bench.request(VIRTIO_BLK_T_OUT, 1, &[Read(DATA, 512)]);
        bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
        // No request has half a header.
        bench.ring.lend(&[Read(HEADER, 8), Write(STATUS, 1)]);
        bench.serve();
        let mut counted = Vec::new();
        bench.block.counters().each(&mut |name, counter| {
            if counter.count() > 0 {
                counted.push((name, counter.count()));
            }
        });
        let expected = [
            ("queue_event_count", 4),
            ("invalid_reqs_count", 1),
            ("read_count", 1),
            ("read_bytes", 1024),
            ("write_count", 1),
            ("write_bytes", 512),
            ("flush_count", 1),
        ];
        assert_eq!(counted, expected);
    });
}

#[test]
fn writes_from_scattered_buffers() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, false, CacheType::Unsafe);
        bench.memory.write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
        let data = [Read(DATA, 1), Read(DATA, 1023)];
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 1, &data), (0, 1));
        let written = std::fs::read(file.path()).unwrap();
        assert_eq!(written, [[1; 512], [7; 512], [7; 512], [4; 512]].concat());
    });
}

#[test]
fn header_and_status_may_be_anywhere_in_the_buffers() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, true, CacheType::Unsafe);
        bench.header(VIRTIO_BLK_T_IN, 3);
        // The header in three pieces; data and status in one.
        bench.ring.lend(&[Read(HEADER, 3), Read(HEADER + 3, 6), Read(HEADER + 9, 7), Write(DATA, 513)]);
        assert_eq!(bench.serve(), 513);
        assert_eq!(bench.bytes(DATA, 513), [vec![4; 512], vec![0]].concat());
        // Header and data in one.
        let (file, mut bench) = four_sectors_by(engine, false, CacheType::Unsafe);
        bench.header(VIRTIO_BLK_T_OUT, 0);
        bench.memory.write_slice(&[9; 512], GuestAddress(HEADER + 16)).unwrap();
        bench.ring.lend(&[Read(HEADER, 528), Write(STATUS, 1)]);
        assert_eq!((bench.serve(), bench.status()), (1, 0));
        assert_eq!(std::fs::read(file.path()).unwrap()[..513], [vec![9; 512], vec![2]].concat());
    });
}

#[test]
fn transfers_out_of_bounds_fail_and_change_nothing() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, false, CacheType::Unsafe);
        let before = std::fs::read(file.path()).unwrap();
        for (sector, len) in
            [(4, 512), (3, 1024), (0, 511), (0, 513), (u64::MAX, 512), (1 << 55, 512), (5, 0)]
        {
            assert_eq!(bench.request(VIRTIO_BLK_T_IN, sector, &[Write(DATA, len)]), (1, 1), "{sector} {len}");
            assert_eq!(bench.request(VIRTIO_BLK_T_OUT, sector, &[Read(DATA, len)]), (1, 1), "{sector} {len}");
        }
        assert_eq!(bench.bytes(DATA, 512), [0; 512]);
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 4, &[]), (0, 1));
    });
}

#[test]
fn a_drive_of_no_sectors_answers() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let block = Block::new(config(file.path(), false, CacheType::Writeback)).unwrap();
    let mut bench = Bench::start(memory(), block, 0);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (1, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (1, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
}

#[test]
fn a_file_that_shrank_gives_an_error() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, true, CacheType::Unsafe);
        file.as_file().set_len(700).unwrap();
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 1024)]), (1, 1));
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (0, 513));
    });
}

#[test]
fn a_read_only_drive_is_not_written() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, true, CacheType::Unsafe);
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (1, 1));
        assert_eq!(std::fs::read(file.path()).unwrap()[..512], [1; 512]);
    });
}

#[test]
fn the_name_is_padded_and_cut_to_20_bytes() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, true, CacheType::Unsafe);
        bench.memory.write_slice(&[0xff; 32], GuestAddress(DATA)).unwrap();
        assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, &[Write(DATA, 20)]), (0, 21));
        assert_eq!(bench.bytes(DATA, 21), *b"rootfs\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff");
        assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, &[Write(DATA, 19)]), (1, 1));
        assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, &[]), (1, 1));

        bench.block.drive.id = "a-name-of-more-than-20-bytes".into();
        assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, &[Write(DATA, 32)]), (0, 21));
        assert_eq!(bench.bytes(DATA, 20), *b"a-name-of-more-than-");
    });
}

#[test]
fn other_types_are_unsupported() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, false, CacheType::Writeback);
        for kind in [2, 3, 5, 12, 14, u32::MAX] {
            assert_eq!(bench.request(kind, 0, &[Write(DATA, 512)]), (2, 1));
        }
    });
}

#[test]
fn hostile_chains_come_back_and_do_no_harm() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, false, CacheType::Writeback);
        bench.header(VIRTIO_BLK_T_IN, 0);
        // No room for a status: no length, no status.
        for buffers in [&[Read(HEADER, 16)][..], &[Read(HEADER, 16), Write(STATUS, 0)], &[Read(HEADER, 0)]] {
            bench.ring.lend(buffers);
            assert_eq!((bench.serve(), bench.status()), (0, UNTOUCHED));
        }
        // Half a header, or none.
        for buffers in [&[Read(HEADER, 15), Write(STATUS, 1)][..], &[Write(STATUS, 1)]] {
            bench.header(VIRTIO_BLK_T_IN, 0);
            bench.ring.lend(buffers);
            assert_eq!((bench.serve(), bench.status()), (1, 1));
        }
        bench.header(VIRTIO_BLK_T_IN, 0);
        // Outside of memory, across its end, at the end of the address space.
        for address in [END, END - 256, u64::MAX - 511] {
            bench.ring.lend(&[Read(HEADER, 16), Write(address, 512), Write(STATUS, 1)]);
            assert_eq!((bench.serve(), bench.status()), (0, UNTOUCHED));
            bench.ring.lend(&[Read(HEADER, 16), Write(DATA, 512), Write(address, 513)]);
            assert_eq!(bench.serve(), 0);
        }
        // Readable behind writable.
        bench.ring.lend(&[Read(HEADER, 16), Write(STATUS, 1), Read(DATA, 512)]);
        assert_eq!((bench.serve(), bench.status()), (0, UNTOUCHED));
        // A loop.
        for flags in [NEXT, NEXT | WRITE] {
            let head = bench.ring.lend(&[Read(HEADER, 16), Write(DATA, 8), Write(DATA, 8), Write(DATA, 8)]);
            for step in 0..16 {
                let at = GuestAddress(PAGE + 16 * ((u64::from(head) + step) % 16) + 12);
                bench.memory.write_obj(if step == 0 { NEXT } else { flags }, at).unwrap();
            }
            assert_eq!(bench.serve(), 0);
        }
        // An indirect table outside of memory.
        let head = bench.ring.lend(&[Read(END, 32)]);
        bench.memory.write_obj(INDIRECT, GuestAddress(PAGE + 16 * u64::from(head) + 12)).unwrap();
        assert_eq!(bench.serve(), 0);
        // It still works.
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (0, 513));
    });
}

#[test]
fn a_head_beyond_the_ring_is_an_error_of_the_device() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, false, CacheType::Unsafe);
        bench.ring.publish(16);
        assert!(matches!(bench.block.queue_event(0), Err(DeviceError::Queue(_))));
    });
}

#[test]
fn a_driver_without_a_queue_is_refused() {
    let (_file, mut bench) = four_sectors(false, CacheType::Unsafe);
    bench.block.reset();
    // Between reset and start nothing happens.
    bench.ring.lend(&[Write(STATUS, 1)]);
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.ring.ring().used_index(), 0);
    let activation = Activation {
        memory: GuestMemoryAtomic::new(memory()),
        queues: vec![None],
        features: 0,
        interrupt: bench.interrupt.clone(),
    };
    assert!(matches!(bench.block.start(activation), Err(DeviceError::Driver(_))));
}

/// What a [`FakeDisk`] was asked for, and how it answers.
#[derive(Default)]
struct Script {
    /// Each call, and how many chains had come back by then.
    calls: Vec<(&'static str, u16)>,
    /// Offset and bytes of each transfer as asked for.
    transfers: Vec<(u64, u64)>,
    /// Bytes that a transfer moves at most.
    most: Option<u64>,
    /// The error of each transfer.
    error: Option<c_int>,
    fail_flush: bool,
}

struct FakeDisk {
    memory: GuestMemoryMmap,
    script: Arc<Mutex<Script>>,
    /// For io_uring.
    fd: RawFd,
}

impl FakeDisk {
    fn record(&self, call: &'static str) {
        let used = Ring::at(&self.memory, PAGE).used_index();
        self.script.lock().unwrap().calls.push((call, used));
    }
}

impl Disk for FakeDisk {
    fn carry_out(&mut self, step: &Step<'_>) -> io::Result<u64> {
        let (name, offset, len) = match step {
            Step::Read { offset, pieces } => ("read", *offset, pieces.bytes()),
            Step::Write { offset, pieces } => ("write", *offset, pieces.bytes()),
            Step::Flush => ("flush", 0, 0),
            Step::Discard { .. } | Step::Zero { .. } => {
                return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            }
        };
        self.record(name);
        let mut script = self.script.lock().unwrap();
        if name == "flush" {
            return if script.fail_flush { Err(io::ErrorKind::StorageFull.into()) } else { Ok(0) };
        }
        script.transfers.push((offset, len));
        match script.error {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => Ok(len.min(script.most.unwrap_or(u64::MAX))),
        }
    }

    fn abilities(&self) -> Abilities {
        Abilities { discard: true, zero: true }
    }

    fn fd(&self) -> RawFd {
        self.fd
    }

    fn fallocate_mode(&self, _: &Step<'_>) -> Option<c_int> {
        None
    }
}

fn faked(cache: CacheType, without: u64) -> (Arc<Mutex<Script>>, Bench) {
    faked_by(IoEngine::Sync, -1, cache, without)
}

/// With io_uring steps go to `fd`.
fn faked_by(engine: IoEngine, fd: RawFd, cache: CacheType, without: u64) -> (Arc<Mutex<Script>>, Bench) {
    let memory = memory();
    let script = Arc::new(Mutex::new(Script::default()));
    let disk = FakeDisk { memory: memory.clone(), script: Arc::clone(&script), fd };
    let limiter = RateLimiter::new(LimiterConfig::default()).unwrap();
    let config = BlockConfig { queues: 2, ..config("fake".as_ref(), false, cache) };
    let mut block = Block::with_disk(config, Box::new(disk), 4, limiter);
    block.completions = (engine == IoEngine::Async).then(|| Epoll::new().unwrap());
    (script, Bench::start(memory, block, without))
}

#[test]
fn a_flush_comes_before_its_completion_and_after_the_writes() {
    let (script, mut bench) = faked(CacheType::Writeback, 0);
    bench.header(VIRTIO_BLK_T_OUT, 0);
    bench.memory.write_obj(VIRTIO_BLK_T_FLUSH, GuestAddress(HEADER + 0x100)).unwrap();
    bench.ring.lend(&[Read(HEADER, 16), Read(DATA, 512), Write(STATUS, 1)]);
    bench.ring.lend(&[Read(HEADER + 0x100, 16), Write(STATUS, 1)]);
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.ring.ring().used_index(), 2);
    assert_eq!(bench.status(), 0);
    assert_eq!(script.lock().unwrap().calls, [("write", 0), ("flush", 1)]);
}

#[test]
fn after_a_failed_flush_no_flush_succeeds() {
    let (script, mut bench) = faked(CacheType::Writeback, 0);
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    script.lock().unwrap().fail_flush = true;
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (1, 1));
    script.lock().unwrap().fail_flush = false;
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (1, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (0, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (0, 513));
}

#[test]
fn a_driver_without_flushes_gets_durable_writes() {
    let (script, mut bench) = faked(CacheType::Writeback, 1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (0, 1));
    assert_eq!(script.lock().unwrap().calls, [("write", 0), ("flush", 0)]);
    script.lock().unwrap().fail_flush = true;
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (1, 1));
}

#[test]
fn unsafe_means_no_flush_ever() {
    let (script, mut bench) = faked(CacheType::Unsafe, 0);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (0, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    assert_eq!(script.lock().unwrap().calls, [("write", 0)]);
}

const SECOND: u64 = 1_000_000_000;

fn bucket(size: u64) -> Option<Bucket> {
    Some(Bucket { size, refill_time_ms: 1000, one_time_burst: 0 })
}

/// Makes a read of `len` bytes of sector 0 available.
fn lend_read(bench: &mut Bench, len: u32) {
    bench.header(VIRTIO_BLK_T_IN, 0);
    bench.ring.lend(&[Read(HEADER, 16), Write(DATA, len), Write(STATUS, 1)]);
}

#[test]
fn requests_wait_in_the_ring_for_the_limiter_and_go_on_by_themselves() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, true, CacheType::Unsafe);
        let clock = bench.limit(LimiterConfig { bandwidth: bucket(1024), ops: None });
        for _ in 0..4 {
            lend_read(&mut bench, 512);
        }
        bench.block.queue_event(0).unwrap();
        bench.wait_for(2);
        assert!(!bench.interrupt.take().is_empty(), "what is done is told at once");
        assert!(bench.kick.read().is_err(), "no kick of our own while we wait");
        // Kicks, and a timer that is early, change nothing.
        clock.store(SECOND, Ordering::Relaxed);
        bench.block.queue_event(0).unwrap();
        bench.timer(&clock, SECOND / 2 - 1);
        assert_eq!(bench.used_index(), 2);
        bench.timer(&clock, SECOND / 2);
        bench.wait_for(3);
        bench.timer(&clock, SECOND);
        bench.wait_for(4);
        assert_eq!((0..4).map(|_| bench.ring.used().unwrap().1).collect::<Vec<_>>(), [513; 4]);
        // The driver is asked for kicks again.
        assert_eq!(bench.ring.ring().used_flags(), 0);
    });
}

#[test]
fn every_chain_is_an_operation() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, true, CacheType::Writeback);
        let clock = bench.limit(LimiterConfig { bandwidth: bucket(1), ops: bucket(3) });
        bench.header(VIRTIO_BLK_T_FLUSH, 0);
        bench.ring.lend(&[Read(HEADER, 16), Write(STATUS, 1)]);
        bench.ring.lend(&[Read(HEADER, 1), Write(STATUS, 1)]);
        bench.ring.lend(&[Read(u64::MAX, 16), Write(STATUS, 1)]);
        bench.ring.lend(&[Read(HEADER, 16), Write(STATUS, 1)]);
        bench.block.queue_event(0).unwrap();
        bench.wait_for(3);
        bench.timer(&clock, SECOND / 3 + 1);
        bench.wait_for(4);
    });
}

#[test]
fn a_limit_that_changes_concerns_what_waits() {
    with_each_engine(|engine| {
        let (_file, mut bench) = four_sectors_by(engine, true, CacheType::Unsafe);
        let clock = bench.limit(LimiterConfig { bandwidth: None, ops: bucket(1) });
        lend_read(&mut bench, 512);
        lend_read(&mut bench, 512);
        bench.block.queue_event(0).unwrap();
        bench.wait_for(1);
        bench.block.set_limiter(LimiterUpdate { bandwidth: None, ops: bucket(0) });
        bench.timer(&clock, 0);
        bench.wait_for(2);
    });
}

#[test]
fn a_request_that_waited_is_forgotten_with_its_driver() {
    let (_file, mut bench) = four_sectors(true, CacheType::Unsafe);
    let clock = bench.limit(LimiterConfig { bandwidth: None, ops: bucket(1) });
    lend_read(&mut bench, 512);
    lend_read(&mut bench, 512);
    bench.block.queue_event(0).unwrap();
    bench.block.reset();
    let Bench { memory, block, .. } = bench;
    let mut bench = Bench::start(memory, block, 0);
    lend_read(&mut bench, 512);
    clock.store(SECOND, Ordering::Relaxed);
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.used_index(), 1);
}

#[test]
fn one_event_moves_a_bounded_number_of_bytes() {
    let (script, mut bench) = faked(CacheType::Unsafe, 0);
    bench.block.drive.sectors = 1 << 40;
    // Half of an event's share each, from the same memory.
    for _ in 0..5 {
        lend_large(&mut bench, VIRTIO_BLK_T_IN, usize::try_from(BYTES_PER_EVENT >> 17).unwrap());
    }
    for used in [2, 4] {
        bench.block.queue_event(0).unwrap();
        assert_eq!(bench.used_index(), used);
        assert_eq!(bench.kick.read().unwrap(), 1, "the rest is left to a kick of our own");
        assert_eq!(bench.interrupt.take(), [Vector::Queue(0)]);
    }
    bench.block.queue_event(0).unwrap();
    assert_eq!((bench.used_index(), bench.status()), (5, 0));
    assert!(bench.kick.read().is_err());
    assert_eq!(script.lock().unwrap().calls.len(), 5);
}

#[test]
fn a_drive_is_opened_anew() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, true, CacheType::Unsafe);
        let sectors = |block: &Block| u64::from_le_bytes(block.config()[..8].try_into().unwrap());
        // Another file at the same path, as behind a new bind mount.
        let other = tempfile::NamedTempFile::new_in(file.path().parent().unwrap()).unwrap();
        other.as_file().write_all_at(&[9; 5 * 512 + 1], 0).unwrap();
        std::fs::rename(other.path(), file.path()).unwrap();
        bench.block.reopen(file.path()).unwrap();
        assert_eq!(sectors(&bench.block), 5);
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 4, &[Write(DATA, 512)]), (0, 513));
        assert_eq!(bench.bytes(DATA, 512), [9; 512]);
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 5, &[Write(DATA, 512)]), (1, 1));
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (1, 1), "still read-only");

        // On an error all is as before.
        let error = bench.block.reopen("/no/such/file".as_ref()).unwrap_err().to_string();
        assert!(error.contains("drive rootfs: /no/such/file does not exist"), "{error}");
        assert!(bench.block.reopen("/dev".as_ref()).is_err());
        assert_eq!(sectors(&bench.block), 5);
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 4, &[Write(DATA, 512)]), (0, 513));

        // To nothing, and from nothing.
        let empty = tempfile::NamedTempFile::new().unwrap();
        bench.block.reopen(empty.path()).unwrap();
        assert_eq!(sectors(&bench.block), 0);
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (1, 1));
        bench.block.reopen(file.path()).unwrap();
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (0, 513));
    });
}

#[test]
fn a_file_that_is_left_is_flushed_and_its_failures_with_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (cache, calls) in [(CacheType::Writeback, &["flush", "flush"][..]), (CacheType::Unsafe, &[])] {
        let (script, mut bench) = faked(cache, 0);
        script.lock().unwrap().fail_flush = true;
        bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
        bench.block.reopen(file.path()).unwrap();
        let called: Vec<_> = script.lock().unwrap().calls.iter().map(|call| call.0).collect();
        assert_eq!(called, calls);
        assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    }
}

#[test]
fn short_transfers_go_on_where_they_stopped() {
    let (script, mut bench) = faked(CacheType::Unsafe, 0);
    script.lock().unwrap().most = Some(600);
    let data = [Write(DATA, 512), Write(DATA + 0x1000, 512)];
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 1, &data), (0, 1025));
    assert_eq!(script.lock().unwrap().transfers, [(512, 1024), (1112, 424)]);
}

#[test]
fn a_transfer_that_makes_no_progress_fails() {
    let (script, mut bench) = faked(CacheType::Unsafe, 0);
    script.lock().unwrap().most = Some(0);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 1, &[Write(DATA, 512)]), (1, 1));
    assert_eq!(script.lock().unwrap().transfers, [(512, 512)]);
}

#[test]
fn a_host_that_says_try_again_is_not_tried_for_ever() {
    let (script, mut bench) = faked(CacheType::Unsafe, 0);
    script.lock().unwrap().error = Some(libc::EAGAIN);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (1, 1));
    assert_eq!(script.lock().unwrap().transfers.len(), 17);
}

#[test]
fn a_full_disk_is_an_io_error_and_no_more() {
    let (script, mut bench) = faked(CacheType::Writeback, 0);
    script.lock().unwrap().error = Some(libc::ENOSPC);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (1, 1));
    script.lock().unwrap().error = None;
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (0, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
}

/// Makes a request of `pieces` times 64 KiB from sector 0 on available, by an indirect table.
fn lend_large(bench: &mut Bench, kind: u32, pieces: usize) {
    let table = END - 0x2000;
    bench.header(kind, 0);
    let piece = if kind == VIRTIO_BLK_T_IN { Write(DATA, 0x1_0000) } else { Read(DATA, 0x1_0000) };
    let buffers = [&[Read(HEADER, 16)], &vec![piece; pieces][..], &[Write(STATUS, 1)]].concat();
    for (index, buffer) in (0u16..).zip(&buffers) {
        let (address, len, flags) = match *buffer {
            Read(address, len) => (address, len, NEXT),
            Write(address, len) => (address, len, WRITE | if address == STATUS { 0 } else { NEXT }),
        };
        let descriptor = virtio_queue::desc::split::Descriptor::new(address, len, flags, index + 1);
        bench.memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }
    let head = bench.ring.lend(&[Read(table, u32::try_from(16 * buffers.len()).unwrap())]);
    bench.memory.write_obj(INDIRECT, GuestAddress(PAGE + 16 * u64::from(head) + 12)).unwrap();
}

#[test]
fn a_huge_request_is_done_in_several_events() {
    let (script, mut bench) = faked(CacheType::Unsafe, 0);
    bench.block.drive.sectors = 1 << 40;
    lend_large(&mut bench, VIRTIO_BLK_T_OUT, 160);
    for _ in 0..2 {
        bench.block.queue_event(0).unwrap();
        assert_eq!(bench.used_index(), 0);
        assert_eq!(bench.kick.read().unwrap(), 1, "the rest is left to a kick of our own");
    }
    bench.block.queue_event(0).unwrap();
    assert_eq!((bench.used_index(), bench.status()), (1, 0));
    assert!(bench.kick.read().is_err());
    const M: u64 = 1 << 20;
    assert_eq!(script.lock().unwrap().transfers, [(0, 4 * M), (4 * M, 4 * M), (8 * M, 2 * M)]);
}

#[test]
fn a_huge_request_is_right_with_each_engine() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, false, CacheType::Unsafe);
        file.as_file().set_len(16 << 20).unwrap();
        bench.block.reopen(file.path()).unwrap();
        let pattern: Vec<u8> = (0..0x1_0000u32).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect();
        bench.memory.write_slice(&pattern, GuestAddress(DATA)).unwrap();
        lend_large(&mut bench, VIRTIO_BLK_T_OUT, 100);
        while bench.used_index() == 0 {
            bench.block.queue_event(0).unwrap();
        }
        assert_eq!(bench.status(), 0);
        let written = std::fs::read(file.path()).unwrap();
        assert!(written[..100 << 16].chunks(1 << 16).all(|chunk| chunk == pattern));
        assert!(written[100 << 16..].iter().all(|byte| *byte == 0));
    });
}

/// A discard or write-zeroes request of one segment; its status.
fn clear(bench: &mut Bench, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
    bench.memory.write_obj(sector, GuestAddress(DATA)).unwrap();
    bench.memory.write_obj(sectors, GuestAddress(DATA + 8)).unwrap();
    bench.memory.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
    let (status, used) = bench.request(kind, 0, &[Read(DATA, 16)]);
    assert_eq!(used, 1);
    status
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, false, CacheType::Writeback);
        assert_eq!(clear(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, 1, 1, 1), 0);
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes, [[1; 512], [0; 512], [3; 512], [4; 512]].concat());
        // Without the permission to unmap: where the file system has a way.
        let status = clear(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, 3, 1, 0);
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes[2 * 512..3 * 512], [3; 512]);
        assert_eq!((status, bytes[3 * 512]), if status == 0 { (0, 0) } else { (2, 4) });
        assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, 0, 4, 0), 0);
        // A hole reads as zeros.
        assert_eq!(std::fs::read(file.path()).unwrap(), [0; 2048]);
        assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, 4, 0, 0), 0, "nothing, at the very end");
    });
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, false, CacheType::Writeback);
        let before = std::fs::read(file.path()).unwrap();
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            for (sector, sectors) in
                [(0, 5), (4, 1), (u64::MAX, 1), (1 << 55, 1), (0, u32::MAX), (u64::MAX, u32::MAX), (5, 0)]
            {
                assert_eq!(clear(&mut bench, kind, sector, sectors, 0), 1, "{kind} {sector} {sectors}");
            }
            // Other flags; those that are unknown go before a range that is wrong.
            for flags in [2, u32::MAX, if kind == VIRTIO_BLK_T_DISCARD { 1 } else { 3 }] {
                assert_eq!(clear(&mut bench, kind, 0, 1, flags), 2, "{kind} {flags}");
                assert_eq!(clear(&mut bench, kind, 9, 1, flags), 2, "{kind} {flags}");
            }
            // No segment, half of one, two.
            for len in [0, 8, 15, 17, 32] {
                assert_eq!(bench.request(kind, 0, &[Read(DATA, len)]), (1, 1), "{kind} {len}");
            }
        }
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
        // More than was announced, though the drive is that large.
        bench.block.drive.sectors = 1 << 40;
        assert_eq!(clear(&mut bench, VIRTIO_BLK_T_DISCARD, 0, MAX_CLEARED_SECTORS + 1, 0), 1);
    });
}

#[test]
fn clearing_needs_the_feature_and_a_drive_that_can_be_written() {
    let (_file, mut bench) = four_sectors(true, CacheType::Unsafe);
    let (_other, without) = four_sectors(false, CacheType::Unsafe);
    let Bench { memory, mut block, .. } = without;
    block.reset();
    let mut without = Bench::start(memory, block, 1 << 13 | 1 << 14);
    // A file system that has no such thing.
    let (_script, mut unable) = faked(CacheType::Unsafe, 0);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(clear(&mut bench, kind, 0, 1, 0), 1);
        assert_eq!(clear(&mut without, kind, 0, 1, 0), 2);
        assert_eq!(clear(&mut unable, kind, 0, 1, 0), 2);
    }
}

#[test]
fn many_requests_are_served_at_once_with_one_interrupt() {
    let (script, mut bench) = faked(CacheType::Unsafe, 0);
    for _ in 0..5 {
        lend_read(&mut bench, 512);
    }
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.used_index(), 5);
    assert_eq!(bench.interrupt.take(), [Vector::Queue(0)]);
    assert_eq!(script.lock().unwrap().calls.len(), 5);
}

#[test]
fn flushes_and_writes_in_flight_together_all_end() {
    with_each_engine(|engine| {
        let (file, mut bench) = four_sectors_by(engine, false, CacheType::Writeback);
        bench.memory.write_obj(VIRTIO_BLK_T_FLUSH, GuestAddress(HEADER + 0x100)).unwrap();
        bench.memory.write_slice(&[9; 512], GuestAddress(DATA)).unwrap();
        bench.header(VIRTIO_BLK_T_OUT, 2);
        for at in 0..3 {
            let status = STATUS + at;
            bench.ring.lend(&[Read(HEADER + 0x100, 16), Write(status + 0x10, 1)]);
            bench.ring.lend(&[Read(HEADER, 16), Read(DATA, 512), Write(status, 1)]);
        }
        bench.memory.write_slice(&[UNTOUCHED; 0x20], GuestAddress(STATUS)).unwrap();
        bench.block.queue_event(0).unwrap();
        bench.wait_for(6);
        assert_eq!(bench.bytes(STATUS, 3), [0; 3]);
        assert_eq!(bench.bytes(STATUS + 0x10, 3), [0; 3]);
        assert_eq!(std::fs::read(file.path()).unwrap()[1024..1536], [9; 512]);
    });
}

#[test]
fn a_driver_without_flushes_gets_durable_writes_by_each_engine() {
    with_each_engine(|engine| {
        let (_file, bench) = four_sectors_by(engine, false, CacheType::Writeback);
        let Bench { memory, mut block, .. } = bench;
        block.reset();
        let mut bench = Bench::start(memory, block, 1 << VIRTIO_BLK_F_FLUSH);
        assert!(bench.block.drive.flush_each_write);
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (0, 1));
    });
}

#[test]
fn every_queue_is_served() {
    let (script, mut bench) = faked(CacheType::Unsafe, 0);
    let Bench { memory, mut block, .. } = bench;
    block.reset();
    let second = 0x1800;
    let mut other = DriverRing::new(&memory, second);
    bench = Bench {
        memory: memory.clone(),
        ring: DriverRing::new(&memory, PAGE),
        block,
        ..faked(CacheType::Unsafe, 0).1
    };
    let queues = [&bench.ring, &other].map(|ring| Some(ring.virtqueue(0, bench.interrupt.clone()).0));
    let activation = Activation {
        memory: GuestMemoryAtomic::new(memory),
        queues: queues.into(),
        features: bench.block.features(),
        interrupt: bench.interrupt.clone(),
    };
    bench.block.start(activation).unwrap();
    lend_read(&mut bench, 512);
    other.lend(&[Read(HEADER, 16), Write(DATA, 512), Write(STATUS, 1)]);
    bench.block.queue_event(1).unwrap();
    assert_eq!((bench.used_index(), other.ring().used_index()), (1, 1));
    assert_eq!(script.lock().unwrap().transfers.len(), 2);
}

#[test]
fn without_io_uring_requests_are_blocking() {
    // No such descriptor can be registered.
    let (script, mut bench) = faked_by(IoEngine::Async, RawFd::MAX, CacheType::Unsafe, 0);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (0, 513));
    assert_eq!(script.lock().unwrap().transfers, [(0, 512)]);
}

/// A drive whose reads end when something is written to the pipe.
fn piped() -> Option<(std::io::PipeWriter, std::io::PipeReader, Bench)> {
    let (reader, writer) = std::io::pipe().unwrap();
    if let Err(error) = Uring::new(reader.as_raw_fd(), &Epoll::new().unwrap()) {
        eprintln!("not tried: {}", resources::chain(&error));
        return None;
    }
    let (_, bench) = faked_by(IoEngine::Async, reader.as_raw_fd(), CacheType::Unsafe, 0);
    Some((writer, reader, bench))
}

#[test]
fn a_request_does_not_wait_for_one_in_flight() {
    use std::io::Write as _;
    let Some((mut pipe, _reader, mut bench)) = piped() else { return };
    let waiting = bench.ring.lend(&[Read(HEADER, 16), Write(DATA, 512), Write(STATUS, 1)]);
    bench.header(VIRTIO_BLK_T_IN, 0);
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.used_index(), 0);
    bench.memory.write_obj(VIRTIO_BLK_T_GET_ID, GuestAddress(HEADER)).unwrap();
    bench.ring.lend(&[Read(HEADER, 16), Write(DATA + 0x1000, 20), Write(STATUS + 1, 1)]);
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.used_index(), 1);
    assert_ne!(bench.ring.used().unwrap().0, waiting);
    pipe.write_all(&[5; 512]).unwrap();
    bench.wait_for(2);
    assert_eq!(bench.ring.used(), Some((waiting, 513)));
    assert_eq!(bench.bytes(DATA, 512), [5; 512]);
}

#[test]
fn after_a_reset_nothing_that_was_in_flight_touches_memory() {
    use std::io::Write as _;
    let Some((mut pipe, mut reader, mut bench)) = piped() else { return };
    // Without this the pipe would end the read, in time, on kernels that cannot cancel it.
    pipe.write_all(&[5; 100]).unwrap();
    lend_read(&mut bench, 512);
    bench.block.queue_event(0).unwrap();
    // As on a vCPU thread.
    std::thread::scope(|scope| scope.spawn(|| bench.block.reset()).join().unwrap());
    bench.memory.write_slice(&[0; 512], GuestAddress(DATA)).unwrap();
    pipe.write_all(&[6; 512]).unwrap();
    let mut left = [0; 512];
    std::io::Read::read_exact(&mut reader, &mut left).unwrap();
    assert_eq!(bench.bytes(DATA, 512), [0; 512]);
    assert_eq!((bench.used_index(), bench.status()), (0, UNTOUCHED));
}

#[test]
fn another_file_takes_over_when_nothing_is_in_flight_on_the_old_one() {
    use std::io::Write as _;
    let Some((mut pipe, _reader, mut bench)) = piped() else { return };
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&[9; 1024], 0).unwrap();
    lend_read(&mut bench, 512);
    bench.block.queue_event(0).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| pipe.write_all(&[5; 512]).unwrap());
        bench.block.reopen(file.path()).unwrap();
    });
    assert_eq!((bench.used_index(), bench.status()), (1, 0));
    assert_eq!(bench.bytes(DATA, 512), [5; 512]);
    bench.interrupt.take();
    bench.ring.used();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 1, &[Write(DATA, 512)]), (0, 513));
    assert_eq!(bench.bytes(DATA, 512), [9; 512]);
}

#[test]
fn what_is_half_done_begins_anew_on_another_file() {
    use std::io::Write as _;
    let Some((mut pipe, _reader, mut bench)) = piped() else { return };
    let (large, small) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
    large.as_file().write_all_at(&[9; 1024], 0).unwrap();
    small.as_file().write_all_at(&[9; 512], 0).unwrap();
    for (file, expected) in [(&large, (0, [9; 1024])), (&small, (1, [5; 1024]))] {
        bench.memory.write_slice(&[5; 1024], GuestAddress(DATA)).unwrap();
        lend_read(&mut bench, 1024);
        bench.block.queue_event(0).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| pipe.write_all(&[5; 512]).unwrap());
            bench.block.reopen(file.path()).unwrap();
        });
        assert_eq!(bench.kick.read().unwrap(), 1, "the serving thread goes on");
        let count = bench.used_index().max(1);
        bench.block.queue_event(0).unwrap();
        bench.wait_for(count);
        assert_eq!(bench.status(), expected.0);
        assert_eq!(bench.bytes(DATA, 1024), expected.1);
        let Some(again) = piped() else { return };
        (pipe, _, bench) = again;
    }
}
