//! Serves a device on an event loop.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::device::Server;
use super::slot::Slot;

/// What an event is about, for everything but a kick, which carries the index of its queue.
const ACTIVATION: u32 = u32::MAX;
const SOURCE: u32 = u32::MAX - 1;

/// A device's part in the event loop whose thread is to serve it: starts it, and brings it kicks and the
/// events of its own descriptors. Everything that the device does beside vCPU threads happens on that thread.
pub struct Worker {
    slot: Arc<Slot>,
}

impl Worker {
    /// Serves the device in `slot`. There must be one worker for each slot.
    pub fn new(slot: Arc<Slot>) -> Self {
        Self { slot }
    }

    fn register(ops: &mut EventOps<'_>, fd: RawFd, data: u32, events: EventSet) {
        if let Err(error) = ops.add(Events::with_data_raw(fd, data, events)) {
            log::error!("a virtio device will not hear from descriptor {fd}: {error:?}");
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        Self::register(ops, self.slot.activation().as_raw_fd(), ACTIVATION, EventSet::IN);
        if self.slot.server() == Server::EventLoop {
            for (index, kick) in (0..SOURCE).zip(self.slot.kicks()) {
                // Edge triggered: each write to an eventfd is an event, so that none has to be read. Its counter has room
                // for 2^64 - 1 of them.
                Self::register(ops, kick.as_raw_fd(), index, EventSet::IN | EventSet::EDGE_TRIGGERED);
            }
        }
        for source in self.slot.event_sources() {
            Self::register(ops, source.fd, SOURCE, source.events);
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        match events.data() {
            ACTIVATION => {
                // Drained before what it announces is done, so that nothing announced meanwhile is lost. Draining fails
                // when there is nothing to drain.
                let _ = self.slot.activation().read();
                self.slot.start_pending();
            }
            SOURCE => self.slot.source_event(events.fd()),
            index => {
                // Lossless: usize is no smaller than u32 here.
                let index = usize::try_from(index).unwrap_or(usize::MAX);
                self.slot.queue_event(index);
            }
        }
    }
}

#[cfg(test)]
mod tests;
