//! Runs inside test guests, for what busybox cannot do: sockets to the host (vsock(7)).
//!
//! | arguments | what it does |
//! | --- | --- |
//! | `echo PORT` | accepts connections on PORT, and sends back what each sends until it ends |
//! | `send PORT TEXT` | connects to the host's PORT, sends TEXT and a newline, prints the answer's first line |
//! | `pour PORT MIB` | connects to the host's PORT, sends so much, and waits until the host closes |
//! | `drain PORT` | connects to the host's PORT, and reads until the host has sent all |

use std::io::{self, BufRead, BufReader, Read, Write};
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
        _ => Err(io::Error::other(
            "usage: pinfold-guest echo PORT | send PORT TEXT | pour PORT MIB | drain PORT",
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
