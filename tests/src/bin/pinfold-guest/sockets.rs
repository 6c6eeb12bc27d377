//! Sockets to the host (vsock(7)).

use std::io::{self, BufRead, BufReader, Read, Write};

use tests::vsock::{self, HOST};

pub fn echo(port: u32) -> io::Result<()> {
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

pub fn send(port: u32, text: &str) -> io::Result<()> {
    let mut connection = vsock::connect(HOST, port)?;
    writeln!(connection, "{text}")?;
    let mut line = String::new();
    BufReader::new(connection).read_line(&mut line)?;
    println!("pinfold-guest: answer {}", line.trim_end());
    Ok(())
}

pub fn pour(port: u32, mib: u32) -> io::Result<()> {
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

pub fn drain(port: u32) -> io::Result<()> {
    let mut connection = vsock::connect(HOST, port)?;
    let mut chunk = vec![0; 128 << 10];
    while connection.read(&mut chunk)? > 0 {}
    Ok(())
}
