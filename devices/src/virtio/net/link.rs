//! Hears of changes of the host's interfaces, without asking what they are: whoever hears looks for himself.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A socket of NETLINK_ROUTE that becomes readable when an interface of our network namespace appears, changes or goes.
pub(super) struct LinkWatch(OwnedFd);

impl LinkWatch {
    /// Begins to listen.
    pub(super) fn new() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: nobody else knows this new descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeroes are an address.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).map_err(io::Error::other)?;
        address.nl_groups = libc::RTMGRP_LINK.cast_unsigned();
        let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
        // SAFETY: the descriptor is open; bind reads `len` bytes of `address`, which outlives the call.
        if unsafe { libc::bind(fd, (&raw const address).cast(), len) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(socket))
    }

    /// Forgets what was heard. The socket says so again if it loses something.
    pub(super) fn drain(&self) {
        let mut message = [0u8; 1];
        // Of each message its first byte; an overflow is an error once.
        loop {
            // SAFETY: the descriptor is open; recv writes at most as many bytes as `message` has.
            let result =
                unsafe { libc::recv(self.as_raw_fd(), message.as_mut_ptr().cast(), message.len(), 0) };
            let lost = || io::Error::last_os_error().raw_os_error() == Some(libc::ENOBUFS);
            if result < 0 && !lost() {
                break;
            }
        }
    }
}

impl AsRawFd for LinkWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
