use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::driver_ring::Lent;
use crate::virtio::interrupt::Vector;
use crate::virtio::vhost_user::peer::{Bench, PROTOCOL, Peer, VERSION_1};

const REQUEST: u64 = 0x4000;
const REPLY: u64 = 0x5000;

fn connect(peer: &Peer) -> Fs {
    Fs::connect("shared", peer.path.clone()).unwrap()
}

/// Lends a request of FUSE with this number, and room for the reply.
fn lend(bench: &mut Bench<Fs>, unique: u64) -> u16 {
    let mut header = [0; 40];
    header[8..16].copy_from_slice(&unique.to_le_bytes());
    bench.memory.write_slice(&header, GuestAddress(REQUEST)).unwrap();
    bench.memory.write_slice(&[0; 16], GuestAddress(REPLY)).unwrap();
    bench.rings[1].lend(&[Lent::Read(REQUEST, 40), Lent::Write(REPLY, 80)])
}

#[test]
fn a_back_end_is_asked_for_what_it_offers() {
    let over = |peer: &Peer| {
        let stream = UnixStream::connect(&peer.path).unwrap();
        Fs::over("shared", stream, "/no/such/socket".into()).unwrap()
    };
    for connect in [connect as fn(&Peer) -> Fs, over] {
        let peer = Peer::new(u64::MAX, Vec::new());
        let device = connect(&peer);
        assert_eq!(device.device_type(), 26);
        assert_eq!(device.features(), VERSION_1 | 1 << 29 | 1 << 28);
        assert_eq!(device.queue_max_sizes().len(), 2);
        assert_eq!(&device.config()[..7], b"shared\0");
        assert_eq!(device.config()[36..], [1, 0, 0, 0]);
    }
}

#[test]
fn when_the_back_end_is_gone_every_request_gets_an_error() {
    let mut peer = Peer::new(VERSION_1 | PROTOCOL, Vec::new());
    let mut bench = Bench::new(connect(&peer));
    let head = lend(&mut bench, 7);
    peer.leave();
    bench.event();
    assert_eq!(bench.interrupt.take(), [Vector::Queue(1)]);
    assert_eq!(bench.rings[1].used(), Some((head, 16)));
    let mut reply = [0; 16];
    bench.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
    let expected = [&16_u32.to_le_bytes()[..], &(-107_i32).to_le_bytes(), &7_u64.to_le_bytes()].concat();
    assert_eq!(reply[..], expected[..]);
    // FUSE_FORGET: there is no reply to it.
    let head = bench.rings[1].lend(&[Lent::Read(REQUEST, 40)]);
    bench.kicks[1].write(1).unwrap();
    bench.event();
    assert_eq!(bench.rings[1].used(), Some((head, 0)));
}
