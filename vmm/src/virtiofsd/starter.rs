//! The process outside of a jail that starts servers for the microVM in it.
//!
//! It is a child of the reaper, from before that has its filter, and so in the overhead group, in the host's root and
//! namespaces, with the rights of who launched the jail, and without a filter. It only takes numbers of folders that the
//! jail's command line named, and nothing at all once there is a guest, as the other end of the link is closed then. It
//! ends with the reaper, or when that asks for it, and no server of its outlives it.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{Shares, Virtiofsd, link};
use crate::descriptors::Descriptors;
use crate::exit::chain;
use crate::fork::{Side, fork};

/// What has happened: somebody asks, or this is the end.
const ASKED: u64 = 0;
const STOP: u64 = 1;

/// The process, as the reaper sees it.
pub struct Starter {
    pid: i32,
    /// The process ends with it.
    stop: PipeWriter,
}

impl Starter {
    /// Starts it, with its end of the link. The calling thread is the only one of the process. Of its descriptors the new
    /// process lets go of `others`, which are returned in this one.
    pub fn start(shares: &Shares, link: OwnedFd, others: Descriptors) -> io::Result<(Self, Descriptors)> {
        let (stopped, stop) = io::pipe()?;
        match fork(false)? {
            Side::Child => {
                drop((stop, others));
                // SAFETY: the name is a NUL-terminated string.
                unsafe { libc::prctl(libc::PR_SET_NAME, c"pinfold_starter".as_ptr()) };
                if let Err(error) = run(shares, link.into(), &stopped) {
                    log::warn!("the process that starts servers outside of the jail ends: {error}");
                }
                // SAFETY: it ends the child without what the parent has to do at its own end.
                unsafe { libc::_exit(0) }
            }
            Side::Parent(pid) => Ok((Self { pid, stop }, others)),
        }
    }

    /// Ends it, and with it all servers.
    pub fn stop(self) {
        drop(self.stop);
        // SAFETY: waitpid of a child of ours, with no status to store.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}

/// Starts what is asked for until this is the end. On return all servers have ended.
fn run(shares: &Shares, link: UnixStream, stopped: &PipeReader) -> io::Result<()> {
    let mut servers: Vec<(u32, Virtiofsd)> = Vec::new();
    let mut link = Some(link);
    let epoll = Epoll::new()?;
    let watch = |fd, mark| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, mark));
    watch(stopped.as_raw_fd(), STOP)?;
    if let Some(link) = &link {
        watch(link.as_raw_fd(), ASKED)?;
    }
    loop {
        let mut events = [EpollEvent::default(); 2];
        let count = match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            count => count?,
        };
        if events[..count].iter().any(|event| event.data() == STOP) {
            return Ok(());
        }
        link = link.filter(|link| {
            let last = serve(shares, link, &mut servers).is_none();
            if last {
                // Somebody else may still have the same end, and then closing it would not do.
                let _ = epoll.ctl(ControlOperation::Delete, link.as_raw_fd(), EpollEvent::default());
            }
            !last
        });
    }
}

/// Answers a question; `None` if it was the last.
fn serve(shares: &Shares, link: &UnixStream, servers: &mut Vec<(u32, Virtiofsd)>) -> Option<()> {
    let number = link::question(link)?;
    // A folder has one server at a time.
    servers.retain(|(served, _)| *served != number);
    let started = match shares.folder(number) {
        Some(folder) => Virtiofsd::start(&shares.program, folder).map_err(|error| chain(&error)),
        None => Err(format!("there is no folder {number}")),
    };
    let connection = started.map(|(server, stream)| {
        servers.push((number, server));
        stream
    });
    link::answer(link, connection).ok()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::virtiofsd::{Link, VirtiofsdError};

    #[test]
    fn only_folders_with_a_number_are_served_until_the_end() {
        let base = tempfile::tempdir().unwrap();
        let folders = ["jail", "here", "gone"].map(|name| base.path().join(name));
        folders.iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        let [jail, here, gone] = folders;
        let shares = Shares::find("/bin/true".into(), &[here.clone(), gone.clone()], &jail).unwrap();
        std::fs::remove_dir(&gone).unwrap();
        let (inside, outside) = UnixStream::pair().unwrap();
        let link = Link::new(vec![here.clone(), gone.clone(), jail.clone()], Some(inside.into()));
        let (stopped, stop) = io::pipe().unwrap();
        thread::scope(|scope| {
            let starter = scope.spawn(|| run(&shares, outside, &stopped));
            // A second one goes in the place of the first.
            for _ in 0..2 {
                link.start(&here).unwrap();
            }
            for (folder, words) in [(&gone, gone.to_str().unwrap()), (&jail, "no folder 2")] {
                match link.start(folder) {
                    Err(VirtiofsdError::Outside(text)) => assert!(text.contains(words), "{text}"),
                    other => panic!("{other:?}"),
                }
            }
            // It stays without anybody who asks.
            link.hang_up();
            drop(stop);
            starter.join().unwrap().unwrap();
        });
    }
}
