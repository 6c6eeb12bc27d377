//! `virtiofsd`, the server of a folder, as a process of ours.
//!
//! It is born in the overhead group, has nothing of ours but a socket, and no wall of ours is around it. Outside of a jail
//! the main thread starts it, before that has its seccomp filter: there is no other wall. In a jail all walls are there
//! when a server is wanted, so that a process starts it that was left outside, by the reaper, before the reaper had its
//! filter. What it may start was pinned down by the jail's command line: the program, and the folders.
//!
//! | module | what it is |
//! | --- | --- |
//! | `server` | the process, and the program |
//! | `shares` | the folders that a jail's command line names |
//! | `link` | what is said through the jail's wall |
//! | `starter` | the process outside |

mod link;
mod server;
mod shares;
mod starter;

pub use link::Link;
pub use server::Virtiofsd;
pub use shares::{Shares, Sharing};
pub use starter::Starter;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::jail::inside;
use crate::lookup;

/// Why a folder is not served.
#[derive(Debug, thiserror::Error)]
pub enum VirtiofsdError {
    /// The folder cannot be used.
    #[error("shared_dir {}: give a folder that exists", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// In a jail nobody may share it.
    #[error(
        "shared_dir {folder}: the jail's command line is to name a folder that is shared, as the host calls it: pinfold \
         jail --share {folder}",
        folder = .0.display()
    )]
    NotNamed(PathBuf),
    /// It and the jail are not apart.
    #[error(
        "--share {}: the jail {} and a folder that is shared may not be in each other, as the guest could put devices \
         into the jail: share another folder, which need not be in the jail to be shared",
        .folder.display(),
        .jail.display()
    )]
    NotApart {
        /// The folder.
        folder: PathBuf,
        /// The jail's root.
        jail: PathBuf,
    },
    /// There is no program.
    #[error(
        "there is no virtiofsd in the PATH or at {}: install it, or start it yourself and name its socket{}",
        server::ELSEWHERE.join(" or "),
        lookup::place()
    )]
    Missing,
    /// There is no socket for it.
    #[error("cannot make a socket for virtiofsd in {}: let it be writable", .path.display())]
    Socket {
        /// The folder for temporary files.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// There is no link to who starts it.
    #[error("cannot make a socket pair")]
    Pair(#[source] io::Error),
    /// It cannot be started.
    #[error("cannot start {}", .path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The process outside of the jail could not start it, and says why.
    #[error("outside of the jail: {0}")]
    Outside(String),
    /// There is no process outside of the jail any more.
    #[error(
        "the process that starts servers outside of the jail does not answer: end this microVM and launch it anew"
    )]
    NoStarter(#[source] io::Error),
}

/// Has `folder` served. Returns the server, if it is a child of ours, and a connection to it, on which it waits.
pub fn serve(folder: &Path) -> Result<(Option<Virtiofsd>, UnixStream), VirtiofsdError> {
    match inside::jail() {
        Some(jail) => {
            let stream = jail.servers().start(folder)?;
            log::info!("a virtiofsd outside of the jail serves {}", folder.display());
            Ok((None, stream))
        }
        None => {
            let (server, stream) = Virtiofsd::start(&server::find()?, folder)?;
            Ok((Some(server), stream))
        }
    }
}

/// Whether `folder` can be served, as far as that is known before.
pub fn check(folder: &Path) -> Result<(), VirtiofsdError> {
    match inside::jail() {
        Some(jail) => jail.servers().find(folder).map(drop),
        None => server::check_folder(folder),
    }
}

/// No server is started any more: there is a guest.
pub fn settle() {
    if let Some(jail) = inside::jail() {
        jail.servers().hang_up();
    }
}
