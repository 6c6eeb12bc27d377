//! A TAP interface of the host: the other end of the guest's cable.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::HEADER_LEN;
use super::lent::Lent;
use crate::retry::retry;
use crate::virtio::iovec::ChainBuffers;

/// Where interfaces are attached.
const TUN_PATH: &str = "/dev/net/tun";

/// The longest name of an interface (IFNAMSIZ without the closing zero).
const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// The longest packet that crosses a TAP: our header, Ethernet with a VLAN tag, and the longest IP packet.
pub(super) const MAX_PACKET: u32 = HEADER_LEN + 14 + 4 + 65535;

/// The shortest: our header and an Ethernet header.
pub(super) const MIN_PACKET: u32 = HEADER_LEN + 14;

/// Why a TAP cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not the name of an interface.
    #[error("{0:?} cannot be the name of a TAP: 1 to {NAME_MAX} bytes, no slash, no space")]
    Name(String),
    /// No such interface in our network namespace.
    #[error("TAP {0} does not exist: create it with: ip tuntap add {0} mode tap")]
    Missing(String),
    /// An interface of another kind.
    #[error("interface {0} is not a TAP: name one that was created with: ip tuntap add NAME mode tap")]
    NotATap(String),
    /// It takes one file, and several are to be attached.
    #[error(
        "TAP {0} has one queue: create it with: ip tuntap add {0} mode tap multi_queue, or set queues to 1"
    )]
    OneQueue(String),
    /// Somebody else is attached.
    #[error("TAP {0} is busy: another process uses it; stop that process or name another TAP")]
    Busy(String),
    /// It belongs to somebody else.
    #[error(
        "TAP {0} may not be used by this user: create it with: ip tuntap add {0} mode tap user UID, or run \
         with CAP_NET_ADMIN"
    )]
    Permission(String),
    /// The host has no TAPs, or not for us.
    #[error("could not open {TUN_PATH} for TAP {tap}: load the module tun, and give this user access")]
    Open {
        /// Name of the TAP.
        tap: String,
        /// What the host said.
        source: io::Error,
    },
    /// Anything else.
    #[error("could not {doing} TAP {tap}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// Name of the TAP.
        tap: String,
        /// What the host said.
        source: io::Error,
    },
}

/// A queue of an attached TAP, not blocking; every packet has a virtio header of 12 bytes in front.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Attaches to the existing TAP `name` with `queues` queues, one for each file that comes back. For one queue it may
    /// have been created for one or for several.
    pub(super) fn open(name: &str, queues: u8) -> Result<Vec<Self>, TapError> {
        let well_formed = (1..=NAME_MAX).contains(&name.len())
            && !name.bytes().any(|byte| byte == b'/' || byte == 0 || byte.is_ascii_whitespace());
        let (true, Ok(c_name)) = (well_formed, CString::new(name)) else {
            return Err(TapError::Name(name.into()));
        };
        // TUNSETIFF would create what does not exist.
        // SAFETY: the argument is a string that ends with a zero.
        if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::ENODEV) => TapError::Missing(name.into()),
                _ => TapError::Host { doing: "look up", tap: name.into(), source },
            });
        }
        (0..queues).map(|_| Self::open_queue(name, &c_name, queues > 1)).collect()
    }

    fn open_queue(name: &str, c_name: &CStr, several: bool) -> Result<Self, TapError> {
        let host = |doing, source| TapError::Host { doing, tap: name.into(), source };
        // The standard library opens with O_CLOEXEC.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN_PATH)
            .map_err(|source| TapError::Open { tap: name.into(), source })?;

        let one = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let [first, second] = match several {
            true => [one | libc::IFF_MULTI_QUEUE, one],
            false => [one, one | libc::IFF_MULTI_QUEUE],
        };
        let mut attached = attach(&file, c_name, first);
        if errno(&attached) == Some(libc::EINVAL) {
            attached = attach(&file, c_name, second);
            if several && attached.is_ok() {
                return Err(TapError::OneQueue(name.into()));
            }
        }
        attached.map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => TapError::NotATap(name.into()),
            Some(libc::EBUSY | libc::E2BIG) => TapError::Busy(name.into()),
            Some(libc::EPERM | libc::EACCES) => TapError::Permission(name.into()),
            _ => host("attach to", error),
        })?;

        let tap = Self { file, name: name.into() };
        let len =
            libc::c_int::try_from(HEADER_LEN).map_err(|error| host("configure", io::Error::other(error)))?;
        // SAFETY: the descriptor is open; TUNSETVNETHDRSZ reads an int, which outlives the call.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) };
        if result < 0 {
            return Err(host("set the header length of", io::Error::last_os_error()));
        }
        Ok(tap)
    }

    /// A stand-in for tests: any socket that keeps the borders of messages.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn from_file(file: File) -> Self {
        Self { file, name: "test".into() }
    }

    /// Name of the interface.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The attached file, for those who move packets in our place (vhost).
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Says what the guest takes in packets from the TAP, as TUN_F_* bits: unfinished checksums, packets that
    /// are still to be segmented.
    pub(super) fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        // SAFETY: the descriptor is open; TUNSETOFFLOAD takes its argument by value.
        let result =
            unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sends the readable part of `buffers` as one packet.
    pub(super) fn send(&self, buffers: &ChainBuffers<'_>) -> io::Result<()> {
        let pieces = buffers.readable();
        let count = libc::c_int::try_from(pieces.len()).map_err(io::Error::other)?;
        // SAFETY: the pieces are guest memory, kept mapped by the borrow of `buffers`; the kernel only reads it.
        retry(|| unsafe { libc::writev(self.as_raw_fd(), pieces.as_ptr(), count) })?;
        Ok(())
    }

    /// Receives one packet into `lent`, and what does not fit there into `beyond`; what does not fit in both is lost,
    /// without a sign. Returns the bytes received, header included. WouldBlock if there is no packet.
    pub(super) fn receive(&self, lent: &mut Lent, beyond: &mut [u8]) -> io::Result<u32> {
        lent.read(self.file.as_fd(), beyond)
    }

    /// Whether the interface is still there.
    pub(super) fn exists(&self) -> bool {
        let mut request = ifreq(0);
        // SAFETY: the descriptor is open; TUNGETIFF writes an ifreq, which outlives the call.
        let result = unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EBADFD)
    }

    /// Has the host put packets into this queue, or not, of a TAP with several.
    pub(super) fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let flag = if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut request = ifreq(libc::c_short::try_from(flag).map_err(io::Error::other)?);
        // SAFETY: the descriptor is open; TUNSETQUEUE reads an ifreq, which outlives the call.
        let result = unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// A request without a name.
fn ifreq(flags: libc::c_short) -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    }
}

/// Makes `file` a queue of the TAP `name`.
fn attach(file: &File, name: &CStr, flags: libc::c_int) -> io::Result<()> {
    let mut request = ifreq(libc::c_short::try_from(flags).map_err(io::Error::other)?);
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the descriptor is open; TUNSETIFF reads and writes an ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn errno(result: &io::Result<()>) -> Option<i32> {
    result.as_ref().err().and_then(io::Error::raw_os_error)
}
