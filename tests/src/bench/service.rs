//! Streams through vsock, and requests to the API.

use super::clock::{Moment, median, monotonic, ns};
use super::figures::FigureId;
use super::guest::Guest;
use super::inside::Sink;
use super::vmm::{Place, Vmm, api_socket, vsock_socket};
use crate::case::Failure;
use crate::check;
use crate::lab::{Api, request};
use crate::vsock;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// How much goes through vsock in each direction, in MiB.
const STREAM_MIB: u32 = 64;
/// The host's port that the guest connects to.
const PORT: u32 = 5300;
/// Requests to the API: some first, then those that count.
const REQUESTS: (usize, usize) = (10, 100);

/// Measures a stream in each direction.
pub fn measure_vsock(vmm: &Vmm, place: &Place, guest: &mut Guest, sink: &Sink) -> Result<(), Failure> {
    let directions = [
        (FigureId::VsockOut, format!("pinfold-guest pour {PORT} {STREAM_MIB}"), swallow as Peer),
        (FigureId::VsockIn, format!("pinfold-guest drain {PORT}"), feed as Peer),
    ];
    for (figure, order, peer) in directions {
        let listener = Listener::new(vmm.kernel_vsock(), &place.ctx.scratch)?;
        let host = std::thread::spawn(move || peer(listener.accept()?));
        let said = guest.ask(&order)?;
        let (bytes, nanos, idle) = join(host)?;
        check!(said.is_empty(), "the guest's stream failed: {said}");
        sink.sample(vmm, figure, ns(bytes) * 8.0 / nanos, sink.counting.then_some(idle));
    }
    Ok(())
}

/// What the host does with a connection: bytes moved, ns from the first to the last, the share that was idle.
type Peer = fn(File) -> Result<(u64, f64, f64), Failure>;

fn swallow(mut connection: File) -> Result<(u64, f64, f64), Failure> {
    let start = Moment::now()?;
    let mut chunk = vec![0; 128 << 10];
    let mut bytes = 0;
    loop {
        let count = connection.read(&mut chunk)?;
        if count == 0 {
            break;
        }
        bytes += u64::try_from(count)?;
    }
    let interval = Moment::now()?.since(&start);
    check!(bytes == u64::from(STREAM_MIB) << 20, "only {bytes} bytes arrived");
    vsock::end_of_sending(&connection)?;
    Ok((bytes, ns(interval.elapsed), interval.idle()))
}

fn feed(mut connection: File) -> Result<(u64, f64, f64), Failure> {
    let start = Moment::now()?;
    let chunk = vec![b'p'; 128 << 10];
    for _ in 0..STREAM_MIB * 8 {
        connection.write_all(&chunk)?;
    }
    vsock::end_of_sending(&connection)?;
    // The guest ends after it has read everything.
    let rest = connection.read(&mut [0]);
    let interval = Moment::now()?.since(&start);
    check!(matches!(rest, Ok(0)), "the guest's end was {rest:?}");
    Ok((u64::from(STREAM_MIB) << 20, ns(interval.elapsed), interval.idle()))
}

fn join<T>(thread: JoinHandle<Result<T, Failure>>) -> Result<T, Failure> {
    thread.join().map_err(|_| Failure::new("the host's end panicked"))?
}

/// Where the guest's connections to the host's [`PORT`] arrive.
enum Listener {
    Kernel(OwnedFd),
    /// Firecracker's convention: a unix socket named after the device's and the port.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    fn new(kernel: bool, scratch: &Path) -> Result<Self, Failure> {
        if kernel {
            return Ok(Self::Kernel(vsock::listen(PORT)?));
        }
        let mut path = vsock_socket(scratch).into_os_string();
        path.push(format!("_{PORT}"));
        let path = PathBuf::from(path);
        Ok(Self::Unix(UnixListener::bind(&path)?, path))
    }

    fn accept(&self) -> Result<File, Failure> {
        match self {
            Self::Kernel(listener) => Ok(vsock::accept(listener)?),
            Self::Unix(listener, _) => Ok(File::from(OwnedFd::from(listener.accept()?.0))),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            drop(std::fs::remove_file(path));
        }
    }
}

/// Measures requests on one connection to the idle VM's API.
pub fn measure_api(vmm: &Vmm, place: &Place, sink: &Sink) -> Result<(), Failure> {
    let socket = api_socket(&place.ctx.scratch);
    let mut latencies = match vmm.api() {
        Some(path) => {
            let mut connection = Api::connect(&socket)?.connection()?;
            let text = request("GET", path, "");
            repeat(|| {
                connection.send(&text)?;
                let response = connection.response()?;
                check!(response.status == 200, "GET {path}: {response:?}");
                Ok(())
            })?
        }
        None => {
            let mut stream = BufReader::new(UnixStream::connect(&socket)?);
            // A greeting comes first, and this command has to be the first one.
            qmp(&mut stream, "{\"execute\":\"qmp_capabilities\"}\n")?;
            repeat(|| qmp(&mut stream, "{\"execute\":\"query-status\"}\n"))?
        }
    };
    let median = median(&mut latencies).ok_or_else(|| Failure::new("no requests"))?;
    sink.sample(vmm, FigureId::ApiRequest, median / 1e3, None);
    Ok(())
}

fn repeat(mut once: impl FnMut() -> Result<(), Failure>) -> Result<Vec<f64>, Failure> {
    let (before, counted) = REQUESTS;
    let mut latencies = Vec::with_capacity(counted);
    for index in 0..before + counted {
        let start = monotonic();
        once()?;
        if index >= before {
            latencies.push(ns(monotonic() - start));
        }
    }
    Ok(latencies)
}

/// Sends a command of QEMU's protocol and waits for its answer.
fn qmp(stream: &mut BufReader<UnixStream>, command: &str) -> Result<(), Failure> {
    stream.get_mut().write_all(command.as_bytes())?;
    let mut line = String::new();
    while !line.starts_with("{\"return\"") {
        line.clear();
        check!(stream.read_line(&mut line)? > 0, "QEMU closed the connection");
        check!(!line.starts_with("{\"error\""), "QEMU said {line}");
    }
    Ok(())
}
