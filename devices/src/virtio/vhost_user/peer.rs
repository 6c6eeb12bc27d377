//! A back-end for tests.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::wire::{Request, words};
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::driver_ring::DriverRing;
use crate::virtio::testing::RecordedInterrupt;

/// Features.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub const PROTOCOL: u64 = 1 << 30;

/// What a peer does beside the protocol, when it is asked for something.
#[derive(Clone)]
pub enum Misdeed {
    /// It leaves.
    Leaves,
    /// It says nothing, until the other end leaves.
    Silent,
    /// It sends this.
    Says(Vec<u8>),
    /// It sends this with a file.
    Shares(Vec<u8>, Arc<File>),
}

/// A back-end that answers by the protocol, serves nothing, and tells which requests it got.
pub struct Peer {
    pub path: PathBuf,
    _directory: tempfile::TempDir,
    asked: Receiver<u32>,
    /// The features that it was set to.
    set: Arc<AtomicU64>,
    /// Its end of the connection, once there is one.
    stream: Receiver<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// One that offers these features, with 2 queues, acknowledgements and, of the configuration space, `config`.
    pub fn new(features: u64, config: Vec<u8>) -> Self {
        Self::misbehaving(features, config, None)
    }

    /// Likewise, that does something else when it is asked for that.
    pub fn misbehaving(features: u64, config: Vec<u8>, misdeed: Option<(Request, Misdeed)>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, asked) = mpsc::channel();
        let (streams, stream) = mpsc::channel();
        let set = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&set);
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            streams.send(stream.try_clone().unwrap()).unwrap();
            while let Some((number, flags, body)) = receive(&mut stream) {
                if number == Request::SET_FEATURES.1 {
                    seen.store(u64::from_le_bytes(body[..8].try_into().unwrap()), Ordering::Relaxed);
                }
                let _ = sender.send(number);
                match misdeed.as_ref().filter(|(request, _)| request.1 == number) {
                    None => {}
                    Some((_, Misdeed::Leaves)) => return stream.shutdown(Shutdown::Both).unwrap(),
                    Some((_, Misdeed::Silent)) => continue,
                    Some((_, Misdeed::Shares(bytes, file))) => {
                        stream.send_with_fd(&bytes[..], file.as_raw_fd()).unwrap();
                        continue;
                    }
                    Some((_, Misdeed::Says(bytes))) => {
                        stream.write_all(bytes).unwrap();
                        continue;
                    }
                }
                let keeps = misdeed.as_ref().is_some_and(|(request, _)| *request == Request::GET_INFLIGHT_FD);
                let Some(answer) = answer(number, flags, body, (features, keeps), &config) else { continue };
                stream.write_all(&message(number, &answer)).unwrap();
            }
        });
        Self { path, _directory: directory, asked, set, stream, thread: Some(thread) }
    }

    /// Has it leave. On return its end of the connection is closed.
    pub fn leave(&mut self) {
        self.stream.recv().unwrap().shutdown(Shutdown::Both).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }

    /// The features that it was set to, to be asked for after an acknowledged request.
    pub fn features(&self) -> u64 {
        self.set.load(Ordering::Relaxed)
    }

    /// What it was asked for since the last call.
    pub fn asked(&self) -> Vec<u32> {
        self.asked.try_iter().collect()
    }
}

fn receive(stream: &mut UnixStream) -> Option<(u32, u32, Vec<u8>)> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let [number, flags, size] =
        [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
    let mut body = vec![0; size as usize];
    stream.read_exact(&mut body).ok()?;
    Some((number, flags, body))
}

/// `offer` are the features, and whether it is known how to keep what is in flight.
fn answer(number: u32, flags: u32, body: Vec<u8>, offer: (u64, bool), config: &[u8]) -> Option<Vec<u8>> {
    let (features, keeps) = offer;
    let number_of = |request: Request| request.1 == number;
    Some(if number_of(Request::GET_FEATURES) {
        features.to_le_bytes().to_vec()
    } else if number_of(Request::GET_PROTOCOL_FEATURES) {
        // MQ, REPLY_ACK, CONFIG, and one that is not known here.
        (0x209_u64 | 1 << 40 | u64::from(keeps) << 12).to_le_bytes().to_vec()
    } else if number_of(Request::GET_QUEUE_NUM) {
        2_u64.to_le_bytes().to_vec()
    } else if number_of(Request::GET_VRING_BASE) {
        body
    } else if number_of(Request::GET_CONFIG) {
        let mut answer = body;
        let len = config.len().min(answer.len() - 12);
        answer[12..][..len].copy_from_slice(&config[..len]);
        answer
    } else if flags & 8 != 0 {
        0_u64.to_le_bytes().to_vec()
    } else {
        return None;
    })
}

/// An answer to the request of this number, as it is sent.
pub fn message(number: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap();
    [words(&[number, 0b101, len]), body.to_vec()].concat()
}

/// Shared guest memory of 64 KiB.
fn memory() -> GuestMemoryMmap {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x1_0000).unwrap();
    let range = (GuestAddress(0), 0x1_0000, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}

/// A started device with its driver, which has at most five rings.
pub struct Bench<D> {
    pub memory: GuestMemoryMmap,
    pub rings: Vec<DriverRing>,
    pub kicks: Vec<Arc<EventFd>>,
    pub interrupt: Arc<RecordedInterrupt>,
    pub device: D,
}

impl<D: VirtioDevice> Bench<D> {
    const RINGS: [u64; 5] = [0x1000, 0x2000, 0xa000, 0xb000, 0xc000];

    pub fn new(device: D) -> Self {
        Self::with_memory(device, memory())
    }

    pub fn with_memory(device: D, memory: GuestMemoryMmap) -> Self {
        let mut bench =
            Self { memory, rings: Vec::new(), kicks: Vec::new(), interrupt: Arc::default(), device };
        bench.start();
        bench
    }

    /// Has a driver that has all features start the device.
    pub fn start(&mut self) {
        let count = self.device.queue_max_sizes().len();
        self.rings = Self::RINGS[..count].iter().map(|base| DriverRing::new(&self.memory, *base)).collect();
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

    /// Lets the device see what happened.
    pub fn event(&mut self) {
        self.device.source_event(0).unwrap();
    }
}
