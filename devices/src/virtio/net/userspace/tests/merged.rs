//! Packets over several buffers (VIRTIO_NET_F_MRG_RXBUF).

use super::*;

/// Lends `count` chains of `len` bytes, and returns where they are.
fn lend(bench: &mut Bench, count: u16, len: u32) -> Vec<u64> {
    let first = u64::from(bench.rx.ring().used_index());
    let places = (0..u64::from(count)).map(|at| DATA + (first + at) % 16 * 0x8000).collect::<Vec<_>>();
    for place in &places {
        bench.rx.lend(&[Lent::Write(*place, len)]);
    }
    places
}

/// `packet` as the guest finds it in `buffers` buffers.
fn spread(packet: &[u8], buffers: u16) -> Vec<u8> {
    [&packet[..10], &buffers.to_le_bytes(), &packet[12..]].concat()
}

/// The next `count` used chains, which are to be in order, put together.
fn received(bench: &mut Bench, places: &[u64], head: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (expected, place) in (head..).zip(places) {
        let (used, len) = bench.rx.used().unwrap();
        assert_eq!(used, expected);
        bytes.extend(bench.bytes(*place, len.try_into().unwrap()));
    }
    bytes
}

#[test]
fn a_packet_takes_as_many_buffers_as_it_fills() {
    let mut bench = Bench::merged();
    let places = lend(&mut bench, 6, 100);
    for (mark, len) in [(1, 250), (2, 100), (3, 101)] {
        bench.host.write_all(&packet(mark, len)).unwrap();
    }
    bench.receive();
    assert_eq!(received(&mut bench, &places[..3], 0), spread(&packet(1, 250), 3));
    assert_eq!(received(&mut bench, &places[3..4], 3), spread(&packet(2, 100), 1));
    assert_eq!(received(&mut bench, &places[4..], 4), spread(&packet(3, 101), 2));
    assert_eq!(bench.rx.used(), None);
    assert_eq!(bench.interrupt.take(), [Vector::Queue(0)]);
}

#[test]
fn the_longest_packet_arrives_over_many_buffers() {
    let mut bench = Bench::merged();
    let long = packet(9, MAX_PACKET.try_into().unwrap());
    let places = lend(&mut bench, 15, 4500);
    bench.host.write_all(&long).unwrap();
    bench.receive();
    assert_eq!(received(&mut bench, &places, 0), spread(&long, 15));
    assert_eq!(bench.net.dropped(), Dropped::default());
}

#[test]
fn a_packet_that_does_not_fit_yet_waits_for_the_rest() {
    let mut bench = Bench::merged();
    let mut places = lend(&mut bench, 2, 100);
    bench.host.write_all(&packet(4, 350)).unwrap();
    bench.host.write_all(&packet(5, 60)).unwrap();
    bench.receive();
    // Nothing of it is shown, and the driver is asked for a kick.
    assert_eq!((bench.rx.used(), bench.rx.ring().used_flags()), (None, 0));
    bench.rx.lend(&[Lent::Write(DATA + 0x4_0000, 100)]);
    bench.receive();
    assert_eq!((bench.rx.used(), bench.rx.ring().used_flags()), (None, 0));
    bench.rx.lend(&[Lent::Write(DATA + 0x5_0000, 100)]);
    bench.rx.lend(&[Lent::Write(DATA + 0x6_0000, 100)]);
    bench.receive();
    places.extend([DATA + 0x4_0000, DATA + 0x5_0000]);
    assert_eq!(received(&mut bench, &places, 0), spread(&packet(4, 350), 4));
    assert_eq!(received(&mut bench, &[DATA + 0x6_0000], 4), spread(&packet(5, 60), 1));
    assert_eq!(bench.net.dropped(), Dropped::default());
}

#[test]
fn a_packet_that_all_of_the_ring_cannot_hold_is_dropped() {
    let mut bench = Bench::merged();
    let places = lend(&mut bench, Ring::SIZE, 11);
    bench.host.write_all(&packet(1, 16 * 11 + 1)).unwrap();
    // The number of buffers lies across two of them.
    bench.host.write_all(&packet(2, 16 * 11)).unwrap();
    bench.receive();
    assert_eq!(bench.net.dropped(), Dropped { to_guest: 1, from_guest: 0 });
    assert_eq!(received(&mut bench, &places, 0), spread(&packet(2, 16 * 11), 16));
}

#[test]
fn chains_in_very_many_pieces_are_bounded() {
    let mut bench = Bench::merged();
    // A table of 1024 descriptors of one byte, for all chains.
    for index in 0..1024u16 {
        let flags = if index == 1023 { WRITE } else { WRITE | NEXT };
        let descriptor = Descriptor::new(DATA + u64::from(index), 1, flags, (index + 1) % 1024);
        bench.memory.write_obj(descriptor, GuestAddress(TABLE + 16 * u64::from(index))).unwrap();
    }
    for (head, descriptors) in [(0, 1024), (1, 600), (2, 600)] {
        let from = TABLE + 16 * u64::from(1024 - descriptors);
        let table = Descriptor::new(from, 16 * descriptors, INDIRECT, 0);
        if descriptors == 1024 {
            bench.rx.ring().store(head, table);
        } else {
            // The links within the table are counted from its own beginning.
            for index in 0..descriptors {
                let flags = if index + 1 == descriptors { WRITE } else { WRITE | NEXT };
                let descriptor = Descriptor::new(DATA, 1, flags, u16::try_from(index + 1).unwrap());
                let at = TABLE + 0x4000 * u64::from(head) + 16 * u64::from(index);
                bench.memory.write_obj(descriptor, GuestAddress(at)).unwrap();
            }
            let table = Descriptor::new(TABLE + 0x4000 * u64::from(head), 16 * descriptors, INDIRECT, 0);
            bench.rx.ring().store(head, table);
        }
        bench.rx.publish(head);
    }
    bench.host.write_all(&packet(1, 590)).unwrap();
    bench.host.write_all(&packet(2, 601)).unwrap();
    bench.host.write_all(&packet(3, 600)).unwrap();
    bench.receive();
    // The first is more than a packet may be read into; the others come one after the other.
    let used = [bench.rx.used(), bench.rx.used(), bench.rx.used(), bench.rx.used()];
    assert_eq!(used, [Some((0, 0)), Some((1, 590)), None, None]);
    bench.rx.ring().store(3, Descriptor::new(DATA, 600, WRITE, 0));
    bench.rx.publish(3);
    bench.receive();
    let used = [bench.rx.used(), bench.rx.used(), bench.rx.used()];
    assert_eq!(used, [Some((2, 600)), Some((3, 1)), None]);
}

#[test]
fn chains_that_hold_nothing_come_back_empty() {
    let mut bench = Bench::merged();
    bench.rx.lend(&[Lent::Write(DATA, 0)]);
    bench.rx.lend(&[Lent::Read(DATA, 100)]);
    bench.rx.lend(&[Lent::Write(END - 8, 100)]);
    bench.rx.lend(&[Lent::Write(DATA, 40)]);
    bench.rx.lend(&[Lent::Write(u64::MAX - 8, 100)]);
    bench.rx.lend(&[Lent::Write(DATA + 0x1000, 40)]);
    bench.host.write_all(&packet(1, 60)).unwrap();
    bench.receive();
    let used: Vec<_> = std::iter::from_fn(|| bench.rx.used()).collect();
    assert_eq!(used, [(0, 0), (1, 0), (2, 0), (4, 0), (3, 40), (5, 20)]);
}

#[test]
fn useless_chains_without_end_hold_nobody_up() {
    let mut bench = Bench::merged();
    bench.host.write_all(&packet(1, 60)).unwrap();
    for _ in 0..Ring::SIZE {
        bench.rx.lend(&[Lent::Write(DATA, 0)]);
    }
    bench.receive();
    assert_eq!(bench.rx.ring().used_index(), Ring::SIZE);
    assert_eq!(bench.rx_kick.read().unwrap(), 1, "the rest is left to a kick of our own");
}

#[test]
fn the_limiter_holds_back_all_buffers_of_a_packet() {
    let mut bench = Bench::merged();
    let clock = bench.limit(LimiterConfig { bandwidth: None, ops: bucket(1) });
    let places = lend(&mut bench, 6, 100);
    bench.host.write_all(&packet(1, 250)).unwrap();
    bench.host.write_all(&packet(2, 250)).unwrap();
    bench.receive();
    assert_eq!(bench.rx.ring().used_index(), 3);
    bench.timers(&clock, SECOND);
    assert_eq!(received(&mut bench, &places[..3], 0), spread(&packet(1, 250), 3));
    assert_eq!(received(&mut bench, &places[3..], 3), spread(&packet(2, 250), 3));
}

#[test]
fn what_waits_is_looked_up_again_in_other_memory() {
    let mut bench = Bench::merged();
    let places = lend(&mut bench, 2, 100);
    bench.receive();
    bench.handle.lock().unwrap().replace(bench.memory.clone());
    bench.rx.lend(&[Lent::Write(DATA + 0x4_0000, 100)]);
    bench.host.write_all(&packet(1, 250)).unwrap();
    bench.receive();
    let places = [places, vec![DATA + 0x4_0000]].concat();
    assert_eq!(received(&mut bench, &places, 0), spread(&packet(1, 250), 3));
    assert_eq!(bench.rx.used(), None);
}

#[test]
fn the_service_answers_over_several_buffers() {
    let mmds = Arc::new(Mutex::new(Mmds::new(1000)));
    let mut bench = Bench::with(Some(MmdsPort::new(mmds, Ipv4Addr::from(SERVICE))), true);
    let places = lend(&mut bench, 2, 20);
    bench.memory.write_slice(&who_has(SERVICE), GuestAddress(DATA + 0xe_0000)).unwrap();
    bench.tx.lend(&[Lent::Read(DATA + 0xe_0000, ARP_LEN)]);
    bench.net.send(0, &bench.taps).unwrap();
    assert_eq!(bench.rx.used(), None);
    bench.rx.lend(&[Lent::Write(DATA + 0x4_0000, 20)]);
    bench.receive();
    let places = [places, vec![DATA + 0x4_0000]].concat();
    let answer = received(&mut bench, &places, 0);
    assert_eq!((answer.len(), &answer[..12]), (54, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0][..]));
    assert_eq!(answer[40..44], SERVICE);
}
