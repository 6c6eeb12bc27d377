//! A back-end in another process (a server of a drive, a file system or a network interface) that answers what it likes, and a driver.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use devices::virtio::block::{CacheType, VhostUserBlock, VhostUserBlockConfig};
use devices::virtio::device::VirtioDevice;
use devices::virtio::fs::Fs;
use devices::virtio::net::{Seen, VhostUserNet, VhostUserNetConfig};

use crate::guest::Guest;
use crate::input::Input;

/// Features of any back-end: VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 30;

/// The next request: its number, whether it wants an answer, and its body.
fn request(stream: &mut UnixStream) -> Option<(u32, bool, Vec<u8>)> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let mut body = vec![0; usize::try_from(word(8).min(0x1000)).ok()?];
    stream.read_exact(&mut body).ok()?;
    Some((word(0), word(4) & 8 != 0, body))
}

/// What the protocol would have for an answer, with numbers from the input.
fn answer(number: u32, wanted: bool, body: Vec<u8>, input: &mut Input<'_>) -> Option<Vec<u8>> {
    Some(match number {
        1 => (FEATURES | input.u64()).to_le_bytes().to_vec(),
        15 => (0x209 | input.u64() & !0x1000).to_le_bytes().to_vec(),
        17 => (4 - u64::from(input.u8() & 3)).to_le_bytes().to_vec(),
        11 => body,
        24 => {
            let mut body = body;
            let len = body.len().saturating_sub(12).min(16);
            let bytes = input.bytes(len);
            body[12..12 + bytes.len()].copy_from_slice(bytes);
            body
        }
        _ if wanted => u64::from(input.u8() == 0xFF).to_le_bytes().to_vec(),
        _ => return None,
    })
}

/// Serves one connection. Hangs up rather than to say nothing, for which a front end would wait.
fn serve(listener: &UnixListener, bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let Ok((mut stream, _)) = listener.accept() else { return };
    while let Some((number, wanted, body)) = request(&mut stream) {
        let Some(mut body) = answer(number, wanted, body, &mut input) else { continue };
        let mut head = [number, 5, u32::try_from(body.len()).unwrap_or_default()];
        match input.u8() {
            0xF0 => head[0] = input.u32(),
            0xF1 => head[1] = input.u32(),
            // With its end to follow, so that nobody waits for the rest.
            0xF2 => head[2] = input.u32(),
            0xF3 => body = input.short_bytes().to_vec(),
            0xF4 => return,
            _ => {}
        }
        let wrong = head != [number, 5, u32::try_from(body.len()).unwrap_or_default()];
        let message = [head.map(u32::to_le_bytes).concat(), body].concat();
        if stream.write_all(&message).is_err() || wrong {
            return;
        }
    }
}

/// A server by one part of the input, a driver by the other.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.u8();
    let server = input.short_bytes();
    let path = crate::host::fresh_path();
    let listener = UnixListener::bind(&path).expect("a fresh path");
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&listener, server));
        let device: Option<Box<dyn VirtioDevice>> = match choice & 9 {
            8 | 9 => {
                let seen = Seen { mac: None, queues: 1 + (choice >> 1 & 1), mtu: None };
                let config = VhostUserNetConfig { id: "eth0".to_owned(), seen, socket: path.clone() };
                VhostUserNet::connect(config).ok().map(|net| Box::new(net) as _)
            }
            0 => Fs::connect("shared", path.clone()).ok().map(|fs| Box::new(fs) as _),
            _ => {
                let config = VhostUserBlockConfig {
                    id: "root".to_owned(),
                    socket: path.clone(),
                    queues: 1 + u16::from(choice >> 1 & 1),
                    cache: if choice & 4 == 0 { CacheType::Writeback } else { CacheType::Unsafe },
                };
                VhostUserBlock::connect(config).ok().map(|block| Box::new(block) as _)
            }
        };
        let Some(device) = device else { return };
        let mut guest = Guest::new(device, true, &mut input).expect("the host has memory");
        guest.live(&mut input, |_, _| {});
    });
    let _ = std::fs::remove_file(path);
}
