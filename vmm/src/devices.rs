//! Which devices the microVM has, where they are, and what serves them.

use std::io;
use std::sync::{Arc, Mutex};

use ::devices::bus::{Bus, BusError};
use ::devices::legacy::{ExitSignal, I8042, Power, Serial};
use ::devices::virtio::block::{Block, BlockConfig, BlockError, CacheType};
use ::devices::virtio::device::{Memory, VirtioDevice};
use ::devices::virtio::mmio::MmioTransport;
use ::devices::virtio::net::{Net, NetConfig, NetError, VhostMode};
use arch::acpi::SLEEP_CONTROL_PORT;
use arch::layout::{COM1_GSI, COM1_PORT, MmioDevice, VIRTIO_MMIO_SIZE, virtio_mmio_window};
use kvm_ioctls::IoEventAddress;
use resources::{Drive, MicrovmConfig, NetworkInterface};

use crate::console::Output;
use crate::event_loop::EventLoop;
use crate::irq::{IrqError, IrqRouter};
use crate::vm::Vm;

/// First I/O port of the i8042, of which it has five.
const I8042_PORT: u64 = 0x60;

/// Why a device could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A drive.
    #[error("drives: \"{id}\"")]
    Drive {
        /// Its `drive_id`.
        id: String,
        /// What is wrong with it.
        source: BlockError,
    },
    /// A network interface.
    #[error("network-interfaces: \"{id}\"")]
    Network {
        /// Its `iface_id`.
        id: String,
        /// What is wrong with it.
        source: NetError,
    },
    /// An interrupt line.
    #[error(transparent)]
    Irq(#[from] IrqError),
    /// A place on the bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// More devices than there are places.
    #[error("there is no room for another virtio-mmio device; remove some")]
    NoRoom,
    /// KVM does not take an ioeventfd.
    #[error("KVM refused KVM_IOEVENTFD")]
    Ioeventfd(#[source] kvm_ioctls::Error),
    /// No eventfd could be made.
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
}

/// The devices of a microVM. When it is dropped none touches guest memory any more.
pub struct Devices {
    vm: Arc<Vm>,
    irqs: IrqRouter,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    serial: Arc<Mutex<Serial>>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    virtio_mmio: Vec<MmioDevice>,
}

impl Devices {
    /// Makes the devices that `config` asks for, and those that every microVM has.
    pub fn attach(
        config: &MicrovmConfig,
        vm: &Arc<Vm>,
        memory: &Memory,
        event_loop: &mut EventLoop,
        output: Output,
        exit: &Arc<ExitSignal>,
    ) -> Result<Self, DeviceError> {
        let irqs = IrqRouter::new(Arc::clone(vm));
        let serial =
            Serial::new(irqs.line(COM1_GSI)?.irqfd, Box::new(output)).map_err(DeviceError::EventFd)?;
        let serial = Arc::new(Mutex::new(serial));
        let pio = Arc::new(Bus::new());
        pio.insert(u64::from(COM1_PORT), Serial::LEN, Arc::clone(&serial) as _)?;
        pio.insert(I8042_PORT, I8042::LEN, Arc::new(Mutex::new(I8042::new(Arc::clone(exit)))) as _)?;
        pio.insert(
            u64::from(SLEEP_CONTROL_PORT),
            Power::LEN,
            Arc::new(Mutex::new(Power::new(Arc::clone(exit)))) as _,
        )?;
        let mut devices = Self {
            vm: Arc::clone(vm),
            irqs,
            pio,
            mmio: Arc::new(Bus::new()),
            serial,
            transports: Vec::new(),
            virtio_mmio: Vec::new(),
        };
        // The root drive is the first disk: the kernel is told that it is /dev/vda.
        let (root, others): (Vec<_>, Vec<_>) = config.drives.iter().partition(|drive| drive.is_root_device);
        for drive in root.into_iter().chain(others) {
            devices.add_virtio(Box::new(block(drive)?), memory, event_loop)?;
        }
        for interface in &config.network_interfaces {
            devices.add_virtio(Box::new(net(interface)?), memory, event_loop)?;
        }
        Ok(devices)
    }

    /// Puts a device on a virtio-mmio transport, wires it to KVM and has `event_loop` serve it.
    fn add_virtio(
        &mut self,
        device: Box<dyn VirtioDevice>,
        memory: &Memory,
        event_loop: &mut EventLoop,
    ) -> Result<(), DeviceError> {
        let base = virtio_mmio_window(self.virtio_mmio.len() as u64).ok_or(DeviceError::NoRoom)?.start;
        let line = self.irqs.allocate()?;
        let transport =
            MmioTransport::new(device, memory.clone(), line.irqfd).map_err(DeviceError::EventFd)?;
        let address = IoEventAddress::Mmio(base.0 + MmioTransport::QUEUE_NOTIFY);
        for (queue, kick) in (0_u32..).zip(transport.kicks()) {
            self.vm.fd().register_ioevent(kick, &address, queue).map_err(DeviceError::Ioeventfd)?;
        }
        event_loop.add(transport.worker());
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(base.0, VIRTIO_MMIO_SIZE, Arc::clone(&transport) as _)?;
        self.transports.push(transport);
        self.virtio_mmio.push(MmioDevice { base, size: VIRTIO_MMIO_SIZE, gsi: line.gsi });
        Ok(())
    }

    /// Port I/O.
    pub fn pio(&self) -> Arc<Bus> {
        Arc::clone(&self.pio)
    }

    /// Memory-mapped I/O.
    pub fn mmio(&self) -> Arc<Bus> {
        Arc::clone(&self.mmio)
    }

    /// The serial port that is the console.
    pub fn serial(&self) -> Arc<Mutex<Serial>> {
        Arc::clone(&self.serial)
    }

    /// The virtio-mmio devices, in the order in which the guest finds them.
    pub fn virtio_mmio(&self) -> &[MmioDevice] {
        &self.virtio_mmio
    }
}

fn block(drive: &Drive) -> Result<Block, DeviceError> {
    let id = drive.drive_id.to_string();
    let config = BlockConfig {
        id: id.clone(),
        path: drive.path_on_host.clone().unwrap_or_default(),
        read_only: drive.is_read_only,
        cache: match drive.cache_type {
            resources::CacheType::Unsafe => CacheType::Unsafe,
            resources::CacheType::Writeback => CacheType::Writeback,
        },
    };
    Block::new(config).map_err(|source| DeviceError::Drive { id, source })
}

fn net(interface: &NetworkInterface) -> Result<Net, DeviceError> {
    let id = interface.iface_id.to_string();
    let config = NetConfig {
        id: id.clone(),
        tap: interface.host_dev_name.clone(),
        mac: interface.guest_mac.map(|mac| mac.0),
        mtu: interface.mtu,
        vhost: match interface.vhost {
            resources::VhostMode::Auto => VhostMode::Auto,
            resources::VhostMode::On => VhostMode::On,
            resources::VhostMode::Off => VhostMode::Off,
        },
    };
    Net::new(config).map_err(|source| DeviceError::Network { id, source })
}
