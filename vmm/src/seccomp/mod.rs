//! What each thread may ask of the kernel: a seccomp filter for its role.
//!
//! A thread takes its filter as the last thing before its loop, and starts neither threads nor processes from then on.
//! The main thread does so when the microVM has been built and before the guest's first instruction: what is needed
//! only to build one (opening KVM, making threads, starting virtiofsd) is out of reach once there is somebody to fear.
//!
//! | module | what it is |
//! | --- | --- |
//! | `policy` | from JSON to programs, at build time and for `--seccomp-filter` |
//! | `trap` | the end of a process that asked for something else |

mod policy;
mod trap;

use std::borrow::Cow;
use std::io;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use seccompiler::sock_filter;
use serde::{Deserialize, Serialize};

pub use policy::{PolicyError, Role};

use policy::Programs;

/// The built-in policy's programs, by the build script.
const BUILT_IN: [&[u8]; Role::ALL.len()] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/seccomp-main.bpf")),
    include_bytes!(concat!(env!("OUT_DIR"), "/seccomp-api.bpf")),
    include_bytes!(concat!(env!("OUT_DIR"), "/seccomp-vcpu.bpf")),
    include_bytes!(concat!(env!("OUT_DIR"), "/seccomp-io.bpf")),
    include_bytes!(concat!(env!("OUT_DIR"), "/seccomp-reaper.bpf")),
];

/// Why a thread has no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The kernel does not take it. The text says why, its causes included.
    #[error(
        "the kernel refused the seccomp filter of the role \"{role}\" ({source}); it needs CONFIG_SECCOMP_FILTER, and \
         --no-seccomp does without"
    )]
    Refused {
        /// The thread's role.
        role: &'static str,
        /// What went wrong.
        source: seccompiler::Error,
    },
}

/// Which filters threads take.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Filters {
    /// None: `--no-seccomp`.
    Off,
    /// Those of the built-in policy.
    BuiltIn,
    /// Those of the user's policy: `--seccomp-filter`.
    Custom(Box<Programs>),
}

impl Filters {
    /// Those of a policy, see [`policy::compile`].
    pub fn custom(json: &str) -> Result<Self, PolicyError> {
        policy::compile(json).map(|programs| Self::Custom(Box::new(programs)))
    }

    /// Has panics tell where they were without a backtrace, where filters forbid what that takes. To be called while there
    /// is one thread.
    pub fn hide_backtraces(&self) {
        if !matches!(self, Self::Off) {
            for variable in ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"] {
                // SAFETY: no other thread reads the environment meanwhile, as the caller promises.
                unsafe { std::env::remove_var(variable) };
            }
        }
    }

    /// Gives the calling thread the filter of its role for good, and no way to new privileges (`PR_SET_NO_NEW_PRIVS`).
    pub fn install(&self, role: Role) -> Result<(), SeccompError> {
        let program = match self {
            Self::Off => return Ok(()),
            Self::BuiltIn => Cow::Borrowed(BUILT_IN[role as usize]),
            Self::Custom(programs) => Cow::Borrowed(programs[role as usize].as_slice()),
        };
        trap::prepare();
        let refused = |source| SeccompError::Refused { role: role.name(), source };
        seccompiler::apply_filter(&instructions(&program)).map_err(refused)
    }

    /// Starts a thread that has its filter before it does anything of its own. On return it has it.
    pub fn spawn(
        &self,
        role: Role,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let (sender, installed) = mpsc::sync_channel(1);
        let filters = self.clone();
        let thread = thread::Builder::new().name(name).spawn(move || {
            let result = filters.install(role);
            let go_on = result.is_ok();
            // The receiver waits for it.
            let _ = sender.send(result);
            if go_on {
                body();
            }
        })?;
        match installed.recv() {
            Ok(Ok(())) => Ok(thread),
            Ok(Err(error)) => Err(io::Error::other(error)),
            Err(gone) => Err(io::Error::other(gone)),
        }
    }
}

/// The instructions of a program of [`Programs`].
fn instructions(program: &[u8]) -> Vec<sock_filter> {
    let (instructions, _) = program.as_chunks::<8>();
    let instruction = |&[a, b, jt, jf, c, d, e, f]: &[u8; 8]| sock_filter {
        code: u16::from_ne_bytes([a, b]),
        jt,
        jf,
        k: u32::from_ne_bytes([c, d, e, f]),
    };
    instructions.iter().map(instruction).collect()
}

#[cfg(test)]
mod tests;
