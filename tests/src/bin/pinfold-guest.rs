//! Runs inside test guests, for what busybox cannot do: sockets to the host (vsock(7)).
//!
//! | arguments | what it does |
//! | --- | --- |
//! | `echo PORT` | accepts connections on PORT, and sends back what each sends until it ends |
//! | `send PORT TEXT` | connects to the host's PORT, sends TEXT and a newline, prints the answer's first line |

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

/// The host's context id (VMADDR_CID_HOST).
const HOST: u32 = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match arguments[..] {
        ["echo", port] => parse(port).and_then(echo),
        ["send", port, text] => parse(port).and_then(|port| send(port, text)),
        _ => Err(io::Error::other("usage: pinfold-guest echo PORT | send PORT TEXT")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pinfold-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(port: &str) -> io::Result<u32> {
    port.parse().map_err(io::Error::other)
}

fn echo(port: u32) -> io::Result<()> {
    let listener = socket()?;
    bind(&listener, port)?;
    println!("pinfold-guest: echoing on {port}");
    loop {
        // SAFETY: no address is asked for.
        let fd = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        };
        let mut connection = file(fd)?;
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = connection.read(&mut buffer) {
                if connection.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
        });
    }
}

fn send(port: u32, text: &str) -> io::Result<()> {
    let socket = socket()?;
    let address = address(HOST, port);
    // SAFETY: the address lives through the call, and its size is right.
    let rc = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size()) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut connection = File::from(socket);
    writeln!(connection, "{text}")?;
    let mut line = String::new();
    BufReader::new(connection).read_line(&mut line)?;
    println!("pinfold-guest: answer {}", line.trim_end());
    Ok(())
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

fn bind(socket: &OwnedFd, port: u32) -> io::Result<()> {
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives through the call, and its size is right; listen takes two integers.
    let bound = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size()) == 0
            && libc::listen(socket.as_raw_fd(), 64) == 0
    };
    if bound { Ok(()) } else { Err(io::Error::last_os_error()) }
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
