//! Which requests a back-end has taken and not answered, as it keeps it in a file that it shares with us
//! (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, for split rings). The file is read and never mapped: a back-end may cut it off.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use super::wire::numbers;

/// Bytes of the head of a queue's part of the file, and of what follows for each descriptor.
const HEAD_LEN: u64 = 16;
const DESCRIPTOR_LEN: u64 = 16;

/// Bytes of what is said of the file: its length and where it starts, in 64 bits each, the number of queues and their
/// size, in 16 bits each, and padding.
pub(super) const ANSWER_LEN: usize = 24;

/// What the back-end keeps.
pub(super) struct Inflight {
    file: File,
    start: u64,
    /// Bytes of each queue's part.
    part: u64,
    queue_size: u16,
}

/// What is asked for: room for so many queues of this size.
pub(super) fn question(queues: u16, queue_size: u16) -> Vec<u8> {
    numbers(&[0, 0, u64::from(queues) | u64::from(queue_size) << 16])
}

impl Inflight {
    /// By the back-end's answer to a [`question`]. `None` if it is too short for what was asked for.
    pub(super) fn new(file: File, answer: [u8; ANSWER_LEN], queues: u16, queue_size: u16) -> Option<Self> {
        let [len, start] = [0, 8].map(|at| number(&answer, at, 8));
        let part = len / u64::from(queues.max(1));
        let needed = HEAD_LEN + DESCRIPTOR_LEN * u64::from(queue_size);
        (part >= needed && start.checked_add(len).is_some()).then_some(Self { file, start, part, queue_size })
    }

    /// The heads of the chains that were taken from the queue of this index and not returned, in the order in which they
    /// were taken. `used` is the ring's used index. Fails where nothing was kept.
    pub(super) fn heads(&self, queue: u16, used: u16) -> io::Result<Vec<u16>> {
        let mut bytes = vec![0; usize::from(self.queue_size) * 16 + 16];
        self.file.read_exact_at(&mut bytes, self.start + self.part * u64::from(queue))?;
        let (head, descriptors) = bytes.split_at(16);
        if short(head, 8) == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it has no version"));
        }
        let mut descriptors: Vec<_> = descriptors.chunks_exact(16).collect();
        let mut heads: Vec<(u64, u16)> = Vec::new();
        // Those that are in the used ring, and were not struck out yet.
        let mut returned = Vec::new();
        let mut last = short(head, 12);
        for _ in 0..used.wrapping_sub(short(head, 14)).min(self.queue_size) {
            returned.push(last);
            last = descriptors.get(usize::from(last)).map_or(u16::MAX, |descriptor| short(descriptor, 6));
        }
        for (index, descriptor) in (0..self.queue_size).zip(descriptors.drain(..)) {
            if descriptor[0] == 1 && !returned.contains(&index) {
                heads.push((number(descriptor, 8, 8), index));
            }
        }
        heads.sort_unstable();
        Ok(heads.into_iter().map(|(_, head)| head).collect())
    }
}

impl AsRawFd for Inflight {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The little-endian number of `len` bytes at `at`.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..][..len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn short(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file for two queues of 4, each in 128 bytes; the second one has this head and these descriptors.
    fn inflight(head: [u16; 4], descriptors: [(u8, u16, u64); 4]) -> Inflight {
        let mut part = vec![0; 8];
        part.extend(head.iter().flat_map(|word| word.to_le_bytes()));
        for (taken, next, counter) in descriptors {
            part.extend([taken, 0, 0, 0, 0, 0]);
            part.extend(next.to_le_bytes());
            part.extend(counter.to_le_bytes());
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&part, 8 + 128).unwrap();
        file.set_len(8 + 256).unwrap();
        Inflight::new(file, answer(256, 8), 2, 4).unwrap()
    }

    fn answer(len: u64, start: u64) -> [u8; ANSWER_LEN] {
        numbers(&[len, start, 2 | 4 << 16]).try_into().unwrap()
    }

    #[test]
    fn what_was_taken_is_found_in_its_order() {
        let taken = [(1, 0, 9), (0, 0, 3), (1, 0, 8), (0, 0, 1)];
        let inflight = inflight([1, 4, 0, 70], taken);
        assert_eq!(inflight.heads(1, 70).unwrap(), [2, 0]);
        // The other queue was not started.
        inflight.heads(0, 0).unwrap_err();
    }

    #[test]
    fn what_was_returned_last_is_not_taken_for_open() {
        let taken = [(1, 2, 9), (1, 0, 3), (1, 0, 8), (0, 0, 1)];
        assert_eq!(inflight([1, 4, 0, 65535], taken).heads(1, 0).unwrap(), [1, 2]);
        assert_eq!(inflight([1, 4, 0, 65535], taken).heads(1, 1).unwrap(), [1]);
        // Nonsense is borne.
        assert_eq!(inflight([1, 4, 77, 0], taken).heads(1, 40000).unwrap(), [1, 2, 0]);
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let file = || tempfile::tempfile().unwrap();
        assert!(Inflight::new(file(), answer(159, 0), 2, 4).is_none());
        assert!(Inflight::new(file(), answer(256, u64::MAX), 2, 4).is_none());
        let inflight = inflight([1, 4, 0, 0], [(0, 0, 0); 4]);
        inflight.file.set_len(8 + 200).unwrap();
        inflight.heads(1, 0).unwrap_err();
    }
}
