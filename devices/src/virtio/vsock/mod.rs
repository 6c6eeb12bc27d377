//! virtio-vsock (virtio 1.2, section 5.10): streams between the guest's programs and unix sockets of the host, in
//! Firecracker's manner.
//!
//! - **Host to guest**: connect to the device's socket, send `CONNECT PORT\n` (in any case), and wait for
//!   `OK HOST_PORT\n`: then the guest's program has the connection. It is closed instead if there is none.
//! - **Guest to host**: a connection to context 2, port PORT, goes to whoever listens on the unix socket
//!   `SOCKET_PORT`, the path of the device's socket with an underscore and the port.
//!
//! A direction that one side ends is ended for the other. A program that does not read stops the one that sends to
//! it, and nobody else.
//!
//! | module | what it is |
//! | --- | --- |
//! | `packet` | the header, field by field |
//! | `socket` | system calls on unix sockets |
//! | `handshake` | the CONNECT line |
//! | `connection` | one connection: credit, data, its two ends |
//! | `muxer` | all of them: whose turn it is, events, deadlines |

mod connection;
mod handshake;
mod muxer;
mod packet;
mod socket;

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use muxer::Muxer;
use packet::HEADER_LEN;
use socket::ListenerFile;

use super::device::{Activation, DeviceError, EventSource, Memory, VirtioDevice};
use super::iovec::ChainIovecs;
use super::virtqueue::{QueueError, Virtqueue, signal};
use crate::counter::{Counters, counters};

/// Index of the queue that packets to the guest travel on.
const RX: usize = 0;
/// Index of the queue that packets from the guest travel on. Behind it is the one for events, of which there are
/// none before a VM can be restored.
const TX: usize = 1;
/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;

/// The least address of a guest: those below are reserved (virtio 1.2, section 5.10.4).
const MIN_GUEST_CID: u64 = 3;

/// How long the guest may take to answer; Linux waits as long for the end of a connection.
const PATIENCE: Duration = Duration::from_secs(8);

/// Why a socket device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The guest's address is reserved, or has more than 32 bits.
    #[error("vsock: guest_cid {0} is no address for a guest: use one from {MIN_GUEST_CID} to 4294967295")]
    GuestCid(u64),
    /// Something is at the socket's path.
    #[error(
        "vsock: could not listen on {}, which exists: remove it if no other VM uses it, or choose another uds_path",
        .0.display()
    )]
    Exists(PathBuf),
    /// The socket cannot be made.
    #[error("vsock: could not listen on {}: let its directory exist and be writable, and its path be short", path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no descriptors left, perhaps.
    #[error("vsock: could not make an epoll descriptor and a timer")]
    Host(#[source] io::Error),
}

/// What a socket device is made of.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's address, 3 to 4294967295.
    pub guest_cid: u64,
    /// Where to listen for the host's programs. Must not exist; its name with `_PORT` behind it is where they
    /// listen for the guest's.
    pub uds_path: PathBuf,
}

counters! {
    /// What the socket device counts; "rx" is towards the guest.
    VsockCounters {
        /// Kicks of the queue for packets to the guest.
        rx_queue_event_count,
        /// Kicks of the queue for packets from the guest.
        tx_queue_event_count,
        /// Packets to the guest.
        rx_packets_count,
        /// Data in them.
        rx_bytes_count,
        /// Buffers of the guest's that hold no packet.
        rx_malformed_buffers,
        /// Packets from the guest.
        tx_packets_count,
        /// Data in them that belong to a connection.
        tx_bytes_count,
        /// Packets from the guest that cannot be followed.
        tx_malformed_packets,
        /// Connections that began, from either side.
        conns_added,
        /// Connections that are gone.
        conns_removed,
        /// Connections of which one side did not answer in time.
        conns_killed,
        /// Connections that could not be made.
        conns_refused,
    }
}

/// A virtio socket device. Its socket exists from the beginning, and is removed with it unless
/// [`Self::keep_socket`] was called.
pub struct Vsock {
    config: [u8; 8],
    muxer: Muxer,
    iovecs: ChainIovecs,
    running: Option<Running>,
}

struct Running {
    memory: Memory,
    rx: Virtqueue,
    tx: Virtqueue,
}

impl Vsock {
    /// Makes the socket and listens. Connections are accepted when the driver has started.
    pub fn new(config: VsockConfig) -> Result<Self, VsockError> {
        Self::with_patience(config, PATIENCE)
    }

    fn with_patience(config: VsockConfig, patience: Duration) -> Result<Self, VsockError> {
        let VsockConfig { guest_cid, uds_path: path } = config;
        if !(MIN_GUEST_CID..=u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::GuestCid(guest_cid));
        }
        let listener = ListenerFile::bind(path.clone()).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => VsockError::Exists(path),
            _ => VsockError::Listen { path, source },
        })?;
        Ok(Self {
            config: guest_cid.to_le_bytes(),
            muxer: Muxer::new(guest_cid, listener, patience).map_err(VsockError::Host)?,
            iovecs: ChainIovecs::new(),
            running: None,
        })
    }

    /// Leaves the socket's file behind at the end. Firecracker does, and its clients remove the file themselves.
    pub fn keep_socket(&mut self) {
        self.muxer.keep_socket();
    }

    /// Takes what the driver made available.
    fn take_packets(&mut self) -> Result<(), DeviceError> {
        let Self { muxer, iovecs, running: Some(Running { memory, tx, .. }), .. } = self else {
            return Ok(());
        };
        let memory = memory.memory();
        tx.serve(&memory, |chain| {
            muxer.counters.tx_packets_count.inc();
            match iovecs.fill(chain, &memory) {
                Ok(packet) => muxer.take_packet(&packet),
                Err(error) => {
                    muxer.counters.tx_malformed_packets.inc();
                    log::debug!("vsock: ignored a packet: {error}");
                }
            }
            0
        })?;
        Ok(())
    }

    /// Accepts connections of the host's, and puts packets into the driver's buffers until there are no more of
    /// either. After one ring's worth the rest waits for a kick that is sent to ourselves, so that other devices
    /// have their turn.
    fn lend_packets(&mut self) -> Result<(), DeviceError> {
        let Self { muxer, iovecs, running: Some(Running { memory, rx, .. }), .. } = self else {
            return Ok(());
        };
        muxer.accept();
        if !muxer.has_packet() {
            return Ok(());
        }
        let memory = memory.memory();
        rx.disable_kicks(&memory)?;
        let mut left = rx.ring().size();
        while muxer.has_packet() && lend_packet(muxer, rx, &memory, iovecs)? {
            left -= 1;
            if left == 0 {
                signal(rx.kick()).map_err(|source| QueueError::Signal { queue: rx.index(), source })?;
                break;
            }
        }
        rx.notify(&memory)?;
        Ok(())
    }
}

/// Puts a packet into the next buffer of the driver's. Returns `false` if it lent none: its next kick resumes.
fn lend_packet(
    muxer: &mut Muxer,
    rx: &mut Virtqueue,
    memory: &GuestMemoryMmap,
    iovecs: &mut ChainIovecs,
) -> Result<bool, DeviceError> {
    let Some(chain) = rx.pop(memory)? else {
        return Ok(rx.enable_kicks(memory)?);
    };
    let head = chain.head_index();
    let buffers = match iovecs.fill(chain, memory) {
        Ok(buffers) if buffers.writable_len() > HEADER_LEN => buffers,
        useless => {
            muxer.counters.rx_malformed_buffers.inc();
            log::debug!("vsock: gave back a buffer that holds no packet: {useless:?}");
            rx.push_used(memory, head, 0)?;
            return Ok(true);
        }
    };
    let Some(header) = muxer.next_packet(&buffers) else {
        rx.undo_pop();
        return Ok(true);
    };
    buffers.write_at(0, &header.to_bytes())?;
    muxer.counters.rx_packets_count.inc();
    muxer.counters.rx_bytes_count.add(header.len.into());
    rx.push_used(memory, head, HEADER_LEN + header.len)?;
    Ok(true)
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.muxer.counters) as _
    }

    fn event_sources(&self) -> Vec<EventSource> {
        // Level triggered: what one event does not get to makes another. It is never ready while the device is
        // not started.
        vec![EventSource { fd: self.muxer.event_fd(), events: EventSet::IN }]
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) else {
            return Err(DeviceError::Driver("did not enable both packet queues of a socket device"));
        };
        self.muxer.start().map_err(|source| DeviceError::Host {
            doing: "vsock: could not watch the listening socket".to_owned(),
            source,
        })?;
        self.running = Some(Running { memory: activation.memory, rx, tx });
        Ok(())
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            RX => {
                self.muxer.counters.rx_queue_event_count.inc();
                self.lend_packets()
            }
            TX => {
                self.muxer.counters.tx_queue_event_count.inc();
                self.take_packets()?;
                self.lend_packets()
            }
            _ => Ok(()),
        }
    }

    fn source_event(&mut self, _fd: RawFd) -> Result<(), DeviceError> {
        self.muxer.poll().map_err(|source| DeviceError::Host {
            doing: "vsock: could not ask which sockets are ready".to_owned(),
            source,
        })?;
        self.lend_packets()
    }

    fn reset(&mut self) {
        self.running = None;
        self.muxer.stop();
    }
}

#[cfg(test)]
mod tests;
