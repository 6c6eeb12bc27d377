//! Sockets of AF_VSOCK (vsock(7)), which std does not have.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The host's context id (VMADDR_CID_HOST).
pub const HOST: u32 = 2;

/// Listens on `port`, whoever calls.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives through the call, and its size is right; listen takes two integers.
    let listens = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size()) == 0
            && libc::listen(socket.as_raw_fd(), 64) == 0
    };
    if listens { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// Waits for the next connection.
pub fn accept(listener: &OwnedFd) -> io::Result<File> {
    // SAFETY: no address is asked for.
    let fd = unsafe {
        libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
    };
    file(fd)
}

/// Connects to `port` of `cid`.
pub fn connect(cid: u32, port: u32) -> io::Result<File> {
    let socket = socket()?;
    let address = address(cid, port);
    // SAFETY: the address lives through the call, and its size is right.
    let rc = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size()) };
    if rc == 0 { Ok(File::from(socket)) } else { Err(io::Error::last_os_error()) }
}

/// Says that nothing more will be sent.
pub fn end_of_sending(socket: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: shutdown takes two integers.
    let rc = unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: socket takes three integers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    file(fd).map(OwnedFd::from)
}

/// Takes over a new descriptor, or says why there is none.
fn file(fd: i32) -> io::Result<File> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new, and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros is a valid address of no family.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    // AF_VSOCK is 40.
    address.svm_family = libc::AF_VSOCK.try_into().unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn size() -> libc::socklen_t {
    // Some 16 bytes.
    std::mem::size_of::<libc::sockaddr_vm>().try_into().unwrap_or_default()
}
