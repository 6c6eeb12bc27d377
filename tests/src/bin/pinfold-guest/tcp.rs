//! Much TCP, in both directions.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

/// Opens a connection to `peer` on each CPU, which passes `mib` MiB of counted words.
pub fn bulk(
    done: &str,
    peer: &str,
    mib: u32,
    pass: fn(TcpStream, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
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

pub fn push(mut stream: TcpStream, words: &[u8]) -> io::Result<()> {
    stream.write_all(words)?;
    stream.shutdown(Shutdown::Write)?;
    // The peer ends when it has seen all.
    stream.read_to_end(&mut Vec::new()).map(drop)
}

pub fn pull(mut stream: TcpStream, words: &[u8]) -> io::Result<()> {
    let mut received = Vec::with_capacity(words.len());
    stream.read_to_end(&mut received)?;
    if received == words { Ok(()) } else { Err(io::Error::other("other words came than were sent")) }
}
