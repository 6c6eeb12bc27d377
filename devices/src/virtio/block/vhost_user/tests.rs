use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::driver_ring::Lent;
use crate::virtio::interrupt::Vector;
use crate::virtio::vhost_user::peer::{Bench, Misdeed, PROTOCOL, Peer, VERSION_1, message};
use crate::virtio::vhost_user::wire::Request;

const DATA: u64 = 0x4000;
const STATUS: u64 = 0x5000;

/// A configuration space with a capacity of 5 sectors, and more queues than anybody wants.
fn space() -> Vec<u8> {
    let mut space = vec![0; CONFIG_LEN];
    space[0] = 5;
    space[NUM_QUEUES_AT] = 77;
    space
}

fn connect_as(peer: &Peer, cache: CacheType, queues: u16) -> Result<VhostUserBlock, BlockError> {
    let config = VhostUserBlockConfig { id: "data".to_owned(), socket: peer.path.clone(), cache, queues };
    VhostUserBlock::connect(config)
}

fn connect(peer: &Peer) -> Result<VhostUserBlock, BlockError> {
    connect_as(peer, CacheType::Unsafe, 1)
}

/// A started drive of a server that does this when it is asked for that.
fn bench(misdeed: Option<(Request, Misdeed)>) -> (Peer, Bench<VhostUserBlock>) {
    let peer = Peer::misbehaving(VERSION_1 | PROTOCOL, space(), misdeed);
    let device = connect(&peer).unwrap();
    (peer, Bench::new(device))
}

/// Lends a read of 512 bytes.
fn lend(bench: &mut Bench<VhostUserBlock>) -> u16 {
    bench.memory.write_slice(&[0; 16], GuestAddress(DATA)).unwrap();
    bench.memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
    bench.rings[0].lend(&[Lent::Read(DATA, 16), Lent::Write(DATA + 16, 512), Lent::Write(STATUS, 1)])
}

#[track_caller]
fn expect_refused(bench: &mut Bench<VhostUserBlock>, head: u16) {
    assert_eq!(bench.interrupt.take(), [Vector::Queue(0)]);
    assert_eq!(bench.rings[0].used(), Some((head, 1)));
    assert_eq!(bench.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 1);
}

#[test]
fn a_server_is_asked_what_the_drive_is_like() {
    let peer = Peer::new(u64::MAX, space());
    let device = connect(&peer).unwrap();
    let has = |device: &VhostUserBlock, bit: u32| device.features() & (1 << bit) != 0;
    assert_eq!(device.device_type(), 2);
    assert_eq!(device.config()[..8], 5_u64.to_le_bytes());
    assert_eq!(device.config()[34..36], [1, 0]);
    assert!(has(&device, VIRTIO_BLK_F_RO) && has(&device, VIRTIO_BLK_F_DISCARD));
    assert!(!has(&device, VIRTIO_BLK_F_FLUSH) && !has(&device, VIRTIO_BLK_F_MQ));
    assert_eq!(device.features() & PROTOCOL, 0);

    let peer = Peer::new(u64::MAX, space());
    let device = connect_as(&peer, CacheType::Writeback, 2).unwrap();
    assert!(has(&device, VIRTIO_BLK_F_FLUSH) && has(&device, VIRTIO_BLK_F_MQ));
    assert_eq!((device.queue_max_sizes(), &device.config()[34..36]), (&[256, 256][..], &[2, 0][..]));
}

#[test]
fn what_a_server_lacks_is_named() {
    let lacks = |features, queues| {
        let peer = Peer::new(features, space());
        connect_as(&peer, CacheType::Unsafe, queues).err().unwrap().to_string()
    };
    assert!(lacks(PROTOCOL, 1).contains("does not offer virtio 1"));
    assert!(lacks(VERSION_1, 1).contains("does not offer its configuration space"));
    assert!(lacks(VERSION_1 | PROTOCOL, 3).contains("does not offer enough queues"));
}

#[test]
fn an_answer_that_is_none_is_an_error() {
    let number = Request::GET_CONFIG.1;
    let head = |offset: u32, size: u32| [offset.to_le_bytes(), size.to_le_bytes(), [0; 4]].concat();
    let good = [head(0, 60), space()].concat();
    for (says, reason) in [
        // Refused, as QEMU does it.
        (message(number, &head(0, 0)), "the answer starts with"),
        (message(number, &[head(0, 60), vec![0; 59]].concat()), "the answer starts with"),
        (message(number, &[head(0, 61), space(), vec![0]].concat()), "the answer starts with"),
        (message(number, &[head(0, 59), space()].concat()), "another part of it"),
        (message(number, &[head(1, 60), space()].concat()), "another part of it"),
        (message(number + 1, &good), "the answer starts with"),
    ] {
        let misdeed = Some((Request::GET_CONFIG, Misdeed::Says(says)));
        let peer = Peer::misbehaving(VERSION_1 | PROTOCOL, space(), misdeed);
        let error = connect(&peer).err().unwrap().to_string();
        assert!(error.contains("GET_CONFIG: ") && error.contains(reason), "{error}");
    }
    for request in [Request::GET_FEATURES, Request::GET_PROTOCOL_FEATURES, Request::GET_CONFIG] {
        let peer = Peer::misbehaving(VERSION_1 | PROTOCOL, space(), Some((request, Misdeed::Leaves)));
        let error = connect(&peer).err().unwrap().to_string();
        assert!(error.contains(&format!("{}: it hung up", request.0)), "{error}");
    }
}

#[test]
fn a_server_that_says_nothing_is_not_waited_for() {
    let misdeed = Some((Request::GET_CONFIG, Misdeed::Silent));
    let peer = Peer::misbehaving(VERSION_1 | PROTOCOL, space(), misdeed);
    let error = connect(&peer).err().unwrap().to_string();
    assert!(error.contains("GET_CONFIG: no answer within"), "{error}");
}

#[test]
fn memory_and_rings_are_handed_over_and_taken_back() {
    let (peer, mut bench) = bench(None);
    let asked = peer.asked();
    let count = |asked: &[u32], request: Request| asked.iter().filter(|one| **one == request.1).count();
    for request in [Request::SET_MEM_TABLE, Request::SET_VRING_KICK, Request::SET_VRING_ENABLE] {
        assert_eq!(count(&asked, request), 1, "{request:?}");
    }
    assert_eq!(count(&asked, Request::GET_VRING_BASE), 0);
    bench.device.reset();
    assert_eq!(count(&peer.asked(), Request::GET_VRING_BASE), 1);
    // Another driver.
    bench.start();
    assert_eq!(count(&peer.asked(), Request::SET_MEM_TABLE), 1);
    assert_eq!(bench.device.front.counters().backend_lost.count(), 0);
}

#[test]
fn when_the_server_is_gone_every_request_fails() {
    let (mut peer, mut bench) = bench(None);
    let head = lend(&mut bench);
    bench.event();
    assert_eq!(bench.interrupt.take(), []);
    peer.leave();
    bench.event();
    expect_refused(&mut bench, head);
    // What comes later is answered at the kick.
    let head = lend(&mut bench);
    bench.kicks[0].write(1).unwrap();
    bench.event();
    expect_refused(&mut bench, head);
    // What cannot be answered comes back all the same.
    let head = bench.rings[0].lend(&[Lent::Read(DATA, 16)]);
    bench.kicks[0].write(1).unwrap();
    bench.event();
    assert_eq!(bench.rings[0].used(), Some((head, 0)));
    bench.interrupt.take();
    let before = bench.device.config().to_vec();
    let error = bench.device.refresh().unwrap_err().to_string();
    assert!(error.contains("is gone"), "{error}");
    assert_eq!(bench.device.config(), before);
    // And so it is for the next driver.
    bench.device.reset();
    bench.start();
    let head = lend(&mut bench);
    bench.kicks[0].write(1).unwrap();
    bench.event();
    expect_refused(&mut bench, head);
    let counters = bench.device.front.counters();
    assert_eq!((counters.backend_lost.count(), counters.refused_count.count()), (1, 4));
}

#[test]
fn a_server_that_fails_while_the_drive_starts_or_stops_is_lost() {
    let refused = || Misdeed::Says(message(Request::SET_MEM_TABLE.1, &1_u64.to_le_bytes()));
    for (request, misdeed) in [
        (Request::SET_MEM_TABLE, refused()),
        (Request::SET_VRING_KICK, Misdeed::Leaves),
        (Request::SET_VRING_ENABLE, Misdeed::Says(message(1, &[]))),
    ] {
        let (_peer, mut bench) = bench(Some((request, misdeed)));
        assert_eq!(bench.device.front.counters().backend_lost.count(), 1, "{request:?}");
        let head = lend(&mut bench);
        bench.kicks[0].write(1).unwrap();
        bench.event();
        expect_refused(&mut bench, head);
    }
    let (_peer, mut bench) = bench(Some((Request::GET_VRING_BASE, Misdeed::Leaves)));
    bench.device.reset();
    assert_eq!(bench.device.front.counters().backend_lost.count(), 1);
}

#[test]
fn private_memory_makes_a_lost_device() {
    let peer = Peer::new(VERSION_1 | PROTOCOL, space());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let bench = Bench::with_memory(connect(&peer).unwrap(), memory);
    assert_eq!(bench.device.front.counters().backend_lost.count(), 1);
}

#[test]
fn a_change_of_the_drive_is_asked_for_and_a_bad_answer_ends_it() {
    let (_peer, mut fresh) = bench(None);
    fresh.device.config[0] = 4;
    fresh.device.refresh().unwrap();
    assert_eq!(fresh.device.config()[0], 5);

    let (mut peer, mut bench) = bench(None);
    let head = lend(&mut bench);
    peer.leave();
    // Before the event of its end is seen.
    let started = Instant::now();
    let error = bench.device.refresh().unwrap_err().to_string();
    assert!(error.contains("GET_CONFIG: "), "{error} after {:?}", started.elapsed());
    expect_refused(&mut bench, head);
}

/// What a server keeps of one queue of 16: the used index that it knows, and which descriptors it has taken.
fn kept(used: u16, taken: &[u16]) -> Arc<File> {
    let mut bytes = vec![0; 16 + 16 * 16];
    bytes[8] = 1;
    bytes[14..16].copy_from_slice(&used.to_le_bytes());
    for head in taken {
        bytes[16 + 16 * usize::from(*head)] = 1;
    }
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    Arc::new(file)
}

/// The answer about a file of this length.
fn inflight(len: u64) -> Vec<u8> {
    message(Request::GET_INFLIGHT_FD.1, &[len.to_le_bytes(), [0; 8], [1, 0, 16, 0, 0, 0, 0, 0]].concat())
}

#[test]
fn requests_that_a_server_had_taken_fail_though_it_answered_later_ones() {
    // Chains of three descriptors: their heads are 0, 3 and 6.
    let shares = Misdeed::Shares(inflight(16 + 16 * 16), kept(1, &[0, 6]));
    let (mut peer, mut bench) = bench(Some((Request::GET_INFLIGHT_FD, shares)));
    assert!(peer.asked().contains(&Request::SET_INFLIGHT_FD.1));
    let heads = [(); 3].map(|()| lend(&mut bench));
    let (mut other, _) = bench.rings[0].virtqueue(0, bench.interrupt.clone());
    other.push_used(&bench.memory, heads[1], 513).unwrap();
    peer.leave();
    bench.event();
    let used = [(); 4].map(|()| bench.rings[0].used());
    assert_eq!(used, [Some((heads[1], 513)), Some((heads[0], 1)), Some((heads[2], 1)), None]);
    let head = lend(&mut bench);
    bench.kicks[0].write(1).unwrap();
    bench.interrupt.take();
    bench.event();
    expect_refused(&mut bench, head);
    // What was kept says nothing about another driver's requests.
    bench.device.reset();
    bench.start();
    let head = lend(&mut bench);
    bench.kicks[0].write(1).unwrap();
    bench.event();
    expect_refused(&mut bench, head);
}

#[test]
fn a_server_that_keeps_too_little_is_lost() {
    let short = Misdeed::Shares(inflight(16 + 16 * 15), kept(0, &[]));
    for misdeed in [short, Misdeed::Says(inflight(16 + 16 * 16))] {
        let (_peer, bench) = bench(Some((Request::GET_INFLIGHT_FD, misdeed)));
        assert_eq!(bench.device.front.counters().backend_lost.count(), 1);
    }
}
