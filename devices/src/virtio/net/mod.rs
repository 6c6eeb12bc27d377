//! virtio-net (virtio 1.2, section 5.1) on a TAP of the host: one queue in each direction, served by the kernel's
//! vhost-net where it is to be had, else by us; and by us where somebody has to look at the packets.

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
use crate::mmds::MmdsPort;
use crate::rate_limiter::{LimiterConfig, LimiterUpdate};

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
    /// vhost-net was demanded, and something that needs to see the packets.
    #[error(
        "network interface {id}: vhost \"on\" and {field} exclude each other, because vhost-net moves the packets \
         inside the kernel: set vhost to auto or off, or leave out {field}"
    )]
    Exclusive {
        /// The interface's name.
        id: String,
        /// What needs to see the packets, as it is called in the configuration.
        field: &'static str,
    },
    /// A limit for packets that we do not see.
    #[error(
        "network interface {id}: a rate limiter cannot be set now, because vhost-net moves the packets inside the \
         kernel: give the interface a rate limiter, or set its vhost to off, before the microVM starts"
    )]
    Unlimitable {
        /// The interface's name.
        id: String,
    },
    /// No timers for its rate limiters or the metadata service.
    #[error("network interface {id}: could not make its timers")]
    Timer {
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
    /// If /dev/vhost-net can be used, and nothing needs to see the packets.
    #[default]
    Auto,
    /// Or there is no device.
    On,
    /// Never.
    Off,
}

/// What a network interface is made of.
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
    /// Limits of the packets to the guest, and of their bytes.
    pub rx_limiter: LimiterConfig,
    /// Limits of the packets from the guest, and of their bytes.
    pub tx_limiter: LimiterConfig,
    /// The metadata service, if the guest has it on this interface. Its packets never reach the TAP, and no limit
    /// counts them.
    pub mmds: Option<MmdsPort>,
}

impl NetConfig {
    /// The field, by its name in the configuration, that needs to see the packets.
    fn needs_packets(&self) -> Option<&'static str> {
        [
            ("rx_rate_limiter", !self.rx_limiter.is_unlimited()),
            ("tx_rate_limiter", !self.tx_limiter.is_unlimited()),
            ("mmds-config", self.mmds.is_some()),
        ]
        .into_iter()
        .find_map(|(field, needs)| needs.then_some(field))
    }
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
    Userspace(Box<Userspace>),
    Vhost(Vhost),
}

/// The queues of a started device.
struct Queues {
    rx: Virtqueue,
    tx: Virtqueue,
}

impl Net {
    /// Attaches to the TAP and, where asked for, opens /dev/vhost-net. Starts nothing.
    pub fn new(mut config: NetConfig) -> Result<Self, NetError> {
        if let Some(mtu) = config.mtu.filter(|&mtu| mtu < MTU_MIN) {
            return Err(NetError::Mtu { id: config.id, mtu });
        }
        let tap = match Tap::open(&config.tap) {
            Ok(tap) => tap,
            Err(source) => return Err(NetError::Tap { id: config.id, source }),
        };
        let backend = match choose_vhost(&config)? {
            Some(vhost) => Backend::Vhost(vhost),
            None => match Userspace::new(config.rx_limiter, config.tx_limiter, config.mmds.take()) {
                Ok(userspace) => Backend::Userspace(Box::new(userspace)),
                Err(source) => return Err(NetError::Timer { id: config.id, source }),
            },
        };
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

    /// Changes the limits of both directions from the next packet on. Refused, changing nothing, if it would set a
    /// limit where vhost-net moves the packets.
    ///
    /// To be called through [`Slot::update`](super::slot::Slot::update).
    pub fn set_limiters(&mut self, rx: LimiterUpdate, tx: LimiterUpdate) -> Result<(), NetError> {
        match &mut self.backend {
            Backend::Userspace(userspace) => userspace.set_limiters(rx, tx),
            Backend::Vhost(_) if rx.sets_a_limit() || tx.sets_a_limit() => {
                return Err(NetError::Unlimitable { id: self.id.clone() });
            }
            Backend::Vhost(_) => {}
        }
        Ok(())
    }
}

/// Opens vhost-net if it is to move the packets.
fn choose_vhost(config: &NetConfig) -> Result<Option<Vhost>, NetError> {
    let id = || config.id.clone();
    match (config.vhost, config.needs_packets()) {
        (VhostMode::Off, _) => return Ok(None),
        (VhostMode::On, Some(field)) => return Err(NetError::Exclusive { id: id(), field }),
        (VhostMode::Auto, Some(field)) => {
            log::info!("network interface {}: not using /dev/vhost-net because of {field}", config.id);
            return Ok(None);
        }
        (VhostMode::On | VhostMode::Auto, None) => {}
    }
    match open_vhost() {
        Ok(vhost) => Ok(Some(vhost)),
        Err(source) if config.vhost == VhostMode::On => Err(NetError::Vhost { id: id(), source }),
        Err(error) => {
            log::info!("network interface {}: not using /dev/vhost-net: {error}", config.id);
            Ok(None)
        }
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
        let fds = match &self.backend {
            Backend::Userspace(userspace) => {
                std::iter::once(self.tap.as_raw_fd()).chain(userspace.timers()).collect()
            }
            Backend::Vhost(vhost) => vec![vhost.error_fd()],
        };
        // Edge triggered: a TAP stays readable while the guest lends no buffers, and all of them do while the
        // device is not started.
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        fds.into_iter().map(|fd| EventSource { fd, events }).collect()
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

    fn source_event(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        match &mut self.backend {
            Backend::Userspace(userspace) => userspace.source_event(fd, &self.tap),
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
