//! virtio-fs (virtio 1.2, section 5.11), a folder of the host's that another process serves by vhost-user (the protocol
//! of QEMU's `docs/interop/vhost-user.rst`). We tell it of guest memory, rings and eventfds, and are out of the way from
//! then on.
//!
//! The back-end is trusted with all of guest memory, which has to be shared memory for it, and with nothing else: what
//! it answers is checked, and it is given [`PATIENCE`] for an answer. When it goes away, its device stays and answers
//! every request with an error ([`fuse`]), so that the guest's programs do not wait for ever.
//!
//! | module | what it is |
//! | --- | --- |
//! | `backend` | the connection: negotiation, start and stop |
//! | `fuse` | the answer in its place |

mod backend;
mod fuse;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use backend::Backend;

use super::device::{Activation, DeviceError, EventSource, Memory, Server, VirtioDevice};
use super::iovec::ChainIovecs;
use super::virtqueue::Virtqueue;
use crate::counter::{Counters, counters};

/// How long the back-end may take for one answer.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// Descriptors in the queue of requests that are not to wait, and in the one of all others.
const QUEUE_SIZES: [u16; 2] = [256, 1024];
/// How many there are of the latter.
const REQUEST_QUEUES: u32 = 1;

/// Bytes of the tag, and of the whole configuration space (section 5.11.4).
const TAG_LEN: usize = 36;
const CONFIG_LEN: usize = TAG_LEN + 4;

/// Mark of the connection among the descriptors that are waited for; the others carry the index of a queue.
const CONNECTION: u64 = u64::MAX;

/// Why a file system cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
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
    /// What is counted of a file system.
    FsCounters {
        /// Times that the back-end was lost.
        backend_lost,
        /// Requests answered with an error in its place.
        refused_count,
    }
}

/// A file system that the process behind a socket serves.
pub struct Fs {
    tag: String,
    features: u64,
    config: [u8; CONFIG_LEN],
    backend: Backend,
    /// Whether the back-end is gone.
    lost: bool,
    /// The connection's end and, once that has come, the kicks.
    epoll: Epoll,
    iovecs: ChainIovecs,
    running: Option<Running>,
    counters: Arc<FsCounters>,
}

struct Running {
    memory: Memory,
    /// The map that the back-end has.
    _shared: Arc<GuestMemoryMmap>,
    queues: Vec<Virtqueue>,
}

impl Fs {
    /// Connects to the server at `path` and asks it what it offers. The guest mounts the file system by `tag`, of at
    /// most 36 bytes. Guest memory must be shared memory.
    pub fn connect(tag: &str, path: PathBuf) -> Result<Self, FsError> {
        let backend = Backend::connect(path, QUEUE_SIZES.len())?;
        let wanted =
            1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let features = backend.features() & wanted;
        if features & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(backend.lacks("virtio 1"));
        }
        let mut config = [0; CONFIG_LEN];
        let len = tag.len().min(TAG_LEN);
        config[..len].copy_from_slice(&tag.as_bytes()[..len]);
        config[TAG_LEN..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let epoll = Epoll::new().map_err(FsError::Epoll)?;
        watch(&epoll, backend.as_raw_fd(), EventSet::READ_HANG_UP, CONNECTION).map_err(FsError::Epoll)?;
        Ok(Self {
            tag: tag.to_owned(),
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
            log::error!("file system {}: {why}; the guest gets errors from now on", self.tag);
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
                Ok(buffers) => fuse::refuse(&buffers),
                Err(error) => {
                    log::debug!("file system {}: {error}", self.tag);
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

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
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
        if !self.lost
            && let Err(error) = self.backend.start(&shared, &queues, features, interrupt.as_ref())
        {
            self.lose(&format!("the back-end could not be started: {error}"));
        }
        self.running = Some(Running { memory, _shared: shared, queues });
        if self.lost { self.take_over() } else { Ok(()) }
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
