//! The end of a process one of whose threads asked the kernel for something that its filter forbids.
//!
//! The kernel sends the thread a SIGSYS instead of doing what it was asked. The handler says which thread, which call
//! and from where, and ends the process; the reaper removes the groups, as after a SIGKILL. It interrupts whatever the
//! thread was doing, so it waits for no lock, allocates nothing, and makes only calls that every filter allows.

use std::cell::Cell;
use std::fmt::{self, Write};
use std::mem;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;
use std::sync::Once;
use std::time::{SystemTime, UNIX_EPOCH};

use syscalls::Sysno;

use crate::exit::Code;
use crate::metrics::{self, METRICS};
use crate::{console, logger};

/// `si_code` of a SIGSYS by a filter (include/uapi/asm-generic/siginfo.h).
const SYS_SECCOMP: i32 = 1;

thread_local! {
    /// The thread's name. Constant initialisation and no destructor: reading it in a signal handler touches nothing
    /// but the thread's own storage.
    static NAME: Cell<[u8; 16]> = const { Cell::new([0; 16]) };
}

/// Has the process end as this module says if the calling thread violates its filter, which it is about to get.
pub fn prepare() {
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, with a NUL at their end.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    // The handler could not ask for it.
    NAME.set(name);
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // SAFETY: an all-zero sigaction is valid, the handler has the form that SA_SIGINFO asks for and is
        // async-signal-safe, and the signal can be caught: it cannot fail.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_sigsys as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigfillset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut());
        }
    });
}

/// `siginfo_t` of a SIGSYS (include/uapi/asm-generic/siginfo.h), as far as it is used here.
#[repr(C)]
struct Fault {
    signal: i32,
    errno: i32,
    code: i32,
    _padding: i32,
    address: usize,
    number: i32,
}

extern "C" fn on_sigsys(_: libc::c_int, info: *const Fault, context: *const libc::ucontext_t) {
    // SAFETY: with SA_SIGINFO the kernel hands over a siginfo_t, which is larger than `Fault`, and the context of the
    // thread, both for as long as the handler runs.
    let (fault, context) = unsafe { (&*info, &*context) };
    if fault.code != SYS_SECCOMP {
        // Somebody sent it. By default it ends a process.
        // SAFETY: it takes no pointer and does not return.
        unsafe { libc::_exit(Code::Generic as libc::c_int) };
    }
    METRICS.seccomp.num_faults.store(1);
    let registers = &context.uc_mcontext.gregs;
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX]
        .map(|register| usize::try_from(register).ok().and_then(|index| registers.get(index)).copied());
    let mut line = Text::new();
    // What does not fit is cut.
    let _ = describe(&mut line, fault, arguments);
    say(libc::STDERR_FILENO, &line);
    if let Some(fd) = logger::raw_fd() {
        say(fd, &line);
    }
    if let Some(fd) = metrics::raw_fd() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let mut line = Text::new();
        let _ = write!(line, "{{\"utc_timestamp_ms\":{now},\"seccomp\":{{\"num_faults\":1}}}}");
        say(fd, &line);
    }
    // Without cgroups there is no reaper to do it. The lines above are for the terminal as it is.
    console::restore_at_the_end();
    // SAFETY: it takes no pointer and does not return.
    unsafe { libc::_exit(Code::BadSyscall as libc::c_int) };
}

fn describe(line: &mut Text, fault: &Fault, arguments: [Option<i64>; 3]) -> fmt::Result {
    let name = NAME.get();
    let name = name.split(|byte| *byte == 0).next().and_then(|name| str::from_utf8(name).ok());
    let call = usize::try_from(fault.number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    write!(
        line,
        "pinfold: the thread \"{}\" made the system call {} ({call}), which its seccomp filter forbids, at {:#x} with \
         the arguments",
        name.unwrap_or("?"),
        fault.number,
        fault.address,
    )?;
    arguments.into_iter().flatten().try_for_each(|argument| write!(line, " {argument:#x}"))?;
    write!(line, "; if this is nobody's attack, please report it (--no-seccomp runs without filters)")
}

/// A line of text without an allocation.
struct Text {
    bytes: [u8; 512],
    len: usize,
}

impl Text {
    fn new() -> Self {
        Self { bytes: [0; 512], len: 0 }
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // Room for the end of the line stays.
        let room = self.bytes.len() - "\r\n".len() - self.len;
        let len = text.len().min(room);
        self.bytes[self.len..self.len + len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        if len == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

/// Writes a line if that does not have to be waited for.
fn say(fd: RawFd, line: &Text) {
    let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd, which lives through the call.
    if unsafe { libc::poll(&raw mut poll, 1, 0) } != 1 {
        return;
    }
    // SAFETY: it is standard error, or a descriptor that is open for the rest of the process.
    let stream = unsafe { BorrowedFd::borrow_raw(fd) };
    // On the terminal that is the guest's console nobody turns a line feed into the start of a new line.
    let raw = console::terminal_settings(stream).is_some_and(|settings| settings.c_oflag & libc::OPOST == 0);
    let mut bytes = line.bytes;
    let end: &[u8] = if raw { b"\r\n" } else { b"\n" };
    bytes[line.len..line.len + end.len()].copy_from_slice(end);
    // SAFETY: the bytes live through the call. What is not taken is lost.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), line.len + end.len()) };
}
