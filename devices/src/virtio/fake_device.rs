//! A device that tells what was asked of it, for the tests of what is generic.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::device::{Activation, DeviceError, EventSource, Memory, Server, VirtioDevice};

/// Features that [`FakeDevice`] offers.
pub const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1;

/// What was asked of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// With the accepted features, and whether each queue is there.
    Start(u64, Vec<bool>),
    Queue(usize),
    Source(RawFd),
    WriteConfig(usize, Vec<u8>),
    Reset,
}

/// What a test sees of the device, and how it makes it fail.
#[derive(Default)]
pub struct Log {
    calls: Mutex<Vec<Call>>,
    pub fail_start: AtomicBool,
    pub fail_events: AtomicBool,
    /// The configuration space is another after the next event.
    pub config_changes: AtomicBool,
}

impl Log {
    /// The calls since the last time.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn push(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }
}

/// A device of type 42 with two queues of at most 16, which returns every chain as it is.
pub struct FakeDevice {
    pub log: Arc<Log>,
    pub server: Server,
    pub sources: Vec<EventSource>,
    pub config: [u8; 6],
    activation: Option<Activation>,
}

impl FakeDevice {
    pub fn new() -> (Self, Arc<Log>) {
        let log = Arc::new(Log::default());
        let (server, config) = (Server::EventLoop, [1, 2, 3, 4, 5, 6]);
        (Self { log: log.clone(), server, sources: Vec::new(), config, activation: None }, log)
    }
}

impl VirtioDevice for FakeDevice {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 16]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.log.push(Call::WriteConfig(offset, data.to_vec()));
    }

    fn config_changed(&mut self) -> bool {
        self.log.config_changes.swap(false, Ordering::Relaxed)
    }

    fn server(&self) -> Server {
        self.server
    }

    fn event_sources(&self) -> Vec<EventSource> {
        self.sources.clone()
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        assert!(self.activation.is_none(), "started twice");
        self.log
            .push(Call::Start(activation.features, activation.queues.iter().map(Option::is_some).collect()));
        self.activation = Some(activation);
        match self.log.fail_start.load(Ordering::Relaxed) {
            true => {
                let source = io::ErrorKind::Other.into();
                Err(DeviceError::Host { doing: "failing as the test wants".to_owned(), source })
            }
            false => Ok(()),
        }
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        self.log.push(Call::Queue(index));
        if self.log.fail_events.load(Ordering::Relaxed) {
            return Err(DeviceError::Driver("failed as the test wants"));
        }
        let activation = self.activation.as_mut().unwrap();
        let memory = activation.memory.memory();
        let queue = activation.queues[index].as_mut().unwrap();
        Ok(queue.serve(&memory, |_| 0)?)
    }

    fn source_event(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        self.log.push(Call::Source(fd));
        match self.log.fail_events.load(Ordering::Relaxed) {
            true => Err(DeviceError::Driver("failed as the test wants")),
            false => Ok(()),
        }
    }

    fn reset(&mut self) {
        assert!(self.activation.take().is_some(), "reset without start");
        self.log.push(Call::Reset);
    }
}

/// 1 MiB of guest memory.
pub fn memory() -> Memory {
    Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap())
}
