//! One connection: a unix socket of the host on one side, packets of the guest's on the other.
//!
//! ```text
//!              REQUEST lent                RESPONSE
//!  host asks:  Requested{told} ----------------------> Open ---> over; what the guest sent last may still
//!  guest asks: REQUEST, socket found ----------------> Open      be on its way: Draining
//! ```
//!
//! # Credit (virtio 1.2, section 5.10.6.3)
//! What the guest sends goes straight to the host's socket. What that does not take is kept here, at most
//! [`BUFFER`] bytes, and counts as forwarded only when the socket took it: so a host program that does not read
//! stops the guest, on this connection alone. The other way round nothing is kept: bytes are read from the
//! host's socket only into a buffer that the guest lent, and never more than it has credit for.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::packet::{HEADER_LEN, Header, NO_MORE, NO_RECEIVE, NO_SEND, Op, Ports};
use super::socket::{receive_into, send, send_from};
use crate::virtio::iovec::ChainBuffers;

/// How many of the guest's bytes are kept for a host program that does not read, as the kernel's own vsock does by
/// default: four of the longest packets that Linux sends. All connections together keep 256 MiB at most.
pub(super) const BUFFER: u32 = 256 << 10;

/// The guest hears of room when so much of it is new.
const NEWS: u32 = BUFFER / 2;

/// The most data in one packet to the guest, so that connections take turns.
const MAX_DATA: u32 = 64 << 10;

/// What becomes of a connection after something happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Live,
    /// It is over.
    Over {
        /// The guest is still to be told, with RST.
        reset: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host wants it. `told`: the guest got the REQUEST.
    Requested { told: bool },
    /// `told`: the guest, which wanted it, got the RESPONSE; true if it was the host that wanted it.
    Open { told: bool },
    /// Over for the guest; its last bytes are still to be sent to the host.
    Draining,
}

/// A connection between a program of the host's and one of the guest's.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    ports: Ports,
    phase: Phase,
    /// When to look at it with [`Self::overdue`].
    pub(super) deadline: Option<Instant>,
    /// Whether it waits in line to lend the guest a packet; kept by the line's owner.
    pub(super) in_line: bool,

    /// The host's socket may have bytes, or its end.
    readable: bool,
    /// The guest's bytes that the host's socket did not take yet.
    kept: VecDeque<u8>,
    /// Bytes from the guest that left here, modulo 2^32.
    forwarded: u32,
    /// The value of `forwarded` that the guest knows.
    forwarded_told: u32,
    /// The guest asked for credit.
    update_wanted: bool,

    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// How many the guest's program has taken, modulo 2^32, and for how many it has room, as it says.
    taken: u32,
    room: u32,
    /// A CREDIT_REQUEST is to be sent at any rate.
    probe: bool,
    /// A CREDIT_REQUEST was sent, and no credit came since.
    probed: bool,

    /// What the host does no more, as flags of SHUTDOWN, and what of that the guest knows.
    host_done: u32,
    host_done_told: u32,
    /// What the guest does no more.
    guest_done: u32,
}

impl Connection {
    /// A connection that the program behind `socket` wants.
    pub(super) fn from_host(socket: UnixStream, ports: Ports) -> Self {
        Self {
            socket,
            ports,
            phase: Phase::Requested { told: false },
            deadline: None,
            in_line: false,
            // Its events may have come before it was a connection.
            readable: true,
            kept: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            update_wanted: false,
            sent: 0,
            taken: 0,
            room: 0,
            probe: false,
            probed: false,
            host_done: 0,
            host_done_told: 0,
            guest_done: 0,
        }
    }

    /// A connection that the guest wants with `request`, to the program behind `socket`.
    pub(super) fn from_guest(socket: UnixStream, request: &Header) -> Self {
        let (taken, room) = (request.fwd_cnt, request.buf_alloc);
        let phase = Phase::Open { told: false };
        Self { phase, taken, room, ..Self::from_host(socket, request.ports_from_guest()) }
    }

    /// Its two ends.
    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    /// A packet of the guest's for this connection. Its data are behind the header in `packet`.
    pub(super) fn take_packet(&mut self, op: Op, header: &Header, packet: &ChainBuffers<'_>) -> Fate {
        (self.taken, self.room) = (header.fwd_cnt, header.buf_alloc);
        self.probed &= self.credit() == 0;
        match (self.phase, op) {
            (_, Op::Reset) => Fate::Over { reset: false },
            (Phase::Requested { told: true }, Op::Response) => {
                self.phase = Phase::Open { told: true };
                self.deadline = None;
                let line = format!("OK {}\n", self.ports.host);
                // Nothing else was ever sent there: a socket that does not take all of it is closed.
                match send(&self.socket, &[IoSlice::new(line.as_bytes())]) {
                    Ok(len) if len == line.len() => Fate::Live,
                    _ => Fate::Over { reset: true },
                }
            }
            (Phase::Open { .. }, Op::Data) => self.take_data(header.len, packet),
            (Phase::Open { .. }, Op::Shutdown) => self.guest_shuts(header.flags),
            (Phase::Open { .. }, Op::CreditUpdate) => Fate::Live,
            (Phase::Open { .. }, Op::CreditRequest) => {
                self.update_wanted = true;
                Fate::Live
            }
            _ => Fate::Over { reset: true },
        }
    }

    /// The host's socket is ready for something.
    pub(super) fn host_event(&mut self, events: EventSet) -> Fate {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.readable |= gone || events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        match self.phase {
            Phase::Requested { told } if gone => Fate::Over { reset: told },
            Phase::Requested { .. } => Fate::Live,
            Phase::Open { .. } | Phase::Draining => {
                if gone {
                    self.host_receives_no_more();
                } else {
                    self.flush();
                }
                let drained = self.phase == Phase::Draining && self.kept.is_empty();
                if drained { Fate::Over { reset: false } } else { Fate::Live }
            }
        }
    }

    /// The deadline has passed. If the connection lives on it needs a new one.
    pub(super) fn overdue(&mut self) -> Fate {
        match self.phase {
            Phase::Requested { told } => Fate::Over { reset: told },
            // A RST now would take from the guest's program what it has not read yet.
            Phase::Open { .. } if self.sent != self.taken => {
                self.probe = true;
                Fate::Live
            }
            Phase::Open { .. } | Phase::Draining => Fate::Over { reset: true },
        }
    }

    /// It is over for the guest. Returns whether it has to stay until the host's socket took the rest.
    pub(super) fn linger(&mut self) -> bool {
        self.phase = Phase::Draining;
        self.deadline = None;
        if !self.kept.is_empty() {
            // Nothing that the host sends reaches the guest any more: let it know, lest it wait to send before it
            // reads. An error means that it was faster.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        !self.kept.is_empty()
    }

    /// Whether there may be something for the guest: if so, [`Self::next_packet`] wants a buffer.
    pub(super) fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Requested { told } => !told,
            Phase::Open { told: false } => true,
            Phase::Open { told: true } => {
                self.host_done != self.host_done_told
                    || self.wants_to_read()
                    || self.owes_update()
                    || self.wants_probe()
            }
            Phase::Draining => false,
        }
    }

    /// The header of the next packet to the guest, the data of which are already in `packet`, behind the place
    /// for the header. `packet` has room for at least one byte of data. `None` if there is nothing after all.
    pub(super) fn next_packet(&mut self, guest_cid: u64, packet: &ChainBuffers<'_>) -> Option<Header> {
        let (op, len) = self.next_op(packet)?;
        let mut header = Header::to_guest(guest_cid, self.ports, op);
        header.len = len;
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
        if op == Op::Shutdown {
            header.flags = self.host_done;
            self.host_done_told = self.host_done;
        }
        self.forwarded_told = self.forwarded;
        self.update_wanted = false;
        Some(header)
    }

    /// Decides on the next packet to the guest; moves the data, and counts them, if there are any.
    fn next_op(&mut self, packet: &ChainBuffers<'_>) -> Option<(Op, u32)> {
        match &mut self.phase {
            Phase::Requested { told: told @ false } => {
                *told = true;
                return Some((Op::Request, 0));
            }
            Phase::Open { told: told @ false } => {
                *told = true;
                return Some((Op::Response, 0));
            }
            Phase::Open { told: true } => {}
            Phase::Requested { told: true } | Phase::Draining => return None,
        }
        // An end of what the host receives does not wait for the end of what it sends.
        if self.host_done == self.host_done_told && self.wants_to_read() {
            let len = self.read(packet);
            if len > 0 {
                return Some((Op::Data, len));
            }
        }
        if self.host_done != self.host_done_told {
            Some((Op::Shutdown, 0))
        } else if self.wants_probe() {
            (self.probe, self.probed) = (false, true);
            Some((Op::CreditRequest, 0))
        } else if self.owes_update() {
            Some((Op::CreditUpdate, 0))
        } else {
            None
        }
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        self.room.saturating_sub(self.sent.wrapping_sub(self.taken))
    }

    /// Whether there may be bytes of the host's that the guest still receives.
    fn has_bytes(&self) -> bool {
        self.readable && self.host_done & NO_SEND == 0 && self.guest_done & NO_RECEIVE == 0
    }

    fn wants_to_read(&self) -> bool {
        self.has_bytes() && self.credit() > 0
    }

    fn wants_probe(&self) -> bool {
        self.probe || (self.has_bytes() && self.credit() == 0 && !self.probed)
    }

    fn owes_update(&self) -> bool {
        self.update_wanted || self.forwarded.wrapping_sub(self.forwarded_told) >= NEWS
    }

    /// Moves bytes from the host's socket to the guest. 0 if there are none now, or none any more.
    fn read(&mut self, packet: &ChainBuffers<'_>) -> u32 {
        let len = self.credit().min(MAX_DATA);
        let received = receive_into(&self.socket, packet, HEADER_LEN, len);
        match received.map(u32::try_from) {
            Ok(Ok(len @ 1..)) => {
                self.sent = self.sent.wrapping_add(len);
                return len;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The end, or a peer that closed without reading everything.
            _ => self.host_done |= NO_SEND,
        }
        self.readable = false;
        0
    }

    /// Moves `len` bytes of the guest's to the host.
    fn take_data(&mut self, len: u32, packet: &ChainBuffers<'_>) -> Fate {
        let present = packet.readable_len().saturating_sub(HEADER_LEN);
        if len > present || len > self.free() || self.guest_done & NO_SEND != 0 {
            return Fate::Over { reset: true };
        }
        let mut done = 0;
        while self.kept.is_empty() && self.host_done & NO_RECEIVE == 0 && done < len {
            let sent = send_from(&self.socket, packet, HEADER_LEN + done, len - done);
            match sent.map(u32::try_from) {
                Ok(Ok(sent @ 1..)) => done += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => self.host_receives_no_more(),
            }
        }
        if self.host_done & NO_RECEIVE != 0 {
            // Nobody reads: what comes is taken, so that the guest does not wait, and forgotten.
            self.forwarded = self.forwarded.wrapping_add(len);
            return Fate::Live;
        }
        self.forwarded = self.forwarded.wrapping_add(done);
        match self.keep(HEADER_LEN + done, len - done, packet) {
            true => Fate::Live,
            false => Fate::Over { reset: true },
        }
    }

    /// Keeps `len` bytes from `offset` on of the guest's packet, which has so many.
    fn keep(&mut self, offset: u32, len: u32, packet: &ChainBuffers<'_>) -> bool {
        let old = self.kept.len();
        let Ok(len) = usize::try_from(len) else { return false };
        self.kept.resize(old + len, 0);
        // A ring has two parts; the new bytes are at the end of one or of both.
        let (first, second) = self.kept.as_mut_slices();
        let split = old.min(first.len());
        let first = &mut first[split..];
        let second = &mut second[old - split..];
        let Ok(first_len) = u32::try_from(first.len()) else { return false };
        packet.read_at(offset, first).is_ok()
            && (second.is_empty() || packet.read_at(offset + first_len, second).is_ok())
    }

    /// Room in what is kept.
    fn free(&self) -> u32 {
        BUFFER.saturating_sub(u32::try_from(self.kept.len()).unwrap_or(u32::MAX))
    }

    /// Sends what is kept until the host's socket takes no more.
    fn flush(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        while !self.kept.is_empty() {
            let (first, second) = self.kept.as_slices();
            match send(&self.socket, &[IoSlice::new(first), IoSlice::new(second)]) {
                Ok(len) => self.forward(len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.host_receives_no_more(),
            }
        }
        self.end_if_sent();
    }

    /// The first `len` bytes that are kept are out of the way.
    fn forward(&mut self, len: usize) {
        self.kept.drain(..len);
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(len).unwrap_or(u32::MAX));
        if self.kept.is_empty() {
            // A connection that is not stalled holds no memory.
            self.kept = VecDeque::new();
        }
    }

    fn host_receives_no_more(&mut self) {
        self.host_done |= NO_RECEIVE;
        self.forward(self.kept.len());
    }

    /// The guest ends a direction, or both.
    fn guest_shuts(&mut self, flags: u32) -> Fate {
        let news = flags & NO_MORE & !self.guest_done;
        self.guest_done |= news;
        if self.guest_done == NO_MORE {
            return Fate::Over { reset: true };
        }
        if news & NO_RECEIVE != 0 {
            // An error means that the host was faster.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        if news & NO_SEND != 0 {
            self.end_if_sent();
        }
        Fate::Live
    }

    /// Passes on that the guest sends no more, behind its last byte. Once only: it makes an event of its own.
    fn end_if_sent(&mut self) {
        if self.guest_done & NO_SEND != 0 && self.kept.is_empty() {
            // An error means that the host was faster.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }
}
