//! Devices from their declarations.

use std::sync::{Arc, Mutex};

use ::devices::legacy::Serial;
use ::devices::mmds::{Mmds, MmdsPort, Version};
use ::devices::rate_limiter::{Bucket, LimiterConfig};
use ::devices::virtio::balloon::{Balloon, BalloonConfig};
use ::devices::virtio::block::{
    Block, BlockConfig, BlockError, CacheType, IoEngine, VhostUserBlock, VhostUserBlockConfig,
};
use ::devices::virtio::device::VirtioDevice;
use ::devices::virtio::fs::Fs;
use ::devices::virtio::net::{Net, NetConfig, NetError, Seen, VhostMode, VhostUserNet, VhostUserNetConfig};
use ::devices::virtio::rng::Rng;
use ::devices::virtio::vsock::{Vsock, VsockConfig};
use resources::{Drive, MicrovmConfig, MmdsConfig, MmdsVersion, NetworkInterface, RateLimiter, TokenBucket};
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceError, Name};
use crate::console::Output;
use crate::sink;
use crate::virtiofsd::{self, Virtiofsd};

/// A device that has no place yet.
type Made = (Name, Box<dyn VirtioDevice>);

/// The virtio devices that `config` declares, in the order in which the guest finds them. Children of ours that are started
/// for them are put into `servers`.
pub fn all(
    config: &MicrovmConfig,
    mmds: &Arc<Mutex<Mmds>>,
    servers: &mut Vec<Virtiofsd>,
) -> Result<Vec<Made>, DeviceError> {
    let mut all: Vec<Made> = Vec::new();
    // The root drive is the first disk: the kernel is told that it is /dev/vda.
    let (root, others): (Vec<_>, Vec<_>) = config.drives.iter().partition(|drive| drive.is_root_device);
    for drive in root.into_iter().chain(others) {
        all.push((Name::Drive(drive.drive_id.clone()), block(drive)?));
    }
    for interface in &config.network_interfaces {
        let port = config
            .mmds_config
            .as_ref()
            .filter(|mmds| mmds.network_interfaces.contains(&interface.iface_id))
            .map(|config| MmdsPort::new(Arc::clone(mmds), config.ipv4_address));
        all.push((Name::Network(interface.iface_id.clone()), net(interface, port)?));
    }
    for section in &config.fs {
        all.push((Name::Fs(section.tag.clone()), Box::new(fs(section, servers)?)));
    }
    if let Some(vsock) = &config.vsock {
        let config = VsockConfig { guest_cid: vsock.guest_cid.into(), uds_path: vsock.uds_path.clone() };
        all.push((Name::Vsock, Box::new(Vsock::new(config)?)));
    }
    if let Some(entropy) = &config.entropy {
        all.push((Name::Entropy, Box::new(Rng::new(limiter(entropy.rate_limiter))?)));
    }
    if let Some(balloon) = &config.balloon {
        let config = BalloonConfig {
            amount_mib: balloon.amount_mib,
            deflate_on_oom: balloon.deflate_on_oom,
            stats_polling_interval_s: balloon.stats_polling_interval_s,
            free_page_reporting: balloon.free_page_reporting,
        };
        all.push((Name::Balloon, Box::new(Balloon::new(config)?)));
    }
    Ok(all)
}

/// Has the metadata service answer as declared.
pub fn configure_mmds(mmds: &mut Mmds, config: &MmdsConfig) {
    mmds.set_version(match config.version {
        MmdsVersion::V1 => Version::V1,
        MmdsVersion::V2 => Version::V2,
    });
    mmds.set_imds_compat(config.imds_compat);
}

/// The serial port, which writes to `output` unless a file is declared.
pub fn serial(
    config: Option<&resources::Serial>,
    irq: EventFd,
    output: Output,
) -> Result<Serial, DeviceError> {
    let output: Box<dyn std::io::Write + Send> =
        match config.and_then(|config| config.serial_out_path.as_ref()) {
            Some(path) => Box::new(sink::open(path)?),
            None => Box::new(output),
        };
    let limit = config.and_then(|config| config.rate_limiter);
    Serial::new(irq, output, limit).map_err(DeviceError::EventFd)
}

pub(super) fn limiter(limits: Option<RateLimiter>) -> LimiterConfig {
    let limits = limits.unwrap_or_default();
    LimiterConfig { bandwidth: limits.bandwidth.map(bucket), ops: limits.ops.map(bucket) }
}

pub(super) fn bucket(bucket: TokenBucket) -> Bucket {
    Bucket {
        size: bucket.size,
        refill_time_ms: bucket.refill_time,
        one_time_burst: bucket.one_time_burst.unwrap_or_default(),
    }
}

fn block(drive: &Drive) -> Result<Box<dyn VirtioDevice>, DeviceError> {
    let id = drive.drive_id.to_string();
    let cache = match drive.cache_type {
        resources::CacheType::Unsafe => CacheType::Unsafe,
        resources::CacheType::Writeback => CacheType::Writeback,
    };
    let made: Result<Box<dyn VirtioDevice>, BlockError> = match drive.socket.clone() {
        Some(socket) => {
            let queues = drive.queues.into();
            let config = VhostUserBlockConfig { id: id.clone(), socket, cache, queues };
            VhostUserBlock::connect(config).map(|block| Box::new(block) as _)
        }
        None => {
            let config = BlockConfig {
                id: id.clone(),
                path: drive.path_on_host.clone().unwrap_or_default(),
                read_only: drive.is_read_only,
                cache,
                engine: match drive.io_engine {
                    resources::IoEngine::Sync => IoEngine::Sync,
                    resources::IoEngine::Async => IoEngine::Async,
                },
                queues: drive.queues.into(),
                limiter: limiter(drive.rate_limiter),
            };
            Block::new(config).map(|block| Box::new(block) as _)
        }
    };
    made.map_err(|source| DeviceError::Drive { id, source })
}

fn fs(fs: &resources::Fs, servers: &mut Vec<Virtiofsd>) -> Result<Fs, DeviceError> {
    let tag = fs.tag.to_string();
    let connected = match (&fs.socket, &fs.shared_dir) {
        (None, Some(folder)) => {
            let served = virtiofsd::serve(folder);
            let (server, stream) =
                served.map_err(|source| DeviceError::Server { tag: tag.clone(), source })?;
            servers.extend(server);
            Fs::over(&tag, stream, folder.clone())
        }
        (socket, _) => Fs::connect(&tag, socket.clone().unwrap_or_default()),
    };
    connected.map_err(|source| DeviceError::Fs { tag, source })
}

fn net(interface: &NetworkInterface, mmds: Option<MmdsPort>) -> Result<Box<dyn VirtioDevice>, DeviceError> {
    let id = interface.iface_id.to_string();
    let seen =
        Seen { mac: interface.guest_mac.map(|mac| mac.0), queues: interface.queues, mtu: interface.mtu };
    let made: Result<Box<dyn VirtioDevice>, NetError> = match interface.socket.clone() {
        Some(socket) => {
            let config = VhostUserNetConfig { id: id.clone(), seen, socket };
            VhostUserNet::connect(config).map(|net| Box::new(net) as _)
        }
        None => {
            let config = NetConfig {
                id: id.clone(),
                seen,
                tap: interface.host_dev_name.clone().unwrap_or_default(),
                vhost: match interface.vhost {
                    resources::VhostMode::Auto => VhostMode::Auto,
                    resources::VhostMode::On => VhostMode::On,
                    resources::VhostMode::Off => VhostMode::Off,
                },
                rx_limiter: limiter(interface.rx_rate_limiter),
                tx_limiter: limiter(interface.tx_rate_limiter),
                mmds,
            };
            Net::new(config).map(|net| Box::new(net) as _)
        }
    };
    made.map_err(|source| DeviceError::Network { id, source })
}
