//! Packets on their way to the guest, moved by us.
//!
//! A packet is read straight into the buffers that wait for one. One that is longer than they are all together, as may
//! happen while the driver lends few, goes on in memory of ours, from where the rest follows once there are buffers:
//! packets are lost only where no buffers that this driver could lend would do.

use std::io;

use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::HEADER_LEN;
use super::detour::Detour;
use super::lent::{Filled, Lent};
use super::tap::{MAX_PACKET, Tap};
use crate::rate_limiter::RateLimiter;
use crate::virtio::device::Memory;
use crate::virtio::virtqueue::{BYTES_PER_EVENT, QueueError, Virtqueue};

/// The receiving half of a pair of queues.
pub(super) struct Receiver {
    queue: Virtqueue,
    memory: Memory,
    lent: Lent,
    merged: bool,
    /// What is beyond the buffers: room for a whole packet if it may follow later, else a byte that tells a packet that
    /// just fits from one that does not.
    beyond: Box<[u8]>,
    /// A packet that waits for more buffers.
    unfinished: Option<Unfinished>,
    /// The length of what the limiter holds back; its chains are in `held_chains`. Then nothing that it limits is
    /// unfinished.
    held: Option<u32>,
    held_chains: Vec<(u16, u32)>,
    /// The chains of the packet at hand, kept so that not every one allocates.
    chains: Vec<(u16, u32)>,
}

/// A packet, the first part of which is in the buffers.
#[derive(Clone, Copy)]
struct Unfinished {
    /// Bytes, with the header.
    len: u32,
    /// Bytes in the buffers.
    kept: u32,
    /// Whether it is from the metadata service, which no limit counts.
    service: bool,
}

/// What packets come from, and what they have to pass.
pub(super) struct Way<'a> {
    /// The TAP.
    pub(super) tap: &'a Tap,
    /// The metadata service, if its packets come this way. They come first.
    pub(super) detour: Option<&'a mut Detour>,
    /// What limits the packets of the TAP.
    pub(super) limiter: &'a mut RateLimiter,
    /// Counts what is lost.
    pub(super) dropped: &'a mut u64,
}

/// What came of an attempt.
enum Step {
    /// A packet of this many bytes is in `chains`.
    Packet(Unfinished),
    /// None, but the next attempt may find one.
    Again,
    /// Nothing to do until the next event: of the TAP if there is no packet, of the driver if there is no buffer.
    Stop,
}

impl Receiver {
    /// Receives into `queue`; `merged` is whether a packet may be spread over several chains.
    pub(super) fn new(queue: Virtqueue, memory: Memory, merged: bool) -> Self {
        let beyond = if merged { usize::try_from(MAX_PACKET).unwrap_or(usize::MAX) } else { 1 };
        Self {
            lent: Lent::new(&memory, merged),
            queue,
            memory,
            merged,
            beyond: vec![0; beyond].into_boxed_slice(),
            unfinished: None,
            held: None,
            held_chains: Vec::new(),
            chains: Vec::new(),
        }
    }

    /// Gives the guest what the metadata service has for it, then takes packets out of the TAP until that is empty or
    /// the limiter says no, all that as long as the driver lends buffers. After one ring's worth, or many bytes, the
    /// rest waits for a kick that is sent to ourselves, so that others have their turn.
    pub(super) fn receive(&mut self, mut way: Way<'_>) -> Result<(), QueueError> {
        let memory = self.memory.memory().into_inner();
        self.queue.disable_kicks(&memory)?;
        let (mut left, mut moved) = (self.queue.ring().size(), 0);
        loop {
            let service = way.detour.as_deref_mut().is_some_and(Detour::is_ready);
            if let Some(len) = self.held {
                if way.limiter.consume(1, payload(len)) {
                    self.held = None;
                    self.queue.push_used_together(&memory, &self.held_chains)?;
                    moved += payload(len);
                } else if !service {
                    break;
                }
            }
            match self.step(&mut way, service)? {
                Step::Packet(Unfinished { len, service: false, .. })
                    if !way.limiter.consume(1, payload(len)) =>
                {
                    self.held = Some(len);
                    std::mem::swap(&mut self.chains, &mut self.held_chains);
                }
                Step::Packet(Unfinished { len, .. }) => {
                    self.queue.push_used_together(&memory, &self.chains)?;
                    moved += payload(len);
                }
                Step::Again => {}
                Step::Stop => break,
            }
            left -= 1;
            if left == 0 || moved >= BYTES_PER_EVENT {
                self.queue.kick_again()?;
                break;
            }
        }
        self.queue.notify(&memory)
    }

    /// Brings one packet into buffers.
    fn step(&mut self, way: &mut Way<'_>, service: bool) -> Result<Step, QueueError> {
        let packet = match self.unfinished.take() {
            Some(packet) => packet,
            None => {
                self.lent.follow(&mut self.queue, &self.memory);
                match self.lent.fill(&mut self.queue)? {
                    Filled::Useless => return Ok(Step::Again),
                    Filled::Empty if self.lent.room() == 0 => return self.wait(),
                    Filled::Enough | Filled::Empty | Filled::Full => {}
                }
                let received = match way.detour.as_deref_mut().filter(|_| service) {
                    Some(detour) => Ok(detour.receive(&mut self.lent, &mut self.beyond)),
                    None => way.tap.receive(&mut self.lent, &mut self.beyond),
                };
                match received {
                    // No TAP does that.
                    Ok(..HEADER_LEN) => return Ok(Step::Stop),
                    Ok(len) => Unfinished { len, kept: len.min(self.lent.room()), service },
                    Err(error) => {
                        if error.kind() != io::ErrorKind::WouldBlock {
                            log::debug!("TAP {}: could not read a packet: {error}", way.tap.name());
                        }
                        return Ok(Step::Stop);
                    }
                }
            }
        };
        self.finish(packet, way)
    }

    /// Finds buffers for the part of `packet` that is in none, and takes it out of them.
    fn finish(&mut self, packet: Unfinished, way: &mut Way<'_>) -> Result<Step, QueueError> {
        let filled = match packet.len > self.lent.room() {
            true if self.merged => self.lent.fill(&mut self.queue)?,
            // The next chain is another packet's.
            true => Filled::Full,
            false => Filled::Enough,
        };
        if packet.len > self.lent.room() {
            if filled == Filled::Full {
                *way.dropped += 1;
                return Ok(Step::Again);
            }
            self.unfinished = Some(packet);
            return match filled {
                Filled::Useless => Ok(Step::Again),
                _ => self.wait(),
            };
        }
        let rest = usize::try_from(packet.len - packet.kept).unwrap_or(usize::MAX);
        if let Some(rest @ [_, ..]) = self.beyond.get(..rest) {
            self.lent.write(packet.kept, rest);
        }
        self.lent.take(packet.len, &mut self.chains);
        Ok(Step::Packet(packet))
    }

    /// Asks the driver for a kick when it lends more.
    fn wait(&mut self) -> Result<Step, QueueError> {
        let memory = self.memory.memory();
        Ok(if self.queue.enable_kicks(&memory)? { Step::Again } else { Step::Stop })
    }
}

/// The bytes of a packet that limits count.
fn payload(len: u32) -> u64 {
    u64::from(len.saturating_sub(HEADER_LEN))
}
