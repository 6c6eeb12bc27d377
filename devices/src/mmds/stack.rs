//! The TCP/IP stack behind a network interface, and the connections that the guest has made to it.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{EthernetFrame, EthernetProtocol, HardwareAddress, IpCidr};

use super::connection::Connection;
use super::link::Link;
use super::store::Mmds;

const HTTP_PORT: u16 = 80;

/// Connections at a time, the one that is waited for included.
const MAX_CONNECTIONS: usize = 30;

/// Bytes that a connection holds before we take them, and before the guest does.
const RECEIVE_BUFFER: usize = 2048;
const SEND_BUFFER: usize = 8192;

/// A connection on which nothing arrives for that long is reset.
const TIMEOUT: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(60);

/// A connection that keeps us waiting for that long makes way for a new one when there are too many.
const PATIENCE: Duration = Duration::from_secs(10);

/// The least time between two timers, so that no guest makes the timer spin.
const LEAST_DELAY: Duration = Duration::from_millis(10);

/// Offsets in a frame: the fields that tell whom it is for.
const ARP_OPERATION: std::ops::Range<usize> = 20..22;
const ARP_TARGET: std::ops::Range<usize> = 38..42;
const IPV4_PROTOCOL: usize = 23;
const IPV4_DESTINATION: std::ops::Range<usize> = 30..34;

const ARP_REQUEST: [u8; 2] = [0, 1];
const PROTOCOL_TCP: u8 = 6;

pub(super) struct Stack {
    address: Ipv4Addr,
    mmds: Arc<Mutex<Mmds>>,
    link: Link,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<(SocketHandle, Connection)>,
    /// What the stack's time counts from.
    epoch: Instant,
}

impl Stack {
    pub(super) fn new(mmds: Arc<Mutex<Mmds>>, address: Ipv4Addr, now: Instant) -> Self {
        let mut link = Link::new();
        let mut config = Config::new(HardwareAddress::Ip);
        // Sequence numbers are no secret from the guest, who sees them all; that they differ is enough.
        config.random_seed = getrandom::u64().unwrap_or_default();
        let mut interface = Interface::new(config, &mut link, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            if !(address.is_multicast() || address.is_broadcast() || address.is_unspecified()) {
                // The guest may have any address, so all are in our network. There is room for the one address.
                let _ = addresses.push(IpCidr::new(address.into(), 0));
            }
        });
        let (sockets, connections) = (SocketSet::new(Vec::new()), Vec::new());
        Self { address, mmds, link, interface, sockets, connections, epoch: now }
    }

    pub(super) fn takes(&self, frame: &[u8]) -> bool {
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else {
            return false;
        };
        match ethernet.ethertype() {
            EthernetProtocol::Arp => {
                frame.get(ARP_OPERATION) == Some(&ARP_REQUEST) && self.is_ours(frame.get(ARP_TARGET))
            }
            EthernetProtocol::Ipv4 => self.is_ours(frame.get(IPV4_DESTINATION)),
            _ => false,
        }
    }

    fn is_ours(&self, address: Option<&[u8]>) -> bool {
        address == Some(&self.address.octets())
    }

    pub(super) fn receive(&mut self, frame: &[u8], now: Instant) {
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else {
            return;
        };
        if !self.takes(frame) {
            return;
        }
        if ethernet.ethertype() == EthernetProtocol::Arp {
            self.link.answer_arp(&ethernet);
        } else if frame.get(IPV4_PROTOCOL) == Some(&PROTOCOL_TCP) {
            self.keep_listening(now);
            self.link.put_packet(&ethernet);
            self.run(now);
        }
    }

    pub(super) fn next_frame(&mut self, buffer: &mut [u8], now: Instant) -> Option<usize> {
        loop {
            if !self.link.has_frame() && self.link.take_refused() {
                self.run(now);
            }
            let frame = self.link.take_frame()?;
            if let Some(room) = buffer.get_mut(..frame.len()) {
                room.copy_from_slice(&frame);
                return Some(frame.len());
            }
        }
    }

    pub(super) fn next_timer(&mut self, now: Instant) -> Option<Duration> {
        if self.link.has_frame() {
            // Nothing more is to be sent before the guest has taken this.
            return None;
        }
        let delay = self.interface.poll_delay(self.stack_time(now), &self.sockets)?;
        Some(Duration::from(delay).max(LEAST_DELAY))
    }

    /// Lets the stack and the connections work until both wait for the guest or there is no room for more
    /// frames.
    pub(super) fn run(&mut self, now: Instant) {
        let time = self.stack_time(now);
        loop {
            self.interface.poll(time, &mut self.link, &mut self.sockets);
            let mut progress = false;
            for (handle, connection) in &mut self.connections {
                progress |= connection.serve(self.sockets.get_mut(*handle), &self.mmds, now);
            }
            if !progress || self.link.is_full() {
                break;
            }
        }
        self.keep_listening(now);
    }

    /// Forgets connections that are over, and sees to it that a socket listens.
    fn keep_listening(&mut self, now: Instant) {
        let Self { sockets, connections, .. } = self;
        let state = |sockets: &SocketSet<'_>, handle| sockets.get::<Socket<'_>>(handle).state();
        connections.retain(|(handle, _)| {
            // Whatever of such a connection still comes from the guest is answered with a reset.
            let over = matches!(state(sockets, *handle), State::Closed | State::TimeWait);
            if over {
                sockets.remove(*handle);
            }
            !over
        });
        if connections.iter().any(|(handle, _)| state(sockets, *handle) == State::Listen) {
            return;
        }
        if connections.len() >= MAX_CONNECTIONS {
            let slowest = connections
                .iter()
                .enumerate()
                .filter_map(|(index, (_, connection))| Some((connection.waiting_since()?, index)))
                .min();
            match slowest {
                Some((since, index)) if now.saturating_duration_since(since) >= PATIENCE => {
                    let (handle, _) = connections.swap_remove(index);
                    sockets.remove(handle);
                }
                _ => return,
            }
        }
        let mut socket =
            Socket::new(SocketBuffer::new(vec![0; RECEIVE_BUFFER]), SocketBuffer::new(vec![0; SEND_BUFFER]));
        socket.set_timeout(Some(TIMEOUT));
        // The end of a response, and what acknowledges a request, are not held back in the hope for more.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        // Not an error: the port is not 0, and the socket is new.
        if socket.listen(HTTP_PORT).is_ok() {
            connections.push((sockets.add(socket), Connection::default()));
        }
    }

    fn stack_time(&self, now: Instant) -> smoltcp::time::Instant {
        smoltcp::time::Instant::ZERO + now.saturating_duration_since(self.epoch).into()
    }
}
