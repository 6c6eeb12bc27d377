//! Which devices the microVM has, where they are, and what serves them.

mod follow;
mod make;
mod pci;

pub use make::configure_mmds;

use std::io;
use std::sync::{Arc, Mutex};

use ::devices::bus::{Bus, BusError};
use ::devices::legacy::{BootTimer, ExitSignal, I8042, I8042Error, Power, Serial, Timestamp};
use ::devices::mmds::Mmds;
use ::devices::virtio::balloon::BalloonError;
use ::devices::virtio::block::BlockError;
use ::devices::virtio::device::{Memory, VirtioDevice};
use ::devices::virtio::mmio::MmioTransport;
use ::devices::virtio::net::NetError;
use ::devices::virtio::rng::RngError;
use ::devices::virtio::slot::Slot;
use ::devices::virtio::vhost_user::VhostUserError;
use ::devices::virtio::vsock::VsockError;
use ::devices::virtio::worker::Worker;
use arch::acpi::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_S5};
use arch::layout::{
    BOOT_TIMER, COM1_GSI, COM1_PORT, I8042_COMMAND_PORT, I8042_DATA_PORT, I8042_GSI, MmioDevice,
    VIRTIO_MMIO_SIZE, Window, virtio_mmio_window,
};
use kvm_ioctls::IoEventAddress;
use resources::{MicrovmConfig, ResourceId};

use self::pci::Pci;
use crate::console::Output;
use crate::irq::{IrqError, IrqRouter};
use crate::metrics::METRICS;
use crate::sink::SinkError;
use crate::virtiofsd::{Virtiofsd, VirtiofsdError};
use crate::vm::{Vm, VmError};

// What `arch` tells the guest of a device is what the device in `devices` does.
const _: () = assert!(
    Power::SLEEP_CONTROL == 0
        && (SLEEP_STATUS_PORT - SLEEP_CONTROL_PORT) as u64 == Power::SLEEP_STATUS
        && (RESET_PORT - SLEEP_CONTROL_PORT) as u64 == Power::RESET
        && RESET_VALUE == Power::RESET_VALUE
        && SLEEP_TYPE_S5 == Power::S5
);
const _: () = assert!((I8042_COMMAND_PORT - I8042_DATA_PORT) as u64 + 1 == I8042::LEN);

/// Why a device could not be attached or changed.
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
    /// A file system.
    #[error("fs: \"{tag}\"")]
    Fs {
        /// Its tag.
        tag: String,
        /// What is wrong with it.
        source: VhostUserError,
    },
    /// A file system's server.
    #[error("fs: \"{tag}\"")]
    Server {
        /// Its tag.
        tag: String,
        /// What is wrong with it.
        source: VirtiofsdError,
    },
    /// The socket device.
    #[error("vsock")]
    Vsock(#[from] VsockError),
    /// The entropy device.
    #[error("entropy")]
    Entropy(#[from] RngError),
    /// The balloon.
    #[error("balloon")]
    Balloon(#[from] BalloonError),
    /// The keyboard.
    #[error(transparent)]
    Keyboard(#[from] I8042Error),
    /// The serial port's output.
    #[error("serial.serial_out_path")]
    Serial(#[from] SinkError),
    /// A device that is not there.
    #[error("there is no device \"{0}\"")]
    Unknown(String),
    /// An interrupt line.
    #[error(transparent)]
    Irq(#[from] IrqError),
    /// A place on the bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// More devices than there are places.
    #[error("there is no room for another device on {0}; remove some")]
    NoRoom(&'static str),
    /// What KVM cannot do.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// KVM does not take an ioeventfd.
    #[error("KVM refused KVM_IOEVENTFD")]
    Ioeventfd(#[source] kvm_ioctls::Error),
    /// No eventfd could be made.
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
}

/// Which virtio device it is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Drive(ResourceId),
    Network(ResourceId),
    Fs(ResourceId),
    Vsock,
    Entropy,
    Balloon,
}

impl Name {
    /// What Firecracker's metrics call its kind.
    fn kind(&self) -> &'static str {
        match self {
            Self::Drive(_) => "block",
            Self::Network(_) => "net",
            Self::Fs(_) => "fs",
            Self::Vsock => "vsock",
            Self::Entropy => "entropy",
            Self::Balloon => "balloon",
        }
    }

    /// What tells it from others of its kind.
    fn id(&self) -> Option<String> {
        match self {
            Self::Drive(id) | Self::Network(id) | Self::Fs(id) => Some(id.to_string()),
            Self::Vsock | Self::Entropy | Self::Balloon => None,
        }
    }
}

/// A device's part in an event loop, and whose thread that is: its own, called by this name, or the main one.
pub type PlacedWorker = (Worker, Option<ResourceId>);

/// The drive's name, if it is one that has asked for a thread of its own.
fn own_thread(config: &MicrovmConfig, name: &Name) -> Option<ResourceId> {
    let Name::Drive(id) = name else { return None };
    config.drives.iter().any(|drive| drive.io_thread && drive.drive_id == *id).then(|| id.clone())
}

/// What beside the declared devices a microVM has.
#[derive(Clone, Copy, Debug)]
pub struct Board {
    /// The boot timer, and from when on it counts.
    pub boot_timer: Option<Timestamp>,
    /// PCI instead of virtio-mmio, with this window above 4 GiB.
    pub pci: Option<Window>,
}

/// The devices of a microVM. When it is dropped none touches guest memory any more.
pub struct Devices {
    vm: Arc<Vm>,
    irqs: IrqRouter,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    serial: Arc<Mutex<Serial>>,
    keyboard: Arc<Mutex<I8042>>,
    pci: Option<Pci>,
    slots: Vec<(Name, Arc<Slot>)>,
    virtio_mmio: Vec<MmioDevice>,
    /// Servers that are children of ours; they end with the devices.
    servers: Vec<Virtiofsd>,
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.slots.iter().for_each(|(_, slot)| slot.reset());
    }
}

impl Devices {
    /// Makes the devices that `config` asks for, and those that every microVM has. The workers are what event loops
    /// need to serve them.
    pub fn attach(
        config: &MicrovmConfig,
        vm: &Arc<Vm>,
        memory: &Memory,
        output: Output,
        mmds: &Arc<Mutex<Mmds>>,
        board: Board,
        exit: &Arc<ExitSignal>,
    ) -> Result<(Self, Vec<PlacedWorker>), DeviceError> {
        let irqs = IrqRouter::new(Arc::clone(vm));
        let irq = irqs.line(COM1_GSI)?.irqfd;
        let serial = make::serial(config.serial.as_ref(), irq, output)?;
        let keyboard = I8042::new(irqs.line(I8042_GSI)?.irqfd, Arc::clone(exit));
        METRICS.devices.clear();
        METRICS.devices.add("uart", None, serial.counters());
        METRICS.devices.add("i8042", None, keyboard.counters());
        let (serial, keyboard) = (Arc::new(Mutex::new(serial)), Arc::new(Mutex::new(keyboard)));
        let pio = Arc::new(Bus::new());
        pio.insert(u64::from(COM1_PORT), Serial::LEN, Arc::clone(&serial) as _)?;
        pio.insert(u64::from(I8042_DATA_PORT), I8042::LEN, Arc::clone(&keyboard) as _)?;
        pio.insert(
            u64::from(SLEEP_CONTROL_PORT),
            Power::LEN,
            Arc::new(Mutex::new(Power::new(Arc::clone(exit)))) as _,
        )?;
        let mmio = Arc::new(Bus::new());
        if let Some(start) = board.boot_timer {
            let timer = Arc::new(Mutex::new(BootTimer::new(start)));
            mmio.insert(BOOT_TIMER.start.0, BOOT_TIMER.size, timer)?;
        }
        let pci = board.pci.map(|mmio64| Pci::new(vm, &mmio, &pio, mmio64)).transpose()?;
        let mut devices = Self {
            vm: Arc::clone(vm),
            irqs,
            pio,
            mmio,
            serial,
            keyboard,
            pci,
            slots: Vec::new(),
            virtio_mmio: Vec::new(),
            servers: Vec::new(),
        };
        let workers = make::all(config, mmds, &mut devices.servers)?
            .into_iter()
            .map(|(name, device)| {
                let thread = own_thread(config, &name);
                Ok((devices.add_virtio(name, device, memory)?, thread))
            })
            .collect::<Result<_, DeviceError>>()?;
        Ok((devices, workers))
    }

    /// Puts a device on the microVM's transport and wires it to KVM.
    fn add_virtio(
        &mut self,
        name: Name,
        device: Box<dyn VirtioDevice>,
        memory: &Memory,
    ) -> Result<Worker, DeviceError> {
        let slot = match &self.pci {
            Some(pci) => pci.add(device, memory, &self.irqs)?,
            None => self.add_mmio(device, memory)?,
        };
        for counters in slot.counters() {
            METRICS.devices.add(name.kind(), name.id(), counters);
        }
        let worker = Worker::new(Arc::clone(&slot));
        self.slots.push((name, slot));
        Ok(worker)
    }

    fn add_mmio(&mut self, device: Box<dyn VirtioDevice>, memory: &Memory) -> Result<Arc<Slot>, DeviceError> {
        let window = virtio_mmio_window(self.virtio_mmio.len() as u64);
        let base = window.ok_or(DeviceError::NoRoom("virtio-mmio"))?.start;
        let line = self.irqs.allocate()?;
        let transport =
            MmioTransport::new(device, memory.clone(), line.irqfd).map_err(DeviceError::EventFd)?;
        let address = IoEventAddress::Mmio(base.0 + MmioTransport::QUEUE_NOTIFY);
        let slot = Arc::clone(transport.slot());
        for (queue, kick) in (0_u32..).zip(slot.kicks()) {
            self.vm.fd().register_ioevent(kick, &address, queue).map_err(DeviceError::Ioeventfd)?;
        }
        self.mmio.insert(base.0, VIRTIO_MMIO_SIZE, Arc::new(Mutex::new(transport)) as _)?;
        self.virtio_mmio.push(MmioDevice { base, size: VIRTIO_MMIO_SIZE, gsi: line.gsi });
        Ok(slot)
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
