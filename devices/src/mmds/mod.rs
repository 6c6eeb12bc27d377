//! The microVM metadata service, as in Firecracker: a JSON document that the API writes, and that the guest
//! reads over HTTP from an address that exists on its own network interface only.
//!
//! ```text
//!  API: PUT, PATCH, GET /mmds -> Mmds <- service <- connection <- TCP/IP (smoltcp) <- link <- frames of the guest
//!                                store   http, token                  stack                   MmdsPort
//! ```
//! An [`MmdsPort`] belongs to a network interface, which asks it of each frame from the guest whether it
//! [takes](MmdsPort::takes) it, and gives the guest its frames before those of the host. Everything happens in the
//! calls of the interface: there is no thread and no descriptor here.
//!
//! # The guest is hostile
//! Connections, bytes of a request and of a connection's buffers, and frames that wait for the guest are all
//! bounded; a response is made when the one before has left, so that a port holds 30 of them at most. A guest
//! that leaves connections open loses the oldest of them when it makes another.

mod connection;
mod http;
mod link;
mod service;
mod stack;
mod store;
mod token;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stack::Stack;
pub use store::{Mmds, MmdsError, Version};

/// The metadata service as one network interface of the guest reaches it.
pub struct MmdsPort(Stack);

impl MmdsPort {
    /// A port that serves `mmds` on TCP port 80 of `ipv4`. An address that no host can have is never answered.
    pub fn new(mmds: Arc<Mutex<Mmds>>, ipv4: Ipv4Addr) -> Self {
        Self(Stack::new(mmds, ipv4, Instant::now()))
    }

    /// Whether an Ethernet frame from the guest, without the virtio header, is for the service: an ARP request
    /// for its address, or an IPv4 packet to it. It must not reach the host's network then.
    pub fn takes(&self, frame: &[u8]) -> bool {
        self.0.takes(frame)
    }

    /// Handles an Ethernet frame from the guest, without the virtio header. Checksums may be unfinished and TCP
    /// segments long, as the guest's offloads leave them. What the port does not take is dropped.
    pub fn from_guest(&mut self, frame: &[u8]) {
        self.0.receive(frame, Instant::now());
    }

    /// Writes the next Ethernet frame for the guest, without the virtio header, to `buffer`, and returns its
    /// length, which is at most 1514 bytes. A frame that is longer than `buffer` is lost.
    pub fn to_guest(&mut self, buffer: &mut [u8]) -> Option<usize> {
        self.0.next_frame(buffer, Instant::now())
    }

    /// How long from now [`poll`](Self::poll) is to be called, unless a call of another method changes that. None
    /// if nothing is to be done before the guest sends or takes a frame.
    pub fn next_timer(&mut self) -> Option<Duration> {
        self.0.next_timer(Instant::now())
    }

    /// Does what is due, such as sending again what the guest has not acknowledged. Frames for the guest may be
    /// waiting afterwards.
    pub fn poll(&mut self) {
        self.0.run(Instant::now());
    }
}

#[cfg(test)]
mod tests;
