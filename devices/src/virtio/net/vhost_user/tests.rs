use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::driver_ring::Lent;
use crate::virtio::interrupt::Vector;
use crate::virtio::vhost_user::peer::{Bench, PROTOCOL, Peer, VERSION_1};

fn seen(queues: u8) -> Seen {
    Seen { mac: Some([6, 0, 0, 0, 0, 1]), queues, mtu: Some(1400) }
}

fn connect(peer: &Peer, queues: u8) -> VhostUserNet {
    let config = VhostUserNetConfig { id: "eth0".into(), seen: seen(queues), socket: peer.path.clone() };
    VhostUserNet::connect(config).unwrap()
}

/// The number of that request.
const SET_VRING_ENABLE: u32 = 18;

#[test]
fn what_a_server_lacks_is_not_offered_and_what_is_ours_is() {
    let plain = connect(&Peer::new(VERSION_1, Vec::new()), 1);
    let ours = 1_u64 << 5 | 1 << 3 | 1 << 16;
    assert_eq!(plain.features(), VERSION_1 | ours);
    assert_eq!(plain.queue_max_sizes().len(), 2);
    assert_eq!(plain.config(), [6, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0x78, 5]);
    let full = connect(&Peer::new(u64::MAX, Vec::new()), 2);
    let tap = 1 << 13 | 1 << 12 | 1 << 11 | 1 << 9 | 1 << 8 | 1 << 7 | 1 << 1 | 1;
    let expected = VERSION_1 | 1 << 29 | 1 << 28 | 1 << 15 | tap | ours | 1 << 22 | 1 << 17;
    assert_eq!(full.features(), expected);
    assert_eq!(full.queue_max_sizes().len(), 5);
    assert_eq!(full.config()[8..10], [2, 0]);
}

#[test]
fn a_server_with_too_few_queues_is_refused() {
    let peer = Peer::new(VERSION_1, Vec::new());
    let config = VhostUserNetConfig { id: "eth0".into(), seen: seen(2), socket: peer.path.clone() };
    let error = VhostUserNet::connect(config).err().unwrap();
    assert!(resources::chain(&error).contains("enough queues"), "{error:?}");
}

#[test]
fn the_server_is_told_of_its_own_features_only() {
    let peer = Peer::new(VERSION_1 | PROTOCOL, Vec::new());
    let bench = Bench::new(connect(&peer, 1));
    assert!(bench.device.features() & (1 << 16) != 0);
    assert_eq!(peer.features(), VERSION_1 | PROTOCOL);
}

#[test]
fn pairs_are_in_use_as_the_driver_says() {
    let peer = Peer::new(u64::MAX, Vec::new());
    let mut bench = Bench::new(connect(&peer, 2));
    let enabled = |peer: &Peer| peer.asked().iter().filter(|request| **request == SET_VRING_ENABLE).count();
    assert_eq!(enabled(&peer), 2, "the first pair");
    // What the driver made available before its server was ready is not forgotten.
    let kicked =
        |bench: &Bench<_>| (0..4).filter(|queue| bench.kicks[*queue].read().is_ok()).collect::<Vec<_>>();
    assert_eq!(kicked(&bench), [0, 1]);
    for (pairs, told, answer) in [(2_u16, 2, 0), (2, 0, 0), (3, 0, 1), (0, 0, 1), (1, 2, 0)] {
        let [low, high] = pairs.to_le_bytes();
        bench.memory.write_slice(&[4, 0, low, high], GuestAddress(0x8000)).unwrap();
        bench.memory.write_slice(&[0xff], GuestAddress(0x8100)).unwrap();
        let head = bench.rings[4].lend(&[Lent::Read(0x8000, 4), Lent::Write(0x8100, 1)]);
        bench.kicks[4].write(1).unwrap();
        let fd = bench.device.kicks.fd();
        bench.device.source_event(fd).unwrap();
        assert_eq!(bench.rings[4].used(), Some((head, 1)));
        let mut status = [0];
        bench.memory.read_slice(&mut status, GuestAddress(0x8100)).unwrap();
        assert_eq!((enabled(&peer), status), (told, [answer]), "{pairs} pairs");
        assert_eq!(kicked(&bench), if pairs == 2 && told > 0 { vec![2, 3] } else { vec![] }, "{pairs} pairs");
    }
}

#[test]
fn without_the_server_the_cable_is_unplugged_and_packets_are_lost() {
    let mut peer = Peer::new(VERSION_1, Vec::new());
    let mut bench = Bench::new(connect(&peer, 1));
    bench.rings[0].lend(&[Lent::Write(0x5000, 256)]);
    let sent = bench.rings[1].lend(&[Lent::Read(0x4000, 64)]);
    assert!(!bench.device.config_changed());
    peer.leave();
    bench.event();
    assert!(bench.device.config_changed());
    assert_eq!(bench.device.config()[STATUS_AT..8], [0, 0]);
    assert_eq!(bench.interrupt.take(), [Vector::Queue(1)]);
    assert_eq!(bench.rings[1].used(), Some((sent, 0)));
    // Room for packets stays where it is.
    assert_eq!(bench.rings[0].used(), None);
    bench.device.reset();
    bench.start();
    assert_eq!(bench.device.config()[STATUS_AT..8], [0, 0]);
}
