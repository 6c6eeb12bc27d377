//! virtio-net (virtio 1.2, section 5.1) on a TAP of the host: pairs of queues, each with a queue of the TAP, served by
//! the kernel's vhost-net where it is to be had, else by us; and by us where somebody has to look at the packets.

mod config;
mod control;
mod detour;
mod features;
mod lent;
mod link;
mod receive;
mod tap;
mod userspace;
mod vhost;
mod vhost_user;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;
use vmm_sys_util::epoll::EventSet;

use config::choose_vhost;
pub use config::{NetConfig, NetError, Seen, VhostMode};
use control::Control;
use features::{has_control, has_merged_buffers, has_pairs, offered, offloads};
use link::LinkWatch;
use tap::Tap;
pub use tap::TapError;
use userspace::Userspace;
use vhost::Vhost;
pub use vhost_user::{VhostUserNet, VhostUserNetConfig};

use super::device::{Activation, DeviceError, EventSource, Server, VirtioDevice};
use super::virtqueue::Virtqueue;
use crate::counter::Counters;
use crate::rate_limiter::LimiterUpdate;

/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;

/// Bytes of the header before every packet, on the queues as on the TAP (virtio 1.2, section 5.1.6): with VERSION_1 it
/// is always the long one.
const HEADER_LEN: u32 = 12;

/// Length of the configuration space: mac, status, max_virtqueue_pairs, mtu.
const CONFIG_LEN: usize = 12;

/// Where the configuration space says whether the link is up, in 16 bits.
const STATUS_AT: usize = 6;

/// A virtio network device.
pub struct Net {
    id: String,
    /// The queues of the TAP, one for each pair.
    taps: Vec<Tap>,
    backend: Backend,
    features: u64,
    config: [u8; CONFIG_LEN],
    config_changed: bool,
    queue_sizes: Vec<u16>,
    /// `None` if the host does not let us hear of it.
    link: Option<LinkWatch>,
    /// Of the started device.
    running: Option<Control>,
}

enum Backend {
    Userspace(Box<Userspace>),
    Vhost(Vhost),
}

/// The queues of a pair.
struct Queues {
    rx: Virtqueue,
    tx: Virtqueue,
}

/// What the queues of a device with at most `most` pairs are to a driver that accepted `features`: pairs, those behind a
/// gap left out, and the control queue.
fn split(
    queues: Vec<Option<Virtqueue>>,
    features: u64,
    most: usize,
) -> Result<(Vec<Queues>, Option<Virtqueue>), DeviceError> {
    let known = if has_pairs(features) { most } else { 1 };
    let mut queues = queues.into_iter();
    let mut pairs = Vec::new();
    let mut gap = false;
    for _ in 0..known {
        match (queues.next().flatten(), queues.next().flatten()) {
            (Some(rx), Some(tx)) if !gap => pairs.push(Queues { rx, tx }),
            _ => gap = true,
        }
    }
    if pairs.is_empty() {
        return Err(DeviceError::Driver("did not enable both queues of a network interface"));
    }
    Ok((pairs, queues.next().flatten().filter(|_| has_control(features))))
}

impl Net {
    /// Attaches to the TAP and, where asked for, opens /dev/vhost-net. Starts nothing.
    pub fn new(mut config: NetConfig) -> Result<Self, NetError> {
        config.seen.check(&config.id)?;
        let taps = match Tap::open(&config.tap, config.seen.queues) {
            Ok(taps) => taps,
            Err(source) => return Err(NetError::Tap { id: config.id, source }),
        };
        let backend = match choose_vhost(&config)? {
            Some(vhost) => Backend::Vhost(vhost),
            None => match Userspace::new(config.rx_limiter, config.tx_limiter, config.mmds.take()) {
                Ok(userspace) => Backend::Userspace(Box::new(userspace)),
                Err(source) => return Err(NetError::Timer { id: config.id, source }),
            },
        };
        let net = Self::with_backend(config, taps, backend);
        let by = if net.is_on_vhost() { "vhost-net" } else { "Pinfold itself" };
        log::info!("network interface {}: its packets are moved by {by}", net.id);
        Ok(net)
    }

    /// For fuzzing: an interface with a socket that keeps the borders of messages in the place of each queue of its
    /// TAP. Packets pass, but the guest sees a dead link: what a TAP is told by ioctl a socket is not.
    #[cfg(feature = "fuzzing")]
    pub fn on_sockets(mut config: NetConfig, sockets: Vec<std::fs::File>) -> Result<Self, NetError> {
        config.seen.check(&config.id)?;
        let timers = Userspace::new(config.rx_limiter, config.tx_limiter, config.mmds.take());
        let userspace = timers.map_err(|source| NetError::Timer { id: config.id.clone(), source })?;
        let taps = sockets.into_iter().map(Tap::from_file).collect();
        let mut net = Self::with_backend(config, taps, Backend::Userspace(Box::new(userspace)));
        net.config[STATUS_AT..8].copy_from_slice(&status(false));
        Ok(net)
    }

    fn with_backend(config: NetConfig, taps: Vec<Tap>, backend: Backend) -> Self {
        let vhost = match &backend {
            Backend::Userspace(_) => None,
            Backend::Vhost(vhost) => Some(vhost.features()),
        };
        let link = LinkWatch::new()
            .inspect_err(|error| log::warn!("will not hear when TAP {} goes: {error}", config.tap))
            .ok();
        Self {
            features: offered(&config.seen, vhost),
            config: config.seen.space(),
            queue_sizes: config.seen.queue_sizes(),
            id: config.id,
            taps,
            backend,
            config_changed: false,
            link,
            running: None,
        }
    }

    /// Whether the kernel's vhost-net moves the packets, and not we.
    pub fn is_on_vhost(&self) -> bool {
        matches!(self.backend, Backend::Vhost(_))
    }

    /// Changes the limits of both directions from the next packet on. Refused, changing nothing, if it would set a
    /// limit where vhost-net moves the packets.
    ///
    /// To be called through [`Slot::update`](super::slot::Slot::update).
    pub fn set_limiters(&mut self, rx: LimiterUpdate, tx: LimiterUpdate) -> Result<(), NetError> {
        match &mut self.backend {
            Backend::Userspace(userspace) => userspace.set_limiters(rx, tx),
            Backend::Vhost(_) if rx.sets_a_limit() || tx.sets_a_limit() => {
                return Err(NetError::Unlimitable { id: self.id.clone() });
            }
            Backend::Vhost(_) => {}
        }
        Ok(())
    }

    fn link_is_up(&self) -> bool {
        self.config[STATUS_AT..8] == status(true)
    }

    /// Interfaces of the host changed. Without its TAP the guest's cable is unplugged, for good.
    fn check_link(&mut self) {
        if self.link_is_up() && !self.taps.iter().take(1).all(Tap::exists) {
            log::warn!("network interface {}: its TAP is gone; the guest sees a dead link", self.id);
            self.config[STATUS_AT..8].copy_from_slice(&status(false));
            self.config_changed = true;
        }
    }

    /// Starts what moves packets, with the first pair in use.
    fn start_backend(
        &mut self,
        activation: &Activation,
        pairs: Vec<Queues>,
        control: Option<&Virtqueue>,
    ) -> Result<(), DeviceError> {
        let Activation { memory, features, interrupt, .. } = activation;
        match &mut self.backend {
            Backend::Userspace(userspace) => {
                userspace.start(memory, pairs, has_merged_buffers(*features));
            }
            Backend::Vhost(vhost) => {
                vhost.start(memory, &pairs, *features, interrupt.as_ref())?;
                if let Some(control) = control {
                    vhost.control.watch(control.kick())?;
                }
            }
        }
        if self.link_is_up() { self.enable(0) } else { Ok(()) }
    }

    /// Does what the driver asks for on its control queue.
    fn serve_control(&mut self) -> Result<(), DeviceError> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        let served = running.serve(|active, count| self.set_active(active, count));
        let taps = &self.taps[..running.active()];
        self.running = Some(running);
        served?;
        // What came to a pair before it was in use.
        if let Backend::Userspace(userspace) = &mut self.backend {
            for pair in 0..taps.len() {
                userspace.receive(pair, taps)?;
                userspace.send(pair, taps)?;
            }
        }
        Ok(())
    }

    /// Uses the first `count` pairs instead of the first `active`. What the host refuses is undone.
    fn set_active(&mut self, active: &mut usize, count: usize) -> bool {
        while *active > count {
            *active -= 1;
            self.disable(*active);
        }
        let before = *active;
        while *active < count {
            if let Err(error) = self.enable(*active) {
                log::warn!("network interface {}: {}", self.id, resources::chain(&error));
                while *active > before {
                    *active -= 1;
                    self.disable(*active);
                }
                return false;
            }
            *active += 1;
        }
        true
    }

    /// Brings `pair` into use. The first one's queue of the TAP always is.
    fn enable(&mut self, pair: usize) -> Result<(), DeviceError> {
        let Some(tap) = self.taps.get(pair) else { return Ok(()) };
        if pair > 0 {
            tap.set_enabled(true).map_err(|source| DeviceError::Host {
                doing: format!("could not use queue {pair} of TAP {}", tap.name()),
                source,
            })?;
        }
        match &self.backend {
            Backend::Userspace(_) => Ok(()),
            Backend::Vhost(vhost) => vhost.attach(pair, tap).inspect_err(|_| self.rest(pair)),
        }
    }

    fn disable(&mut self, pair: usize) {
        if let Backend::Vhost(vhost) = &mut self.backend {
            vhost.detach(pair);
        }
        self.rest(pair);
    }

    /// Has the host put no packets into the TAP's queue of `pair`, unless it is the first.
    fn rest(&self, pair: usize) {
        if let Some(tap) = self.taps.get(pair).filter(|_| pair > 0)
            && let Err(error) = tap.set_enabled(false)
        {
            // It rests already, or the TAP is gone.
            log::debug!("TAP {}: queue {pair} is not put to rest: {error}", tap.name());
        }
    }
}

/// The status in the configuration space.
fn status(up: bool) -> [u8; 2] {
    let [low, high, ..] = if up { VIRTIO_NET_S_LINK_UP.to_le_bytes() } else { [0; 4] };
    [low, high]
}

impl VirtioDevice for Net {
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
        match &self.backend {
            Backend::Userspace(_) => Server::EventLoop,
            Backend::Vhost(_) => Server::Vhost,
        }
    }

    fn counters(&self) -> Arc<dyn Counters> {
        match &self.backend {
            Backend::Userspace(userspace) => Arc::clone(userspace.counters()) as _,
            // The kernel counts, at the TAP.
            Backend::Vhost(_) => Arc::new(()),
        }
    }

    fn event_sources(&self) -> Vec<EventSource> {
        // Edge triggered: a TAP stays readable while the guest lends no buffers, and all of them do while the
        // device is not started.
        let edge = |fd| EventSource { fd, events: EventSet::IN | EventSet::EDGE_TRIGGERED };
        let own: Vec<_> = match &self.backend {
            Backend::Userspace(userspace) => {
                self.taps.iter().map(Tap::as_raw_fd).chain(userspace.timers()).map(edge).collect()
            }
            Backend::Vhost(vhost) => vec![edge(vhost.error_fd()), edge(vhost.control.fd())],
        };
        own.into_iter().chain(self.link.as_ref().map(|link| edge(link.as_raw_fd()))).collect()
    }

    fn start(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        // What may have happened while nobody looked.
        self.check_link();
        let queues = std::mem::take(&mut activation.queues);
        let (pairs, control) = split(queues, activation.features, self.taps.len())?;
        if self.link_is_up() {
            self.taps[0].set_offloads(offloads(activation.features)).map_err(|source| DeviceError::Host {
                doing: format!("could not set the offloads of TAP {}", self.taps[0].name()),
                source,
            })?;
        }
        (1..self.taps.len()).for_each(|pair| self.rest(pair));
        let count = pairs.len();
        self.start_backend(&activation, pairs, control.as_ref())?;
        self.running = Some(Control::new(activation.memory, control, count));
        self.serve_control()
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(running) = &self.running else { return Ok(()) };
        if running.is_queue(index) {
            return self.serve_control();
        }
        let taps = &self.taps[..running.active()];
        match (&mut self.backend, index % 2) {
            (Backend::Userspace(userspace), 0) => userspace.receive(index / 2, taps),
            (Backend::Userspace(userspace), _) => userspace.send(index / 2, taps),
            (Backend::Vhost(_), _) => Ok(()),
        }
    }

    fn source_event(&mut self, fd: RawFd) -> Result<(), DeviceError> {
        if let Some(link) = self.link.as_ref().filter(|link| link.as_raw_fd() == fd) {
            link.drain();
            self.check_link();
            return Ok(());
        }
        let Some(running) = &self.running else { return Ok(()) };
        let taps = &self.taps[..running.active()];
        match &mut self.backend {
            Backend::Userspace(userspace) => match self.taps.iter().position(|tap| tap.as_raw_fd() == fd) {
                Some(pair) => userspace.receive(pair, taps),
                None => userspace.timer_event(fd, taps),
            },
            Backend::Vhost(vhost) if fd == vhost.control.fd() => self.serve_control(),
            Backend::Vhost(vhost) => vhost.error(),
        }
    }

    fn reset(&mut self) {
        match &mut self.backend {
            Backend::Userspace(userspace) => userspace.stop(),
            Backend::Vhost(vhost) => vhost.stop(),
        }
        self.running = None;
        (1..self.taps.len()).for_each(|pair| self.rest(pair));
    }
}

#[cfg(test)]
mod tests;
