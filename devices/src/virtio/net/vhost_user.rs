//! A network interface whose packets another process moves by vhost-user: a switch in user space, or passt. The server
//! has the pairs of queues; the control queue is ours, and the configuration space too, as it is with other VMMs. When
//! the server is gone the guest's cable is unplugged.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::config::Seen;
use super::control::{Control, KickWatch};
use super::features::{OF_SERVERS, own};
use super::{CONFIG_LEN, NetError, Queues, STATUS_AT, VIRTIO_ID_NET, split, status};
use crate::counter::Counters;
use crate::virtio::device::{Activation, DeviceError, EventSource, Server, VirtioDevice};
use crate::virtio::iovec::ChainBuffers;
use crate::virtio::vhost_user::{FrontEnd, VhostUserError, Wanted};

/// What a network interface of another process is made of.
pub struct VhostUserNetConfig {
    /// The interface's name, for messages.
    pub id: String,
    /// What the guest sees. The server must have as many pairs of queues.
    pub seen: Seen,
    /// Where the server listens.
    pub socket: PathBuf,
}

/// A virtio network device whose packets another process moves.
pub struct VhostUserNet {
    features: u64,
    pairs: usize,
    config: [u8; CONFIG_LEN],
    config_changed: bool,
    queue_sizes: Vec<u16>,
    front: FrontEnd,
    kicks: KickWatch,
    running: Option<Control>,
}

impl VhostUserNet {
    /// Connects to the server and asks it what it offers. Guest memory must be shared memory.
    pub fn connect(config: VhostUserNetConfig) -> Result<Self, NetError> {
        let VhostUserNetConfig { id, seen, socket } = config;
        seen.check(&id)?;
        let wanted = Wanted {
            what: format!("network interface {id}"),
            path: socket,
            stream: None,
            queues: seen.queues.into(),
            features: OF_SERVERS,
            refuse: drop_packet,
            wants_answers: sends,
        };
        let front = match FrontEnd::connect(wanted) {
            Ok(front) => front,
            Err(source) => return Err(NetError::Server { id, source }),
        };
        let kicks = match KickWatch::new() {
            Ok(kicks) => kicks,
            Err(source) => return Err(NetError::Server { id, source: VhostUserError::Epoll(source) }),
        };
        log::info!("network interface {id}: its packets are moved by a vhost-user server");
        Ok(Self {
            features: own(&seen) | front.features(),
            pairs: seen.queues.into(),
            config: seen.space(),
            config_changed: false,
            queue_sizes: seen.queue_sizes(),
            front,
            kicks,
            running: None,
        })
    }

    /// Unplugs the guest's cable once the server is gone.
    fn check_link(&mut self) {
        if self.front.is_lost() && self.config[STATUS_AT..8] == status(true) {
            self.config[STATUS_AT..8].copy_from_slice(&status(false));
            self.config_changed = true;
        }
    }

    /// Does what the driver asks for on its control queue.
    fn serve_control(&mut self) -> Result<(), DeviceError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let front = &mut self.front;
        let mut result = Ok(());
        running.serve(|active, count| {
            let indices = queues(count.min(*active))..queues(count.max(*active));
            match front.set_enabled(indices, count > *active) {
                Ok(done) => {
                    if done {
                        *active = count;
                    }
                    done
                }
                Err(error) => {
                    result = Err(error);
                    false
                }
            }
        })?;
        self.check_link();
        result
    }
}

/// The index of the first queue behind as many pairs.
fn queues(pairs: usize) -> u16 {
    u16::try_from(2 * pairs).unwrap_or(u16::MAX)
}

/// Whether the driver sends by the queue of this index.
fn sends(index: u16) -> bool {
    index % 2 == 1
}

/// What is sent when nobody is there to take it is lost.
fn drop_packet(_: &ChainBuffers<'_>) -> u32 {
    0
}

impl VirtioDevice for VhostUserNet {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn config_changed(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn server(&self) -> Server {
        Server::Vhost
    }

    fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(self.front.counters()) as _
    }

    fn event_sources(&self) -> Vec<EventSource> {
        let kicks = EventSource { fd: self.kicks.fd(), events: EventSet::IN | EventSet::EDGE_TRIGGERED };
        vec![self.front.event_source(), kicks]
    }

    fn start(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let (pairs, control) =
            split(std::mem::take(&mut activation.queues), activation.features, self.pairs)?;
        let count = pairs.len();
        activation.queues = pairs.into_iter().flat_map(|Queues { rx, tx }| [Some(rx), Some(tx)]).collect();
        let memory = activation.memory.clone();
        // The first pair is in use, until the driver says how many.
        self.front.start(activation, queues(1))?;
        if let Some(control) = &control {
            self.kicks.watch(control.kick())?;
        }
        self.running = Some(Control::new(memory, control, count));
        self.check_link();
        self.serve_control()
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        match &self.running {
            Some(running) if running.is_queue(index) => self.serve_control(),
            _ => Ok(()),
        }
    }

    fn source_event(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        if fd == self.kicks.fd() {
            return self.serve_control();
        }
        let result = self.front.event();
        self.check_link();
        result
    }

    fn reset(&mut self) {
        self.kicks.stop();
        self.front.reset();
        self.running = None;
    }
}

#[cfg(test)]
mod tests;
