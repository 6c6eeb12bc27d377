//! Threads that serve one device each, so that it waits for no other one.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use ::devices::virtio::worker::Worker;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use resources::ResourceId;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::event_loop::register;
use crate::seccomp::{Filters, Role};

/// Why a device has no thread.
#[derive(Debug, thiserror::Error)]
pub enum IoThreadError {
    /// Its event loop.
    #[error("cannot make the event loop of the I/O thread of \"{0}\": {1:?}")]
    Loop(ResourceId, event_manager::Error),
    /// Its descriptor, or itself.
    #[error("cannot start the I/O thread of \"{id}\"")]
    Start {
        /// The device.
        id: ResourceId,
        /// What the host said.
        source: io::Error,
    },
}

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// A thread with an event loop. It ends when this is dropped; its device is to be at rest by then.
pub struct IoThread {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Serves `worker` on a thread of its own, which is born in the cgroup of the calling one.
    pub fn spawn(id: &ResourceId, worker: Worker, filters: &Filters) -> Result<Self, IoThreadError> {
        let failed = |source| IoThreadError::Start { id: id.clone(), source };
        let stop = EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(failed)?;
        let mut manager: EventManager<Subscriber> =
            EventManager::new().map_err(|error| IoThreadError::Loop(id.clone(), error))?;
        manager.add_subscriber(Box::new(Stop(Arc::clone(&stop))));
        manager.add_subscriber(Box::new(worker));
        let stopped = Arc::clone(&stop);
        let device = id.clone();
        // Cut to the 15 bytes that a thread's name has.
        let name = format!("pinfold_io {id}");
        let thread =
            filters.spawn(Role::Io, name, move || run(manager, &stopped, &device)).map_err(failed)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn run(mut manager: EventManager<Subscriber>, stop: &EventFd, device: &ResourceId) {
    // The descriptor stays readable until somebody reads it, which is done here only.
    while stop.read().is_err() {
        if let Err(error) = manager.run() {
            log::error!("the I/O thread of \"{device}\" ends, and the device stands still: {error:?}");
            return;
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            log::error!("cannot stop an I/O thread: {error}");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Wakes the loop to its end.
struct Stop(Arc<EventFd>);

impl MutEventSubscriber for Stop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        register(ops, Events::new(&*self.0, EventSet::IN), "the end of an I/O thread");
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
}
