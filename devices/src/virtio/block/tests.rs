use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::rate_limiter::Bucket;
use crate::virtio::driver_ring::{DriverRing, Lent::Read, Lent::Write};
use crate::virtio::interrupt::Vector;
use crate::virtio::testing::{INDIRECT, NEXT, RecordedInterrupt, Ring, WRITE};

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

    /// Serves what is available and returns the used length of the next chain.
    fn serve(&mut self) -> u32 {
        self.block.queue_event(0).unwrap();
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
    let limiter = LimiterConfig::default();
    BlockConfig { id: "rootfs".into(), path: path.into(), read_only, cache, limiter }
}

/// A drive of four sectors, each filled with its number plus one.
fn four_sectors(read_only: bool, cache: CacheType) -> (tempfile::NamedTempFile, Bench) {
    let file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..4u8 {
        file.as_file().write_all_at(&[sector + 1; 512], u64::from(sector) * 512).unwrap();
    }
    let block = Block::new(config(file.path(), read_only, cache)).unwrap();
    (file, Bench::start(memory(), block, 0))
}

#[test]
fn features_and_configuration_space() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(0x1234 * 512 + 1).unwrap();
    let common = 1u64 << 32 | 1 << 29 | 1 << 28 | 1 << 2;
    for (read_only, cache, special) in [
        (false, CacheType::Unsafe, 0),
        (true, CacheType::Unsafe, 1 << 5),
        (false, CacheType::Writeback, 1 << 9),
        (true, CacheType::Writeback, 1 << 5 | 1 << 9),
    ] {
        let block = Block::new(config(file.path(), read_only, cache)).unwrap();
        assert_eq!(block.features(), common | special);
        assert_eq!(block.device_type(), 2);
        assert_eq!(block.queue_max_sizes(), [256]);
        assert_eq!(block.config(), [0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 254, 0, 0, 0]);
    }
}

#[test]
fn reads_into_scattered_buffers() {
    let (_file, mut bench) = four_sectors(true, CacheType::Unsafe);
    let data = [Write(DATA, 100), Write(DATA + 0x1000, 924)];
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, &data), (0, 1025));
    assert_eq!(bench.bytes(DATA, 100), [3; 100]);
    assert_eq!(bench.bytes(DATA + 0x1000, 412), [3; 412]);
    assert_eq!(bench.bytes(DATA + 0x1000 + 412, 512), [4; 512]);
}

#[test]
fn writes_from_scattered_buffers() {
    let (file, mut bench) = four_sectors(false, CacheType::Unsafe);
    bench.memory.write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
    let data = [Read(DATA, 1), Read(DATA, 1023)];
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 1, &data), (0, 1));
    let written = std::fs::read(file.path()).unwrap();
    assert_eq!(written, [[1; 512], [7; 512], [7; 512], [4; 512]].concat());
}

#[test]
fn header_and_status_may_be_anywhere_in_the_buffers() {
    let (_file, mut bench) = four_sectors(true, CacheType::Unsafe);
    bench.header(VIRTIO_BLK_T_IN, 3);
    // The header in three pieces; data and status in one.
    bench.ring.lend(&[Read(HEADER, 3), Read(HEADER + 3, 6), Read(HEADER + 9, 7), Write(DATA, 513)]);
    assert_eq!(bench.serve(), 513);
    assert_eq!(bench.bytes(DATA, 513), [vec![4; 512], vec![0]].concat());
    // Header and data in one.
    let (file, mut bench) = four_sectors(false, CacheType::Unsafe);
    bench.header(VIRTIO_BLK_T_OUT, 0);
    bench.memory.write_slice(&[9; 512], GuestAddress(HEADER + 16)).unwrap();
    bench.ring.lend(&[Read(HEADER, 528), Write(STATUS, 1)]);
    assert_eq!((bench.serve(), bench.status()), (1, 0));
    assert_eq!(std::fs::read(file.path()).unwrap()[..513], [vec![9; 512], vec![2]].concat());
}

#[test]
fn transfers_out_of_bounds_fail_and_change_nothing() {
    let (file, mut bench) = four_sectors(false, CacheType::Unsafe);
    let before = std::fs::read(file.path()).unwrap();
    for (sector, len) in [(4, 512), (3, 1024), (0, 511), (0, 513), (u64::MAX, 512), (1 << 55, 512), (5, 0)] {
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, sector, &[Write(DATA, len)]), (1, 1), "{sector} {len}");
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, sector, &[Read(DATA, len)]), (1, 1), "{sector} {len}");
    }
    assert_eq!(bench.bytes(DATA, 512), [0; 512]);
    assert_eq!(std::fs::read(file.path()).unwrap(), before);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 4, &[]), (0, 1));
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
    let (file, mut bench) = four_sectors(true, CacheType::Unsafe);
    file.as_file().set_len(700).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 1024)]), (1, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[Write(DATA, 512)]), (0, 513));
}

#[test]
fn a_read_only_drive_is_not_written() {
    let (file, mut bench) = four_sectors(true, CacheType::Unsafe);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[Read(DATA, 512)]), (1, 1));
    assert_eq!(std::fs::read(file.path()).unwrap()[..512], [1; 512]);
}

#[test]
fn the_name_is_padded_and_cut_to_20_bytes() {
    let (_file, mut bench) = four_sectors(true, CacheType::Unsafe);
    bench.memory.write_slice(&[0xff; 32], GuestAddress(DATA)).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, &[Write(DATA, 20)]), (0, 21));
    assert_eq!(bench.bytes(DATA, 21), *b"rootfs\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff");
    assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, &[Write(DATA, 19)]), (1, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, &[]), (1, 1));

    bench.block.drive.id = "a-name-of-more-than-20-bytes".into();
    assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, &[Write(DATA, 32)]), (0, 21));
    assert_eq!(bench.bytes(DATA, 20), *b"a-name-of-more-than-");
}

#[test]
fn other_types_are_unsupported() {
    let (_file, mut bench) = four_sectors(false, CacheType::Writeback);
    for kind in [2, 3, 5, VIRTIO_BLK_T_DISCARD, u32::MAX] {
        assert_eq!(bench.request(kind, 0, &[Write(DATA, 512)]), (2, 1));
    }
}

#[test]
fn hostile_chains_come_back_and_do_no_harm() {
    let (_file, mut bench) = four_sectors(false, CacheType::Writeback);
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
}

#[test]
fn a_head_beyond_the_ring_is_an_error_of_the_device() {
    let (_file, mut bench) = four_sectors(false, CacheType::Unsafe);
    bench.ring.publish(16);
    assert!(matches!(bench.block.queue_event(0), Err(DeviceError::Queue(_))));
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

/// What a [`FakeDisk`] was asked for, and how many chains had come back by then.
#[derive(Default)]
struct Script {
    calls: Vec<(&'static str, u16)>,
    fail_flush: bool,
}

struct FakeDisk {
    memory: GuestMemoryMmap,
    script: Arc<Mutex<Script>>,
}

impl FakeDisk {
    fn record(&self, call: &'static str) {
        let used = Ring::at(&self.memory, PAGE).used_index();
        self.script.lock().unwrap().calls.push((call, used));
    }
}

impl Disk for FakeDisk {
    fn read(&mut self, _: u64, _: &ChainBuffers<'_>, _: u32) -> io::Result<()> {
        self.record("read");
        Ok(())
    }

    fn write(&mut self, _: u64, _: &ChainBuffers<'_>, _: u32, _: u32) -> io::Result<()> {
        self.record("write");
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.record("flush");
        if self.script.lock().unwrap().fail_flush { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

fn faked(cache: CacheType, without: u64) -> (Arc<Mutex<Script>>, Bench) {
    let memory = memory();
    let script = Arc::new(Mutex::new(Script::default()));
    let disk = FakeDisk { memory: memory.clone(), script: Arc::clone(&script) };
    let limiter = RateLimiter::new(LimiterConfig::default()).unwrap();
    let block = Block::with_disk(config("fake".as_ref(), false, cache), Box::new(disk), 4, limiter);
    (script, Bench::start(memory, block, without))
}

#[test]
fn a_flush_comes_before_its_completion_and_after_the_writes() {
    let (script, mut bench) = faked(CacheType::Writeback, 0);
    bench.header(VIRTIO_BLK_T_OUT, 0);
    bench.memory.write_obj(VIRTIO_BLK_T_FLUSH, GuestAddress(HEADER + 0x100)).unwrap();
    bench.ring.lend(&[Read(HEADER, 16), Read(DATA, 512), Write(STATUS, 1)]);
    bench.ring.lend(&[Read(HEADER + 0x100, 16), Write(STATUS, 1)]);
    bench.serve();
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
    let (_file, mut bench) = four_sectors(true, CacheType::Unsafe);
    let clock = bench.limit(LimiterConfig { bandwidth: bucket(1024), ops: None });
    for _ in 0..4 {
        lend_read(&mut bench, 512);
    }
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.used_index(), 2);
    assert_eq!(bench.interrupt.take(), [Vector::Queue(0)], "what is done is told at once");
    assert!(bench.kick.read().is_err(), "no kick of our own while we wait");
    // Kicks, and a timer that is early, change nothing.
    clock.store(SECOND, Ordering::Relaxed);
    bench.block.queue_event(0).unwrap();
    bench.timer(&clock, SECOND / 2 - 1);
    assert_eq!(bench.used_index(), 2);
    bench.timer(&clock, SECOND / 2);
    assert_eq!(bench.used_index(), 3);
    bench.timer(&clock, SECOND);
    assert_eq!(bench.used_index(), 4);
    assert_eq!((0..4).map(|_| bench.ring.used().unwrap().1).collect::<Vec<_>>(), [513; 4]);
    // The driver is asked for kicks again.
    assert_eq!(bench.ring.ring().used_flags(), 0);
}

#[test]
fn every_chain_is_an_operation() {
    let (_file, mut bench) = four_sectors(true, CacheType::Writeback);
    let clock = bench.limit(LimiterConfig { bandwidth: bucket(1), ops: bucket(3) });
    bench.header(VIRTIO_BLK_T_FLUSH, 0);
    bench.ring.lend(&[Read(HEADER, 16), Write(STATUS, 1)]);
    bench.ring.lend(&[Read(HEADER, 1), Write(STATUS, 1)]);
    bench.ring.lend(&[Read(u64::MAX, 16), Write(STATUS, 1)]);
    bench.ring.lend(&[Read(HEADER, 16), Write(STATUS, 1)]);
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.used_index(), 3);
    bench.timer(&clock, SECOND / 3 + 1);
    assert_eq!(bench.used_index(), 4);
}

#[test]
fn a_limit_that_changes_concerns_what_waits() {
    let (_file, mut bench) = four_sectors(true, CacheType::Unsafe);
    let clock = bench.limit(LimiterConfig { bandwidth: None, ops: bucket(1) });
    lend_read(&mut bench, 512);
    lend_read(&mut bench, 512);
    bench.block.queue_event(0).unwrap();
    assert_eq!(bench.used_index(), 1);
    bench.block.set_limiter(LimiterUpdate { bandwidth: None, ops: bucket(0) });
    bench.timer(&clock, 0);
    assert_eq!(bench.used_index(), 2);
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
    bench.block.set_sectors(1 << 40);
    // Half of an event's share each, from the same memory.
    let pieces = vec![Write(DATA, 0x1_0000); usize::try_from(BYTES_PER_EVENT >> 17).unwrap()];
    let table = END - 0x1000;
    bench.header(VIRTIO_BLK_T_IN, 0);
    let buffers = [&[Read(HEADER, 16)], &pieces[..], &[Write(STATUS, 1)]].concat();
    for (index, buffer) in (0u16..).zip(&buffers) {
        let (address, len, flags) = match *buffer {
            Read(address, len) => (address, len, NEXT),
            Write(address, len) => (address, len, WRITE | if address == STATUS { 0 } else { NEXT }),
        };
        let descriptor = virtio_queue::desc::split::Descriptor::new(address, len, flags, index + 1);
        bench.memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }
    let table_len = u32::try_from(16 * buffers.len()).unwrap();
    for _ in 0..5 {
        let head = bench.ring.lend(&[Read(table, table_len)]);
        bench.memory.write_obj(INDIRECT, GuestAddress(PAGE + 16 * u64::from(head) + 12)).unwrap();
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
    let (file, mut bench) = four_sectors(true, CacheType::Unsafe);
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
