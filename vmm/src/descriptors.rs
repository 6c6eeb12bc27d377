//! Handing state and open descriptors to another image of ourselves: the one that we execute, and the reaper.
//!
//! The state travels as JSON in a sealed memfd, never in the environment, and says which number each named
//! descriptor has in the receiving process.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::memfd;

/// Changes whenever the meaning of the state does.
const VERSION: u32 = 3;

/// What every executable of this version holds that can take over what [`pack`] writes.
pub const MARK: &str =
    concat!("pinfold ", env!("CARGO_PKG_VERSION"), " takes over what it is handed, in form 3");

/// Nothing may change the state on its way.
const SEALS: i32 = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;

/// Descriptors by name.
pub type Descriptors = BTreeMap<String, OwnedFd>;

/// Why state could not be handed on or taken over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// A system call failed.
    #[error("handing state to another image of pinfold: {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The state cannot be written or read.
    #[error("handing state to another image of pinfold: its form is wrong")]
    Form(#[from] serde_json::Error),
    /// What was given is not ours.
    #[error("descriptor {0} does not hold the state of a pinfold {version}: --handover and --reap are for internal use", version = env!("CARGO_PKG_VERSION"))]
    Foreign(RawFd),
}

fn io(doing: &'static str) -> impl FnOnce(io::Error) -> HandoverError {
    move |source| HandoverError::Io { doing, source }
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    descriptors: BTreeMap<String, RawFd>,
    state: T,
}

/// Writes `state` and the numbers of `descriptors` to a sealed memfd. Neither it nor they are inheritable yet:
/// see [`inheritable`].
pub fn pack<T: Serialize>(state: &T, descriptors: &Descriptors) -> Result<OwnedFd, HandoverError> {
    let numbers = descriptors.iter().map(|(name, fd)| (name.clone(), fd.as_raw_fd())).collect();
    let text = serde_json::to_vec(&Envelope { version: VERSION, descriptors: numbers, state })?;
    let mut file = memfd::create(c"pinfold-state").map_err(io("memfd_create"))?;
    file.write_all(&text).map_err(io("write"))?;
    memfd::seal(&file, SEALS).map_err(io("F_ADD_SEALS"))?;
    Ok(file.into())
}

/// Takes over what [`pack`] wrote. Everything is close-on-exec afterwards.
///
/// Called once, at the start of a process, before it opens anything: each number in the state then stands for a
/// descriptor that was inherited for us alone.
pub fn unpack<T: DeserializeOwned>(fd: RawFd) -> Result<(T, Descriptors), HandoverError> {
    // SAFETY: F_GET_SEALS takes no argument and works on any number.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_GET_SEALS) } != SEALS {
        return Err(HandoverError::Foreign(fd));
    }
    // SAFETY: it is an open memfd with our seals, inherited for us alone, as the command line says.
    let mut file = unsafe { File::from_raw_fd(fd) };
    let mut text = Vec::new();
    io::Seek::rewind(&mut file).and_then(|()| file.read_to_end(&mut text)).map_err(io("read"))?;
    let envelope: Envelope<T> = serde_json::from_slice(&text)?;
    if envelope.version != VERSION {
        return Err(HandoverError::Foreign(fd));
    }
    let mut descriptors = Descriptors::new();
    for (name, number) in envelope.descriptors {
        set_cloexec(number, true).map_err(io("set close-on-exec"))?;
        // SAFETY: the sender listed each open descriptor once and left it to us; fcntl just said that it is open.
        descriptors.insert(name, unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok((envelope.state, descriptors))
}

/// Executes `image` in this process's place, with `arguments` and `flag` followed by the number of what [`pack`] gave. It
/// inherits that, the descriptors `handed` and, if it is to, the environment.
pub fn exec(
    image: BorrowedFd<'_>,
    arguments: Vec<OsString>,
    flag: &str,
    memfd: &OwnedFd,
    handed: &Descriptors,
    environment: bool,
) -> io::Result<Infallible> {
    let flag = OsString::from(format!("{flag}={}", memfd.as_raw_fd()));
    let to_c = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::from);
    let arguments: Vec<CString> = arguments.into_iter().chain([flag]).map(to_c).collect::<io::Result<_>>()?;
    let mut argv: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    argv.push(std::ptr::null());
    let fds: Vec<RawFd> = handed.values().chain([memfd]).map(AsRawFd::as_raw_fd).collect();
    inheritable(&fds)?;
    let none = [std::ptr::null()];
    // SAFETY: the path is an empty string for AT_EMPTY_PATH, argv and the environment are NULL-terminated arrays of
    // NUL-terminated strings that live through the call, and no other thread changes the environment.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            image.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            if environment { environ } else { none.as_ptr() },
            libc::AT_EMPTY_PATH,
        )
    };
    Err(io::Error::last_os_error())
}

unsafe extern "C" {
    /// The environment as the C library keeps it.
    static environ: *const *const libc::c_char;
}

/// Has `fd` not survive an exec.
pub fn hide(fd: RawFd) -> io::Result<()> {
    match set_cloexec(fd, true) {
        // It was that of a directory that has been read.
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(()),
        result => result,
    }
}

/// Lets every one of `fds` survive an exec. Only system calls: may run between fork and exec.
pub fn inheritable(fds: &[RawFd]) -> io::Result<()> {
    fds.iter().try_for_each(|&fd| set_cloexec(fd, false))
}

fn set_cloexec(fd: RawFd, on: bool) -> io::Result<()> {
    // SAFETY: F_SETFD takes an integer; a number that is not open gives EBADF.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, if on { libc::FD_CLOEXEC } else { 0 }) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn state_and_descriptors_arrive() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let descriptors = Descriptors::from([("link".to_owned(), OwnedFd::from(theirs))]);
        let memfd = pack(&vec![1, 2, 3], &descriptors).unwrap();
        // An exec would end the sender's ownership.
        for fd in descriptors.into_values() {
            let _ = fd.into_raw_fd();
        }
        let (state, descriptors) = unpack::<Vec<u32>>(memfd.into_raw_fd()).unwrap();
        assert_eq!(state, [1, 2, 3]);
        drop(descriptors);
        assert_eq!((&ours).read(&mut [0]).unwrap(), 0, "the other end is closed: it was handed over");
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(unpack::<u32>(file.as_raw_fd()), Err(HandoverError::Foreign(_))));
        assert!(matches!(unpack::<u32>(0), Err(HandoverError::Foreign(0))));
        assert!(matches!(unpack::<u32>(9999), Err(HandoverError::Foreign(9999))));
    }
}
