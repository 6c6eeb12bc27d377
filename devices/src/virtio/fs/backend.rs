//! The connection to a back-end.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::{FsError, PATIENCE};
use crate::virtio::interrupt::{Interrupt, Vector};
use crate::virtio::virtqueue::{Virtqueue, ring_addresses};

/// Bit of the features that says that the back-end has protocol features; the driver is not offered it.
const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A connection, negotiated.
pub(super) struct Backend {
    path: PathBuf,
    /// The other end of what `frontend` uses, too: to see that it is closed.
    stream: UnixStream,
    frontend: Frontend,
    features: u64,
}

/// What of guest memory, or of the conversation, is wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// It is not shared memory.
    #[error("guest memory is not shared memory")]
    NotShared,
    /// A ring lies across regions.
    #[error("the driver put a ring where guest memory is not contiguous")]
    Ring,
    /// There is no interrupt.
    #[error("no interrupt for a queue: {0}")]
    Interrupt(io::Error),
    /// A request failed.
    #[error("{doing}: {reason}")]
    Talk { doing: &'static str, reason: vhost::Error },
}

fn talk(doing: &'static str) -> impl FnOnce(vhost::Error) -> StartError {
    move |reason| StartError::Talk { doing, reason }
}

impl Backend {
    /// Connects, and negotiates all but the driver's features. The back-end is to have `queues` queues.
    pub(super) fn connect(path: PathBuf, queues: usize) -> Result<Self, FsError> {
        let connected = UnixStream::connect(&path).and_then(|stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok((stream.try_clone()?, stream))
        });
        let (stream, ours) = match connected {
            Ok(pair) => pair,
            Err(source) => return Err(FsError::Connect { path, source }),
        };
        let frontend = Frontend::from_stream(ours, u64::try_from(queues).unwrap_or(u64::MAX));
        let mut backend = Self { path, stream, frontend, features: 0 };
        backend.negotiate(queues)?;
        Ok(backend)
    }

    fn negotiate(&mut self, queues: usize) -> Result<(), FsError> {
        self.frontend.set_owner().map_err(|error| self.failed("SET_OWNER", &error))?;
        self.features = self.frontend.get_features().map_err(|error| self.failed("GET_FEATURES", &error))?;
        if self.features & PROTOCOL == 0 {
            return Ok(());
        }
        let offered = self
            .frontend
            .get_protocol_features()
            .map_err(|error| self.failed("GET_PROTOCOL_FEATURES", &error))?;
        let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let accepted = offered & wanted;
        self.frontend
            .set_protocol_features(accepted)
            .map_err(|error| self.failed("SET_PROTOCOL_FEATURES", &error))?;
        if accepted.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if accepted.contains(VhostUserProtocolFeatures::MQ) {
            let there =
                self.frontend.get_queue_num().map_err(|error| self.failed("GET_QUEUE_NUM", &error))?;
            if there < u64::try_from(queues).unwrap_or(u64::MAX) {
                return Err(self.lacks("enough queues"));
            }
        }
        Ok(())
    }

    /// The virtio features that it offers.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Hands memory and queues over. Those of a driver that did not accept all of our features are served likewise.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &[Virtqueue],
        features: u64,
        interrupt: &dyn Interrupt,
    ) -> Result<(), StartError> {
        let protocol = self.features & PROTOCOL;
        self.frontend.set_features(features | protocol).map_err(talk("SET_FEATURES"))?;
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| StartError::NotShared)?;
        self.frontend.set_mem_table(&regions).map_err(talk("SET_MEM_TABLE"))?;
        for queue in queues {
            let (index, ring) = (usize::from(queue.index()), queue.ring());
            let [desc_table_addr, avail_ring_addr, used_ring_addr] =
                ring_addresses(ring, memory).ok_or(StartError::Ring)?;
            let addresses = VringConfigData {
                queue_max_size: ring.max_size(),
                queue_size: ring.size(),
                flags: 0,
                desc_table_addr,
                used_ring_addr,
                avail_ring_addr,
                log_addr: None,
            };
            let call = interrupt.notifier(Vector::Queue(queue.index())).map_err(StartError::Interrupt)?;
            let frontend = &mut self.frontend;
            frontend.set_vring_num(index, ring.size()).map_err(talk("SET_VRING_NUM"))?;
            frontend.set_vring_addr(index, &addresses).map_err(talk("SET_VRING_ADDR"))?;
            frontend.set_vring_base(index, ring.next_avail()).map_err(talk("SET_VRING_BASE"))?;
            frontend.set_vring_call(index, &call).map_err(talk("SET_VRING_CALL"))?;
            frontend.set_vring_kick(index, queue.kick()).map_err(talk("SET_VRING_KICK"))?;
        }
        if protocol != 0 {
            for queue in queues {
                let index = queue.index().into();
                self.frontend.set_vring_enable(index, true).map_err(talk("SET_VRING_ENABLE"))?;
            }
        }
        Ok(())
    }

    /// Takes the queues away. Each answer means that the back-end does not touch that queue any more.
    pub(super) fn stop(&mut self, queues: &[Virtqueue]) -> Result<(), StartError> {
        for queue in queues {
            let index = queue.index().into();
            if self.features & PROTOCOL != 0 {
                self.frontend.set_vring_enable(index, false).map_err(talk("SET_VRING_ENABLE"))?;
            }
            self.frontend.get_vring_base(index).map_err(talk("GET_VRING_BASE"))?;
        }
        Ok(())
    }

    pub(super) fn lacks(&self, what: &'static str) -> FsError {
        FsError::Lacks { path: self.path.clone(), what }
    }

    fn failed(&self, doing: &'static str, error: &vhost::Error) -> FsError {
        FsError::Talk { path: self.path.clone(), doing, reason: error.to_string() }
    }
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
