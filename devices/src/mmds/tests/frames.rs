//! Frames as a hostile guest makes them.

use std::net::Ipv4Addr;

use super::guest::{ADDRESS, GUEST_MAC};

pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const PSH: u8 = 8;
pub(super) const ACK: u8 = 16;

/// A TCP segment to port 80 of the service, with no checksum.
#[derive(Clone, Default)]
pub(super) struct Segment {
    pub(super) host: u8,
    pub(super) port: u16,
    pub(super) sequence: u32,
    pub(super) acknowledged: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) urgent: u16,
    /// A multiple of 4 bytes, 40 at most.
    pub(super) options: Vec<u8>,
    pub(super) payload: Vec<u8>,
}

impl Segment {
    pub(super) fn frame(&self) -> Vec<u8> {
        let tcp_header = 20 + self.options.len();
        let total = u16::try_from(20 + tcp_header + self.payload.len()).unwrap();
        let mut frame = ethernet(0x0800);
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 172, 16, 0, self.host]);
        frame.extend(ADDRESS.octets());
        frame.extend(self.port.to_be_bytes());
        frame.extend(80u16.to_be_bytes());
        frame.extend(self.sequence.to_be_bytes());
        frame.extend(self.acknowledged.to_be_bytes());
        frame.extend([u8::try_from(tcp_header / 4 * 16).unwrap(), self.flags]);
        frame.extend(self.window.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(self.urgent.to_be_bytes());
        frame.extend(&self.options);
        frame.extend(&self.payload);
        frame
    }
}

/// An ARP packet: `operation` is 1 for a request.
pub(super) fn arp(operation: u8, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(0x0806);
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(GUEST_MAC);
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

fn ethernet(ethertype: u16) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(GUEST_MAC);
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// The sequence number after a segment in a frame for the guest, if there is one.
pub(super) fn next_sequence(frame: &[u8]) -> Option<u32> {
    if frame.get(12..14)? != [8, 0] || frame.get(23) != Some(&6) {
        return None;
    }
    let sequence = u32::from_be_bytes(frame.get(38..42)?.try_into().unwrap());
    let header = 34 + usize::from(frame.get(46)? / 16 * 4);
    let flags = *frame.get(47)?;
    let len = u32::try_from(frame.len() - header).unwrap() + u32::from(flags & (SYN | FIN) != 0);
    Some(sequence.wrapping_add(len))
}

/// Numbers that look random and are the same each time (xorshift64).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 8) % end
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }

    pub(super) fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(super) fn word(&mut self) -> u32 {
        u32::from(self.short()) << 16 | u32::from(self.short())
    }

    pub(super) fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }

    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let index = self.below(u64::try_from(from.len()).unwrap());
        &from[usize::try_from(index).unwrap()]
    }
}
