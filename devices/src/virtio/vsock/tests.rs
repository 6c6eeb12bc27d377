use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};
use vmm_sys_util::eventfd::EventFd;

use super::connection::BUFFER;
use super::muxer::{MAX_CONNECTIONS, MAX_HANDSHAKES};
use super::packet::{HOST_CID, Header, NO_MORE, NO_RECEIVE, NO_SEND, Op, Ports, STREAM};
use super::*;
use crate::virtio::driver_ring::DriverRing;
use crate::virtio::driver_ring::Lent::{Read as LentRead, Write as LentWrite};
use crate::virtio::testing::{RecordedInterrupt, Ring};

const CID: u64 = 3;
const RX_RING: u64 = 0x1000;
const TX_RING: u64 = 0x2000;
/// Where the guest writes what it sends.
const TX_DATA: u64 = 0x1_0000;
/// Where the buffers are that it lends, one for each descriptor.
const RX_DATA: u64 = 0x10_0000;
const RX_LEN: u32 = 4096;
/// The room that the guest says it has.
const ROOM: u32 = 64 << 10;
/// Longer than a test.
const FOR_EVER: Duration = Duration::from_secs(600);

/// A packet that arrived in the guest.
#[derive(Debug)]
struct Packet {
    header: Header,
    data: Vec<u8>,
}

impl Packet {
    fn op(&self) -> Op {
        Op::from_number(self.header.op).unwrap()
    }

    /// The connection's ends.
    fn ports(&self) -> Ports {
        Ports { host: self.header.src_port, guest: self.header.dst_port }
    }
}

/// A device in a directory of its own, with a guest whose driver is in the test's hands.
struct Bench {
    dir: TempDir,
    memory: GuestMemoryMmap,
    rx: DriverRing,
    tx: DriverRing,
    rx_kick: Arc<EventFd>,
    device: Vsock,
    /// Buffers by the head of their chain.
    lent: HashMap<u16, u64>,
    free: Vec<u64>,
    /// What arrived and was not looked at.
    arrived: VecDeque<Packet>,
    /// What the guest took out of its buffers, by connection.
    taken: HashMap<Ports, u32>,
    /// The guest's program takes what arrives, and the driver says so.
    reads: bool,
}

impl Bench {
    fn new() -> Self {
        Self::with_patience(FOR_EVER)
    }

    fn with_patience(patience: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = VsockConfig { guest_cid: CID, uds_path: dir.path().join("v.sock") };
        let device = Vsock::with_patience(config, patience).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
        let (rx, tx) = (DriverRing::new(&memory, RX_RING), DriverRing::new(&memory, TX_RING));
        let mut bench = Self {
            dir,
            memory,
            rx,
            tx,
            rx_kick: Arc::new(EventFd::new(0).unwrap()),
            device,
            lent: HashMap::new(),
            free: Vec::new(),
            arrived: VecDeque::new(),
            taken: HashMap::new(),
            reads: true,
        };
        bench.start();
        bench.lend(8);
        bench
    }

    /// Starts the device with empty rings.
    fn start(&mut self) {
        self.rx = DriverRing::new(&self.memory, RX_RING);
        self.tx = DriverRing::new(&self.memory, TX_RING);
        self.lent.clear();
        self.free = (0..32).map(|index| RX_DATA + index * 0x2000).collect();
        let interrupt = Arc::new(RecordedInterrupt::default());
        let (rx, rx_kick) = self.rx.virtqueue(0, interrupt.clone());
        let (tx, _) = self.tx.virtqueue(1, interrupt.clone());
        let activation = Activation {
            memory: GuestMemoryAtomic::new(self.memory.clone()),
            queues: vec![Some(rx), Some(tx), None],
            features: self.device.features(),
            interrupt,
        };
        self.rx_kick = rx_kick;
        self.device.start(activation).unwrap();
        self.device.queue_event(RX).unwrap();
        self.device.queue_event(TX).unwrap();
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("v.sock")
    }

    /// Lends `count` buffers more.
    fn lend(&mut self, count: usize) {
        for at in self.free.split_off(self.free.len() - count) {
            // Old Linux drivers have the header in a buffer of its own.
            let head = match at % 0x4000 {
                0 => self.rx.lend(&[LentWrite(at, HEADER_LEN + RX_LEN)]),
                _ => self.rx.lend(&[LentWrite(at, HEADER_LEN), LentWrite(at + 64, RX_LEN)]),
            };
            self.lent.insert(head, at);
        }
        self.device.queue_event(RX).unwrap();
    }

    /// Whether the device's descriptor is ready within `timeout` ms.
    fn is_ready(&self, timeout: i32) -> bool {
        let fd = self.device.event_sources()[0].fd;
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which outlives the call.
        unsafe { libc::poll(&raw mut poll, 1, timeout) > 0 }
    }

    /// Takes what the device put into buffers, and lends them again.
    fn collect(&mut self) -> bool {
        let mut any = false;
        while let Some((head, len)) = self.rx.used() {
            any = true;
            let at = self.lent.remove(&head).unwrap();
            let mut header = [0; 44];
            self.memory.read_slice(&mut header, GuestAddress(at)).unwrap();
            let header = Header::from_bytes(&header);
            assert_eq!(len, HEADER_LEN + header.len);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            let mut data = vec![0; header.len.try_into().unwrap()];
            let data_at = if at.is_multiple_of(0x4000) { at + 44 } else { at + 64 };
            self.memory.read_slice(&mut data, GuestAddress(data_at)).unwrap();
            let packet = Packet { header, data };
            self.free.push(at);
            self.lend(1);
            if self.reads && header.len > 0 {
                *self.taken.entry(packet.ports()).or_default() += header.len;
                self.send(packet.ports(), Op::CreditUpdate);
            }
            self.arrived.push_back(packet);
        }
        any
    }

    /// Brings the device its events until there are none.
    fn run(&mut self) {
        let fd = self.device.event_sources()[0].fd;
        for _ in 0..100_000 {
            let mut busy = self.collect();
            if self.rx_kick.read().is_ok() {
                busy = true;
                self.device.queue_event(RX).unwrap();
            }
            if self.is_ready(0) {
                busy = true;
                self.device.source_event(fd).unwrap();
            }
            if !busy {
                return;
            }
        }
        panic!("the device is never done");
    }

    /// Waits for the timer until the device has a packet for the guest.
    fn wait(&mut self) {
        self.run();
        while self.arrived.is_empty() {
            assert!(self.is_ready(10_000));
            self.run();
        }
    }

    /// The next packet, of kind `op`.
    fn expect(&mut self, op: Op) -> Packet {
        self.run();
        let packet = self.arrived.pop_front().unwrap_or_else(|| panic!("no packet where {op:?} should be"));
        assert_eq!(packet.op(), op, "{packet:?}");
        packet
    }

    fn expect_nothing(&mut self) {
        self.run();
        assert!(self.arrived.is_empty(), "{:?}", self.arrived);
    }

    fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: 0,
            kind: STREAM,
            op: op.number(),
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: self.taken.get(&ports).copied().unwrap_or(0),
        }
    }

    fn send(&mut self, ports: Ports, op: Op) {
        self.send_raw(self.header(ports, op), &[]);
    }

    fn shut(&mut self, ports: Ports, flags: u32) {
        self.send_raw(Header { flags, ..self.header(ports, Op::Shutdown) }, &[]);
    }

    fn send_data(&mut self, ports: Ports, data: &[u8]) {
        let len = data.len().try_into().unwrap();
        self.send_raw(Header { len, ..self.header(ports, Op::Data) }, data);
    }

    /// Sends a packet and sees its buffers come back.
    fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.memory.write_slice(&header.to_bytes(), GuestAddress(TX_DATA)).unwrap();
        self.memory.write_slice(data, GuestAddress(TX_DATA + 44)).unwrap();
        let len = u32::try_from(data.len()).unwrap();
        // Header and data in two buffers, cut somewhere else.
        let first = 44 + len / 3;
        let rest = 44 + len - first;
        self.tx.lend(&[LentRead(TX_DATA, first), LentRead(TX_DATA + u64::from(first), rest)]);
        self.device.queue_event(TX).unwrap();
        assert_eq!(self.tx.used().unwrap().1, 0);
    }

    /// A host program that wants `line`.
    fn dial(&mut self, line: &str) -> UnixStream {
        let mut socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.write_all(line.as_bytes()).unwrap();
        self.run();
        socket
    }

    /// An open connection that the host asked for, to the guest's port `port`.
    fn open_from_host(&mut self, port: u32) -> (UnixStream, Ports) {
        let socket = self.dial(&format!("CONNECT {port}\n"));
        let ports = self.expect(Op::Request).ports();
        assert_eq!(ports.guest, port);
        self.send(ports, Op::Response);
        assert_eq!(read(&socket), format!("OK {}\n", ports.host).into_bytes());
        (socket, ports)
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// An open connection that the guest asked for, from its port `guest`.
    fn open_from_guest(&mut self, listener: &UnixListener, ports: Ports) -> UnixStream {
        self.send(ports, Op::Request);
        let response = self.expect(Op::Response);
        assert_eq!(response.ports(), ports);
        assert_eq!((response.header.buf_alloc, response.header.fwd_cnt), (BUFFER, 0));
        let (socket, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }
}

/// What can be read at once.
fn read(mut socket: &UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let len = socket.read(&mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

/// Whether nothing can be read now, and there is no end.
fn is_silent(mut socket: &UnixStream) -> bool {
    socket.read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Whether the other side ended.
fn is_closed(mut socket: &UnixStream) -> bool {
    match socket.read(&mut [0]) {
        Ok(len) => len == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

/// Bytes that are out of order if any is missing or moved.
fn pattern(seed: u32, from: usize, len: usize) -> Vec<u8> {
    (from..from + len)
        .map(|index| {
            let index = u32::try_from(index).unwrap();
            index.wrapping_add(seed).wrapping_mul(2_654_435_761).to_le_bytes()[3]
        })
        .collect()
}

#[test]
fn features_and_configuration_space() {
    let dir = tempfile::tempdir().unwrap();
    for guest_cid in [3, 0xffff_ffff] {
        let device = Vsock::new(VsockConfig { guest_cid, uds_path: dir.path().join("s") }).unwrap();
        assert_eq!(device.device_type(), 19);
        assert_eq!(device.queue_max_sizes(), [256, 256, 256]);
        assert_eq!(device.features(), 1 << 32 | 1 << 29 | 1 << 28);
        assert_eq!(device.config(), guest_cid.to_le_bytes());
    }
    for guest_cid in [0, 1, 2, 1 << 32, u64::MAX] {
        let config = VsockConfig { guest_cid, uds_path: dir.path().join("s") };
        assert!(matches!(Vsock::new(config), Err(VsockError::GuestCid(cid)) if cid == guest_cid));
    }
}

#[test]
fn the_socket_is_there_at_once_and_goes_with_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let config = VsockConfig { guest_cid: 3, uds_path: path.clone() };
    let device = Vsock::new(config.clone()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).unwrap();
    let error = Vsock::new(config.clone()).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "vsock: could not listen on {}, which exists: remove it if no other VM uses it, or choose another \
             uds_path",
            path.display()
        )
    );
    // The one that failed has left it alone.
    assert!(path.exists());
    drop(device);
    assert!(!path.exists());
    // A file of somebody else's stays.
    let device = Vsock::new(config).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "not ours").unwrap();
    drop(device);
    assert!(path.exists());
    // So does one that is to.
    std::fs::remove_file(&path).unwrap();
    let mut device = Vsock::new(VsockConfig { guest_cid: 3, uds_path: path.clone() }).unwrap();
    device.keep_socket();
    drop(device);
    assert!(path.exists());
}

#[test]
fn paths_that_cannot_be_are_refused() {
    for path in ["/no/such/directory/s".to_owned(), format!("/tmp/{}", "x".repeat(200))] {
        let error =
            Vsock::new(VsockConfig { guest_cid: 3, uds_path: Path::new(&path).into() }).err().unwrap();
        assert!(matches!(&error, VsockError::Listen { path: at, .. } if at == Path::new(&path)), "{error}");
        assert!(error.to_string().contains(&path));
    }
}

#[test]
fn a_host_program_connects() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.open_from_host(1024);
    assert_eq!(ports.host, 1 << 30);
    socket.write_all(b"hello").unwrap();
    assert_eq!(bench.expect(Op::Data).data, b"hello");
    bench.send_data(ports, b"hello yourself");
    assert_eq!(read(&socket), b"hello yourself");
    // Another one gets another port.
    let (_other, ports) = bench.open_from_host(1024);
    assert_eq!(ports.host, (1 << 30) + 1);
    bench.expect_nothing();
}

#[test]
fn the_handshake_may_come_in_lower_case_and_in_pieces() {
    let mut bench = Bench::new();
    let mut socket = bench.dial("conn");
    bench.expect_nothing();
    socket.write_all(b"ect 102").unwrap();
    bench.expect_nothing();
    // Bytes behind the line are the guest's, once it has answered.
    socket.write_all(b"4\nearly").unwrap();
    let ports = bench.expect(Op::Request).ports();
    assert_eq!(ports.guest, 1024);
    bench.expect_nothing();
    assert!(is_silent(&socket));
    bench.send(ports, Op::Response);
    assert_eq!(bench.expect(Op::Data).data, b"early");
    assert_eq!(read(&socket), format!("OK {}\n", ports.host).into_bytes());
}

#[test]
fn other_first_lines_close() {
    let mut bench = Bench::new();
    for line in ["GET / HTTP/1.1\r\n", "CONNECT\n", "CONNECT 1 2\n", "\n", &"x".repeat(32)] {
        let socket = bench.dial(line);
        assert!(is_closed(&socket), "{line}");
    }
    let socket = bench.dial("CONNECT 1");
    socket.shutdown(Shutdown::Write).unwrap();
    bench.run();
    assert!(is_closed(&socket));
    // One that hangs up before the guest could be asked.
    drop(bench.dial("CONN"));
    bench.expect_nothing();
}

#[test]
fn a_port_without_a_program_closes() {
    let mut bench = Bench::new();
    let socket = bench.dial("CONNECT 1024\n");
    let ports = bench.expect(Op::Request).ports();
    bench.send(ports, Op::Reset);
    assert!(is_closed(&socket));
    bench.expect_nothing();
}

#[test]
fn a_host_program_that_gives_up_is_reset_in_the_guest() {
    let mut bench = Bench::new();
    let socket = bench.dial("CONNECT 1024\n");
    let ports = bench.expect(Op::Request).ports();
    drop(socket);
    assert_eq!(bench.expect(Op::Reset).ports(), ports);
    // The answer comes too late.
    bench.send(ports, Op::Response);
    assert_eq!(bench.expect(Op::Reset).ports(), ports);
    bench.expect_nothing();
}

#[test]
fn a_host_program_that_sends_no_more_still_receives() {
    let mut bench = Bench::new();
    let socket = bench.dial("CONNECT 1024\n");
    socket.shutdown(Shutdown::Write).unwrap();
    let ports = bench.expect(Op::Request).ports();
    bench.send(ports, Op::Response);
    assert_eq!(bench.expect(Op::Shutdown).header.flags, NO_SEND);
    assert_eq!(read(&socket), format!("OK {}\n", ports.host).into_bytes());
    bench.send_data(ports, b"answer");
    assert_eq!(read(&socket), b"answer");
}

#[test]
fn a_guest_that_does_not_answer_is_given_up() {
    let mut bench = Bench::with_patience(Duration::from_millis(20));
    let socket = bench.dial("CONNECT 1024\n");
    let ports = bench.expect(Op::Request).ports();
    bench.wait();
    assert_eq!(bench.expect(Op::Reset).ports(), ports);
    assert!(is_closed(&socket));
}

#[test]
fn the_guest_connects() {
    let mut bench = Bench::new();
    let listener = bench.listen(52);
    let ports = Ports { host: 52, guest: 7000 };
    let mut socket = bench.open_from_guest(&listener, ports);
    bench.send_data(ports, b"from the guest");
    assert_eq!(read(&socket), b"from the guest");
    socket.write_all(b"from the host").unwrap();
    assert_eq!(bench.expect(Op::Data).data, b"from the host");
    // The guest closes, and hears that the host has.
    bench.shut(ports, NO_MORE);
    assert_eq!(bench.expect(Op::Reset).ports(), ports);
    assert!(is_closed(&socket));
    bench.expect_nothing();
}

#[test]
fn a_guest_is_refused_where_nobody_listens() {
    let mut bench = Bench::new();
    for port in [52, u32::MAX] {
        let ports = Ports { host: port, guest: 7000 };
        bench.send(ports, Op::Request);
        let reset = bench.expect(Op::Reset);
        assert_eq!((reset.ports(), reset.header.kind), (ports, STREAM));
    }
    // Somebody was there.
    drop(bench.listen(52));
    bench.send(Ports { host: 52, guest: 7000 }, Op::Request);
    bench.expect(Op::Reset);
    bench.expect_nothing();
}

#[test]
fn a_listener_whose_backlog_is_full_refuses() {
    let mut bench = Bench::new();
    let listener = bench.listen(52);
    // SAFETY: the descriptor is open; a call without pointers.
    assert_eq!(unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) }, 0);
    bench.send(Ports { host: 52, guest: 1 }, Op::Request);
    bench.expect(Op::Response);
    bench.send(Ports { host: 52, guest: 2 }, Op::Request);
    bench.expect(Op::Reset);
}

/// More than the credit of either side, both ways at once, with a host that reads in pieces of odd sizes.
#[test]
fn data_arrive_whole_and_in_order_both_ways() {
    const TOTAL: usize = 1_000_000;
    let mut bench = Bench::new();
    let (socket, ports) = bench.open_from_host(5000);
    let to_guest = pattern(1, 0, TOTAL);
    let to_host = pattern(2, 0, TOTAL);
    let (mut written, mut sent, mut forwarded) = (0, 0, 0u32);
    let (mut at_guest, mut at_host) = (Vec::new(), Vec::<u8>::new());
    while at_guest.len() < TOTAL || at_host.len() < TOTAL {
        if written < TOTAL {
            written += (&socket).write(&to_guest[written..]).unwrap_or(0);
        }
        // The guest keeps to the credit that it was given.
        let credit = usize::try_from(BUFFER - (u32::try_from(sent).unwrap() - forwarded)).unwrap();
        let len = credit.min(TOTAL - sent).min(60_001);
        if len > 0 {
            bench.send_data(ports, &to_host[sent..sent + len]);
            sent += len;
        }
        bench.run();
        while let Some(packet) = bench.arrived.pop_front() {
            assert!(matches!(packet.op(), Op::Data | Op::CreditUpdate | Op::CreditRequest), "{packet:?}");
            assert_eq!(packet.header.buf_alloc, BUFFER);
            forwarded = packet.header.fwd_cnt;
            at_guest.extend(packet.data);
        }
        let mut piece = [0; 7919];
        if let Ok(len) = (&socket).read(&mut piece) {
            at_host.extend(&piece[..len]);
        }
    }
    assert!(at_guest == to_guest, "what the host sent is not what arrived");
    assert!(at_host == to_host, "what the guest sent is not what arrived");
}

#[test]
fn the_guests_credit_is_kept_to() {
    let mut bench = Bench::new();
    bench.reads = false;
    let (mut socket, ports) = bench.open_from_host(5000);
    let data = pattern(3, 0, 100_000);
    socket.write_all(&data).unwrap();
    bench.run();
    let mut arrived = Vec::new();
    while let Some(packet) = bench.arrived.pop_front() {
        match packet.op() {
            Op::Data => arrived.extend(packet.data),
            op => {
                assert_eq!(op, Op::CreditRequest);
                // Once, and behind the last byte.
                assert!(bench.arrived.is_empty());
            }
        }
    }
    let room = usize::try_from(ROOM).unwrap();
    assert_eq!(arrived, data[..room]);
    // An answer that gives none is not asked about again.
    bench.send(ports, Op::CreditUpdate);
    bench.expect_nothing();
    bench.taken.insert(ports, 10);
    bench.send(ports, Op::CreditUpdate);
    assert_eq!(bench.expect(Op::Data).data, data[room..room + 10]);
    bench.expect(Op::CreditRequest);
    // Numbers that cannot be give no credit.
    for fwd_cnt in [ROOM + 11, u32::MAX, 1 << 31] {
        bench.send_raw(Header { fwd_cnt, ..bench.header(ports, Op::CreditUpdate) }, &[]);
        bench.expect_nothing();
    }
}

#[test]
fn a_stalled_host_program_stops_its_connection_and_no_other() {
    let mut bench = Bench::new();
    let (stalled, stalled_ports) = bench.open_from_host(1);
    let (live, live_ports) = bench.open_from_host(2);
    // Until the device has as many bytes as it said it would.
    let mut sent = 0;
    let mut forwarded;
    loop {
        bench.send(stalled_ports, Op::CreditRequest);
        bench.run();
        forwarded = bench.arrived.drain(..).next_back().unwrap().header.fwd_cnt;
        let credit = usize::try_from(BUFFER).unwrap() - (sent - usize::try_from(forwarded).unwrap());
        if credit == 0 {
            break;
        }
        let len = credit.min(50_000);
        bench.send_data(stalled_ports, &pattern(4, sent, len));
        sent += len;
    }
    // The other connection does not notice, in either direction.
    for _ in 0..50 {
        bench.send_data(live_ports, b"ping");
        assert_eq!(read(&live), b"ping");
        (&live).write_all(b"pong").unwrap();
        assert_eq!(bench.expect(Op::Data).data, b"pong");
    }
    // The stalled one's own other direction neither.
    (&stalled).write_all(b"still here").unwrap();
    let packet = bench.expect(Op::Data);
    assert_eq!((packet.data.as_slice(), packet.header.fwd_cnt), (&b"still here"[..], forwarded));
    // It reads on: everything is there, and the guest hears of the room without asking.
    let mut received = Vec::new();
    while received.len() < sent {
        received.extend(read(&stalled));
        bench.run();
    }
    assert!(received == pattern(4, 0, sent));
    let last = bench.arrived.drain(..).next_back().unwrap();
    assert_eq!(last.op(), Op::CreditUpdate);
    assert!(sent - usize::try_from(last.header.fwd_cnt).unwrap() < usize::try_from(BUFFER / 4).unwrap());
}

#[test]
fn more_than_the_credit_is_an_end() {
    let mut bench = Bench::new();
    let (socket, ports) = bench.open_from_host(1);
    let piece = vec![1; 60_000];
    // No host's socket takes this much.
    for sent in 0.. {
        assert!(sent < 100, "never reset");
        bench.send_data(ports, &piece);
        bench.run();
        if let Some(packet) = bench.arrived.pop_back()
            && packet.op() == Op::Reset
        {
            break;
        }
    }
    // What was kept still arrives.
    let mut received = 0;
    while !is_closed(&socket) {
        received += 1 + read(&socket).len();
        bench.run();
    }
    assert_eq!(received % piece.len(), 0);
    assert!(received > usize::try_from(BUFFER).unwrap());
}

#[test]
fn what_the_guest_sent_arrives_though_it_closed() {
    for end in [Op::Shutdown, Op::Reset] {
        let mut bench = Bench::new();
        let (socket, ports) = bench.open_from_host(1);
        let mut sent = 0;
        loop {
            bench.send(ports, Op::CreditRequest);
            bench.run();
            let header = bench.arrived.drain(..).next_back().unwrap().header;
            if sent > usize::try_from(header.fwd_cnt).unwrap() {
                break;
            }
            bench.send_data(ports, &pattern(5, sent, 50_000));
            sent += 50_000;
        }
        match end {
            Op::Shutdown => bench.shut(ports, NO_MORE),
            _ => bench.send(ports, Op::Reset),
        }
        if end == Op::Shutdown {
            bench.expect(Op::Reset);
        }
        // The ports are free for another connection.
        bench.send(ports, Op::Request);
        bench.expect(Op::Reset);
        let mut received = Vec::new();
        loop {
            let bytes = read(&socket);
            bench.run();
            if bytes.is_empty() {
                break;
            }
            received.extend(bytes);
        }
        assert!(received == pattern(5, 0, sent), "{} of {sent} bytes", received.len());
        bench.expect_nothing();
    }
}

#[test]
fn the_guest_ends_one_direction() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.open_from_host(1);
    bench.send_data(ports, b"last words");
    bench.shut(ports, NO_SEND);
    assert_eq!(read(&socket), b"last words");
    assert_eq!(read(&socket), b"");
    socket.write_all(b"still listening?").unwrap();
    assert_eq!(bench.expect(Op::Data).data, b"still listening?");
    // What it sends nevertheless is an error of its own.
    bench.send_data(ports, b"more");
    bench.expect(Op::Reset);

    let (mut socket, ports) = bench.open_from_host(1);
    bench.shut(ports, NO_RECEIVE);
    assert_eq!(socket.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    bench.send_data(ports, b"one way");
    assert_eq!(read(&socket), b"one way");
    // Both, one after the other.
    bench.shut(ports, NO_SEND);
    bench.expect(Op::Reset);
    assert!(is_closed(&socket));
    bench.expect_nothing();
}

#[test]
fn the_host_ends_one_direction_and_then_the_other() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.open_from_host(1);
    socket.write_all(b"last words").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.expect(Op::Data).data, b"last words");
    assert_eq!(bench.expect(Op::Shutdown).header.flags, NO_SEND);
    bench.send_data(ports, b"answer");
    assert_eq!(read(&socket), b"answer");
    drop(socket);
    assert_eq!(bench.expect(Op::Shutdown).header.flags, NO_MORE);
    // The guest sent this before it knew: taken and forgotten.
    bench.send_data(ports, b"too late");
    bench.expect_nothing();
    bench.send(ports, Op::Reset);
    bench.expect_nothing();
}

#[test]
fn a_host_that_closes_has_its_last_bytes_delivered() {
    let mut bench = Bench::new();
    let (mut socket, _) = bench.open_from_host(1);
    let data = pattern(6, 0, 150_000);
    socket.write_all(&data).unwrap();
    drop(socket);
    bench.run();
    let mut received = Vec::new();
    let mut flags = 0;
    for packet in bench.arrived.drain(..) {
        match packet.op() {
            Op::Data => {
                assert_eq!(flags & NO_SEND, 0, "bytes behind the end");
                received.extend(packet.data);
            }
            Op::Shutdown => flags = packet.header.flags,
            op => assert_eq!(op, Op::CreditRequest),
        }
    }
    assert!(received == data);
    assert_eq!(flags, NO_MORE);
}

#[test]
fn a_guest_that_does_not_close_is_reset_once_it_has_read() {
    let mut bench = Bench::with_patience(Duration::from_millis(500));
    let (mut socket, ports) = bench.open_from_host(1);
    bench.reads = false;
    socket.write_all(b"unread").unwrap();
    drop(socket);
    assert_eq!(bench.expect(Op::Shutdown).header.flags, NO_RECEIVE);
    bench.expect(Op::Data);
    assert_eq!(bench.expect(Op::Shutdown).header.flags, NO_MORE);
    // The guest's program has not read: it gets more time, and is asked about it.
    bench.wait();
    bench.expect(Op::CreditRequest);
    bench.taken.insert(ports, 6);
    bench.send(ports, Op::CreditUpdate);
    bench.wait();
    assert_eq!(bench.expect(Op::Reset).ports(), ports);
}

#[test]
fn many_connections_and_no_more() {
    let mut bench = Bench::new();
    let listener = bench.listen(9);
    let mut guests = Vec::new();
    let mut hosts = Vec::new();
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
        if port % 2 == 0 {
            let ports = Ports { host: 9, guest: port };
            guests.push((bench.open_from_guest(&listener, ports), ports));
        } else {
            hosts.push(bench.open_from_host(port));
        }
    }
    // The guest is refused; the host waits.
    let ports = Ports { host: 9, guest: 5000 };
    bench.send(ports, Op::Request);
    bench.expect(Op::Reset);
    let waiting = bench.dial("CONNECT 5001\n");
    bench.expect_nothing();
    assert!(is_silent(&waiting));

    // All at once, and everyone gets its own.
    let all: Vec<_> = guests.iter().chain(&hosts).collect();
    for (socket, ports) in &all {
        let mut socket = socket;
        socket.write_all(&ports.guest.to_le_bytes()).unwrap();
    }
    bench.run();
    assert_eq!(bench.arrived.len(), MAX_CONNECTIONS);
    for packet in std::mem::take(&mut bench.arrived) {
        assert_eq!(packet.data, packet.ports().guest.to_le_bytes());
        bench.send_data(packet.ports(), &packet.data);
    }
    for (socket, ports) in all {
        assert_eq!(read(socket), ports.guest.to_le_bytes());
    }

    let (_, ports) = guests.pop().unwrap();
    bench.run();
    bench.arrived.clear();
    bench.send(ports, Op::Reset);
    assert_eq!(bench.expect(Op::Request).ports().guest, 5001);
}

#[test]
fn half_made_connections_are_bounded() {
    let mut bench = Bench::with_patience(Duration::from_millis(500));
    let idle: Vec<_> = (0..MAX_HANDSHAKES).map(|_| UnixStream::connect(bench.socket()).unwrap()).collect();
    let socket = UnixStream::connect(bench.socket()).unwrap();
    (&socket).write_all(b"CONNECT 1\n").unwrap();
    bench.run();
    // It waits behind those that say nothing, until they have had their time.
    bench.wait();
    assert_eq!(bench.expect(Op::Request).ports().guest, 1);
    let closed = idle.iter().filter(|socket| {
        socket.set_nonblocking(true).unwrap();
        is_closed(socket)
    });
    assert!(closed.count() > 0);
}

#[test]
fn a_program_that_is_slow_to_speak_is_let_be_where_there_are_few() {
    let mut bench = Bench::with_patience(Duration::from_millis(20));
    let mut socket = bench.dial("CONN");
    for _ in 0..3 {
        assert!(bench.is_ready(10_000));
        bench.run();
    }
    socket.write_all(b"ECT 1\n").unwrap();
    bench.expect(Op::Request);
}

#[test]
fn packets_wait_for_buffers_and_take_turns() {
    let mut bench = Bench::new();
    let (mut first, first_ports) = bench.open_from_host(1);
    let (mut second, second_ports) = bench.open_from_host(2);
    // No more buffers than are lent now: use them up.
    let before = Ring::at(&bench.memory, RX_RING).used_index();
    first.write_all(&vec![1; 40_000]).unwrap();
    second.write_all(&vec![2; 40_000]).unwrap();
    let fd = bench.device.event_sources()[0].fd;
    while bench.is_ready(0) {
        bench.device.source_event(fd).unwrap();
    }
    // Not ready, though there is more: it waits for the driver's kick.
    let after = Ring::at(&bench.memory, RX_RING).used_index();
    assert_eq!(usize::from(after - before), bench.lent.len());
    bench.run();
    let order: Vec<Ports> = bench.arrived.iter().map(Packet::ports).collect();
    let turns = order.chunks(2).filter(|turn| turn.contains(&first_ports) && turn.contains(&second_ports));
    assert_eq!(turns.count(), order.len() / 2);
    let lens = |ports| {
        bench.arrived.iter().filter(|packet| packet.ports() == ports).map(|packet| packet.data.len()).sum()
    };
    let (len_first, len_second): (usize, usize) = (lens(first_ports), lens(second_ports));
    assert_eq!((len_first, len_second), (40_000, 40_000));
}

#[test]
fn one_event_does_one_ring_of_work() {
    let mut bench = Bench::new();
    bench.device.reset();
    bench.start();
    // A ring full of buffers of one descriptor each.
    bench.free.retain(|at| at.is_multiple_of(0x4000));
    bench.lend(16);
    let mut socket = bench.dial("CONNECT 1\n");
    let ports = bench.expect(Op::Request).ports();
    bench.send(ports, Op::Response);
    bench.rx_kick.read().unwrap_err();
    socket.write_all(&vec![1; usize::try_from(ROOM).unwrap()]).unwrap();
    let fd = bench.device.event_sources()[0].fd;
    bench.device.source_event(fd).unwrap();
    // There is more than fits; the kick of ours brings us back to it.
    assert_eq!(bench.rx_kick.read().unwrap(), 1);
    assert!(!bench.is_ready(0));
    assert_eq!((0..).map_while(|_| bench.rx.used()).count(), 16);
}

#[test]
fn hostile_packets_do_no_harm() {
    let mut bench = Bench::new();
    let (socket, ports) = bench.open_from_host(1);
    let stranger = Ports { host: 77, guest: 78 };
    // Of no connection: refused, but for RST.
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        bench.send(stranger, op);
        assert_eq!(bench.expect(Op::Reset).ports(), stranger);
    }
    bench.send(stranger, Op::Reset);
    bench.expect_nothing();
    // Unknown types and operations.
    bench.send_raw(Header { kind: 2, ..bench.header(ports, Op::Data) }, b"x");
    assert_eq!(bench.expect(Op::Reset).header.kind, 2);
    for op in [0, 8, u16::MAX] {
        bench.send_raw(Header { op, ..bench.header(stranger, Op::Data) }, &[]);
        bench.expect(Op::Reset);
    }
    // From or to elsewhere.
    for header in [
        Header { src_cid: CID + 1, ..bench.header(ports, Op::Data) },
        Header { src_cid: CID | 1 << 32, ..bench.header(ports, Op::Data) },
        Header { dst_cid: CID, ..bench.header(ports, Op::Data) },
        Header { dst_cid: 0, ..bench.header(ports, Op::Request) },
    ] {
        bench.send_raw(header, &[]);
    }
    // Half a header; buffers outside of memory; a buffer to write.
    for buffers in
        [[LentRead(TX_DATA, 20), LentRead(TX_DATA, 23)], [LentRead(TX_DATA, 44), LentRead(1 << 40, 10)]]
    {
        bench.tx.lend(&buffers);
    }
    bench.tx.lend(&[LentWrite(TX_DATA, 100)]);
    bench.device.queue_event(TX).unwrap();
    for _ in 0..3 {
        assert_eq!(bench.tx.used().unwrap().1, 0);
    }
    bench.expect_nothing();
    // The connection has not noticed.
    bench.send_data(ports, b"alive");
    assert_eq!(read(&socket), b"alive");
}

#[test]
fn a_broken_rule_ends_the_connection() {
    let mut bench = Bench::new();
    let listener = bench.listen(9);
    type Breach = dyn Fn(&Bench, Ports) -> Header;
    let breaches: [&Breach; 6] = [
        // More data than there are.
        &|bench, ports| Header { len: 11, ..bench.header(ports, Op::Data) },
        &|bench, ports| Header { len: u32::MAX, ..bench.header(ports, Op::Data) },
        // Open already.
        &|bench, ports| bench.header(ports, Op::Request),
        &|bench, ports| bench.header(ports, Op::Response),
        &|bench, ports| Header { op: 0, ..bench.header(ports, Op::Data) },
        &|bench, ports| Header { op: 99, ..bench.header(ports, Op::Data) },
    ];
    for (breach, guest) in breaches.iter().zip(0..) {
        let ports = Ports { host: 9, guest };
        let socket = bench.open_from_guest(&listener, ports);
        bench.send_raw(breach(&bench, ports), &[0; 10]);
        assert_eq!(bench.expect(Op::Reset).ports(), ports);
        assert!(is_closed(&socket));
        bench.expect_nothing();
    }
    // Before the guest has answered.
    for op in [Op::Data, Op::Request, Op::Shutdown] {
        let socket = bench.dial("CONNECT 5\n");
        let ports = bench.expect(Op::Request).ports();
        bench.send(ports, op);
        bench.expect(Op::Reset);
        assert!(is_closed(&socket));
    }
}

#[test]
fn refusals_without_buffers_are_bounded() {
    let mut bench = Bench::new();
    bench.device.reset();
    bench.start();
    for guest in 0..5000 {
        bench.send(Ports { host: 1, guest }, Op::Data);
    }
    // Opened and closed by the guest, without a buffer for any answer.
    let listener = bench.listen(9);
    for _ in 0..1000 {
        let ports = Ports { host: 9, guest: 1 };
        bench.send(ports, Op::Request);
        drop(listener.accept().unwrap());
        bench.send(ports, Op::Reset);
    }
    assert_eq!(bench.device.muxer.line_len(), 0);
    bench.lend(8);
    bench.run();
    assert_eq!(bench.arrived.len(), 1024);
    assert!(bench.arrived.iter().all(|packet| packet.op() == Op::Reset));
}

#[test]
fn useless_buffers_come_back_empty() {
    let mut bench = Bench::new();
    bench.device.reset();
    bench.start();
    let (_socket, useless) = (bench.dial("CONNECT 1\n"), 3);
    bench.rx.lend(&[LentWrite(RX_DATA, HEADER_LEN)]);
    bench.rx.lend(&[LentRead(RX_DATA, 4096)]);
    bench.rx.lend(&[LentWrite(1 << 40, 4096)]);
    bench.device.queue_event(RX).unwrap();
    for _ in 0..useless {
        assert_eq!(bench.rx.used().unwrap().1, 0);
    }
    bench.lend(1);
    bench.expect(Op::Request);
}

#[test]
fn a_reset_drops_connections_and_keeps_listening() {
    let mut bench = Bench::new();
    let (open, ports) = bench.open_from_host(1);
    let asked = bench.dial("CONNECT 2\n");
    let silent = bench.dial("CONN");
    // With packets in flight.
    (&open).write_all(&vec![1; 100_000]).unwrap();
    bench.send_data(ports, b"x");
    bench.device.reset();
    assert_eq!(read(&open), b"x");
    assert!([&open, &asked, &silent].into_iter().all(is_closed));
    // Not started: programs wait, and nothing is ready that nobody would look after.
    bench.arrived.clear();
    let mut early = UnixStream::connect(bench.socket()).unwrap();
    early.write_all(b"CONNECT 3\n").unwrap();
    assert!(!bench.is_ready(0));
    bench.device.queue_event(RX).unwrap();
    bench.device.queue_event(TX).unwrap();

    bench.start();
    bench.lend(8);
    assert_eq!(bench.expect(Op::Request).ports().guest, 3);
    // Nobody knows the old connection.
    bench.send_data(ports, b"x");
    bench.expect(Op::Reset);
    let (mut socket, _) = bench.open_from_host(1);
    socket.write_all(b"again").unwrap();
    assert_eq!(bench.expect(Op::Data).data, b"again");
}

#[test]
fn a_driver_without_queues_is_refused() {
    let mut bench = Bench::new();
    bench.device.reset();
    let activation = Activation {
        memory: GuestMemoryAtomic::new(bench.memory.clone()),
        queues: vec![None, None, None],
        features: 0,
        interrupt: Arc::new(RecordedInterrupt::default()),
    };
    assert!(matches!(bench.device.start(activation), Err(DeviceError::Driver(_))));
    // As the generic code does after a failure.
    bench.device.reset();
    bench.start();
}

#[test]
fn a_head_beyond_the_ring_is_an_error_of_the_device() {
    let mut bench = Bench::new();
    bench.tx.publish(16);
    assert!(matches!(bench.device.queue_event(TX), Err(DeviceError::Queue(_))));
}
