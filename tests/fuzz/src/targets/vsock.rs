//! The socket device: packets of the guest's, and programs of the host's that connect, talk and leave.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use devices::virtio::vsock::{Vsock, VsockConfig};

use crate::guest::Guest;
use crate::input::Input;

/// A program that listens for the guest has this port.
const PORT: u32 = 5;
/// Connections that the host keeps.
const MAX_OPEN: usize = 16;

/// A device and its driver, and a host.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let path = crate::host::fresh_path();
    let vsock = Vsock::new(VsockConfig { guest_cid: 3, uds_path: path.clone() }).expect("a fresh path");
    let mut guest = Guest::new(Box::new(vsock), false, &mut input).expect("the host has memory");
    let listening = path.with_file_name(format!(
        "{}_{PORT}",
        path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    ));
    let listener = UnixListener::bind(&listening).expect("a fresh path");
    listener.set_nonblocking(true).expect("a socket");
    let mut open: Vec<UnixStream> = Vec::new();
    guest.live(&mut input, |_, input| {
        let choice = input.u8();
        let which = usize::from(choice >> 4) % open.len().max(1);
        match choice & 7 {
            0 | 1 if open.len() < MAX_OPEN => {
                let Ok(mut stream) = UnixStream::connect(&path) else { return };
                stream.set_nonblocking(true).expect("a socket");
                let _ = match choice & 8 {
                    0 => writeln!(stream, "CONNECT {}", input.u8()),
                    _ => stream.write_all(input.short_bytes()),
                };
                open.push(stream);
            }
            2 if open.len() < MAX_OPEN => open.extend(listener.accept().map(|(stream, _)| {
                stream.set_nonblocking(true).expect("a socket");
                stream
            })),
            3 if !open.is_empty() => drop(open.swap_remove(which)),
            4 if !open.is_empty() => {
                let how = if choice & 8 == 0 { std::net::Shutdown::Write } else { std::net::Shutdown::Read };
                let _ = open[which].shutdown(how);
            }
            5 if !open.is_empty() => {
                let mut bytes = [0; 0x1_0000];
                let _ = open[which].read(&mut bytes);
            }
            _ if !open.is_empty() => {
                let mut bytes = input.short_bytes().to_vec();
                if choice & 8 != 0 {
                    bytes.resize(usize::from(input.u16()), 7);
                }
                let _ = open[which].write(&bytes);
            }
            _ => {}
        }
    });
    let _ = std::fs::remove_file(listening);
}
