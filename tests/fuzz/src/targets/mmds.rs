//! The metadata service: frames of the guest's, TCP segments of a connection that is there, HTTP in them.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use devices::mmds::{Mmds, MmdsPort, Version};
use serde_json::json;

use crate::input::Input;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SYN: u8 = 2;
const FIN: u8 = 1;
const ACK: u8 = 16;

/// The guest's end of a connection.
#[derive(Default)]
struct Connection {
    port: u16,
    sequence: u32,
    acknowledged: u32,
}

impl Connection {
    /// A segment to port 80 of the service, with no checksum, as a guest with offloads sends it.
    fn segment(&self, flags: u8, window: u16, payload: &[u8]) -> Vec<u8> {
        let total = u16::try_from(40 + payload.len()).unwrap_or(u16::MAX);
        let mut frame = ethernet(0x0800);
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 172, 16, 0, 2]);
        frame.extend(ADDRESS.octets());
        frame.extend(self.port.to_be_bytes());
        frame.extend(80_u16.to_be_bytes());
        frame.extend(self.sequence.to_be_bytes());
        frame.extend(self.acknowledged.to_be_bytes());
        frame.extend([5 << 4, flags]);
        frame.extend(window.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(payload);
        frame
    }

    fn send(&mut self, port: &mut MmdsPort, flags: u8, window: u16, payload: &[u8]) {
        let frame = self.segment(flags, window, payload);
        assert!(port.takes(&frame), "it is for the service");
        port.from_guest(&frame);
        let len = u32::try_from(payload.len()).unwrap_or_default() + u32::from(flags & (SYN | FIN) != 0);
        self.sequence = self.sequence.wrapping_add(len);
    }

    /// What acknowledges a segment for us.
    fn take(&mut self, frame: &[u8]) {
        let word = |at: usize| Some(u32::from_be_bytes(frame.get(at..at + 4)?.try_into().ok()?));
        if frame.get(23) != Some(&6) || frame.get(36..38) != Some(&self.port.to_be_bytes()) {
            return;
        }
        let (Some(sequence), Some(&header), Some(&flags)) = (word(38), frame.get(46), frame.get(47)) else {
            return;
        };
        let len = frame.len().saturating_sub(34 + usize::from(header >> 4) * 4);
        let len = u32::try_from(len).unwrap_or_default() + u32::from(flags & (SYN | FIN) != 0);
        self.acknowledged = sequence.wrapping_add(len);
    }
}

fn ethernet(kind: u16) -> Vec<u8> {
    let mut frame = vec![0xFF; 6];
    frame.extend(MAC);
    frame.extend(kind.to_be_bytes());
    frame
}

/// Takes the service's frames, as many as it would send at once and more.
fn drain(port: &mut MmdsPort, connection: &mut Connection) {
    let mut buffer = [0; 1514];
    for _ in 0..1000 {
        let Some(len) = port.to_guest(&mut buffer) else { return };
        connection.take(&buffer[..len.min(1514)]);
    }
    panic!("the service sends without end");
}

/// A guest's frames.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut mmds = Mmds::new(51200);
    let choice = input.u8();
    mmds.set_version(if choice & 1 == 0 { Version::V1 } else { Version::V2 });
    mmds.set_imds_compat(choice & 2 != 0);
    if choice & 4 == 0 {
        let document =
            json!({"latest": {"meta-data": {"ami-id": "1", "a b": [1, {"c": null}], "e": "x\ny"}}});
        mmds.put(document).expect("it is small");
    }
    let mut port = MmdsPort::new(Arc::new(Mutex::new(mmds)), ADDRESS);
    let mut connection = Connection { port: 1000, ..Connection::default() };
    for _ in 0..200 {
        if input.is_empty() {
            break;
        }
        match input.u8() % 8 {
            0 => {
                // A new connection, up to its being open.
                connection.port = connection.port.wrapping_add(1);
                connection.send(&mut port, SYN, 0xFFFF, &[]);
                drain(&mut port, &mut connection);
                connection.send(&mut port, ACK, 0xFFFF, &[]);
            }
            1 | 2 => {
                let payload = input.short_bytes();
                connection.send(&mut port, ACK, 0xFFFF, payload);
            }
            3 => {
                let (flags, window) = (input.u8(), input.u16());
                connection.sequence = connection.sequence.wrapping_add(input.u32());
                let payload = input.short_bytes();
                connection.send(&mut port, flags, window, payload);
            }
            4 => {
                // A segment with something in it changed.
                let mut frame = connection.segment(ACK, 0xFFFF, b"GET / HTTP/1.1\r\n\r\n");
                let len = frame.len();
                for _ in 0..input.u8() % 8 {
                    frame[usize::from(input.u8()) % len] = input.u8();
                }
                if port.takes(&frame) {
                    port.from_guest(&frame);
                }
            }
            5 => {
                let mut frame = ethernet(0x0806);
                frame.extend([0, 1, 8, 0, 6, 4, 0, input.u8()]);
                frame.extend(MAC);
                frame.extend([172, 16, 0, 2, 0, 0, 0, 0, 0, 0]);
                frame.extend(if input.flag() { input.u32().to_be_bytes() } else { ADDRESS.octets() });
                let _ = port.takes(&frame);
                port.from_guest(&frame);
            }
            6 => {
                let frame = input.short_bytes();
                let _ = port.takes(frame);
                port.from_guest(frame);
            }
            _ => {
                port.poll();
                let _ = port.next_timer();
            }
        }
        if input.u8() & 3 != 3 {
            drain(&mut port, &mut connection);
        }
    }
}
