//! The life of one vCPU on its thread.

use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use devices::legacy::ExitKind;
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::Kickable;
use super::life::{Answer, Life, Step};
use super::{Command, Event, Outside};
use crate::metrics::{METRICS, VcpuExits};

/// What one KVM_RUN led to.
enum Outcome {
    /// Again.
    Continue,
    /// Look at the commands first.
    Interrupted,
    /// The guest is at its end.
    Ended(ExitKind),
}

/// A vCPU.
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
    outside: Outside,
    commands: Receiver<Command>,
    events: Sender<Event>,
    exits: &'static VcpuExits,
}

impl Vcpu {
    pub fn new(
        index: u8,
        fd: VcpuFd,
        outside: Outside,
        commands: Receiver<Command>,
        events: Sender<Event>,
    ) -> Self {
        Self { index, fd, outside, commands, events, exits: METRICS.vcpu.exits(index) }
    }

    /// Lives until told to finish. The thread does not end with the guest but waits for [`Command::Finish`]:
    /// whoever looks at our threads meanwhile finds all of them.
    pub fn live(mut self) {
        let _kickable = Kickable::new(&mut self.fd);
        let mut life = Life::new();
        self.tell(Event::Created);
        loop {
            match life.step() {
                Step::Wait => match self.commands.recv() {
                    Ok(command) => self.follow(&mut life, command),
                    Err(_) => life.abandoned(),
                },
                Step::Enter => match self.enter() {
                    Outcome::Continue => {}
                    Outcome::Interrupted => life.interrupted(),
                    Outcome::Ended(kind) => {
                        self.outside.exit.raise(kind);
                        life.guest_ended();
                    }
                },
                Step::Look => {
                    self.fd.set_kvm_immediate_exit(0);
                    match self.commands.try_recv() {
                        Ok(command) => self.follow(&mut life, command),
                        Err(TryRecvError::Empty) => life.nothing_to_follow(),
                        Err(TryRecvError::Disconnected) => life.abandoned(),
                    }
                }
                Step::End => return,
            }
        }
    }

    /// Nobody who stopped listening needs an answer.
    fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    fn follow(&self, life: &mut Life, command: Command) {
        match life.follow(command) {
            Some(Answer::Running) => self.tell(Event::Running),
            Some(Answer::Paused) => self.tell(Event::Paused),
            None => {}
        }
    }

    /// One KVM_RUN.
    fn enter(&mut self) -> Outcome {
        let error = |reason: String| {
            METRICS.vcpu.failures.inc();
            Outcome::Ended(ExitKind::Error(format!("vCPU {}: {reason}", self.index)))
        };
        match self.fd.run() {
            Ok(exit) => match exit {
                VcpuExit::IoIn(port, data) => {
                    self.exits.io_in();
                    self.outside.pio.read(u64::from(port), data);
                    Outcome::Continue
                }
                VcpuExit::IoOut(port, data) => {
                    self.exits.io_out();
                    self.outside.pio.write(u64::from(port), data);
                    Outcome::Continue
                }
                VcpuExit::MmioRead(address, data) => {
                    self.exits.mmio_read();
                    self.outside.mmio.read(address, data);
                    Outcome::Continue
                }
                VcpuExit::MmioWrite(address, data) => {
                    self.exits.mmio_write();
                    self.outside.mmio.write(address, data);
                    Outcome::Continue
                }
                VcpuExit::Intr => Outcome::Interrupted,
                // A triple fault: what a PC answers with a reset.
                VcpuExit::Shutdown => Outcome::Ended(ExitKind::Reset),
                VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Outcome::Ended(ExitKind::Reset),
                VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Outcome::Ended(ExitKind::PowerOff),
                VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
                    error("the guest reported a crash (KVM_SYSTEM_EVENT_CRASH)".to_owned())
                }
                VcpuExit::FailEntry(reason, cpu) => error(format!(
                    "the processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}, \
                     host CPU {cpu})"
                )),
                VcpuExit::InternalError => {
                    error("KVM cannot go on (KVM_EXIT_INTERNAL_ERROR; see the host's kernel log)".to_owned())
                }
                other => error(format!("KVM exit of a kind that nobody handles: {other:?}")),
            },
            Err(failure) => match failure.errno() {
                libc::EINTR => Outcome::Interrupted,
                libc::EAGAIN => Outcome::Continue,
                _ => error(format!("KVM_RUN failed: {failure}")),
            },
        }
    }
}
