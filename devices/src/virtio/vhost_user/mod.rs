//! Devices that another process serves by vhost-user (the protocol of QEMU's `docs/interop/vhost-user.rst`). We tell it
//! of guest memory, rings and eventfds, and are out of the way from then on.
//!
//! The back-end is trusted with all of guest memory, which has to be shared memory for it, and with nothing else: what
//! it answers is checked, and it is given [`PATIENCE`] for an answer. When it goes away, or does not keep to the
//! protocol, its device stays and answers in its place, so that the guest's programs do not wait for ever.
//!
//! | module | what it is |
//! | --- | --- |
//! | `backend` | the conversation: negotiation, configuration, start and stop |
//! | `device` | what all devices of back-ends have in common |
//! | `inflight` | which requests a back-end that is gone had taken |
//! | `wire` | its messages |

mod backend;
mod device;
mod inflight;
#[cfg(test)]
pub(crate) mod peer;
pub(super) mod wire;

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use backend::Backend;
pub(super) use device::BackEndDevice;

use super::device::{Activation, DeviceError, EventSource, Memory};
use super::iovec::{ChainBuffers, ChainIovecs};
use super::virtqueue::{Chain, Virtqueue};
use crate::counter::counters;

/// How long the back-end may take for one answer.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// What rings may have, whatever the device.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Mark of the connection among the descriptors that are waited for; the others carry the index of a queue.
const CONNECTION: u64 = u64::MAX;

/// Why a device cannot be had of a back-end.
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
    #[error("the server at {} failed at {reason}", .path.display())]
    Talk {
        /// The socket.
        path: PathBuf,
        /// What was being asked, and what came of it.
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
    /// The server was lost.
    #[error("the server at {} is gone: start it, and then the microVM, again", .path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
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

/// Answers a request in the place of a back-end that is gone; returns the number of bytes written.
pub(super) type Refuse = fn(&ChainBuffers<'_>) -> u32;

/// What is asked of a back-end.
pub(super) struct Wanted {
    /// What it serves, for messages.
    pub what: String,
    /// Its socket; what messages call it.
    pub path: PathBuf,
    /// A connection to it, where there is one already.
    pub stream: Option<UnixStream>,
    /// How many queues it is to have; of network devices, pairs of them.
    pub queues: usize,
    /// The features of this kind of device that are passed on to the driver if it offers them.
    pub features: u64,
    /// The answer once it is gone.
    pub refuse: Refuse,
    /// Whether what the driver puts into the queue of this index wants an answer then. Room for packets does not: given
    /// back, it would be offered again at once, and so on.
    pub wants_answers: fn(u16) -> bool,
}

/// The side of a device that is here.
pub(super) struct FrontEnd {
    features: u64,
    backend: Backend,
    /// Whether the back-end is gone.
    lost: bool,
    /// The connection's end and, once that has come, the kicks.
    epoll: Epoll,
    stand_in: StandIn,
    running: Option<Running>,
}

/// Answers in the place of a back-end.
struct StandIn {
    /// What the back-end served, for messages.
    what: String,
    refuse: Refuse,
    wants_answers: fn(u16) -> bool,
    iovecs: ChainIovecs,
    counters: Arc<VhostUserCounters>,
}

impl StandIn {
    /// Returns the number of bytes written into the chain.
    fn answer(&mut self, chain: Chain<'_>, memory: &GuestMemoryMmap) -> u32 {
        self.counters.refused_count.inc();
        match self.iovecs.fill(chain, memory) {
            Ok(buffers) => (self.refuse)(&buffers),
            Err(error) => {
                log::debug!("{}: {error}", self.what);
                0
            }
        }
    }
}

struct Running {
    memory: Memory,
    /// The map that the back-end has.
    _shared: Arc<GuestMemoryMmap>,
    queues: Vec<Virtqueue>,
}

impl FrontEnd {
    /// Connects to the server and asks it what it offers. Guest memory must be shared memory.
    pub(super) fn connect(wanted: Wanted) -> Result<Self, VhostUserError> {
        let Wanted { what, path, stream, queues, features, refuse, wants_answers } = wanted;
        let backend = Backend::connect(path, stream, queues)?;
        let features = backend.features() & (features | RING_FEATURES);
        if features & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(backend.lacks("virtio 1"));
        }
        let epoll = Epoll::new().map_err(VhostUserError::Epoll)?;
        watch(&epoll, backend.as_raw_fd(), EventSet::READ_HANG_UP, CONNECTION)
            .map_err(VhostUserError::Epoll)?;
        Ok(Self {
            features,
            backend,
            lost: false,
            epoll,
            stand_in: StandIn {
                what,
                refuse,
                wants_answers,
                iovecs: ChainIovecs::new(),
                counters: Arc::default(),
            },
            running: None,
        })
    }

    /// The features for the driver.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// What is counted.
    pub(super) fn counters(&self) -> &Arc<VhostUserCounters> {
        &self.stand_in.counters
    }

    /// What wakes [`Self::event`].
    pub(super) fn event_source(&self) -> EventSource {
        EventSource { fd: self.epoll.as_raw_fd(), events: EventSet::IN | EventSet::EDGE_TRIGGERED }
    }

    /// Has the back-end fill `space` with the beginning of the device's configuration space. On an error `space` is as it
    /// was.
    pub(super) fn read_config(&mut self, space: &mut [u8]) -> Result<(), VhostUserError> {
        if self.lost {
            return Err(VhostUserError::Gone { path: self.backend.path().to_owned() });
        }
        let read = self.backend.read_config(space);
        if let Err(error @ VhostUserError::Talk { .. }) = &read {
            // An answer that comes late would be taken for that to the next request.
            self.lose(&error.to_string());
            if let Err(error) = self.take_over() {
                log::warn!("{}: {}", self.stand_in.what, resources::chain(&error));
            }
        }
        read
    }

    /// The back-end is no more; `false` if that was known.
    fn lose(&mut self, why: &str) -> bool {
        let news = !std::mem::replace(&mut self.lost, true);
        if news {
            self.backend.hang_up();
            self.stand_in.counters.backend_lost.inc();
            log::error!("{}: {why}; the guest gets errors from now on", self.stand_in.what);
        }
        news
    }

    /// Waits for the kicks in the back-end's place, and answers what waits already.
    fn take_over(&mut self) -> Result<(), DeviceError> {
        let Some(Running { memory, queues, .. }) = &mut self.running else { return Ok(()) };
        let memory = memory.memory();
        let inflight = self.backend.take_inflight();
        let wants_answers = self.stand_in.wants_answers;
        for queue in queues.iter_mut().filter(|queue| wants_answers(queue.index())) {
            // What it had taken and not answered is, if it did not say so and answered in order, what is behind the used
            // index.
            let used = queue.resume_after_used(&memory)?;
            match inflight.as_ref().map(|inflight| inflight.heads(queue.index(), used)) {
                None => {}
                Some(Ok(heads)) => {
                    queue.answer_taken(&memory, &heads, |chain| self.stand_in.answer(chain, &memory))?;
                }
                Some(Err(error)) => {
                    log::warn!("{}: it is not known what was in flight: {error}", self.stand_in.what);
                }
            }
            let index = queue.index().into();
            watch(&self.epoll, queue.kick().as_raw_fd(), EventSet::IN, index).map_err(|source| {
                DeviceError::Host { doing: "could not wait for a queue's kicks".to_owned(), source }
            })?;
        }
        (0..queues.len()).try_for_each(|place| self.refuse(place))
    }

    /// Answers every request in the queue at this place with an error.
    fn refuse(&mut self, place: usize) -> Result<(), DeviceError> {
        let Some(Running { memory, queues, .. }) = &mut self.running else { return Ok(()) };
        let Some(queue) = queues.get_mut(place) else { return Ok(()) };
        if !(self.stand_in.wants_answers)(queue.index()) {
            return Ok(());
        }
        let memory = memory.memory();
        queue.serve(&memory, |chain| self.stand_in.answer(chain, &memory))?;
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

    /// Whether the back-end is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    /// As [`VirtioDevice::start`](super::device::VirtioDevice::start), with the queues of the indices below `enabled` in
    /// use.
    pub(super) fn start(&mut self, activation: Activation, enabled: u16) -> Result<(), DeviceError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let queues: Vec<Virtqueue> = queues.into_iter().flatten().collect();
        let shared = memory.memory().into_inner();
        if !self.lost
            && let Err(error) = self.backend.start(&shared, &queues, features, interrupt.as_ref(), enabled)
        {
            self.lose(&format!("the back-end could not be started: {error}"));
        }
        self.running = Some(Running { memory, _shared: shared, queues });
        if self.lost { self.take_over() } else { Ok(()) }
    }

    /// Takes the queues of these indices into use, or out of it. Whether the back-end did.
    pub(super) fn set_enabled(&mut self, indices: Range<u16>, enabled: bool) -> Result<bool, DeviceError> {
        let Some(Running { queues, .. }) = &self.running else { return Ok(false) };
        if self.lost {
            return Ok(false);
        }
        let mut concerned = queues.iter().filter(|queue| indices.contains(&queue.index()));
        let Err(error) = concerned.try_for_each(|queue| self.backend.set_enabled(queue, enabled)) else {
            return Ok(true);
        };
        self.lose(&format!("the back-end could not be told of a queue: {error}"));
        self.take_over().map(|()| false)
    }

    /// What [`Self::event_source`] names is ready.
    pub(super) fn event(&mut self) -> Result<(), DeviceError> {
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

    /// As [`VirtioDevice::reset`](super::device::VirtioDevice::reset).
    pub(super) fn reset(&mut self) {
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

fn watch(epoll: &Epoll, fd: RawFd, events: EventSet, mark: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, mark))
}
