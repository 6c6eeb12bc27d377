//! The host's unix sockets: the file that the device listens on, and bytes moved between a socket and guest memory
//! without a copy of ours.

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use libc::iovec;

use crate::retry::retry;
use crate::virtio::iovec::ChainBuffers;

/// How many pieces of guest memory one system call moves.
const PIECES: usize = 32;

/// A listening socket whose file is removed with it, unless it is to stay.
#[derive(Debug)]
pub(super) struct ListenerFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    identity: (u64, u64),
    keep: bool,
}

impl ListenerFile {
    /// Makes the file and listens. It does not block.
    pub(super) fn bind(path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        let file = fs::symlink_metadata(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path, identity: (file.dev(), file.ino()), keep: false })
    }

    /// Lets the file stay when the socket goes.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    /// The socket.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Connects to whoever listens for the guest's connections to `port`. Does not wait: a listener whose
    /// backlog is full counts as none.
    pub(super) fn connect_to_port(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string().into_vec();
        path.extend_from_slice(format!("_{port}").as_bytes());
        connect(&path)
    }
}

impl Drop for ListenerFile {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // Another one's file may have taken the place of ours.
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("could not remove the socket {}: {error}", self.path.display());
        }
    }
}

/// Connects to the socket at `path` without waiting, which the standard library cannot.
fn connect(path: &[u8]) -> io::Result<UnixStream> {
    let sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).map_err(io::Error::other)?;
    let mut address = libc::sockaddr_un { sun_family, sun_path: [0; 108] };
    // The last byte stays 0.
    if path.len() >= address.sun_path.len() {
        let path = Path::new(std::ffi::OsStr::from_bytes(path)).display();
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("the path {path} is too long")));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: a call without pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, and nobody else has it.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: `address` is a socket address of `len` bytes, which outlives the call.
    let result = unsafe { libc::connect(fd, (&raw const address).cast(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Sends bytes of ours; returns how many the socket took. WouldBlock if it takes none now.
pub(super) fn send(socket: &UnixStream, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
    // SAFETY: an IoSlice has the layout of an iovec, and each is readable memory that outlives the call.
    unsafe { send_pieces(socket, pieces.as_ptr().cast(), pieces.len()) }
}

/// Sends at most `len` bytes from `offset` on of the readable part of `packet`; returns how many the socket took.
/// WouldBlock if it takes none now.
pub(super) fn send_from(
    socket: &UnixStream,
    packet: &ChainBuffers<'_>,
    offset: u32,
    len: u32,
) -> io::Result<usize> {
    let (pieces, count) = collect(packet.readable_range(offset, len));
    // SAFETY: the pieces are guest memory, kept mapped by the borrow of `packet`.
    unsafe { send_pieces(socket, pieces.as_ptr(), count) }
}

/// Receives at most `len` bytes to `offset` of the writable part of `packet`; returns how many, 0 at the end of the
/// stream. WouldBlock if there are none now.
pub(super) fn receive_into(
    socket: &UnixStream,
    packet: &ChainBuffers<'_>,
    offset: u32,
    len: u32,
) -> io::Result<usize> {
    let (pieces, count) = collect(packet.writable_range(offset, len));
    let count = libc::c_int::try_from(count).map_err(io::Error::other)?;
    // SAFETY: the pieces are writable guest memory, kept mapped by the borrow of `packet`.
    retry(|| unsafe { libc::readv(socket.as_raw_fd(), pieces.as_ptr(), count) })
}

/// The first of `pieces`, as many as one call moves, and their number.
fn collect(pieces: impl Iterator<Item = iovec>) -> ([iovec; PIECES], usize) {
    let mut collected = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES];
    let mut count = 0;
    for (slot, piece) in collected.iter_mut().zip(pieces) {
        *slot = piece;
        count += 1;
    }
    (collected, count)
}

/// Sends without a SIGPIPE where nobody receives any more.
///
/// # Safety
/// `pieces` points to `count` iovecs, each of readable memory.
unsafe fn send_pieces(socket: &UnixStream, pieces: *const iovec, count: usize) -> io::Result<usize> {
    // SAFETY: a message of zeros is a valid one: no address, no pieces, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.cast_mut();
    message.msg_iovlen = count;
    // SAFETY: the caller vouches for the pieces, which the kernel only reads.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })
}
