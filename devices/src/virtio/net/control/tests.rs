use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::driver_ring::{DriverRing, Lent};
use crate::virtio::testing::RecordedInterrupt;

const RING: u64 = 0x1000;
const DATA: u64 = 0x8000;
const ANSWER: u64 = 0x9000;

/// What became of commands, each a chain of buffers: the numbers asked for, the used lengths, and the answer of the
/// last, 0xff if there was none.
fn ask(commands: &[&[Lent]], bytes: &[u8]) -> (Vec<u16>, Vec<u32>, u8) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
    memory.write_obj(0xffu8, GuestAddress(ANSWER)).unwrap();
    let mut ring = DriverRing::new(&memory, RING);
    let (mut queue, _) = ring.virtqueue(4, Arc::new(RecordedInterrupt::default()));
    for command in commands {
        ring.lend(command);
    }
    let mut asked = Vec::new();
    let set = |pairs| {
        asked.push(pairs);
        pairs == 2
    };
    serve(&mut queue, &memory, &mut ChainIovecs::new(), set).unwrap();
    let used = std::iter::from_fn(|| ring.used().map(|(_, len)| len)).collect();
    (asked, used, memory.read_obj(GuestAddress(ANSWER)).unwrap())
}

#[test]
fn the_number_of_pairs_is_asked_for_and_answered() {
    // As Linux does, and in one piece.
    let pieces = [Lent::Read(DATA, 2), Lent::Read(DATA + 2, 2), Lent::Write(ANSWER, 1)];
    assert_eq!(ask(&[&pieces], &[4, 0, 2, 0]), (vec![2], vec![1], 0));
    let whole = [Lent::Read(DATA, 4), Lent::Write(ANSWER, 8)];
    assert_eq!(ask(&[&whole], &[4, 0, 1, 1]), (vec![0x101], vec![1], 1));
    assert_eq!(ask(&[&whole, &whole], &[4, 0, 2, 0]), (vec![2, 2], vec![1, 1], 0));
}

#[test]
fn everything_else_is_refused() {
    let whole = [Lent::Read(DATA, 4), Lent::Write(ANSWER, 1)];
    for command in [[0, 0, 2, 0], [4, 1, 2, 0], [5, 0, 2, 0], [3, 0, 2, 0]] {
        assert_eq!(ask(&[&whole], &command), (vec![], vec![1], 1), "{command:?}");
    }
    let short = [Lent::Read(DATA, 3), Lent::Write(ANSWER, 1)];
    assert_eq!(ask(&[&short], &[4, 0, 2, 0]), (vec![], vec![1], 1));
    assert_eq!(ask(&[&[Lent::Write(ANSWER, 1)]], &[]), (vec![], vec![1], 1));
}

#[test]
fn what_cannot_be_answered_is_not_done() {
    for buffers in [
        &[Lent::Read(DATA, 4)][..],
        &[Lent::Read(DATA, 4), Lent::Write(ANSWER, 0)],
        &[Lent::Read(DATA, 4), Lent::Write(0x1_0000, 1)],
        &[Lent::Write(ANSWER, 1), Lent::Read(DATA, 4)],
    ] {
        assert_eq!(ask(&[buffers], &[4, 0, 2, 0]), (vec![], vec![0], 0xff));
    }
}
