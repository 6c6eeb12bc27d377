use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::virtio::testing::{INDIRECT, NEXT, RecordedInterrupt, Ring, WRITE};

const SIZE: u16 = Ring::SIZE;

/// A ring at address 4096, in 1 MiB of memory.
struct Fixture {
    memory: GuestMemoryMmap,
    interrupt: Arc<RecordedInterrupt>,
    kick: Arc<EventFd>,
}

impl Fixture {
    fn new() -> Self {
        Self {
            memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap(),
            interrupt: Arc::default(),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    fn ring(&self) -> Ring<'_> {
        Ring::new(&self.memory, 0x1000)
    }

    fn queue(&self, event_idx: bool) -> Virtqueue {
        let mut queue = self.ring().queue();
        queue.set_event_idx(event_idx);
        Virtqueue::new(3, queue, self.kick.clone(), self.interrupt.clone())
    }

    fn interrupts(&self) -> usize {
        self.interrupt.take().len()
    }
}

#[test]
fn chains_are_served_in_order_and_announced_once() {
    for event_idx in [false, true] {
        let fixture = Fixture::new();
        let mut queue = fixture.queue(event_idx);
        let ring = fixture.ring();
        for index in 0..3 {
            ring.store(index, Descriptor::new(0x8000, 1 + u32::from(index), WRITE, 0));
            ring.offer(index, index);
        }
        let mut lengths = Vec::new();
        queue
            .serve(&fixture.memory, |mut chain| {
                lengths.push(chain.next().unwrap().len());
                7
            })
            .unwrap();
        assert_eq!(lengths, [1, 2, 3]);
        assert_eq!(ring.used_index(), 3);
        assert_eq!(ring.used_entry(2), (2, 7));
        assert_eq!(fixture.interrupt.take(), [Vector::Queue(3)]);
        assert!(fixture.kick.read().is_err());

        // Nothing new: nobody is told of anything.
        queue.serve(&fixture.memory, |_| panic!("there is no chain")).unwrap();
        assert_eq!(fixture.interrupts(), 0);
    }
}

#[test]
fn a_full_ring_is_served_and_one_that_refills_has_to_wait() {
    for event_idx in [false, true] {
        let fixture = Fixture::new();
        let mut queue = fixture.queue(event_idx);
        let ring = fixture.ring();
        for index in 0..SIZE {
            ring.store(index, Descriptor::new(0x8000, 1, 0, 0));
        }
        ring.offer(0, 0);
        let mut served = 0u16;
        // Each chain that is served makes another one available, for ever.
        let each = |_: Chain<'_>| {
            served += 1;
            ring.offer(served, served % SIZE);
            0
        };
        queue.serve(&fixture.memory, each).unwrap();
        assert_eq!(served, SIZE);
        assert_eq!(fixture.kick.read().unwrap(), 1, "the rest is not forgotten");

        queue.serve(&fixture.memory, |_| 0).unwrap();
        assert!(fixture.kick.read().is_err());
        assert_eq!(ring.used_index(), SIZE + 1);
    }
}

#[test]
fn chains_are_returned_together() {
    for event_idx in [false, true] {
        let fixture = Fixture::new();
        let ring = fixture.ring();
        let mut queue = fixture.queue(event_idx);
        queue.push_used_together(&fixture.memory, &[(7, 100), (2, 200)]).unwrap();
        assert_eq!((ring.used_index(), ring.used_entry(0), ring.used_entry(1)), (2, (7, 100), (2, 200)));
        queue.push_used_together(&fixture.memory, &[]).unwrap();
        assert_eq!(ring.used_index(), 2);
        queue.notify(&fixture.memory).unwrap();
        assert_eq!(fixture.interrupts(), 1);
        queue.notify(&fixture.memory).unwrap();
        assert_eq!(fixture.interrupts(), 0, "told already");
        // Across the end of the ring.
        ring.set_used_event(10);
        let all: Vec<_> = (0..SIZE).map(|head| (head, 1)).collect();
        queue.push_used_together(&fixture.memory, &all).unwrap();
        assert_eq!((ring.used_index(), ring.used_entry(SIZE + 1)), (SIZE + 2, (u32::from(SIZE) - 1, 1)));
        queue.notify(&fixture.memory).unwrap();
        assert_eq!(fixture.interrupts(), 1);
    }
}

#[test]
fn several_chains_are_given_back() {
    let fixture = Fixture::new();
    let mut queue = fixture.queue(false);
    let ring = fixture.ring();
    for index in 0..3 {
        ring.store(index, Descriptor::new(0x8000, 1, 0, 0));
        ring.offer(index, index);
    }
    let pop = |queue: &mut Virtqueue| queue.pop(&fixture.memory).unwrap().unwrap().head_index();
    assert_eq!([pop(&mut queue), pop(&mut queue), pop(&mut queue)], [0, 1, 2]);
    queue.undo_pops(2);
    assert_eq!([pop(&mut queue), pop(&mut queue)], [1, 2]);
}

#[test]
fn leaving_asks_for_kicks() {
    let fixture = Fixture::new();
    let mut queue = fixture.queue(false);
    let ring = fixture.ring();
    queue.disable_kicks(&fixture.memory).unwrap();
    assert_eq!(ring.used_flags(), 1);
    queue.serve(&fixture.memory, |_| 0).unwrap();
    assert_eq!(ring.used_flags(), 0);

    let fixture = Fixture::new();
    let ring = fixture.ring();
    let mut queue = fixture.queue(true);
    ring.store(0, Descriptor::new(0x8000, 1, 0, 0));
    ring.offer(0, 0);
    queue.serve(&fixture.memory, |_| 0).unwrap();
    assert_eq!(ring.available_event(), 1);
}

#[test]
fn a_chain_that_arrives_while_kicks_are_off_is_seen() {
    let fixture = Fixture::new();
    let mut queue = fixture.queue(true);
    let ring = fixture.ring();
    ring.store(0, Descriptor::new(0x8000, 1, 0, 0));
    ring.offer(0, 0);
    assert!(queue.enable_kicks(&fixture.memory).unwrap());
    assert!(queue.pop(&fixture.memory).unwrap().is_some());
    assert!(!queue.enable_kicks(&fixture.memory).unwrap());
}

#[test]
fn the_driver_decides_about_interrupts() {
    let fixture = Fixture::new();
    let ring = fixture.ring();
    ring.store(0, Descriptor::new(0x8000, 1, 0, 0));
    let mut queue = fixture.queue(false);
    ring.set_available_flags(1);
    ring.offer(0, 0);
    queue.serve(&fixture.memory, |_| 0).unwrap();
    assert_eq!(fixture.interrupts(), 0, "VIRTQ_AVAIL_F_NO_INTERRUPT");
    ring.set_available_flags(0);
    ring.offer(1, 0);
    queue.serve(&fixture.memory, |_| 0).unwrap();
    assert_eq!(fixture.interrupts(), 1);

    let fixture = Fixture::new();
    let ring = fixture.ring();
    ring.store(0, Descriptor::new(0x8000, 1, 0, 0));
    let mut queue = fixture.queue(true);
    // Tell me when the second one is used.
    ring.set_used_event(1);
    ring.offer(0, 0);
    queue.serve(&fixture.memory, |_| 0).unwrap();
    assert_eq!(fixture.interrupts(), 0);
    ring.offer(1, 0);
    queue.serve(&fixture.memory, |_| 0).unwrap();
    assert_eq!(fixture.interrupts(), 1);
}

#[test]
fn a_chain_given_back_is_popped_again() {
    let fixture = Fixture::new();
    let mut queue = fixture.queue(false);
    let ring = fixture.ring();
    ring.store(5, Descriptor::new(0x8000, 1, 0, 0));
    ring.offer(0, 5);
    assert_eq!(queue.pop(&fixture.memory).unwrap().unwrap().head_index(), 5);
    queue.undo_pop();
    assert_eq!(queue.pop(&fixture.memory).unwrap().unwrap().head_index(), 5);
    assert!(queue.pop(&fixture.memory).unwrap().is_none());
}

#[test]
fn a_chain_that_is_held_stays_and_ends_the_turn() {
    let fixture = Fixture::new();
    let mut queue = fixture.queue(false);
    let ring = fixture.ring();
    for index in 0..3 {
        ring.store(index, Descriptor::new(0x8000, 1, 0, 0));
        ring.offer(index, index);
    }
    let mut seen = Vec::new();
    let mut serve = |turns: [Turn; 2]| {
        let mut turns = turns.into_iter();
        let each = |chain: Chain<'_>| {
            seen.push(chain.head_index());
            turns.next().unwrap()
        };
        queue.serve_while(&fixture.memory, each).unwrap();
        (ring.used_index(), queue.kick().read().is_ok())
    };
    // Asked for no kicks, and none of our own.
    assert_eq!(serve([Turn::Used(7), Turn::Held]), (1, false));
    assert_eq!(ring.used_flags(), 1);
    assert_eq!(serve([Turn::Last(8), Turn::Held]), (2, true));
    assert_eq!(serve([Turn::Used(9), Turn::Held]), (3, false));
    assert_eq!(ring.used_flags(), 0);
    assert_eq!(seen, [0, 1, 1, 2]);
    assert_eq!([0, 1, 2].map(|position| ring.used_entry(position)), [(0, 7), (1, 8), (2, 9)]);
}

#[test]
fn indices_wrap() {
    let fixture = Fixture::new();
    let mut queue = fixture.queue(false);
    let ring = fixture.ring();
    ring.store(0, Descriptor::new(0x8000, 1, 0, 0));
    let mut served = 0u32;
    for position in (0..=u16::MAX).chain(0..20) {
        ring.offer(position, 0);
        queue
            .serve(&fixture.memory, |_| {
                served += 1;
                0
            })
            .unwrap();
    }
    assert_eq!(served, 0x1_0000 + 20);
}

#[test]
fn an_index_that_jumps_is_refused() {
    let fixture = Fixture::new();
    for jump in [SIZE + 1, 0x8000, u16::MAX] {
        let mut queue = fixture.queue(false);
        fixture.ring().set_available_index(jump);
        let result = queue.serve(&fixture.memory, |_| panic!("there is no chain"));
        assert!(matches!(result, Err(QueueError::Available { queue: 3, .. })), "{jump}: {result:?}");
    }
}

#[test]
fn a_head_out_of_range_is_refused() {
    let fixture = Fixture::new();
    for head in [SIZE, u16::MAX] {
        let mut queue = fixture.queue(false);
        fixture.ring().offer(0, head);
        let result = queue.serve(&fixture.memory, |_| panic!("there is no chain"));
        assert!(matches!(result, Err(QueueError::Head { queue: 3, size: SIZE, .. })), "{head}: {result:?}");
    }
}

#[test]
fn hostile_chains_end() {
    let fixture = Fixture::new();
    let ring = fixture.ring();
    let mut queue = fixture.queue(false);
    // A loop; one that leads out of the table; one that is nowhere; an indirect table in an indirect table,
    // without entries, with a broken length, and of more entries than there can be.
    ring.store(0, Descriptor::new(0x8000, 1, NEXT, 0));
    ring.store(1, Descriptor::new(0x8000, 1, NEXT, SIZE));
    ring.store(2, Descriptor::new(u64::MAX, u32::MAX, NEXT, 2));
    ring.store(3, Descriptor::new(0x9000, 32, INDIRECT, 0));
    fixture.memory.write_obj(Descriptor::new(0x9000, 32, INDIRECT, 0), GuestAddress(0x9000)).unwrap();
    ring.store(4, Descriptor::new(0x9000, 0, INDIRECT, 0));
    ring.store(5, Descriptor::new(0x9000, 17, INDIRECT, 0));
    ring.store(6, Descriptor::new(0x9000, 0xffff_fff0, INDIRECT | NEXT, 0));
    ring.store(7, Descriptor::new(u64::MAX - 8, 32, INDIRECT, 0));
    for head in 0..8 {
        ring.offer(head, head);
    }
    let mut lengths = Vec::new();
    queue
        .serve(&fixture.memory, |chain| {
            lengths.push(chain.count());
            0
        })
        .unwrap();
    assert_eq!(lengths, [16, 1, 1, 0, 0, 0, 0, 0]);
    assert_eq!(ring.used_index(), 8);
}

#[test]
fn a_table_may_lie_over_its_own_rings() {
    let fixture = Fixture::new();
    let ring = fixture.ring();
    let mut queue = ring.queue();
    queue.try_set_used_ring_address(GuestAddress(ring.available())).unwrap();
    let mut queue = Virtqueue::new(0, queue, fixture.kick.clone(), fixture.interrupt.clone());
    ring.store(0, Descriptor::new(0x1000, 0x1000, WRITE, 0));
    ring.offer(0, 0);
    // It ends, in whatever way.
    for _ in 0..100 {
        let _ = queue.serve(&fixture.memory, |_| 0);
    }
}

#[test]
fn memory_that_vanishes_ends_in_an_error() {
    let fixture = Fixture::new();
    let mut queue = fixture.queue(false);
    let gone = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x8_0000), 0x1000)]).unwrap();
    assert!(queue.serve(&gone, |_| 0).is_err());
    assert!(queue.pop(&gone).is_err());
    assert!(queue.push_used(&gone, 0, 0).is_err());
}

#[test]
fn rings_are_checked_against_memory() {
    let memory = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0x1000), 0x1000),
        (GuestAddress(0x2000), 0x1000),
        (GuestAddress(0x1_0000), 0x1000),
    ])
    .unwrap();
    let check = |table: u64, available: u64, used: u64| {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(available)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        check_ring(1, &queue, &memory)
    };
    // The last place of each part: 256, 38 and 134 bytes.
    check(0x1f00, 0x2fda, 0x1_0f78).unwrap();
    for (table, available, used, bad) in [
        (0x1f10, 0x1000, 0x1000, "descriptor table"),
        (0x0, 0x1000, 0x1000, "descriptor table"),
        (0xffff_ffff_ffff_fff0, 0x1000, 0x1000, "descriptor table"),
        (0x1000, 0x2fdc, 0x1000, "available ring"),
        (0x1000, u64::MAX - 1, 0x1000, "available ring"),
        // Across two regions.
        (0x1000, 0x1fe0, 0x1000, "available ring"),
        (0x1000, 0x1000, 0x1_0f7c, "used ring"),
        (0x1000, 0x1000, 0xfffc, "used ring"),
    ] {
        match check(table, available, used) {
            Err(QueueError::Ring { queue: 1, part, .. }) => assert_eq!(part, bad),
            result => panic!("{table:#x} {available:#x} {used:#x}: {result:?}"),
        }
    }
}

#[test]
fn a_full_eventfd_is_signalled() {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    event.write(u64::MAX - 1).unwrap();
    signal(&event).unwrap();
}

#[test]
fn a_kick_is_asked_for_after_several_chains() {
    let fixture = Fixture::new();
    assert_eq!(fixture.queue(false).enable_kick_after(&fixture.memory, 4).unwrap(), None);

    let mut queue = fixture.queue(true);
    let ring = fixture.ring();
    for index in 0..SIZE {
        ring.store(index, Descriptor::new(0x8000, 1, 0, 0));
    }
    assert_eq!(queue.enable_kick_after(&fixture.memory, 4).unwrap(), Some(false));
    // The driver kicks when it adds the chain with this number.
    assert_eq!(ring.available_event(), 3);
    for index in 0..3 {
        ring.offer(index, index);
        assert_eq!(queue.enable_kick_after(&fixture.memory, 4).unwrap(), Some(false), "{index}");
    }
    ring.offer(3, 3);
    assert_eq!(queue.enable_kick_after(&fixture.memory, 4).unwrap(), Some(true));
    assert!(queue.pop(&fixture.memory).unwrap().is_some());
    assert_eq!(queue.enable_kick_after(&fixture.memory, 4).unwrap(), Some(false));
    assert_eq!(ring.available_event(), 4);
    // Never more than the driver can add.
    assert_eq!(queue.enable_kick_after(&fixture.memory, u16::MAX).unwrap(), Some(false));
    assert_eq!(ring.available_event(), 1 + SIZE / 2 - 1);
}

#[test]
fn what_another_had_taken_is_returned_whatever_order_it_answered_in() {
    let fixture = Fixture::new();
    let mut other = fixture.queue(false);
    let mut queue = fixture.queue(false);
    let ring = fixture.ring();
    let offer = |position: u16, head: u16| {
        ring.store(head, Descriptor::new(0x8000, 1 + u32::from(head), WRITE, 0));
        ring.offer(position, head);
    };
    // The ring has come round once. Of the last three one was answered, the second of them.
    for position in 0..SIZE {
        offer(position, position);
        let head = other.pop(&fixture.memory).unwrap().unwrap().head_index();
        other.push_used(&fixture.memory, head, 1).unwrap();
    }
    for (position, head) in (SIZE..).zip([5, 9, 2, 7]) {
        offer(position, head);
    }
    other.push_used(&fixture.memory, 9, 1).unwrap();
    assert_eq!(queue.resume_after_used(&fixture.memory).unwrap(), SIZE + 1);
    let mut lengths = Vec::new();
    queue
        .answer_taken(&fixture.memory, &[5, 2], |mut chain| {
            lengths.push(chain.next().unwrap().len());
            0
        })
        .unwrap();
    assert_eq!(lengths, [6, 3]);
    queue.serve(&fixture.memory, |chain| u32::from(chain.head_index())).unwrap();
    let used: Vec<_> = (SIZE..ring.used_index()).map(|position| ring.used_entry(position)).collect();
    assert_eq!(used, [(9, 1), (5, 0), (2, 0), (7, 7)]);
    assert_eq!(fixture.interrupts(), 1);
}

#[test]
fn heads_that_the_driver_never_lent_are_not_returned() {
    let fixture = Fixture::new();
    let mut queue = fixture.queue(false);
    let ring = fixture.ring();
    queue.resume_after_used(&fixture.memory).unwrap();
    queue.answer_taken(&fixture.memory, &[3, u16::MAX], |_| 0).unwrap();
    assert_eq!(ring.used_index(), 0);
}
