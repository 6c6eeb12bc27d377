use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::driver_ring::{DriverRing, Lent, Lent::Read, Lent::Write};
use crate::virtio::interrupt::Vector;
use crate::virtio::slot::Slot;
use crate::virtio::testing::{INDIRECT, RecordedInterrupt, Ring};
use crate::virtio::worker::Worker;

const PAGE: u64 = 0x1000;
/// Where page numbers and statistics are put.
const BUFFER: u64 = 0x8000;
/// Memory that is given away: pages from here to [`END`] hold their own number.
const FIRST: u64 = 0x10;
/// A border between two regions that follow each other.
const BORDER: u64 = 0x80;
/// The first page behind memory.
const END: u64 = 0x100;

/// How a driver numbers its queues: each is at the index, or absent.
struct Layout {
    stats: Option<usize>,
    reporting: Option<usize>,
}

struct Bench {
    memory: GuestMemoryMmap,
    rings: Vec<DriverRing>,
    kicks: Vec<Arc<EventFd>>,
    interrupt: Arc<RecordedInterrupt>,
    balloon: Balloon,
}

impl Bench {
    /// Starts a balloon with all that it offers.
    fn new(config: BalloonConfig) -> Self {
        let middle = GuestAddress(BORDER * PAGE);
        let half = usize::try_from(BORDER * PAGE).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (middle, half)]).unwrap();
        for page in FIRST..END {
            memory.write_slice(&page.to_le_bytes().repeat(512), GuestAddress(page * PAGE)).unwrap();
        }
        let balloon = Balloon::new(config).unwrap();
        let (rings, kicks, interrupt) = (Vec::new(), Vec::new(), Arc::default());
        let mut bench = Self { memory, rings, kicks, interrupt, balloon };
        let features = bench.balloon.features();
        bench.start(
            features,
            &Layout {
                stats: (features & F_STATS_VQ != 0).then_some(2),
                reporting: (features & F_REPORTING != 0).then_some(4),
            },
        );
        bench
    }

    /// Starts the device on empty rings.
    fn start(&mut self, features: u64, layout: &Layout) {
        self.rings = (1..=5).map(|index| DriverRing::new(&self.memory, index * PAGE)).collect();
        self.kicks.clear();
        let mut queues = Vec::new();
        for index in 0..self.balloon.queue_max_sizes().len() {
            let number = u16::try_from(index).unwrap();
            let (queue, kick) = self.rings[index].virtqueue(number, self.interrupt.clone());
            self.kicks.push(kick);
            let there = index < 2 || [layout.stats, layout.reporting].contains(&Some(index));
            queues.push(there.then_some(queue));
        }
        let activation = self.activation(queues, features);
        self.balloon.start(activation).unwrap();
    }

    fn activation(&self, queues: Vec<Option<Virtqueue>>, features: u64) -> Activation {
        let memory = GuestMemoryAtomic::new(self.memory.clone());
        Activation { memory, queues, features, interrupt: self.interrupt.clone() }
    }

    /// Serves queue `index` until it rests, and returns how many turns that took.
    fn serve(&mut self, index: usize) -> usize {
        for turns in 1..100 {
            self.balloon.queue_event(index).unwrap();
            if self.kicks[index].read().is_err() {
                return turns;
            }
        }
        panic!("queue {index} does not come to rest");
    }

    /// Has one chain served; it comes back with nothing written into it.
    fn request(&mut self, index: usize, buffers: &[Lent]) {
        let head = self.rings[index].lend(buffers);
        self.serve(index);
        assert_eq!(self.interrupt.take(), [Vector::Queue(u16::try_from(index).unwrap())]);
        assert_eq!(self.rings[index].used(), Some((head, 0)));
    }

    /// Puts page numbers into memory.
    fn numbers(&self, numbers: &[u32]) -> Lent {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
        Read(BUFFER, u32::try_from(bytes.len()).unwrap())
    }

    fn inflate(&mut self, numbers: &[u32]) {
        let buffer = self.numbers(numbers);
        self.request(INFLATE, &[buffer]);
    }

    /// The pages that the host has taken back. Asks it before it reads them, which brings them back; all others
    /// must hold what they held.
    fn discarded(&self) -> Vec<u64> {
        let mut discarded = Vec::new();
        for page in FIRST..END {
            let address = GuestAddress(page * PAGE);
            let resident = self.is_resident(page);
            let mut bytes = [0; 4096];
            self.memory.read_slice(&mut bytes, address).unwrap();
            if bytes == [0; 4096] {
                assert!(!resident, "page {page:#x}");
                discarded.push(page);
            } else {
                assert_eq!(bytes.to_vec(), page.to_le_bytes().repeat(512), "page {page:#x}");
            }
        }
        discarded
    }

    fn is_resident(&self, page: u64) -> bool {
        let slice = self.memory.get_slice(GuestAddress(page * PAGE), 4096).unwrap();
        let mut resident = 0u8;
        // SAFETY: mincore reads no memory of the mapping, and writes one byte for one page.
        let result = unsafe { libc::mincore(slice.ptr_guard_mut().as_ptr().cast(), 4096, &mut resident) };
        assert_eq!(result, 0);
        resident & 1 != 0
    }

    /// Puts records of statistics into memory, followed by `rest`.
    fn records(&self, records: &[(u16, u64)], rest: &[u8]) -> Lent {
        let mut bytes = Vec::new();
        for (tag, value) in records {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend(rest);
        self.memory.write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
        Read(BUFFER, u32::try_from(bytes.len()).unwrap())
    }

    /// Lends a buffer of statistics, which does not come back.
    fn say(&mut self, buffers: &[Lent]) -> u16 {
        let head = self.rings[2].lend(buffers);
        self.serve(2);
        assert_eq!(self.interrupt.take(), []);
        assert_eq!(self.rings[2].used(), None);
        head
    }

    /// Waits for the timer at most so long, and says whether it expired.
    fn wait(&self, timeout_ms: i32) -> bool {
        let fd = self.balloon.event_sources()[0].fd;
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which lives here.
        let ready = unsafe { libc::poll(&mut poll, 1, timeout_ms) };
        assert!(ready >= 0);
        ready == 1
    }

    fn is_armed(&self) -> bool {
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let mut left = libc::itimerspec { it_interval: zero, it_value: zero };
        // SAFETY: the structure lives here.
        let result = unsafe { libc::timerfd_gettime(self.balloon.event_sources()[0].fd, &mut left) };
        assert_eq!(result, 0);
        (left.it_value.tv_sec, left.it_value.tv_nsec) != (0, 0)
    }

    fn tick(&mut self) {
        let fd = self.balloon.event_sources()[0].fd;
        self.balloon.source_event(fd).unwrap();
    }
}

fn plain() -> Bench {
    Bench::new(BalloonConfig::default())
}

fn reporting() -> Bench {
    Bench::new(BalloonConfig { free_page_reporting: true, ..Default::default() })
}

fn with_stats(stats_polling_interval_s: u16) -> Bench {
    Bench::new(BalloonConfig { stats_polling_interval_s, ..Default::default() })
}

#[test]
fn features_and_queues_follow_the_configuration() {
    let common = 1u64 << 32 | 1 << 29 | 1 << 28;
    let off = BalloonConfig::default();
    for (config, special, queues) in [
        (off, 0, 2),
        (BalloonConfig { deflate_on_oom: true, ..off }, 1 << 2, 2),
        (BalloonConfig { stats_polling_interval_s: 1, ..off }, 1 << 1, 3),
        (BalloonConfig { free_page_reporting: true, ..off }, 1 << 5, 5),
        (
            BalloonConfig {
                amount_mib: 3,
                deflate_on_oom: true,
                stats_polling_interval_s: u16::MAX,
                free_page_reporting: true,
            },
            1 << 1 | 1 << 2 | 1 << 5,
            5,
        ),
    ] {
        let balloon = Balloon::new(config).unwrap();
        assert_eq!(balloon.device_type(), 5);
        assert_eq!(balloon.features(), common | special);
        assert_eq!(balloon.queue_max_sizes(), vec![256; queues]);
        assert_eq!(balloon.event_sources().len(), usize::from(config.stats_polling_interval_s > 0));
    }
}

#[test]
fn the_configuration_space_has_target_and_actual_size() {
    let mut balloon = Balloon::new(BalloonConfig { amount_mib: 0x201, ..Default::default() }).unwrap();
    assert_eq!(balloon.config(), [0, 1, 2, 0, 0, 0, 0, 0]);
    balloon.write_config(4, &[0xff, 4, 3, 0]);
    assert_eq!(balloon.config(), [0, 1, 2, 0, 0xff, 4, 3, 0]);
    assert_eq!((balloon.amount_mib(), balloon.actual_mib()), (0x201, 0x304));
    // Nothing else can be written.
    for (offset, len) in [(0, 4), (0, 8), (4, 1), (4, 3), (5, 3), (7, 1), (4, 0)] {
        balloon.write_config(offset, &[9; 8][..len]);
        assert_eq!(balloon.config(), [0, 1, 2, 0, 0xff, 4, 3, 0]);
    }
}

#[test]
fn the_size_changes_up_to_what_can_be_counted() {
    let mut balloon = Balloon::new(BalloonConfig::default()).unwrap();
    balloon.set_amount_mib(0xff_ffff).unwrap();
    assert_eq!(balloon.config(), [0, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let error = balloon.set_amount_mib(0x100_0000).unwrap_err();
    assert!(error.to_string().contains("16777216"), "{error}");
    assert_eq!(balloon.amount_mib(), 0xff_ffff);
    balloon.set_amount_mib(1).unwrap();
    assert_eq!(balloon.config(), [0, 1, 0, 0, 0, 0, 0, 0]);
    let config = BalloonConfig { amount_mib: u32::MAX, ..Default::default() };
    assert!(matches!(Balloon::new(config), Err(BalloonError::TooLarge { amount_mib: u32::MAX })));
}

#[test]
fn inflating_gives_just_the_named_pages_back() {
    let mut bench = plain();
    assert!(bench.discarded().is_empty());
    // Out of order, one twice, across the border of regions.
    bench.inflate(&[0x81, 0x20, 0x7f, 0x22, 0x80, 0x20, 0xff]);
    assert_eq!(bench.discarded(), [0x20, 0x22, 0x7f, 0x80, 0x81, 0xff]);
    // In pieces, with part of a number at the end.
    bench.numbers(&[0x30, 0x31, 0x32]);
    bench.request(INFLATE, &[Read(BUFFER, 3), Read(BUFFER + 3, 0), Read(BUFFER + 3, 6)]);
    bench.memory.write_slice(&[1; 8], GuestAddress(0x20 * PAGE)).unwrap();
    bench.memory.write_slice(&[0; 8], GuestAddress(0x20 * PAGE)).unwrap();
    assert!(bench.is_resident(0x20));
    bench.inflate(&[0x20]);
    // The others came back when they were read, and hold nothing.
    for page in [0x22, 0x7f, 0x80, 0x81, 0xff] {
        bench.inflate(&[page]);
    }
    assert_eq!(bench.discarded(), [0x20, 0x22, 0x30, 0x31, 0x7f, 0x80, 0x81, 0xff]);
}

#[test]
fn pages_outside_of_memory_are_passed_over() {
    let mut bench = plain();
    bench.inflate(&[0x100, 0x50, u32::MAX, 0x51, 0x8000_0000]);
    assert_eq!(bench.discarded(), [0x50, 0x51]);
    bench.inflate(&[0x100]);
    bench.inflate(&[]);
}

#[test]
fn hostile_chains_come_back_and_do_no_harm() {
    let mut bench = plain();
    bench.numbers(&[0x50]);
    for buffers in [
        &[Write(BUFFER, 4)][..],
        &[Write(BUFFER, 4), Read(BUFFER, 4)],
        &[Read(BUFFER, 4), Read(END * PAGE, 4)],
        &[Read(u64::MAX - 3, 4)],
        &[Read(BUFFER, 3)],
        &[Read(BUFFER, 0)],
    ] {
        bench.request(INFLATE, buffers);
    }
    assert!(bench.discarded().is_empty());
    bench.inflate(&[0x50]);
    assert_eq!(bench.discarded(), [0x50]);
    for queue in [INFLATE, DEFLATE] {
        bench.rings[queue].publish(Ring::SIZE);
        assert!(matches!(bench.balloon.queue_event(queue), Err(DeviceError::Queue(_))));
    }
}

#[test]
fn of_too_many_page_numbers_the_first_are_taken() {
    let mut bench = plain();
    // 1024 times one page, then another one.
    bench.numbers(&[0x50; 1024]);
    bench.memory.write_obj(0x60u32, GuestAddress(BUFFER + 0x1000)).unwrap();
    bench.request(INFLATE, &[Read(BUFFER, 4096), Read(BUFFER + 0x1000, 4)]);
    assert_eq!(bench.discarded(), [0x50]);
}

#[test]
fn a_long_chain_is_done_in_turns_and_returned_at_the_end() {
    // 16 times the same 112 pages, none next to the other.
    let mut bench = plain();
    let numbers: Vec<u32> = (0x10..0x80).step_by(2).chain((0x81..0xf1).step_by(2)).collect();
    let Read(address, len) = bench.numbers(&numbers) else { panic!() };
    for _ in 0..16 {
        bench.rings[INFLATE].lend(&[Read(address, len)]);
    }
    bench.balloon.queue_event(INFLATE).unwrap();
    assert_eq!(bench.rings[INFLATE].ring().used_index(), 4);
    assert_eq!(bench.kicks[INFLATE].read().unwrap(), 1);
    // 16 * (112 + 1) steps and one that finds nothing, 512 at a time.
    assert_eq!(bench.serve(INFLATE), 3);
    assert_eq!(bench.rings[INFLATE].ring().used_index(), 16);
    assert_eq!(bench.discarded().len(), 112);

    // What was left of a chain when the driver reset the device is forgotten.
    for _ in 0..16 {
        bench.rings[INFLATE].lend(&[Read(address, len)]);
    }
    bench.balloon.queue_event(INFLATE).unwrap();
    bench.balloon.reset();
    let features = bench.balloon.features();
    bench.start(features, &Layout { stats: None, reporting: None });
    bench.memory.write_slice(&0x10u64.to_le_bytes().repeat(512), GuestAddress(0x10 * PAGE)).unwrap();
    bench.balloon.queue_event(INFLATE).unwrap();
    assert_eq!(bench.rings[INFLATE].ring().used_index(), 0);
    assert!(bench.is_resident(0x10));
}

#[test]
fn deflating_is_acknowledged() {
    let mut bench = plain();
    bench.inflate(&[0x20]);
    let buffer = bench.numbers(&[0x20, u32::MAX]);
    bench.request(DEFLATE, &[buffer]);
    bench.request(DEFLATE, &[Write(u64::MAX, 1)]);
    assert_eq!(bench.discarded(), [0x20]);
}

#[test]
fn reported_pages_are_given_back() {
    let mut bench = reporting();
    let pages = |first: u64, count: u32| Write(first * PAGE, count * 4096);
    bench.request(4, &[pages(0x20, 2), pages(0x7f, 2), pages(0xff, 1)]);
    assert_eq!(bench.discarded(), [0x20, 0x21, 0x7f, 0x80, 0xff]);
}

#[test]
fn only_whole_writable_pages_in_memory_are_given_back() {
    let mut bench = reporting();
    bench.request(
        4,
        &[
            // One whole page among parts, no whole page, nothing.
            Write(0x20 * PAGE + 1, 0x2ffe),
            Write(0x30 * PAGE + 1, 0x1ffe),
            Write(0x38 * PAGE, 0xfff),
            Write(0x40 * PAGE, 0),
            Write(u64::MAX, 0),
            // Not all in memory.
            Write(0xff * PAGE, 0x2000),
            Write(u64::MAX - 0xfff, 0x1000),
            Write(0x50 * PAGE, u32::MAX - 0x2_0000),
            // Still in order.
            Write(0x60 * PAGE, 0x1000),
        ],
    );
    assert_eq!(bench.discarded(), [0x21, 0x60]);
    bench.request(4, &[Read(0x70 * PAGE, 0x1000)]);
    assert!(bench.is_resident(0x70));
    // An indirect table outside of memory.
    let head = bench.rings[4].lend(&[Read(END * PAGE, 32)]);
    bench.rings[4].ring().store(head, Descriptor::new(END * PAGE, 32, INDIRECT, 0));
    bench.serve(4);
    assert_eq!(bench.rings[4].used(), Some((head, 0)));
}

#[test]
fn large_ranges_are_given_back_in_pieces() {
    let mut ranges = vec![0x10_0000..0x10_1000, 0x3f_f000..0x80_1000];
    let mut pieces = Vec::new();
    while let Some(piece) = discard::next_piece(&mut ranges) {
        pieces.push(piece);
    }
    let expected = [
        0x3f_f000..0x40_0000,
        0x40_0000..0x60_0000,
        0x60_0000..0x80_0000,
        0x80_0000..0x80_1000,
        0x10_0000..0x10_1000,
    ];
    assert_eq!(pieces, expected);
}

#[test]
fn the_reporting_queue_is_found_where_the_driver_put_it() {
    let config =
        BalloonConfig { stats_polling_interval_s: 100, free_page_reporting: true, ..Default::default() };
    let mut bench = Bench::new(config);
    let all = bench.balloon.features();
    for (features, stats, index) in [
        (all, Some(2), 4),
        // As Linux does.
        (all, Some(2), 3),
        (all & !F_STATS_VQ, None, 2),
        (all & !F_STATS_VQ, None, 4),
    ] {
        bench.balloon.reset();
        bench.start(features, &Layout { stats, reporting: Some(index) });
        bench.memory.write_slice(&[1; 4096], GuestAddress(0x50 * PAGE)).unwrap();
        bench.request(index, &[Write(0x50 * PAGE, 0x1000)]);
        assert!(!bench.is_resident(0x50), "{index}");
        if stats.is_some() {
            let buffer = bench.records(&[(4, 9)], &[]);
            bench.say(&[buffer]);
            assert_eq!(bench.balloon.stats().unwrap().free_memory, Some(9));
        }
    }
    // A driver that did not accept reports gives nothing away.
    bench.balloon.reset();
    bench.start(all & !F_REPORTING, &Layout { stats: Some(2), reporting: Some(4) });
    bench.memory.write_slice(&[1; 4096], GuestAddress(0x50 * PAGE)).unwrap();
    bench.rings[4].lend(&[Write(0x50 * PAGE, 0x1000)]);
    bench.serve(4);
    assert!(bench.is_resident(0x50));
}

#[test]
fn statistics_are_what_the_driver_said_last() {
    let mut bench = with_stats(1);
    bench.balloon.set_amount_mib(5).unwrap();
    bench.balloon.write_config(4, &0x2ffu32.to_le_bytes());
    let sizes = Stats {
        target_pages: 0x500,
        actual_pages: 0x2ff,
        target_mib: 5,
        actual_mib: 2,
        ..Default::default()
    };
    assert_eq!(bench.balloon.stats(), Some(sizes));

    let records: Vec<_> = (0..18).map(|tag| (tag, 1000 + u64::from(tag))).collect();
    let buffer = bench.records(&records, &[4, 0, 1]);
    let head = bench.say(&[buffer]);
    let all = Stats {
        swap_in: Some(1000),
        swap_out: Some(1001),
        major_faults: Some(1002),
        minor_faults: Some(1003),
        free_memory: Some(1004),
        total_memory: Some(1005),
        available_memory: Some(1006),
        disk_caches: Some(1007),
        hugetlb_allocations: Some(1008),
        hugetlb_failures: Some(1009),
        oom_kill: Some(1010),
        alloc_stall: Some(1011),
        async_scan: Some(1012),
        direct_scan: Some(1013),
        async_reclaim: Some(1014),
        direct_reclaim: Some(1015),
        ..sizes
    };
    assert_eq!(bench.balloon.stats(), Some(all));

    // The timer has the buffer returned, and the driver fills it anew.
    assert!(bench.wait(60_000));
    bench.tick();
    assert_eq!(bench.interrupt.take(), [Vector::Queue(2)]);
    assert_eq!(bench.rings[2].used(), Some((head, 0)));
    let buffer = bench.records(&[(4, u64::MAX), (u16::MAX, 1), (5, 1), (5, 2)], &[]);
    let head = bench.say(&[buffer]);
    let fewer = Stats { free_memory: Some(u64::MAX), total_memory: Some(2), ..sizes };
    assert_eq!(bench.balloon.stats(), Some(fewer));

    // An event that comes too early neither waits nor does anything.
    bench.balloon.set_stats_polling_interval_s(u16::MAX).unwrap();
    bench.tick();
    assert_eq!(bench.rings[2].used(), None);
    // With a shorter interval it comes again, even if the driver has no buffer there.
    bench.balloon.set_stats_polling_interval_s(1).unwrap();
    assert!(bench.wait(60_000));
    bench.tick();
    assert_eq!(bench.rings[2].used(), Some((head, 0)));
    assert!(bench.wait(60_000));
    bench.tick();
    assert_eq!((bench.rings[2].used(), bench.balloon.stats()), (None, Some(fewer)));
}

#[test]
fn hostile_statistics_do_no_harm() {
    let mut bench = with_stats(100);
    let buffer = bench.records(&[(4, 7)], &[]);
    let first = bench.say(&[buffer]);
    let said = bench.balloon.stats();
    // A second buffer sends the first one back, and so on; a bad one is kept like any other.
    let mut older = first;
    for buffers in [&[Read(BUFFER, 10), Read(END * PAGE, 10)][..], &[Write(BUFFER, 10), Read(BUFFER, 10)]] {
        let head = bench.rings[2].lend(buffers);
        bench.serve(2);
        assert_eq!((bench.rings[2].used(), bench.rings[2].used()), (Some((older, 0)), None));
        assert_eq!(bench.balloon.stats(), said);
        older = head;
    }
    // Too short for anything; longer than anything looked at.
    for (len, free_memory) in [(9, None), (0x7_0000, Some(7)), (0, None)] {
        let head = bench.rings[2].lend(&[Read(BUFFER, len)]);
        bench.serve(2);
        assert_eq!(bench.rings[2].used(), Some((older, 0)));
        assert_eq!(bench.balloon.stats().unwrap().free_memory, free_memory);
        older = head;
    }
    // As many as fit: all but the last come back.
    for _ in 0..Ring::SIZE - 1 {
        bench.rings[2].lend(&[buffer]);
    }
    bench.serve(2);
    assert_eq!(std::iter::from_fn(|| bench.rings[2].used()).count(), usize::from(Ring::SIZE) - 1);
    bench.rings[2].publish(Ring::SIZE);
    assert!(matches!(bench.balloon.queue_event(2), Err(DeviceError::Queue(_))));
}

#[test]
fn statistics_are_not_switched_while_there_may_be_a_driver() {
    let mut off = plain().balloon;
    assert_eq!(off.stats(), None);
    off.set_stats_polling_interval_s(0).unwrap();
    let error = off.set_stats_polling_interval_s(1).unwrap_err();
    assert!(matches!(error, BalloonError::StatsSwitch { from: 0, to: 1 }));
    let mut on = with_stats(7).balloon;
    on.set_stats_polling_interval_s(8).unwrap();
    let error = on.set_stats_polling_interval_s(0).unwrap_err();
    assert!(matches!(error, BalloonError::StatsSwitch { from: 8, to: 0 }));
}

#[test]
fn a_driver_without_statistics_is_not_asked() {
    let mut bench = with_stats(1);
    let features = bench.balloon.features() & !F_STATS_VQ;
    bench.balloon.reset();
    bench.start(features, &Layout { stats: None, reporting: None });
    bench.balloon.set_stats_polling_interval_s(2).unwrap();
    assert!(!bench.is_armed());
    assert_eq!(bench.balloon.stats(), Some(Stats::default()));
}

#[test]
fn a_reset_forgets_the_driver_and_another_one_can_start() {
    let mut bench = with_stats(1);
    bench.balloon.set_amount_mib(5).unwrap();
    bench.balloon.write_config(4, &256u32.to_le_bytes());
    let buffer = bench.records(&[(4, 7)], &[]);
    bench.say(&[buffer]);
    bench.balloon.reset();
    assert!(!bench.is_armed());
    let target = Stats { target_pages: 0x500, target_mib: 5, ..Default::default() };
    assert_eq!(bench.balloon.stats(), Some(target));
    // Nothing happens until the next start.
    let numbers = bench.numbers(&[0x20]);
    bench.rings[INFLATE].lend(&[numbers]);
    bench.rings[2].lend(&[buffer]);
    for queue in 0..3 {
        bench.balloon.queue_event(queue).unwrap();
        assert_eq!(bench.rings[queue].used(), None);
    }
    bench.tick();
    assert!(bench.discarded().is_empty());

    let features = bench.balloon.features();
    bench.start(features, &Layout { stats: Some(2), reporting: None });
    bench.inflate(&[0x20]);
    assert_eq!(bench.discarded(), [0x20]);
    // The buffer of the driver before is not returned to this one.
    assert!(bench.wait(60_000));
    bench.tick();
    assert_eq!(bench.rings[2].used(), None);

    bench.balloon.reset();
    let (queue, _kick) = bench.rings[0].virtqueue(0, bench.interrupt.clone());
    let activation = bench.activation(vec![Some(queue), None, None], features);
    assert!(matches!(bench.balloon.start(activation), Err(DeviceError::Driver(_))));
}

#[test]
fn a_running_device_is_changed_and_polled_on_an_event_loop() {
    let bench = with_stats(u16::MAX);
    let Bench { memory, interrupt, mut balloon, .. } = bench;
    balloon.reset();
    let features = balloon.features();
    let slot = Arc::new(
        Slot::new(Box::new(balloon), GuestMemoryAtomic::new(memory.clone()), interrupt.clone()).unwrap(),
    );
    let mut manager = EventManager::new().unwrap();
    manager.add_subscriber(Worker::new(slot.clone()));
    let mut rings: Vec<_> = (1..4).map(|index| DriverRing::new(&memory, index * PAGE)).collect();
    memory.write_slice(&[4, 0, 9, 0, 0, 0, 0, 0, 0, 0], GuestAddress(BUFFER)).unwrap();
    let head = rings[2].lend(&[Read(BUFFER, 10)]);
    slot.activate(features, rings.iter().map(|ring| Some(ring.ring().queue())).collect());
    while manager.run_with_timeout(0).unwrap() > 0 {}
    let stats = slot.update(|balloon: &mut Balloon| balloon.stats()).unwrap().unwrap();
    assert_eq!(stats.free_memory, Some(9));
    assert_eq!((rings[2].used(), interrupt.take()), (None, vec![]));

    // The size is the driver's to know, the interval is not.
    slot.update(|balloon: &mut Balloon| balloon.set_amount_mib(2)).unwrap().unwrap();
    assert_eq!(interrupt.take(), [Vector::Config]);
    slot.update(|balloon: &mut Balloon| balloon.set_stats_polling_interval_s(1)).unwrap().unwrap();
    assert_eq!(interrupt.take(), []);
    let mut config = [0; 8];
    slot.read_config(0, &mut config);
    assert_eq!(config, [0, 2, 0, 0, 0, 0, 0, 0]);

    assert_eq!(manager.run_with_timeout(60_000).unwrap(), 1);
    assert_eq!((rings[2].used(), interrupt.take()), (Some((head, 0)), vec![Vector::Queue(2)]));
    slot.reset();
}
