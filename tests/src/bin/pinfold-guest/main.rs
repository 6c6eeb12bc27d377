//! Runs inside test guests, for what busybox cannot do.
//!
//! | arguments | what it does |
//! | --- | --- |
//! | `echo PORT` | accepts connections on PORT, and sends back what each sends until it ends |
//! | `send PORT TEXT` | connects to the host's PORT, sends TEXT and a newline, prints the answer's first line |
//! | `pour PORT MIB` | connects to the host's PORT, sends so much, and waits until the host closes |
//! | `drain PORT` | connects to the host's PORT, and reads until the host has sent all |
//! | `push ADDRESS:PORT MIB` | on each CPU connects by TCP, sends MIB MiB of counted words, waits for the peer's end |
//! | `pull ADDRESS:PORT MIB` | on each CPU connects by TCP, and receives the same |
//! | `zero DISK OFFSET LEN` | zeroes a range, keeping its space (BLKZEROOUT) |
//! | `random DISK DEPTH COUNT` | reads COUNT blocks of 4 KiB at random places, DEPTH at a time (io_submit(2)) |

mod disk;
mod sockets;
mod tcp;

use std::io;
use std::process::ExitCode;

const USAGE: &str = "usage: pinfold-guest echo PORT | send PORT TEXT | pour PORT MIB | drain PORT | \
    push|pull ADDRESS:PORT MIB | zero DISK OFFSET LEN | random DISK DEPTH COUNT";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match arguments[..] {
        ["echo", port] => parse(port).and_then(sockets::echo),
        ["send", port, text] => parse(port).and_then(|port| sockets::send(port, text)),
        ["pour", port, mib] => parse(port).and_then(|port| sockets::pour(port, parse(mib)?)),
        ["drain", port] => parse(port).and_then(sockets::drain),
        ["push", peer, mib] => parse(mib).and_then(|mib| tcp::bulk("pushed", peer, mib, tcp::push)),
        ["pull", peer, mib] => parse(mib).and_then(|mib| tcp::bulk("pulled", peer, mib, tcp::pull)),
        ["zero", path, offset, len] => disk::zero(path, offset, len),
        ["random", path, depth, count] => disk::random(path, depth, count),
        _ => Err(io::Error::other(USAGE)),
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
