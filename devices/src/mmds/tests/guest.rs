//! A guest with a TCP/IP stack of its own, and a time that passes when nothing else happens.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::Instant as WireTime;
use smoltcp::wire::{EthernetAddress, IpCidr};

use crate::mmds::{Mmds, MmdsPort};

pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(super) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
/// Longer than any frame for the guest.
pub(super) const BUFFER: usize = 1600;
/// Steps after which a guest that still waits has found a bug.
const PATIENCE: usize = 20_000;

#[derive(Default)]
struct Wire {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

struct Incoming(Vec<u8>);
struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; len];
        let result = fill(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: WireTime) -> Option<(Incoming, Outgoing<'_>)> {
        Some((Incoming(self.incoming.pop_front()?), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: WireTime) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        // As with checksum offload: ours are left to the device, and the device's are looked at.
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}

/// A response: its status, its head and its body.
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

pub(super) struct Guest {
    pub(super) port: MmdsPort,
    pub(super) now: Instant,
    pub(super) mmds: Arc<Mutex<Mmds>>,
    interface: Interface,
    wire: Wire,
    sockets: SocketSet<'static>,
    next_port: u16,
    epoch: Instant,
}

impl Guest {
    pub(super) fn new(mmds: Mmds, address: Ipv4Addr) -> Self {
        let mmds = Arc::new(Mutex::new(mmds));
        let port = MmdsPort::new(Arc::clone(&mmds), ADDRESS);
        let mut wire = Wire::default();
        let config = Config::new(EthernetAddress(GUEST_MAC).into());
        let mut interface = Interface::new(config, &mut wire, WireTime::ZERO);
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(address.into(), 0)).unwrap());
        let epoch = Instant::now();
        let sockets = SocketSet::new(Vec::new());
        Self { port, now: epoch, mmds, interface, wire, sockets, next_port: 49_152, epoch }
    }

    pub(super) fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 20_000]);
        let mut socket = Socket::new(buffer(), buffer());
        self.next_port += 1;
        socket.connect(self.interface.context(), (ADDRESS, 80), self.next_port).unwrap();
        self.sockets.add(socket)
    }

    pub(super) fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Lets frames pass in both directions, or time if there are none.
    pub(super) fn step(&mut self) {
        let time = WireTime::ZERO + (self.now - self.epoch).into();
        self.interface.poll(time, &mut self.wire, &mut self.sockets);
        let mut idle = self.wire.outgoing.is_empty();
        for frame in self.wire.outgoing.drain(..) {
            assert!(self.port.takes(&frame), "{frame:02x?}");
            self.port.0.receive(&frame, self.now);
        }
        let mut buffer = [0; BUFFER];
        while let Some(len) = self.port.0.next_frame(&mut buffer, self.now) {
            self.wire.incoming.push_back(buffer[..len].to_vec());
            idle = false;
        }
        if idle {
            self.now += Duration::from_millis(10);
            self.port.0.run(self.now);
        }
    }

    pub(super) fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..PATIENCE {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("the guest waits in vain");
    }

    pub(super) fn established(&mut self) -> SocketHandle {
        let handle = self.connect();
        self.until(|guest| guest.socket(handle).may_send());
        handle
    }

    pub(super) fn send(&mut self, handle: SocketHandle, bytes: &[u8]) {
        let mut sent = 0;
        self.until(|guest| {
            sent += guest.socket(handle).send_slice(&bytes[sent..]).unwrap();
            sent == bytes.len()
        });
    }

    /// Takes one response from a connection.
    pub(super) fn reply(&mut self, handle: SocketHandle) -> Reply {
        let mut bytes = Vec::new();
        let mut reply = None;
        self.until(|guest| {
            // Byte by byte, since what follows belongs to the next response.
            while reply.is_none() && guest.socket(handle).can_recv() {
                let mut byte = [0];
                guest.socket(handle).recv_slice(&mut byte).unwrap();
                bytes.push(byte[0]);
                reply = complete(&bytes);
            }
            reply.is_some()
        });
        reply.unwrap()
    }

    /// Sends a request on a connection of its own. `headers` are lines that end with CR LF.
    pub(super) fn ask(&mut self, line: &str, headers: &str) -> Reply {
        let handle = self.established();
        self.send(handle, format!("{line} HTTP/1.1\r\nHost: {ADDRESS}\r\n{headers}\r\n").as_bytes());
        let reply = self.reply(handle);
        self.socket(handle).close();
        self.until(|guest| !guest.socket(handle).is_active());
        self.sockets.remove(handle);
        reply
    }
}

fn complete(bytes: &[u8]) -> Option<Reply> {
    let (head, body) = std::str::from_utf8(bytes).ok()?.split_once("\r\n\r\n")?;
    let (_, length) = head.split_once("Content-Length: ").unwrap();
    let length: usize = length.lines().next().unwrap().parse().unwrap();
    let status = head[9..12].parse().unwrap();
    (body.len() == length).then(|| Reply { status, head: head.to_owned(), body: body.to_owned() })
}
