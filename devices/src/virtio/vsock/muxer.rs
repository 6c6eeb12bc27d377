//! All connections of a device: who they are, which of them have something for the guest, and what the host's
//! sockets want.
//!
//! Every descriptor is registered with one epoll descriptor, edge triggered, once for its life: what it is ready for
//! is remembered until it says that it is not. So a connection that has to wait, for the guest's credit or for its
//! buffers, costs nothing, and the epoll descriptor itself is ready only if there is news.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::VsockCounters;
use super::connection::{Connection, Fate};
use super::handshake::{Handshake, Progress};
use super::packet::{HEADER_LEN, HOST_CID, Header, NO_MORE, Op, Ports, STREAM};
use super::socket::ListenerFile;
use crate::virtio::iovec::ChainBuffers;

/// The most connections, those that are being made included.
pub(super) const MAX_CONNECTIONS: usize = 1023;
/// The most host programs that have not yet said which port they want. More of them wait in the listener's backlog.
pub(super) const MAX_HANDSHAKES: usize = 256;
/// The most RSTs that wait for the guest's buffers. A guest that is owed so many has asked for it.
const MAX_RESETS: usize = 1024;
/// How many sockets are looked at in one event; more of them make another event.
const EVENTS: usize = 64;

/// The first and last port that a connection of the host's gets on its side, as with Firecracker.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// Marks of the epoll descriptor's entries; from [`FIRST_ID`] on, of connections and handshakes.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_ID: u64 = 2;

/// What every descriptor is registered for.
const EDGES: EventSet =
    EventSet::IN.union(EventSet::OUT).union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);

/// The connections of a device.
pub(super) struct Muxer {
    guest_cid: u64,
    listener: ListenerFile,
    epoll: Epoll,
    timer: TimerFd,
    timer_armed: bool,
    /// How long to wait for an answer of the guest's, and for a line of the host's where others wait.
    patience: Duration,
    /// Host programs may be waiting to be accepted.
    acceptable: bool,
    handshakes: HashMap<u64, (Handshake, Instant)>,
    connections: HashMap<u64, Connection>,
    /// The connections that the guest knows or is to know.
    by_ports: HashMap<Ports, u64>,
    /// Connections that may have a packet for the guest, each once.
    line: VecDeque<u64>,
    /// RSTs for the guest.
    resets: VecDeque<Header>,
    next_id: u64,
    next_port: u32,
    pub(super) counters: Arc<VsockCounters>,
}

impl Muxer {
    /// Leaves the listener's file behind at the end.
    pub(super) fn keep_socket(&mut self) {
        self.listener.keep();
    }

    /// Serves `listener` once started.
    pub(super) fn new(guest_cid: u64, listener: ListenerFile, patience: Duration) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            listener,
            epoll: Epoll::new()?,
            timer: TimerFd::new().map_err(io::Error::from)?,
            timer_armed: false,
            patience,
            acceptable: false,
            handshakes: HashMap::new(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: FIRST_ID,
            next_port: FIRST_PORT,
            counters: Arc::default(),
        })
    }

    /// Readable when [`Self::poll`] has something to do; never between [`Self::stop`] and [`Self::start`].
    pub(super) fn event_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Begins to accept host programs. Those that came earlier have waited in the backlog.
    pub(super) fn start(&mut self) -> io::Result<()> {
        self.register(self.listener.listener().as_raw_fd(), LISTENER)?;
        self.register(self.timer.as_raw_fd(), TIMER)
    }

    /// Drops all connections, and lets host programs wait in the backlog.
    pub(super) fn stop(&mut self) {
        for fd in [self.listener.listener().as_raw_fd(), self.timer.as_raw_fd()] {
            if let Err(error) = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
                // It was not registered: the start had failed.
                log::debug!("vsock: could not stop watching a descriptor: {error}");
            }
        }
        self.acceptable = false;
        self.timer_armed = false;
        self.handshakes.clear();
        self.counters.conns_removed.add(self.connections.len() as u64);
        self.connections.clear();
        self.by_ports.clear();
        self.line.clear();
        self.resets.clear();
    }

    /// Looks after some of the sockets that have news, and the deadlines.
    pub(super) fn poll(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in &events[..count] {
            let set = EventSet::from_bits_truncate(event.events());
            match event.data() {
                LISTENER => self.acceptable = true,
                TIMER => self.look_at_deadlines(),
                id if self.handshakes.contains_key(&id) => self.continue_handshake(id, set),
                id => {
                    if let Some(connection) = self.connections.get_mut(&id) {
                        let fate = connection.host_event(set);
                        self.settle(id, fate);
                    }
                }
            }
        }
        Ok(())
    }

    /// Accepts host programs as far as there is room for them.
    pub(super) fn accept(&mut self) {
        while self.acceptable && self.has_room() && self.handshakes.len() < MAX_HANDSHAKES {
            match self.listener.listener().accept() {
                Ok((socket, _)) => {
                    let id = self.new_id();
                    let registered =
                        socket.set_nonblocking(true).and_then(|()| self.register(socket.as_raw_fd(), id));
                    if let Err(error) = registered {
                        log::debug!("vsock: dropped a connection of the host's: {error}");
                        continue;
                    }
                    let deadline = self.deadline();
                    self.handshakes.insert(id, (Handshake::new(socket), deadline));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.acceptable = false,
                // No descriptors left, perhaps: the next event tries again.
                Err(error) => return log::debug!("vsock: could not accept a connection: {error}"),
            }
        }
    }

    /// Takes a packet of the guest's. One that makes no sense is answered with RST or ignored.
    pub(super) fn take_packet(&mut self, packet: &ChainBuffers<'_>) {
        let mut bytes = [0; HEADER_LEN as usize];
        if let Err(error) = packet.read_at(0, &mut bytes) {
            self.counters.tx_malformed_packets.inc();
            return log::debug!("vsock: ignored a packet without a header: {error}");
        }
        let header = Header::from_bytes(&bytes);
        if (header.src_cid, header.dst_cid) != (self.guest_cid, HOST_CID) {
            self.counters.tx_malformed_packets.inc();
            return log::debug!("vsock: ignored a packet to or from elsewhere: {header:?}");
        }
        let ports = header.ports_from_guest();
        let op = Op::from_number(header.op);
        if header.kind != STREAM {
            return self.refuse(&header);
        }
        let Some(&id) = self.by_ports.get(&ports) else {
            return if op == Some(Op::Request) { self.connect(&header) } else { self.refuse(&header) };
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        self.counters.tx_bytes_count.add(header.len.min(packet.readable_len()).into());
        let fate = match op {
            Some(op) => connection.take_packet(op, &header, packet),
            None => Fate::Over { reset: true },
        };
        self.settle(id, fate);
    }

    /// Whether there may be something for the guest: if so, [`Self::next_packet`] wants a buffer.
    pub(super) fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// The header of the next packet for the guest, whose data are already behind the place for the header in
    /// `packet`, which has room for more than the header. Connections take turns. `None` if there is nothing after
    /// all.
    pub(super) fn next_packet(&mut self, packet: &ChainBuffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(id) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.in_line = false;
            let header = connection.next_packet(self.guest_cid, packet);
            if header.is_some_and(|header| header.flags == NO_MORE) {
                self.set_deadline(id);
            }
            self.settle(id, Fate::Live);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// How many connections wait in line.
    #[cfg(test)]
    pub(super) fn line_len(&self) -> usize {
        self.line.len()
    }

    fn has_room(&self) -> bool {
        self.connections.len() + self.handshakes.len() < MAX_CONNECTIONS
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        // It will not end before the machine does.
        self.next_id += 1;
        id
    }

    fn register(&self, fd: RawFd, id: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EDGES, id))
    }

    fn continue_handshake(&mut self, id: u64, events: EventSet) {
        let Some((mut handshake, deadline)) = self.handshakes.remove(&id) else { return };
        match handshake.read() {
            _ if events.intersects(EventSet::HANG_UP | EventSet::ERROR) => {}
            Progress::Waiting => {
                self.handshakes.insert(id, (handshake, deadline));
            }
            Progress::Failed => log::debug!("vsock: a host program did not say CONNECT and a port"),
            Progress::Port(guest) => {
                let ports = Ports { host: self.free_port(guest), guest };
                self.insert(id, Connection::from_host(handshake.socket, ports));
                self.set_deadline(id);
            }
        }
    }

    /// A port for the host's side of a connection to the guest's port `guest`.
    fn free_port(&mut self, guest: u32) -> u32 {
        // There are many more ports than connections.
        loop {
            let host = self.next_port;
            self.next_port = if host == LAST_PORT { FIRST_PORT } else { host + 1 };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// The guest asks for a connection with `request`.
    fn connect(&mut self, request: &Header) {
        if !self.has_room() {
            self.counters.conns_refused.inc();
            log::debug!("vsock: refused a connection of the guest's: there are {MAX_CONNECTIONS}");
            return self.refuse(request);
        }
        let id = self.new_id();
        match self.open(request.dst_port, id) {
            Ok(socket) => self.insert(id, Connection::from_guest(socket, request)),
            Err(error) => {
                self.counters.conns_refused.inc();
                log::debug!("vsock: no connection to port {} of the host: {error}", request.dst_port);
                self.refuse(request);
            }
        }
    }

    fn open(&self, port: u32, id: u64) -> io::Result<UnixStream> {
        let socket = self.listener.connect_to_port(port)?;
        self.register(socket.as_raw_fd(), id)?;
        Ok(socket)
    }

    fn insert(&mut self, id: u64, connection: Connection) {
        self.counters.conns_added.inc();
        self.by_ports.insert(connection.ports(), id);
        self.connections.insert(id, connection);
        self.settle(id, Fate::Live);
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, header: &Header) {
        // A RST is never answered: it could go on for ever.
        if Op::from_number(header.op) != Some(Op::Reset) {
            let reset = Header::to_guest(self.guest_cid, header.ports_from_guest(), Op::Reset);
            self.push_reset(Header { kind: header.kind, ..reset });
        }
    }

    fn push_reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        }
    }

    /// Does what follows from `fate` for connection `id`, to which something happened.
    fn settle(&mut self, id: u64, fate: Fate) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match fate {
            Fate::Live => {
                if !connection.in_line && connection.has_packet() {
                    connection.in_line = true;
                    self.line.push_back(id);
                }
            }
            Fate::Over { reset } => {
                let ports = connection.ports();
                if std::mem::take(&mut connection.in_line) {
                    self.line.retain(|&other| other != id);
                }
                if !connection.linger() {
                    self.connections.remove(&id);
                    self.counters.conns_removed.inc();
                }
                // The ports of one that lingers may belong to another by now.
                if self.by_ports.get(&ports) == Some(&id) {
                    self.by_ports.remove(&ports);
                }
                if reset {
                    self.push_reset(Header::to_guest(self.guest_cid, ports, Op::Reset));
                }
            }
        }
    }

    /// Gives connection `id` time from now on.
    fn set_deadline(&mut self, id: u64) {
        let deadline = self.deadline();
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.deadline = Some(deadline);
        }
    }

    /// A deadline for something that begins now. All are equally long, so none is before one set earlier, and a
    /// timer that is armed stays as it is.
    fn deadline(&mut self) -> Instant {
        if !self.timer_armed {
            self.arm(self.patience);
        }
        Instant::now() + self.patience
    }

    fn arm(&mut self, after: Duration) {
        // Zero would disarm it.
        match self.timer.reset(after.max(Duration::from_millis(1)), None) {
            Ok(()) => self.timer_armed = true,
            Err(error) => log::debug!("vsock: could not set a timer: {error}"),
        }
    }

    /// The timer rang: looks at everything that has a deadline.
    fn look_at_deadlines(&mut self) {
        self.timer_armed = false;
        let now = Instant::now();
        // A program that is slow to say what it wants is in nobody's way but where there are many.
        let crowded = self.handshakes.len() > MAX_HANDSHAKES / 2;
        self.handshakes.retain(|_, (_, deadline)| {
            let in_time = *deadline > now;
            if !in_time {
                *deadline = now + self.patience;
            }
            in_time || !crowded
        });
        let overdue = |(&id, connection): (&u64, &Connection)| {
            connection.deadline.is_some_and(|deadline| deadline <= now).then_some(id)
        };
        let overdue: Vec<u64> = self.connections.iter().filter_map(overdue).collect();
        for id in overdue {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let fate = connection.overdue();
            match fate {
                Fate::Live => self.set_deadline(id),
                Fate::Over { .. } => self.counters.conns_killed.inc(),
            }
            self.settle(id, fate);
        }
        let ahead = self.connections.values().filter_map(|connection| connection.deadline);
        if let Some(next) = ahead.chain(self.handshakes.values().map(|(_, deadline)| *deadline)).min() {
            self.arm(next.saturating_duration_since(now));
        }
    }
}
