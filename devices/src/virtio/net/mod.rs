//! virtio-net (virtio 1.2, section 5.1) on a TAP of the host: one queue in each direction, served by the kernel's
//! vhost-net where it is to be had, else by us.

mod tap;
mod userspace;
mod vhost;

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::epoll::EventSet;

use tap::Tap;
pub use tap::TapError;
use userspace::Userspace;
use vhost::Vhost;

use super::device::{Activation, DeviceError, EventSource, Server, VirtioDevice};
use super::virtqueue::Virtqueue;

/// Index of the queue that packets to the guest travel on.
const RX: usize = 0;
/// Index of the queue that packets from the guest travel on.
const TX: usize = 1;
/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;

/// Bytes of the header before every packet, on the queues as on the TAP (virtio 1.2, section 5.1.6).
const HEADER_LEN: u32 = 12;

/// Length of the configuration space: mac, status, max_virtqueue_pairs, mtu.
const CONFIG_LEN: usize = 12;

/// The least MTU that a device may name (virtio 1.2, section 5.1.4.1).
const MTU_MIN: u16 = 68;

/// What VERSION_1 and the rings need, whoever serves them.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the TAP does: unfinished checksums and segmentation in both directions.
const TAP_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6;

/// Why a network interface cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Its TAP cannot be used.
    #[error("network interface {id}: could not attach to its TAP")]
    Tap {
        /// The interface's name.
        id: String,
        /// Why.
        source: TapError,
    },
    /// vhost-net was demanded and is not to be had.
    #[error(
        "network interface {id}: could not use /dev/vhost-net: load the module vhost_net and give this user \
         access, or set vhost to auto or off"
    )]
    Vhost {
        /// The interface's name.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// The MTU is out of range.
    #[error("network interface {id}: an MTU of {mtu} is too small: use at least {MTU_MIN}, or leave it out")]
    Mtu {
        /// The interface's name.
        id: String,
        /// What was asked for.
        mtu: u16,
    },
}

/// Whether the kernel's vhost-net moves the packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VhostMode {
    /// If /dev/vhost-net can be used.
    #[default]
    Auto,
    /// Or there is no device.
    On,
    /// Never.
    Off,
}

/// What a network interface is made of.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// The interface's name, for messages.
    pub id: String,
    /// Name of an existing TAP in our network namespace.
    pub tap: String,
    /// The guest's address; without one the guest chooses.
    pub mac: Option<[u8; 6]>,
    /// Who moves the packets.
    pub vhost: VhostMode,
    /// The MTU that the guest is told, in bytes.
    pub mtu: Option<u16>,
}

/// A virtio network device.
pub struct Net {
    id: String,
    tap: Tap,
    backend: Backend,
    features: u64,
    config: [u8; CONFIG_LEN],
}

enum Backend {
    Userspace(Userspace),
    Vhost(Vhost),
}

/// The queues of a started device.
struct Queues {
    rx: Virtqueue,
    tx: Virtqueue,
}

impl Net {
    /// Attaches to the TAP and, where asked for, opens /dev/vhost-net. Starts nothing.
    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        if let Some(mtu) = config.mtu.filter(|&mtu| mtu < MTU_MIN) {
            return Err(NetError::Mtu { id: config.id, mtu });
        }
        let tap = match Tap::open(&config.tap) {
            Ok(tap) => tap,
            Err(source) => return Err(NetError::Tap { id: config.id, source }),
        };
        let vhost = match config.vhost {
            VhostMode::Off => None,
            VhostMode::Auto | VhostMode::On => match open_vhost() {
                Ok(vhost) => Some(vhost),
                Err(source) if config.vhost == VhostMode::On => {
                    return Err(NetError::Vhost { id: config.id, source });
                }
                Err(error) => {
                    log::info!("network interface {}: not using /dev/vhost-net: {error}", config.id);
                    None
                }
            },
        };
        let backend = vhost.map_or_else(|| Backend::Userspace(Userspace::default()), Backend::Vhost);
        Ok(Self::with_backend(config, tap, backend))
    }

    fn with_backend(config: NetConfig, tap: Tap, backend: Backend) -> Self {
        let mut features = TAP_FEATURES
            | match &backend {
                Backend::Userspace(_) => RING_FEATURES,
                Backend::Vhost(vhost) => vhost.features() & (RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF),
            };
        let mut space = [0; CONFIG_LEN];
        if let Some(mac) = config.mac {
            features |= 1 << VIRTIO_NET_F_MAC;
            space[..6].copy_from_slice(&mac);
        }
        if let Some(mtu) = config.mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            space[10..].copy_from_slice(&mtu.to_le_bytes());
        }
        Self { id: config.id, tap, backend, features, config: space }
    }
}

/// Opens /dev/vhost-net if it speaks virtio 1.
fn open_vhost() -> io::Result<Vhost> {
    let vhost = Vhost::new()?;
    if vhost.features() & (1 << VIRTIO_F_VERSION_1) == 0 {
        return Err(io::Error::other("it does not offer VIRTIO_F_VERSION_1"));
    }
    Ok(vhost)
}

/// What a driver that accepted `features` takes from the TAP.
fn offloads(features: u64) -> libc::c_uint {
    let accepted = |bit: u32| features & (1 << bit) != 0;
    // Segmentation needs checksums (virtio 1.2, section 5.1.3.1), and the TAP refuses it without.
    if !accepted(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut offloads = libc::TUN_F_CSUM;
    if accepted(VIRTIO_NET_F_GUEST_TSO4) {
        offloads |= libc::TUN_F_TSO4;
    }
    if accepted(VIRTIO_NET_F_GUEST_TSO6) {
        offloads |= libc::TUN_F_TSO6;
    }
    offloads
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn server(&self) -> Server {
        match &self.backend {
            Backend::Userspace(_) => Server::EventLoop,
            Backend::Vhost(_) => Server::Vhost,
        }
    }

    fn event_sources(&self) -> Vec<EventSource> {
        let fd = match &self.backend {
            Backend::Userspace(_) => self.tap.as_raw_fd(),
            Backend::Vhost(vhost) => vhost.error_fd(),
        };
        // Edge triggered: a TAP stays readable while the guest lends no buffers, and either does while the
        // device is not started.
        vec![EventSource { fd, events: EventSet::IN | EventSet::EDGE_TRIGGERED }]
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) else {
            return Err(DeviceError::Driver("did not enable both queues of a network interface"));
        };
        let queues = Queues { rx, tx };
        self.tap.set_offloads(offloads(activation.features)).map_err(|source| DeviceError::Host {
            doing: format!("could not set the offloads of TAP {}", self.tap.name()),
            source,
        })?;
        match &mut self.backend {
            Backend::Userspace(userspace) => userspace.start(activation.memory, queues),
            Backend::Vhost(vhost) => vhost.start(
                &activation.memory,
                &queues,
                activation.features,
                activation.interrupt.as_ref(),
                &self.tap,
            )?,
        }
        Ok(())
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        match (&mut self.backend, index) {
            (Backend::Userspace(userspace), RX) => userspace.receive(&self.tap),
            (Backend::Userspace(userspace), TX) => userspace.send(&self.tap),
            (Backend::Userspace(_) | Backend::Vhost(_), _) => Ok(()),
        }
    }

    fn source_event(&mut self, _fd: RawFd) -> Result<(), DeviceError> {
        match &mut self.backend {
            Backend::Userspace(userspace) => userspace.receive(&self.tap),
            Backend::Vhost(vhost) => vhost.error(),
        }
    }

    fn reset(&mut self) {
        match &mut self.backend {
            Backend::Userspace(userspace) => {
                userspace.stop();
                let dropped = userspace.dropped();
                log::debug!("network interface {}: until now {dropped:?}", self.id);
            }
            Backend::Vhost(vhost) => vhost.stop(),
        }
    }
}

#[cfg(test)]
mod tests;
