//! vCPU threads.
//!
//! ```text
//!             Run              Pause
//!   Created ------> Running <--------> Paused
//!      |               |     Run          |
//!      |               v                  |
//!      +----------> Finished <------------+      by Finish, or by the guest
//! ```
//!
//! Commands go to a thread through a channel, and it is kicked out of KVM_RUN to read them. It answers each
//! with an [`Event`]; the first events of all come unasked: that it joined its cgroup, or why it could not.

mod kick;
mod life;
mod run;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use ::devices::bus::Bus;
use ::devices::legacy::ExitSignal;
use kvm_ioctls::VcpuFd;

use run::Vcpu;

/// What a vCPU thread is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Command {
    /// Run the guest.
    Run,
    /// Stop running the guest.
    Pause,
    /// Let the thread end.
    Finish,
}

/// What a vCPU thread answers.
#[derive(Debug)]
enum Event {
    /// It joined its cgroup and waits for its first command.
    Created,
    /// It could not join its cgroup or have its filter, and has ended.
    Stray(String),
    /// It runs the guest.
    Running,
    /// It has stopped running the guest, whose state is complete in KVM.
    Paused,
}

/// Why vCPU threads could not be started, stopped or told something.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The thread could not be made.
    #[error("cannot start the thread of vCPU {index}")]
    Spawn {
        /// Which one.
        index: u8,
        /// What the host said.
        source: io::Error,
    },
    /// The thread could not be placed, or has no filter.
    #[error("vCPU {index}: {reason}")]
    Stray {
        /// Which one.
        index: u8,
        /// What refused what, and the way out.
        reason: String,
    },
    /// The thread has ended.
    #[error("the thread of vCPU {index} has ended")]
    Gone {
        /// Which one.
        index: u8,
    },
}

/// Puts the calling thread where a vCPU belongs, and gives it its seccomp filter; the text says what refused what, and
/// the way out.
pub type Enter = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What vCPUs share: the ways out of the guest.
#[derive(Clone)]
pub struct Outside {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Tells the event loop how the guest ended.
    pub exit: Arc<ExitSignal>,
}

/// A vCPU's thread.
struct Handle {
    index: u8,
    commands: Sender<Command>,
    events: Receiver<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    fn send(&self, command: Command) {
        // A thread that has ended needs no telling; whoever waits for its answer learns it.
        if self.commands.send(command).is_ok()
            && let Some(thread) = &self.thread
        {
            kick::kick(thread);
        }
    }

    fn event(&self) -> Result<Event, VcpuError> {
        self.events.recv().map_err(|_| VcpuError::Gone { index: self.index })
    }
}

/// The threads of all vCPUs. They end when it is dropped.
pub struct Vcpus(Vec<Handle>);

impl Vcpus {
    /// Starts a thread for each vCPU. On return each is in its cgroup and none has run the guest. If one cannot
    /// be placed none goes on.
    pub fn spawn(vcpus: Vec<VcpuFd>, outside: &Outside, enter: &Enter) -> Result<Self, VcpuError> {
        kick::install();
        let mut threads = Self(Vec::with_capacity(vcpus.len()));
        for (index, fd) in (0..).zip(vcpus) {
            let (commands, inbox) = mpsc::channel();
            let (outbox, events) = mpsc::channel();
            let enter = Arc::clone(enter);
            let outside = outside.clone();
            let thread = thread::Builder::new()
                .name(format!("fc_vcpu {index}"))
                .spawn(move || match enter() {
                    Ok(()) => Vcpu::new(index, fd, outside, inbox, outbox).live(),
                    // The receiver waits for it, or has given up on all threads.
                    Err(reason) => drop(outbox.send(Event::Stray(reason))),
                })
                .map_err(|source| VcpuError::Spawn { index, source })?;
            threads.0.push(Handle { index, commands, events, thread: Some(thread) });
        }
        for handle in &threads.0 {
            if let Event::Stray(reason) = handle.event()? {
                return Err(VcpuError::Stray { index: handle.index, reason });
            }
        }
        Ok(threads)
    }

    /// Runs the guest.
    pub fn run(&self) -> Result<(), VcpuError> {
        self.tell(Command::Run)
    }

    /// Stops running the guest. On return no vCPU runs.
    pub fn pause(&self) -> Result<(), VcpuError> {
        self.tell(Command::Pause)
    }

    fn tell(&self, command: Command) -> Result<(), VcpuError> {
        self.0.iter().for_each(|handle| handle.send(command));
        // Everybody's answer is taken, also when one has none to give: the next command would be told it otherwise.
        let answers: Vec<_> = self.0.iter().map(Handle::event).collect();
        answers.into_iter().try_for_each(|answer| answer.map(drop))
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.0.iter().for_each(|handle| handle.send(Command::Finish));
        for thread in self.0.iter_mut().filter_map(|handle| handle.thread.take()) {
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
