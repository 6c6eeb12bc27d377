//! What is said to a back-end, and in which order.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::inflight::{self, ANSWER_LEN, Inflight};
use super::wire::{Request, TalkError, Wire, numbers, words};
use super::{PATIENCE, VhostUserError};
use crate::virtio::interrupt::{Interrupt, Vector};
use crate::virtio::virtqueue::{Virtqueue, ring_addresses};

/// Bit of the features that says that the back-end has protocol features; the driver is not offered it.
const PROTOCOL: u64 = 1 << 30;

/// Protocol features: several queues, acknowledgements, a configuration space, and a file of what is in flight.
const MQ: u64 = 1 << 0;
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;
const INFLIGHT_SHMFD: u64 = 1 << 12;

/// The most regions of memory that a back-end can be told of.
const MAX_REGIONS: usize = 8;

/// A connection, negotiated.
pub(super) struct Backend {
    path: PathBuf,
    wire: Wire,
    features: u64,
    protocol: u64,
    /// What the back-end keeps of the requests that it has taken, if it does.
    inflight: Option<Inflight>,
}

/// What of guest memory, or of the conversation, is wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// It is not shared memory.
    #[error("guest memory is not shared memory")]
    NotShared,
    /// It is in too many pieces.
    #[error("guest memory has {0} regions, and a back-end takes {MAX_REGIONS}")]
    Regions(usize),
    /// It keeps too little of what is in flight.
    #[error("GET_INFLIGHT_FD: there is too little room in it")]
    Inflight,
    /// A ring lies across regions.
    #[error("the driver put a ring where guest memory is not contiguous")]
    Ring,
    /// There is no interrupt.
    #[error("no interrupt for a queue: {0}")]
    Interrupt(io::Error),
    /// A request failed.
    #[error(transparent)]
    Talk(#[from] TalkError),
}

impl Backend {
    /// Connects, unless there is a `stream` already, and negotiates all but the driver's features. The back-end is to have
    /// `queues` queues. (Of network devices pairs are meant: some back-ends count those, and who counts queues has more.)
    pub(super) fn connect(
        path: PathBuf,
        stream: Option<UnixStream>,
        queues: usize,
    ) -> Result<Self, VhostUserError> {
        let connected = match stream {
            Some(stream) => Wire::over(stream, PATIENCE),
            None => Wire::connect(&path, PATIENCE),
        };
        let wire = match connected {
            Ok(wire) => wire,
            Err(source) => return Err(VhostUserError::Connect { path, source }),
        };
        let mut backend = Self { path, wire, features: 0, protocol: 0, inflight: None };
        let there = backend.negotiate().map_err(|error| backend.failed(&error))?;
        match there < u64::try_from(queues).unwrap_or(u64::MAX) {
            true => Err(backend.lacks("enough queues")),
            false => Ok(backend),
        }
    }

    /// Agrees on what both know. Returns how many queues the back-end says that it has.
    fn negotiate(&mut self) -> Result<u64, TalkError> {
        self.wire.tell(Request::SET_OWNER, &[], &[])?;
        self.features = self.wire.ask_number(Request::GET_FEATURES)?;
        if self.features & PROTOCOL == 0 {
            return Ok(1);
        }
        let known = MQ | REPLY_ACK | CONFIG | INFLIGHT_SHMFD;
        self.protocol = self.wire.ask_number(Request::GET_PROTOCOL_FEATURES)? & known;
        self.wire.tell(Request::SET_PROTOCOL_FEATURES, &self.protocol.to_le_bytes(), &[])?;
        if self.protocol & REPLY_ACK != 0 {
            self.wire.expect_acknowledgements();
        }
        if self.protocol & MQ == 0 { Ok(1) } else { self.wire.ask_number(Request::GET_QUEUE_NUM) }
    }

    /// The virtio features that it offers.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// The socket that it was found at, or what is said in its place.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Has the back-end fill `space` with as much of the beginning of the device's configuration space. On an error
    /// `space` is as it was.
    pub(super) fn read_config(&mut self, space: &mut [u8]) -> Result<(), VhostUserError> {
        if self.protocol & CONFIG == 0 {
            return Err(self.lacks("its configuration space (VHOST_USER_PROTOCOL_F_CONFIG)"));
        }
        // Offset, size and flags; then as many bytes, which mean nothing in a question.
        let head = words(&[0, u32::try_from(space.len()).unwrap_or(u32::MAX), 0]);
        let mut body = head.clone();
        body.resize(head.len() + space.len(), 0);
        let mut answer = body.clone();
        self.wire.ask(Request::GET_CONFIG, &body, &mut answer).map_err(|error| self.failed(&error))?;
        let (answered, content) = answer.split_at(head.len());
        // Offset and size are those that were asked for; flags mean nothing here.
        if answered[..8] != head[..8] {
            return Err(VhostUserError::Talk {
                path: self.path.clone(),
                reason: format!("{}: another part of it came than was asked for", Request::GET_CONFIG.0),
            });
        }
        space.copy_from_slice(content);
        Ok(())
    }

    /// Hands memory and queues over, those of the indices below `enabled` in use. Those of a driver that did not accept
    /// all of our features are served likewise. `features` may have some that are not the back-end's concern.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &[Virtqueue],
        features: u64,
        interrupt: &dyn Interrupt,
        enabled: u16,
    ) -> Result<(), StartError> {
        self.inflight = None;
        let features = (features | PROTOCOL) & self.features;
        self.wire.tell(Request::SET_FEATURES, &features.to_le_bytes(), &[])?;
        let (table, files) = memory_table(memory)?;
        self.wire.tell(Request::SET_MEM_TABLE, &table, &files)?;
        self.share_inflight(queues)?;
        for queue in queues {
            self.hand_over(memory, queue, interrupt)?;
        }
        for queue in queues.iter().filter(|queue| queue.index() < enabled) {
            self.set_enabled(queue, true)?;
        }
        Ok(())
    }

    /// Takes `queue` into use, or out of it. Without protocol features a ring is always in use.
    pub(super) fn set_enabled(&mut self, queue: &Virtqueue, enabled: bool) -> Result<(), TalkError> {
        if self.features & PROTOCOL == 0 {
            return Ok(());
        }
        let request = Request::SET_VRING_ENABLE;
        self.wire.tell(request, &state(queue, enabled.into()), &[])?;
        if !enabled {
            return Ok(());
        }
        if self.protocol & REPLY_ACK == 0 {
            // It has done what came before when it answers this.
            self.wire.ask_number(Request::GET_FEATURES)?;
        }
        // The driver may have kicked since the back-end has had the kick, and kicks once. Some (the crate
        // vhost-user-backend, and so virtiofsd) read a kick of a ring that is not in use and forget it.
        queue.kick_again().map_err(|error| TalkError { request, reason: io::Error::other(error) })
    }

    /// Has the back-end keep what it has taken where we find it when it is gone.
    fn share_inflight(&mut self, queues: &[Virtqueue]) -> Result<(), StartError> {
        if self.protocol & INFLIGHT_SHMFD == 0 {
            return Ok(());
        }
        let count = queues.iter().map(|queue| queue.index().saturating_add(1)).max().unwrap_or(0);
        let size = queues.iter().map(|queue| queue.ring().size()).max().unwrap_or(0);
        let mut answer = [0; ANSWER_LEN];
        let question = inflight::question(count, size);
        let file = self.wire.ask_file(Request::GET_INFLIGHT_FD, &question, &mut answer)?;
        let inflight = Inflight::new(file, answer, count, size).ok_or(StartError::Inflight)?;
        self.wire.tell(Request::SET_INFLIGHT_FD, &answer, &[inflight.as_raw_fd()])?;
        self.inflight = Some(inflight);
        Ok(())
    }

    /// What the back-end, which is gone, kept of the requests of the driver that was there. It says nothing about those
    /// of the next one.
    pub(super) fn take_inflight(&mut self) -> Option<Inflight> {
        self.inflight.take()
    }

    fn hand_over(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &Virtqueue,
        interrupt: &dyn Interrupt,
    ) -> Result<(), StartError> {
        let ring = queue.ring();
        let [table, available, used] = ring_addresses(ring, memory).ok_or(StartError::Ring)?;
        let call = interrupt.notifier(Vector::Queue(queue.index())).map_err(StartError::Interrupt)?;
        // Index and flags; then the addresses, of which the last would be that of a log.
        let addresses = [words(&[queue.index().into(), 0]), numbers(&[table, used, available, 0])].concat();
        let index = u64::from(queue.index()).to_le_bytes();
        self.wire.tell(Request::SET_VRING_NUM, &state(queue, ring.size()), &[])?;
        self.wire.tell(Request::SET_VRING_ADDR, &addresses, &[])?;
        self.wire.tell(Request::SET_VRING_BASE, &state(queue, ring.next_avail()), &[])?;
        self.wire.tell(Request::SET_VRING_CALL, &index, &[call.as_raw_fd()])?;
        self.wire.tell(Request::SET_VRING_KICK, &index, &[queue.kick().as_raw_fd()])?;
        Ok(())
    }

    /// Takes the queues away. Each answer means that the back-end does not touch that queue any more.
    pub(super) fn stop(&mut self, queues: &[Virtqueue]) -> Result<(), TalkError> {
        for queue in queues {
            self.set_enabled(queue, false)?;
            self.wire.ask(Request::GET_VRING_BASE, &state(queue, 0), &mut [0; 8])?;
        }
        Ok(())
    }

    /// Hangs up, so that a back-end that is there and made a mistake knows that it has no device any more.
    pub(super) fn hang_up(&self) {
        if let Err(error) = self.wire.hang_up() {
            log::debug!("could not hang up on {}: {error}", self.path.display());
        }
    }

    pub(super) fn lacks(&self, what: &'static str) -> VhostUserError {
        VhostUserError::Lacks { path: self.path.clone(), what }
    }

    fn failed(&self, error: &TalkError) -> VhostUserError {
        VhostUserError::Talk { path: self.path.clone(), reason: error.to_string() }
    }
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.wire.as_raw_fd()
    }
}

/// A queue's index with something about it.
fn state(queue: &Virtqueue, value: u16) -> Vec<u8> {
    words(&[queue.index().into(), value.into()])
}

/// Where guest memory is, for SET_MEM_TABLE, and the files that it is in.
fn memory_table(memory: &GuestMemoryMmap) -> Result<(Vec<u8>, Vec<RawFd>), StartError> {
    let count = memory.num_regions();
    let known = u32::try_from(count).ok().filter(|_| count <= MAX_REGIONS);
    let mut table = words(&[known.ok_or(StartError::Regions(count))?, 0]);
    let mut files = Vec::new();
    for region in memory.iter() {
        let file = region.file_offset().ok_or(StartError::NotShared)?;
        let here = u64::try_from(region.as_ptr().addr()).unwrap_or(0);
        // Where the guest has it, its length, where we have it, and where it is in the file.
        table.extend(numbers(&[region.start_addr().raw_value(), region.len(), here, file.start()]));
        files.push(file.file().as_raw_fd());
    }
    Ok((table, files))
}
