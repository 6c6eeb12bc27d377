//! What all devices of back-ends have in common as virtio devices: everything goes to the front end.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::FrontEnd;
use crate::counter::Counters;
use crate::virtio::device::{Activation, DeviceError, EventSource, Server, VirtioDevice};

/// What is special about a device that a back-end serves.
pub(in crate::virtio) trait BackEndDevice: Send + 'static {
    /// The device type (virtio 1.2, section 5).
    const TYPE: u32;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space.
    fn space(&self) -> &[u8];

    /// What talks to the back-end.
    fn front(&self) -> &FrontEnd;

    /// Likewise, to do so.
    fn front_mut(&mut self) -> &mut FrontEnd;
}

impl<D: BackEndDevice> VirtioDevice for D {
    fn device_type(&self) -> u32 {
        D::TYPE
    }

    fn features(&self) -> u64 {
        self.front().features()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.queue_sizes()
    }

    fn config(&self) -> &[u8] {
        self.space()
    }

    fn server(&self) -> Server {
        Server::Vhost
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(self.front().counters()) as _
    }

    fn event_sources(&self) -> Vec<EventSource> {
        vec![self.front().event_source()]
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.front_mut().start(activation, u16::MAX)
    }

    fn queue_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    fn source_event(&mut self, _fd: RawFd) -> Result<(), DeviceError> {
        self.front_mut().event()
    }

    fn reset(&mut self) {
        self.front_mut().reset();
    }
}
