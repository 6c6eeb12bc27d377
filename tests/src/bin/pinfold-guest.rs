//! Runs inside test guests, for what busybox cannot do: sockets to the host (vsock(7)), and block devices used as
//! programs do.
//!
//! | arguments | what it does |
//! | --- | --- |
//! | `echo PORT` | accepts connections on PORT, and sends back what each sends until it ends |
//! | `send PORT TEXT` | connects to the host's PORT, sends TEXT and a newline, prints the answer's first line |
//! | `zero DISK OFFSET LEN` | zeroes a range, keeping its space (BLKZEROOUT) |
//! | `random DISK DEPTH COUNT` | reads COUNT blocks of 4 KiB at random places, DEPTH at a time (io_submit(2)) |

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;

/// The host's context id (VMADDR_CID_HOST).
const HOST: u32 = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match arguments[..] {
        ["echo", port] => parse(port).and_then(echo),
        ["send", port, text] => parse(port).and_then(|port| send(port, text)),
        ["zero", disk, offset, len] => zero(disk, offset, len),
        ["random", disk, depth, count] => random(disk, depth, count),
        _ => Err(io::Error::other(
            "usage: pinfold-guest echo PORT | send PORT TEXT | zero DISK OFFSET LEN | random DISK DEPTH COUNT",
        )),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pinfold-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse<T: std::str::FromStr>(number: &str) -> io::Result<T>
where
    T::Err: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    number.parse().map_err(io::Error::other)
}

fn zero(disk: &str, offset: &str, len: &str) -> io::Result<()> {
    // _IO(0x12, 127) of linux/fs.h.
    const BLKZEROOUT: libc::Ioctl = 0x127f;
    let disk = OpenOptions::new().write(true).open(disk)?;
    let range: [u64; 2] = [parse(offset)?, parse(len)?];
    // SAFETY: it reads two u64, which live through the call.
    if unsafe { libc::ioctl(disk.as_raw_fd(), BLKZEROOUT, range.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    println!("pinfold-guest: zeroed");
    Ok(())
}

/// struct iocb of linux/aio_abi.h, little endian.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

const BLOCK: usize = 4096;

#[repr(align(4096))]
#[derive(Clone)]
struct Aligned {
    _bytes: [u8; BLOCK],
}

/// Submits one read at a time and takes them back one at a time, as fio does unless told otherwise.
fn random(disk: &str, depth: &str, count: &str) -> io::Result<()> {
    let disk = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let (depth, count): (usize, usize) = (parse(depth)?, parse(count)?);
    let blocks = io::Seek::seek(&mut &disk, io::SeekFrom::End(0))? / BLOCK as u64;
    let mut buffers = vec![Aligned { _bytes: [0; BLOCK] }; depth];
    let mut context = 0_u64;
    let checked = |result: libc::c_long| usize::try_from(result).map_err(|_| io::Error::last_os_error());
    // SAFETY: it writes one u64, which lives through the call.
    checked(unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) })?;
    let mut state = 1_u64;
    let mut submit = |slot: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let offset = (state >> 33) % blocks * BLOCK as u64;
        let request = Iocb {
            data: slot as u64,
            fd: u32::try_from(disk.as_raw_fd()).map_err(io::Error::other)?,
            buffer: (&raw mut buffers[slot]).addr() as u64,
            len: BLOCK as u64,
            offset: i64::try_from(offset).map_err(io::Error::other)?,
            // IOCB_CMD_PREAD is 0.
            ..Iocb::default()
        };
        let list = [&raw const request];
        // SAFETY: it reads a list of one request, which lives through the call; the request's buffer lives until all
        // have ended.
        checked(unsafe { libc::syscall(libc::SYS_io_submit, context, 1, list.as_ptr()) })
    };
    (0..depth).try_for_each(|slot| submit(slot).map(drop))?;
    for done in 1..=count {
        let mut event = [0_u64, 0, 0, 0];
        // SAFETY: it writes one struct io_event, which is four u64, and waits without a limit.
        checked(unsafe {
            libc::syscall(libc::SYS_io_getevents, context, 1, 1, event.as_mut_ptr(), std::ptr::null::<u8>())
        })?;
        if event[2] != BLOCK as u64 {
            return Err(io::Error::other("a read was not whole"));
        }
        if done + depth <= count {
            submit(usize::try_from(event[0]).map_err(io::Error::other)?)?;
        }
    }
    println!("pinfold-guest: read {count}");
    Ok(())
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
