use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryAtomic};

use super::*;
use crate::virtio::driver_ring::{DriverRing, Lent};
use crate::virtio::interrupt::Vector;
use crate::virtio::testing::RecordedInterrupt;

const RINGS: [u64; 2] = [0x1000, 0x2000];
const REQUEST: u64 = 0x4000;
const REPLY: u64 = 0x5000;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const PROTOCOL: u64 = 1 << 30;

/// Numbers of requests in the protocol.
mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
}

/// A back-end that answers by the protocol, serves nothing, and tells which requests it got. It leaves when it is
/// asked for the base of a ring and is not to answer that.
struct Peer {
    path: PathBuf,
    _directory: tempfile::TempDir,
    asked: Receiver<u32>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    fn new(features: u64, stops: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, asked) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut header = [0; 12];
            while stream.read_exact(&mut header).is_ok() {
                let [number, flags, size] =
                    [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
                let mut body = vec![0; size as usize];
                stream.read_exact(&mut body).unwrap();
                let _ = sender.send(number);
                let reply = match number {
                    request::GET_FEATURES => features.to_le_bytes().to_vec(),
                    // MQ, REPLY_ACK, and CONFIG, which is not asked for.
                    request::GET_PROTOCOL_FEATURES => 0x209_u64.to_le_bytes().to_vec(),
                    request::GET_QUEUE_NUM => 2_u64.to_le_bytes().to_vec(),
                    request::GET_VRING_BASE if !stops => return,
                    request::GET_VRING_BASE => body,
                    _ if flags & 8 != 0 => 0_u64.to_le_bytes().to_vec(),
                    _ => continue,
                };
                let len = u32::try_from(reply.len()).unwrap();
                let header: Vec<u8> =
                    [number, 0b101, len].iter().flat_map(|word| word.to_le_bytes()).collect();
                stream.write_all(&[header, reply].concat()).unwrap();
            }
        });
        Self { path, _directory: directory, asked, thread: Some(thread) }
    }

    fn connect(&self) -> Result<Fs, FsError> {
        Fs::connect("shared", self.path.clone())
    }

    fn asked(&self) -> Vec<u32> {
        self.asked.try_iter().collect()
    }
}

/// Shared guest memory of 64 KiB.
fn memory() -> GuestMemoryMmap {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x1_0000).unwrap();
    let range = (GuestAddress(0), 0x1_0000, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}

/// A started file system.
struct Bench {
    memory: GuestMemoryMmap,
    rings: [DriverRing; 2],
    kicks: Vec<Arc<vmm_sys_util::eventfd::EventFd>>,
    interrupt: Arc<RecordedInterrupt>,
    device: Fs,
}

impl Bench {
    fn new(device: Fs) -> Self {
        let memory = memory();
        let rings = RINGS.map(|base| DriverRing::new(&memory, base));
        let mut bench = Self { memory, rings, kicks: Vec::new(), interrupt: Arc::default(), device };
        bench.start();
        bench
    }

    fn start(&mut self) {
        self.rings = RINGS.map(|base| DriverRing::new(&self.memory, base));
        let made =
            self.rings.iter().zip(0..).map(|(ring, index)| ring.virtqueue(index, self.interrupt.clone()));
        let (queues, kicks) = made.map(|(queue, kick)| (Some(queue), kick)).unzip();
        self.kicks = kicks;
        let activation = Activation {
            memory: GuestMemoryAtomic::new(self.memory.clone()),
            queues,
            features: self.device.features(),
            interrupt: self.interrupt.clone(),
        };
        self.device.start(activation).unwrap();
    }

    /// Lends a request of FUSE with this number, and room for the reply.
    fn lend(&mut self, unique: u64) -> u16 {
        let mut header = [0; 40];
        header[8..16].copy_from_slice(&unique.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(REQUEST)).unwrap();
        self.memory.write_slice(&[0; 16], GuestAddress(REPLY)).unwrap();
        self.rings[1].lend(&[Lent::Read(REQUEST, 40), Lent::Write(REPLY, 80)])
    }

    fn expect_refused(&mut self, head: u16, unique: u64) {
        assert_eq!(self.interrupt.take(), [Vector::Queue(1)]);
        assert_eq!(self.rings[1].used(), Some((head, 16)));
        let mut reply = [0; 16];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        let expected = [&16_u32.to_le_bytes()[..], &(-107_i32).to_le_bytes(), &unique.to_le_bytes()].concat();
        assert_eq!(reply[..], expected[..]);
    }

    fn event(&mut self) {
        self.device.source_event(0).unwrap();
    }
}

#[test]
fn a_back_end_is_asked_for_what_it_offers() {
    let peer = Peer::new(u64::MAX, true);
    let device = peer.connect().unwrap();
    assert_eq!(device.device_type(), 26);
    assert_eq!(device.features(), VERSION_1 | 1 << 29 | 1 << 28);
    assert_eq!(device.queue_max_sizes().len(), 2);
    assert_eq!(&device.config()[..7], b"shared\0");
    assert_eq!(device.config()[36..], [1, 0, 0, 0]);
}

#[test]
fn a_server_that_is_missing_or_too_old_is_named() {
    let error = Fs::connect("shared", PathBuf::from("/nonexistent/socket")).err().unwrap();
    assert!(error.to_string().contains("/nonexistent/socket"), "{error}");
    let peer = Peer::new(PROTOCOL, true);
    let error = peer.connect().err().unwrap();
    assert!(error.to_string().contains("does not offer virtio 1"), "{error}");
}

#[test]
fn memory_and_rings_are_handed_over_and_taken_back() {
    let peer = Peer::new(VERSION_1 | PROTOCOL, true);
    let mut bench = Bench::new(peer.connect().unwrap());
    let asked = peer.asked();
    let count = |number| asked.iter().filter(|asked| **asked == number).count();
    assert_eq!(count(request::SET_MEM_TABLE), 1);
    assert_eq!((count(request::SET_VRING_KICK), count(request::SET_VRING_ENABLE)), (2, 2));
    assert_eq!(count(request::GET_VRING_BASE), 0);
    bench.device.reset();
    let asked = peer.asked();
    assert_eq!(asked.iter().filter(|asked| **asked == request::GET_VRING_BASE).count(), 2);
    // Another driver.
    bench.start();
    assert!(peer.asked().contains(&request::SET_MEM_TABLE));
    assert!(!bench.device.lost);
}

#[test]
fn private_memory_makes_a_lost_device() {
    let peer = Peer::new(VERSION_1 | PROTOCOL, true);
    let mut device = peer.connect().unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let interrupt: Arc<RecordedInterrupt> = Arc::default();
    let ring = DriverRing::new(&memory, RINGS[0]);
    let (queue, _kick) = ring.virtqueue(0, interrupt.clone());
    let features = device.features();
    let memory = GuestMemoryAtomic::new(memory);
    device.start(Activation { memory, queues: vec![Some(queue)], features, interrupt }).unwrap();
    assert!(device.lost);
}

#[test]
fn when_the_back_end_is_gone_every_request_gets_an_error() {
    let mut peer = Peer::new(VERSION_1 | PROTOCOL, false);
    let mut bench = Bench::new(peer.connect().unwrap());
    let head = bench.lend(7);
    bench.event();
    assert_eq!(bench.interrupt.take(), []);
    // The peer leaves without an answer.
    let first = bench.device.backend.stop(&bench.device.running.as_ref().unwrap().queues[..1]);
    assert!(first.is_err());
    peer.thread.take().unwrap().join().unwrap();
    bench.event();
    bench.expect_refused(head, 7);
    // What comes later is answered at the kick.
    let head = bench.lend(8);
    bench.kicks[1].write(1).unwrap();
    bench.event();
    bench.expect_refused(head, 8);
    // FUSE_FORGET: there is no reply to it.
    let head = bench.rings[1].lend(&[Lent::Read(REQUEST, 40)]);
    bench.kicks[1].write(1).unwrap();
    bench.event();
    assert_eq!(bench.rings[1].used(), Some((head, 0)));
    // And so it is for the next driver.
    bench.interrupt.take();
    bench.device.reset();
    bench.start();
    let head = bench.lend(9);
    bench.kicks[1].write(1).unwrap();
    bench.event();
    bench.expect_refused(head, 9);
    assert_eq!(
        (bench.device.counters.backend_lost.count(), bench.device.counters.refused_count.count()),
        (1, 4)
    );
}
