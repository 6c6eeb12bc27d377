use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::mmds::Mmds;
use crate::rate_limiter::Bucket;
use crate::virtio::driver_ring::{DriverRing, Lent};
use crate::virtio::interrupt::Vector;
use crate::virtio::testing::{INDIRECT, NEXT, RecordedInterrupt, Ring, WRITE};

mod merged;

const RX_RING: u64 = 0x1000;
const TX_RING: u64 = 0x2000;
/// For descriptors elsewhere than in a ring.
const TABLE: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
const END: u64 = 0x10_0000;

/// A started device between two rings and a socket that keeps the borders of packets like a TAP.
struct Bench {
    memory: GuestMemoryMmap,
    handle: Memory,
    rx: DriverRing,
    tx: DriverRing,
    rx_kick: Arc<EventFd>,
    tx_kick: Arc<EventFd>,
    interrupt: Arc<RecordedInterrupt>,
    taps: [Tap; 1],
    /// The host's end.
    host: File,
    net: Userspace,
}

impl Bench {
    fn new() -> Self {
        Self::with(None, false)
    }

    /// With a driver that takes a packet in several buffers.
    fn merged() -> Self {
        Self::with(None, true)
    }

    fn with(mmds: Option<MmdsPort>, merged: bool) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), END.try_into().unwrap())]).unwrap();
        let (rx, tx) = (DriverRing::new(&memory, RX_RING), DriverRing::new(&memory, TX_RING));
        let interrupt = Arc::new(RecordedInterrupt::default());
        let (rx_queue, rx_kick) = rx.virtqueue(0, interrupt.clone());
        let (tx_queue, tx_kick) = tx.virtqueue(1, interrupt.clone());
        let mut net = Userspace::new(LimiterConfig::default(), LimiterConfig::default(), mmds).unwrap();
        let queues = Queues { rx: rx_queue, tx: tx_queue };
        let handle = GuestMemoryAtomic::new(memory.clone());
        net.start(&handle, vec![queues], merged);
        let (tap, host) = socket_pair();
        Self { memory, handle, rx, tx, rx_kick, tx_kick, interrupt, taps: [Tap::from_file(tap)], host, net }
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn receive(&mut self) {
        self.net.receive(0, &self.taps).unwrap();
    }

    /// Limits both directions by a clock that stands where the test puts it, in nanoseconds.
    fn limit(&mut self, config: LimiterConfig) -> Arc<AtomicU64> {
        let clock = Arc::new(AtomicU64::new(0));
        self.net.rx_limiter = RateLimiter::manual(config, &clock);
        self.net.tx_limiter = RateLimiter::manual(config, &clock);
        clock
    }

    /// All timers fire at the time `now`.
    fn timers(&mut self, clock: &AtomicU64, now: u64) {
        clock.store(now, Ordering::Relaxed);
        for fd in self.net.timers() {
            self.net.timer_event(fd, &self.taps).unwrap();
        }
    }

    /// Sends `packet` from one buffer of guest memory.
    fn send(&mut self, packet: &[u8]) {
        self.memory.write_slice(packet, GuestAddress(DATA)).unwrap();
        self.tx.lend(&[Lent::Read(DATA, packet.len().try_into().unwrap())]);
        self.net.send(0, &self.taps).unwrap();
    }

    /// The next packet at the host's end.
    fn sent(&mut self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 70_000];
        match self.host.read(&mut packet) {
            Ok(len) => Some(packet[..len].to_vec()),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                None
            }
        }
    }
}

fn socket_pair() -> (File, File) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the last argument has room for two descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
    // SAFETY: nobody else knows these new descriptors.
    fds.map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) })).into()
}

/// A packet of `len` bytes that is told from others by `mark`.
fn packet(mark: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| mark.wrapping_add(u8::try_from(at % 251).unwrap())).collect()
}

/// What the guest sees of `packet`: it is in one buffer.
fn as_received(packet: &[u8]) -> Vec<u8> {
    [&packet[..10], &[1, 0], &packet[12..]].concat()
}

#[test]
fn a_packet_arrives_over_several_buffers() {
    let mut bench = Bench::new();
    bench.rx.lend(&[Lent::Write(DATA, 11), Lent::Write(DATA + 0x1000, 40), Lent::Write(DATA + 0x2000, 100)]);
    let sent = packet(3, 90);
    bench.host.write_all(&sent).unwrap();
    bench.receive();
    assert_eq!(bench.rx.used(), Some((0, 90)));
    let received = [bench.bytes(DATA, 11), bench.bytes(DATA + 0x1000, 40), bench.bytes(DATA + 0x2000, 39)];
    assert_eq!(received.concat(), as_received(&sent));
    assert_eq!(bench.interrupt.take(), [Vector::Queue(0)]);
}

#[test]
fn nothing_to_receive_keeps_the_buffer() {
    let mut bench = Bench::new();
    bench.rx.lend(&[Lent::Write(DATA, 2000)]);
    bench.receive();
    bench.receive();
    assert_eq!(bench.rx.used(), None);
    bench.host.write_all(&packet(1, 60)).unwrap();
    bench.receive();
    assert_eq!(bench.rx.used(), Some((0, 60)));
}

#[test]
fn packets_wait_for_buffers() {
    let mut bench = Bench::new();
    for mark in 1..=3 {
        bench.host.write_all(&packet(mark, 60)).unwrap();
    }
    bench.rx.lend(&[Lent::Write(DATA, 2000)]);
    bench.receive();
    assert_eq!((bench.rx.used(), bench.rx.used()), (Some((0, 60)), None));
    // The driver is asked for a kick.
    assert_eq!(bench.rx.ring().used_flags(), 0);
    bench.rx.lend(&[Lent::Write(DATA, 2000)]);
    bench.rx.lend(&[Lent::Write(DATA + 0x1000, 2000)]);
    bench.receive();
    assert_eq!((bench.rx.used(), bench.rx.used()), (Some((1, 60)), Some((2, 60))));
    assert_eq!(bench.bytes(DATA + 0x1000, 60), as_received(&packet(3, 60)));
    assert_eq!(bench.net.dropped(), Dropped::default());
}

#[test]
fn a_packet_that_just_fits_is_told_from_one_that_does_not() {
    let mut bench = Bench::new();
    bench.rx.lend(&[Lent::Write(DATA, 100), Lent::Write(DATA + 0x1000, 100)]);
    bench.host.write_all(&packet(1, 201)).unwrap();
    bench.host.write_all(&packet(2, 4000)).unwrap();
    bench.host.write_all(&packet(3, 200)).unwrap();
    bench.receive();
    assert_eq!((bench.rx.used(), bench.rx.used()), (Some((0, 200)), None));
    let received = [bench.bytes(DATA, 100), bench.bytes(DATA + 0x1000, 100)];
    assert_eq!(received.concat(), as_received(&packet(3, 200)));
    assert_eq!(bench.net.dropped(), Dropped { to_guest: 2, from_guest: 0 });
}

#[test]
fn the_longest_packet_needs_no_more_than_it_says() {
    let mut bench = Bench::new();
    bench.rx.lend(&[Lent::Write(DATA, MAX_PACKET)]);
    let longest = packet(1, MAX_PACKET.try_into().unwrap());
    bench.host.write_all(&longest).unwrap();
    bench.receive();
    assert_eq!(bench.rx.used(), Some((0, MAX_PACKET)));
    assert_eq!(bench.bytes(DATA, longest.len()), as_received(&longest));
}

#[test]
fn buffers_that_hold_no_packet_come_back_empty() {
    let mut bench = Bench::new();
    bench.host.write_all(&packet(1, 60)).unwrap();
    bench.rx.lend(&[Lent::Write(DATA, MIN_PACKET - 1)]);
    bench.rx.lend(&[Lent::Read(DATA, 2000)]);
    bench.rx.lend(&[Lent::Write(END - 8, 2000)]);
    bench.rx.lend(&[Lent::Write(u64::MAX, 2000)]);
    bench.rx.lend(&[Lent::Write(DATA, 2000)]);
    bench.receive();
    for (head, len) in [(0, 0), (1, 0), (2, 0), (3, 0), (4, 60)] {
        assert_eq!(bench.rx.used(), Some((head, len)));
    }
}

#[test]
fn one_event_does_one_ring_of_work() {
    let mut bench = Bench::new();
    for _ in 0..Ring::SIZE {
        bench.rx.lend(&[Lent::Write(DATA, 1)]);
    }
    assert!(bench.rx_kick.read().is_err());
    bench.receive();
    assert_eq!(bench.rx.ring().used_index(), Ring::SIZE);
    assert_eq!(bench.rx_kick.read().unwrap(), 1, "the rest is left to a kick of our own");
    bench.receive();
    assert!(bench.rx_kick.read().is_err());
}

#[test]
fn a_packet_leaves_over_several_buffers() {
    let mut bench = Bench::new();
    let first = packet(5, 100);
    bench.memory.write_slice(&first[..12], GuestAddress(DATA)).unwrap();
    bench.memory.write_slice(&first[12..], GuestAddress(DATA + 0x1000)).unwrap();
    bench.tx.lend(&[Lent::Read(DATA, 12), Lent::Read(DATA + 0x1000, 88)]);
    bench.net.send(0, &bench.taps).unwrap();
    assert_eq!(bench.sent(), Some(first));
    assert_eq!(bench.tx.used(), Some((0, 0)));
    assert_eq!(bench.interrupt.take(), [Vector::Queue(1)]);
}

#[test]
fn what_is_no_packet_is_dropped() {
    let mut bench = Bench::new();
    bench.send(&packet(1, (MIN_PACKET - 1).try_into().unwrap()));
    bench.send(&packet(1, (MAX_PACKET + 1).try_into().unwrap()));
    bench.tx.lend(&[Lent::Write(DATA, 100)]);
    bench.tx.lend(&[Lent::Read(END - 8, 100)]);
    bench.tx.lend(&[Lent::Write(DATA, 100), Lent::Read(DATA, 100)]);
    // 4 GiB of the same memory, if it were there.
    bench.tx.lend(&[Lent::Read(0, u32::MAX)]);
    bench.net.send(0, &bench.taps).unwrap();
    assert_eq!(bench.sent(), None);
    assert_eq!(bench.net.dropped(), Dropped { to_guest: 0, from_guest: 6 });
    assert_eq!(bench.tx.ring().used_index(), 6);

    bench.send(&packet(7, MIN_PACKET.try_into().unwrap()));
    assert_eq!(bench.sent(), Some(packet(7, MIN_PACKET.try_into().unwrap())));
}

#[test]
fn a_tap_that_is_full_or_gone_drops_packets() {
    let mut bench = Bench::new();
    let mut sent = 0;
    while bench.net.dropped().from_guest == 0 {
        bench.send(&packet(1, 60));
        sent += 1;
        assert!(sent < 10_000, "the socket is never full");
    }
    while bench.sent().is_some() {}
    bench.send(&packet(2, 60));
    assert_eq!(bench.sent(), Some(packet(2, 60)));

    let (gone, host) = socket_pair();
    drop(host);
    bench.taps = [Tap::from_file(gone)];
    bench.send(&packet(3, 60));
    assert_eq!(bench.net.dropped().from_guest, 2);
    // Every chain came back, and receiving does not spin.
    assert_eq!(bench.tx.ring().used_index(), sent + 2);
    bench.rx.lend(&[Lent::Write(DATA, 2000)]);
    bench.receive();
}

#[test]
fn a_stopped_device_touches_nothing() {
    let mut bench = Bench::new();
    bench.rx.lend(&[Lent::Write(DATA, 2000)]);
    bench.host.write_all(&packet(1, 60)).unwrap();
    bench.net.stop();
    bench.receive();
    bench.send(&packet(1, 60));
    assert_eq!((bench.rx.used(), bench.tx.used()), (None, None));
    assert_eq!(bench.sent(), None);
}

const SECOND: u64 = 1_000_000_000;

fn bucket(size: u64) -> Option<Bucket> {
    Some(Bucket { size, refill_time_ms: 1000, one_time_burst: 0 })
}

#[test]
fn a_packet_to_the_guest_waits_for_the_limiter() {
    let mut bench = Bench::new();
    // The header is not counted.
    let clock = bench.limit(LimiterConfig { bandwidth: bucket(200), ops: None });
    for mark in 1..=3 {
        bench.rx.lend(&[Lent::Write(DATA + 0x1000 * u64::from(mark), 2000)]);
        bench.host.write_all(&packet(mark, 112)).unwrap();
    }
    bench.receive();
    assert_eq!(bench.rx.ring().used_index(), 2);
    assert_eq!(bench.interrupt.take(), [Vector::Queue(0)]);
    // Neither kicks nor packets change anything, nor does the other direction's timer.
    bench.host.write_all(&packet(4, 112)).unwrap();
    bench.receive();
    bench.timers(&clock, SECOND / 2 - 1);
    assert_eq!(bench.rx.ring().used_index(), 2);
    bench.timers(&clock, SECOND / 2);
    assert_eq!(bench.rx.ring().used_index(), 3);
    assert_eq!(bench.bytes(DATA + 0x3000, 112), as_received(&packet(3, 112)));
    // The next one goes on with a buffer of its own.
    bench.rx.lend(&[Lent::Write(DATA + 0x4000, 2000)]);
    bench.timers(&clock, SECOND);
    bench.receive();
    assert_eq!(
        (0..4).map(|_| bench.rx.used().unwrap()).collect::<Vec<_>>(),
        [(0, 112), (1, 112), (2, 112), (3, 112)]
    );
    assert_eq!(bench.bytes(DATA + 0x4000, 112), as_received(&packet(4, 112)));
    assert_eq!(bench.net.dropped(), Dropped::default());
}

#[test]
fn a_packet_from_the_guest_waits_for_the_limiter() {
    let mut bench = Bench::new();
    let clock = bench.limit(LimiterConfig { bandwidth: None, ops: bucket(2) });
    for mark in 1..=4 {
        bench.send(&packet(mark, 60));
    }
    assert_eq!((bench.sent(), bench.sent(), bench.sent()), (Some(packet(1, 60)), Some(packet(2, 60)), None));
    assert!(bench.tx_kick.read().is_err());
    // All of them are in the buffer of the last one.
    bench.timers(&clock, SECOND / 2);
    assert_eq!((bench.sent(), bench.sent()), (Some(packet(4, 60)), None));
    bench.net.set_limiters(LimiterUpdate::default(), LimiterUpdate { bandwidth: None, ops: bucket(0) });
    bench.timers(&clock, SECOND / 2);
    assert_eq!(bench.sent(), Some(packet(4, 60)));
    assert_eq!(bench.tx.ring().used_index(), 4);
}

#[test]
fn a_packet_that_waits_goes_with_its_driver() {
    let mut bench = Bench::new();
    let clock = bench.limit(LimiterConfig { bandwidth: None, ops: bucket(1) });
    for mark in 1..=2 {
        bench.rx.lend(&[Lent::Write(DATA, 2000)]);
        bench.host.write_all(&packet(mark, 60)).unwrap();
        bench.send(&packet(mark, 60));
    }
    bench.receive();
    bench.net.stop();
    let (mut rx, mut tx) = (DriverRing::new(&bench.memory, RX_RING), DriverRing::new(&bench.memory, TX_RING));
    let queues = Queues {
        rx: rx.virtqueue(0, bench.interrupt.clone()).0,
        tx: tx.virtqueue(1, bench.interrupt.clone()).0,
    };
    bench.net.start(&GuestMemoryAtomic::new(bench.memory.clone()), vec![queues], false);
    clock.store(SECOND, Ordering::Relaxed);
    rx.lend(&[Lent::Write(DATA, 2000)]);
    bench.host.write_all(&packet(3, 60)).unwrap();
    bench.receive();
    assert_eq!(rx.used(), Some((0, 60)));
    assert_eq!(bench.bytes(DATA, 60), as_received(&packet(3, 60)));
    tx.lend(&[Lent::Read(DATA, 60)]);
    bench.net.send(0, &bench.taps).unwrap();
    assert_eq!(tx.used(), Some((0, 0)));
}

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const GUEST: [u8; 4] = [172, 16, 0, 2];
const SERVICE: [u8; 4] = [169, 254, 169, 254];
/// Header and ARP packet.
const ARP_LEN: u32 = HEADER_LEN + 42;

fn with_service() -> Bench {
    let mmds = Arc::new(Mutex::new(Mmds::new(1000)));
    Bench::with(Some(MmdsPort::new(mmds, Ipv4Addr::from(SERVICE))), false)
}

/// A packet that asks who has `address`.
fn who_has(address: [u8; 4]) -> Vec<u8> {
    let ethernet = [&[0xff; 6], &GUEST_MAC[..], &[8, 6]].concat();
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1], &GUEST_MAC[..], &GUEST, &[0; 6], &address].concat();
    [&[0; 12], &ethernet[..], &arp].concat()
}

/// A packet that opens a connection to the service, with unfinished checksums.
fn syn() -> Vec<u8> {
    let ethernet = [&[0xff; 6], &GUEST_MAC[..], &[8, 0]].concat();
    let ipv4 = [&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0][..], &GUEST, &SERVICE].concat();
    let tcp = [0xc0, 0, 0, 80, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0];
    [&[0; 12], &ethernet[..], &ipv4, &tcp].concat()
}

#[test]
fn the_service_answers_past_the_tap_and_the_limits() {
    let mut bench = with_service();
    let clock = bench.limit(LimiterConfig { bandwidth: None, ops: bucket(1) });
    for _ in 0..2 {
        bench.send(&who_has(SERVICE));
    }
    assert_eq!(bench.sent(), None);
    assert_eq!(bench.tx.ring().used_index(), 2);
    // The answers wait for buffers, and come before what is in the TAP.
    for mark in 1..=2 {
        bench.host.write_all(&packet(mark, 60)).unwrap();
    }
    bench.rx.lend(&[Lent::Write(DATA + 0x1000, 2000)]);
    bench.receive();
    assert_eq!((bench.rx.used(), bench.rx.used()), (Some((0, ARP_LEN)), None));
    let answer = bench.bytes(DATA + 0x1000, 12 + 42);
    assert_eq!(answer[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(answer[12..18], GUEST_MAC);
    assert_eq!(answer[32..34], [0, 2], "an ARP reply");
    assert_eq!(answer[40..44], SERVICE);
    for _ in 0..3 {
        bench.rx.lend(&[Lent::Write(DATA + 0x2000, 2000)]);
    }
    bench.receive();
    // One from the service, one from the TAP; the next one waits.
    assert_eq!(
        [bench.rx.used(), bench.rx.used(), bench.rx.used()],
        [Some((1, ARP_LEN)), Some((2, 60)), None]
    );
    // The service does not.
    bench.send(&who_has(SERVICE));
    bench.rx.lend(&[Lent::Write(DATA + 0x3000, 2000)]);
    bench.receive();
    assert_eq!(bench.rx.used(), Some((4, ARP_LEN)));
    bench.timers(&clock, SECOND);
    assert_eq!((bench.rx.used(), bench.rx.used()), (Some((3, 60)), None));
}

#[test]
fn everything_else_reaches_the_tap() {
    let mut bench = with_service();
    for other in [who_has(GUEST), packet(8, MIN_PACKET.try_into().unwrap()), packet(9, 60)] {
        bench.send(&other);
        assert_eq!(bench.sent(), Some(other));
    }
    bench.rx.lend(&[Lent::Write(DATA, 2000)]);
    bench.receive();
    assert_eq!(bench.rx.used(), None);
}

#[test]
fn an_answer_that_does_not_fit_is_lost_and_costs_no_buffer() {
    let mut bench = with_service();
    bench.rx.lend(&[Lent::Write(DATA + 0x1000, ARP_LEN - 1)]);
    bench.send(&who_has(SERVICE));
    assert_eq!(bench.rx.used(), None);
    assert_eq!(bench.net.dropped(), Dropped { to_guest: 1, from_guest: 0 });
    bench.host.write_all(&packet(1, 50)).unwrap();
    bench.receive();
    assert_eq!(bench.rx.used(), Some((0, 50)));
}

#[test]
fn the_service_tries_again_by_its_timer() {
    let mut bench = with_service();
    for _ in 0..4 {
        bench.rx.lend(&[Lent::Write(DATA + 0x1000, 2000)]);
    }
    bench.send(&syn());
    // SYN and ACK of ours, which the guest does not acknowledge.
    assert!(bench.rx.used().is_some());
    assert_eq!(bench.bytes(DATA + 0x1000 + 12 + 14 + 20 + 13, 1), [0x12]);
    let timer = bench.net.timers().last().unwrap();
    while bench.rx.used().is_none() {
        let mut poll = libc::pollfd { fd: timer, events: libc::POLLIN, revents: 0 };
        // SAFETY: the first argument is an array of one pollfd.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 10_000) }, 1, "the timer does not fire");
        bench.net.timer_event(timer, &bench.taps).unwrap();
    }
    assert_eq!(bench.bytes(DATA + 0x1000 + 12 + 14 + 20 + 13, 1), [0x12]);
}
