//! Runs inside test guests, for what busybox cannot do: sockets to the host (vsock(7)), and much TCP.
//!
//! | arguments | what it does |
//! | --- | --- |
//! | `echo PORT` | accepts connections on PORT, and sends back what each sends until it ends |
//! | `send PORT TEXT` | connects to the host's PORT, sends TEXT and a newline, prints the answer's first line |
//! | `pour PORT MIB` | connects to the host's PORT, sends so much, and waits until the host closes |
//! | `drain PORT` | connects to the host's PORT, and reads until the host has sent all |
//! | `push ADDRESS:PORT MIB` | on each CPU connects by TCP, sends MIB MiB of counted words, waits for the peer's end |
//! | `pull ADDRESS:PORT MIB` | on each CPU connects by TCP, and receives the same |

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::ExitCode;
use tests::vsock::{self, HOST};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match arguments[..] {
        ["echo", port] => parse(port).and_then(echo),
        ["send", port, text] => parse(port).and_then(|port| send(port, text)),
        ["pour", port, mib] => parse(port).and_then(|port| pour(port, parse(mib)?)),
        ["drain", port] => parse(port).and_then(drain),
        ["push", peer, mib] => parse(mib).and_then(|mib| bulk("pushed", peer, mib, push)),
        ["pull", peer, mib] => parse(mib).and_then(|mib| bulk("pulled", peer, mib, pull)),
        _ => Err(io::Error::other(
            "usage: pinfold-guest echo PORT | send PORT TEXT | pour PORT MIB | drain PORT | \
             push|pull ADDRESS:PORT MIB",
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

fn parse(number: &str) -> io::Result<u32> {
    number.parse().map_err(io::Error::other)
}

/// Opens a connection to `peer` on each CPU, which passes `mib` MiB of counted words.
fn bulk(done: &str, peer: &str, mib: u32, pass: fn(TcpStream, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let words: Vec<u8> = (0..mib << 18).flat_map(u32::to_le_bytes).collect();
    let cpus = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| {
        let on_cpu = |cpu| {
            let words = &words;
            scope.spawn(move || run_on(cpu).and_then(|()| pass(TcpStream::connect(peer)?, words)))
        };
        let threads: Vec<_> = (0..cpus).map(on_cpu).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        })
    })?;
    println!("{done} on {cpus}");
    Ok(())
}

fn run_on(cpu: usize) -> io::Result<()> {
    // SAFETY: an empty set is all zeros; `cpu` is one of the machine's, so that it is in the set.
    let rc = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn push(mut stream: TcpStream, words: &[u8]) -> io::Result<()> {
    stream.write_all(words)?;
    stream.shutdown(Shutdown::Write)?;
    // The peer ends when it has seen all.
    stream.read_to_end(&mut Vec::new()).map(drop)
}

fn pull(mut stream: TcpStream, words: &[u8]) -> io::Result<()> {
    let mut received = Vec::with_capacity(words.len());
    stream.read_to_end(&mut received)?;
    if received == words { Ok(()) } else { Err(io::Error::other("other words came than were sent")) }
}

fn echo(port: u32) -> io::Result<()> {
    let listener = vsock::listen(port)?;
    println!("pinfold-guest: echoing on {port}");
    loop {
        let mut connection = vsock::accept(&listener)?;
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
    let mut connection = vsock::connect(HOST, port)?;
    writeln!(connection, "{text}")?;
    let mut line = String::new();
    BufReader::new(connection).read_line(&mut line)?;
    println!("pinfold-guest: answer {}", line.trim_end());
    Ok(())
}

fn pour(port: u32, mib: u32) -> io::Result<()> {
    let mut connection = vsock::connect(HOST, port)?;
    let chunk = vec![b'p'; 128 << 10];
    for _ in 0..mib * 8 {
        connection.write_all(&chunk)?;
    }
    vsock::end_of_sending(&connection)?;
    // The host's end of sending comes after it has read everything.
    let rest = connection.read(&mut [0])?;
    if rest == 0 { Ok(()) } else { Err(io::Error::other("the host sends, and was only to read")) }
}

fn drain(port: u32) -> io::Result<()> {
    let mut connection = vsock::connect(HOST, port)?;
    let mut chunk = vec![0; 128 << 10];
    while connection.read(&mut chunk)? > 0 {}
    Ok(())
}
