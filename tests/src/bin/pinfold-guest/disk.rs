//! Block devices, used as programs do.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use super::parse;

/// Zeroes a range, keeping its space.
pub fn zero(disk: &str, offset: &str, len: &str) -> io::Result<()> {
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
pub fn random(disk: &str, depth: &str, count: &str) -> io::Result<()> {
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
