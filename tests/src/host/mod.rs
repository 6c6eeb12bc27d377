//! The emulated test host: built from Debian packages, cached, booted under QEMU's TCG.
//!
//! | module | job |
//! | --- | --- |
//! | [`packages`] | Debian packages that this machine lacks, and where Debian's mirror is |
//! | [`recipe`] | what each kernel, image and guest is made of |
//! | [`cache`] | finished artefacts under `target/pinfold-host`, built once, never half |
//! | [`image`], [`guest`] | making the host's disk, and the guest's kernel and initramfs |
//! | [`cpio`], [`modules`], [`bzimage`] | the formats that takes |
//! | [`emulator`] | QEMU without a fault that hangs nested guests |
//! | [`boot`], [`channel`] | a running host, and the line to its agent |
//! | [`room`] | how many of them at a time |

pub mod boot;
mod bzimage;
mod cache;
mod channel;
mod command;
mod cpio;
mod emulator;
mod guest;
mod image;
mod modules;
mod packages;
pub mod progress;
mod recipe;
pub mod room;

pub use boot::{Cpu, EmulatedHost};
pub use guest::{GuestFiles, guest_files};
pub use image::{BenchImage, HostImage, bench_image, host_image};

use std::path::PathBuf;

/// Why the emulated host could not be built or used.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// An external program could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// An external program failed.
    #[error("{what}: `{command}` failed ({status}); the end of its output:\n{tail}")]
    Command {
        /// What was being done.
        what: String,
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The last lines it printed.
        tail: String,
    },
    /// A file could not be read, written or moved.
    #[error("cannot {action} {path}")]
    File {
        /// `read`, `write` and so on.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Packages are missing and cannot be installed.
    #[error(
        "the test host needs these Debian packages, and neither root nor sudo is there to install them: {0}"
    )]
    Packages(String),
    /// apt knows no Debian mirror.
    #[error("apt's configuration names no Debian archive; set PINFOLD_DEBIAN_MIRROR to the URI of one")]
    NoMirror,
    /// What was built or fetched is not as expected.
    #[error("{0}")]
    Unexpected(String),
    /// The host did not come up, ended, or stands still.
    #[error("the emulated host {what}; its console ends with:\n{console}")]
    Dead {
        /// What went wrong.
        what: String,
        /// The last lines of its console.
        console: String,
    },
}

impl HostError {
    /// For `map_err`: `action` on `path` failed.
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}
