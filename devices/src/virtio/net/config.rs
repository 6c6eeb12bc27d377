//! What a network interface is made of, and why it cannot be made.

use std::io;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::tap::TapError;
use super::vhost::Vhost;
use super::{CONFIG_LEN, QUEUE_SIZE, STATUS_AT, status};
use crate::mmds::MmdsPort;
use crate::rate_limiter::LimiterConfig;
use crate::virtio::vhost_user::VhostUserError;

/// The least MTU that a device may name (virtio 1.2, section 5.1.4.1).
const MTU_MIN: u16 = 68;

/// The most pairs of queues of an interface.
const PAIRS_MAX: u8 = resources::NetworkInterface::QUEUES_MAX;

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
    /// The server that is to move the packets cannot be used.
    #[error("network interface {id}: could not be had of its vhost-user server")]
    Server {
        /// The interface's name.
        id: String,
        /// Why.
        source: VhostUserError,
    },
    /// The MTU is out of range.
    #[error("network interface {id}: an MTU of {mtu} is too small: use at least {MTU_MIN}, or leave it out")]
    Mtu {
        /// The interface's name.
        id: String,
        /// What was asked for.
        mtu: u16,
    },
    /// The number of queues is out of range.
    #[error("network interface {id}: queues is {queues}: use 1 to {PAIRS_MAX}")]
    Queues {
        /// The interface's name.
        id: String,
        /// What was asked for.
        queues: u8,
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

/// What the guest sees of a network interface, whoever moves its packets.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The guest's address; without one the guest chooses.
    pub mac: Option<[u8; 6]>,
    /// Pairs of queues, 1 to [`resources::NetworkInterface::QUEUES_MAX`].
    pub queues: u8,
    /// The MTU that the guest is told, in bytes.
    pub mtu: Option<u16>,
}

impl Seen {
    /// Refuses values that no device can have. `id` is the interface's name.
    pub(super) fn check(&self, id: &str) -> Result<(), NetError> {
        if let Some(mtu) = self.mtu.filter(|&mtu| mtu < MTU_MIN) {
            return Err(NetError::Mtu { id: id.to_owned(), mtu });
        }
        match self.queues {
            1..=PAIRS_MAX => Ok(()),
            queues => Err(NetError::Queues { id: id.to_owned(), queues }),
        }
    }

    /// The configuration space, with the link up.
    pub(super) fn space(&self) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        space[..6].copy_from_slice(&self.mac.unwrap_or_default());
        space[STATUS_AT..8].copy_from_slice(&status(true));
        if self.queues > 1 {
            space[8..10].copy_from_slice(&u16::from(self.queues).to_le_bytes());
        }
        space[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        space
    }

    /// The largest sizes of the queues: of several pairs, with that of the control queue.
    pub(super) fn queue_sizes(&self) -> Vec<u16> {
        let queues = usize::from(self.queues);
        vec![QUEUE_SIZE; if queues > 1 { 2 * queues + 1 } else { 2 }]
    }
}

/// What a network interface on a TAP is made of.
pub struct NetConfig {
    /// The interface's name, for messages.
    pub id: String,
    /// What the guest sees. The TAP must have been made for several queues if there are several pairs.
    pub seen: Seen,
    /// Name of an existing TAP in our network namespace.
    pub tap: String,
    /// Who moves the packets.
    pub vhost: VhostMode,
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

/// Opens vhost-net if it is to move the packets.
pub(super) fn choose_vhost(config: &NetConfig) -> Result<Option<Vhost>, NetError> {
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
    match open_vhost(config.seen.queues) {
        Ok(vhost) => Ok(Some(vhost)),
        Err(source) if config.vhost == VhostMode::On => Err(NetError::Vhost { id: id(), source }),
        Err(error) => {
            log::info!("network interface {}: not using /dev/vhost-net: {error}", config.id);
            Ok(None)
        }
    }
}

/// Opens /dev/vhost-net if it speaks virtio 1.
fn open_vhost(pairs: u8) -> io::Result<Vhost> {
    let vhost = Vhost::new(pairs)?;
    if vhost.features() & (1 << VIRTIO_F_VERSION_1) == 0 {
        return Err(io::Error::other("it does not offer VIRTIO_F_VERSION_1"));
    }
    Ok(vhost)
}
