//! Devices that another process serves: vhost-user (the protocol of QEMU's `docs/interop/vhost-user.rst`). We tell it
//! of guest memory, rings and eventfds, and are out of the way from then on.
//!
//! The back-end is trusted with all of guest memory, which has to be shared memory for it, and with nothing else: what
//! it answers is checked, and it is given [`PATIENCE`] for an answer. When it goes away, its device stays and answers
//! every request with an error ([`kind::Kind::refuse`]), so that the guest's programs do not wait for ever.
//!
//! | module | what it is |
//! | --- | --- |
//! | `backend` | the connection: negotiation, start and stop |
//! | `kind` | what is special about file systems and disks |

mod backend;
mod kind;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use backend::Backend;
pub use kind::Kind;

use super::device::{Activation, DeviceError, EventSource, Memory, Server, VirtioDevice};
use super::iovec::ChainIovecs;
use super::virtqueue::Virtqueue;
use crate::counter::{Counters, counters};

/// How long the back-end may take for one answer.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// Mark of the connection among the descriptors that are waited for; the others carry the index of a queue.
const CONNECTION: u64 = u64::MAX;

/// Why a device of another process cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody listens.
    #[error(
        "could not connect to {}: start its server first, and let this process reach the socket",
        .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The server and we do not understand each other.
    #[error("the server at {} failed at {doing}: {reason}", .path.display())]
    Talk {
        /// The socket.
        path: PathBuf,
        /// What was being asked.
        doing: &'static str,
        /// What came of it.
        reason: String,
    },
    /// The server cannot do what is needed.
    #[error("the server at {} does not offer {what}: use another one", .path.display())]
    Lacks {
        /// The socket.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// The host has no descriptors left, perhaps.
    #[error("could not make an epoll descriptor")]
    Epoll(#[source] io::Error),
}

counters! {
    /// What is counted of a device that another process serves.
    VhostUserCounters {
        /// Times that the back-end was lost.
        backend_lost,
        /// Requests answered with an error in its place.
        refused_count,
    }
}

/// A device that the process behind a socket serves.
pub struct VhostUser {
    kind: Kind,
    sizes: Vec<u16>,
    features: u64,
    config: Vec<u8>,
    backend: Backend,
    /// Whether the back-end is gone.
    lost: bool,
    /// The connection's end and, once that has come, the kicks.
    epoll: Epoll,
    iovecs: ChainIovecs,
    running: Option<Running>,
    counters: Arc<VhostUserCounters>,
}

struct Running {
    memory: Memory,
    /// The map that the back-end has.
    _shared: Arc<GuestMemoryMmap>,
    queues: Vec<Virtqueue>,
}

impl VhostUser {
    /// Connects to the server at `path` and asks it what it offers. Guest memory must be shared memory.
    pub fn connect(kind: Kind, path: PathBuf) -> Result<Self, VhostUserError> {
        let sizes = kind.queue_sizes();
        let mut backend = Backend::connect(path, sizes.len())?;
        let wanted = kind.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let features = backend.features() & wanted;
        if features & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(backend.lacks("virtio 1"));
        }
        let config = match kind.config() {
            Some(config) => config,
            None => backend.config(kind.config_len())?,
        };
        let epoll = Epoll::new().map_err(VhostUserError::Epoll)?;
        watch(&epoll, backend.as_raw_fd(), EventSet::READ_HANG_UP, CONNECTION)
            .map_err(VhostUserError::Epoll)?;
        Ok(Self {
            kind,
            sizes,
            features,
            config,
            backend,
            lost: false,
            epoll,
            iovecs: ChainIovecs::new(),
            running: None,
            counters: Arc::default(),
        })
    }

    /// The back-end is no more; `false` if that was known.
    fn lose(&mut self, why: &str) -> bool {
        let news = !std::mem::replace(&mut self.lost, true);
        if news {
            self.counters.backend_lost.inc();
            log::error!("{}: {why}; the guest gets errors from now on", self.kind);
        }
        news
    }

    /// Waits for the kicks in the back-end's place, and answers what waits already.
    fn take_over(&mut self) -> Result<(), DeviceError> {
        let Some(Running { memory, queues, .. }) = &mut self.running else { return Ok(()) };
        let memory = memory.memory();
        for queue in queues.iter_mut() {
            // What it had taken and not answered is, if it answered in order, what is behind the used index.
            queue.resume_after_used(&memory)?;
            let index = queue.index().into();
            watch(&self.epoll, queue.kick().as_raw_fd(), EventSet::IN, index).map_err(|source| {
                DeviceError::Host { doing: "could not wait for a queue's kicks".to_owned(), source }
            })?;
        }
        (0..queues.len()).try_for_each(|index| self.refuse(index))
    }

    /// Answers every request in the queue at this place with an error.
    fn refuse(&mut self, place: usize) -> Result<(), DeviceError> {
        let Some(Running { memory, queues, .. }) = &mut self.running else { return Ok(()) };
        let Some(queue) = queues.get_mut(place) else { return Ok(()) };
        let memory = memory.memory();
        queue.serve(&memory, |chain| {
            self.counters.refused_count.inc();
            match self.iovecs.fill(chain, &memory) {
                Ok(buffers) => self.kind.refuse(&buffers),
                Err(error) => {
                    log::debug!("{}: {error}", self.kind);
                    0
                }
            }
        })?;
        Ok(())
    }

    /// The marks of what has happened.
    fn poll(&mut self) -> io::Result<Vec<u64>> {
        let mut events = [EpollEvent::default(); 16];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        Ok(events[..count].iter().map(EpollEvent::data).collect())
    }
}

fn watch(epoll: &Epoll, fd: RawFd, events: EventSet, mark: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, mark))
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        self.kind.device_type()
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn server(&self) -> Server {
        Server::Vhost
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }

    fn event_sources(&self) -> Vec<EventSource> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        vec![EventSource { fd: self.epoll.as_raw_fd(), events }]
    }

    fn start(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let queues: Vec<Virtqueue> = queues.into_iter().flatten().collect();
        let shared = memory.memory().into_inner();
        let started = match self.lost {
            true => Ok(()),
            false => self.backend.start(&shared, &queues, features, interrupt.as_ref()),
        };
        self.running = Some(Running { memory, _shared: shared, queues });
        match started {
            Ok(()) if !self.lost => Ok(()),
            Ok(()) => self.take_over(),
            Err(error) => {
                self.lose(&format!("the back-end could not be started: {error}"));
                self.take_over()
            }
        }
    }

    fn queue_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    fn source_event(&mut self, _fd: RawFd) -> Result<(), DeviceError> {
        loop {
            let marks = self.poll().map_err(|source| DeviceError::Host {
                doing: "could not ask whether a vhost-user back-end is there".to_owned(),
                source,
            })?;
            if marks.is_empty() {
                return Ok(());
            }
            for mark in marks {
                if mark == CONNECTION {
                    if self.lose("the back-end is gone") {
                        self.take_over()?;
                    }
                } else if let Some(Running { queues, .. }) = &self.running
                    && let Some(place) = queues.iter().position(|queue| u64::from(queue.index()) == mark)
                {
                    // It fails when there is nothing to drain.
                    let _ = queues[place].kick().read();
                    self.refuse(place)?;
                }
            }
        }
    }

    fn reset(&mut self) {
        let Some(Running { queues, .. }) = self.running.take() else { return };
        if self.lost {
            for queue in &queues {
                let fd = queue.kick().as_raw_fd();
                // It fails for one that could not be added.
                let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
            }
        } else if let Err(error) = self.backend.stop(&queues) {
            self.lose(&format!("the back-end did not stop: {error}"));
        }
    }
}

#[cfg(test)]
mod tests;
