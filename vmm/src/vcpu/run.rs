//! The life of one vCPU on its thread.

use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use devices::legacy::ExitKind;
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::Kickable;
use super::{Command, Event, Outside};
use crate::metrics::{METRICS, VcpuExits};

/// Where a vCPU is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Placed, and has never run.
    Created,
    /// In the guest, or on its way there.
    Running,
    /// Has run, and does not now.
    Paused,
    /// Will never run again.
    Finished,
}

impl State {
    /// Where `command` leads, and whether the guest is to run.
    fn on(self, command: Command) -> Self {
        match (self, command) {
            (State::Finished, _) | (_, Command::Finish) => State::Finished,
            (_, Command::Run) => State::Running,
            // What has never run has nothing to pause.
            (State::Created, Command::Pause) => State::Created,
            (State::Running | State::Paused, Command::Pause) => State::Paused,
        }
    }
}

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
        let mut state = State::Created;
        self.tell(Event::Created);
        loop {
            state = match state {
                State::Created | State::Paused => self.wait(state),
                State::Running => self.run(),
                State::Finished => return,
            };
        }
    }

    /// Nobody who stopped listening needs an answer.
    fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Waits for a command and follows it.
    fn wait(&mut self, state: State) -> State {
        match self.commands.recv() {
            Ok(command) => self.follow(state, command),
            Err(_) => State::Finished,
        }
    }

    fn follow(&self, state: State, command: Command) -> State {
        let next = state.on(command);
        match next {
            State::Running => self.tell(Event::Running),
            State::Created | State::Paused => self.tell(Event::Paused),
            State::Finished => {}
        }
        next
    }

    /// Runs the guest until a command or its end.
    fn run(&mut self) -> State {
        loop {
            match self.enter() {
                Outcome::Continue => {}
                Outcome::Interrupted => {
                    // First the flag, then the commands: whoever sends one kicks afterwards.
                    self.fd.set_kvm_immediate_exit(0);
                    match self.commands.try_recv() {
                        Ok(command) => return self.follow(State::Running, command),
                        Err(TryRecvError::Empty) => {}
                        Err(TryRecvError::Disconnected) => return State::Finished,
                    }
                }
                Outcome::Ended(kind) => {
                    self.outside.exit.raise(kind);
                    return State::Paused;
                }
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_leads_somewhere_from_every_state() {
        use Command::{Finish, Pause, Run};
        use State::{Created, Finished, Paused, Running};
        for (from, command, to) in [
            (Created, Run, Running),
            (Created, Pause, Created),
            (Created, Finish, Finished),
            (Running, Run, Running),
            (Running, Pause, Paused),
            (Running, Finish, Finished),
            (Paused, Run, Running),
            (Paused, Pause, Paused),
            (Paused, Finish, Finished),
            (Finished, Run, Finished),
            (Finished, Pause, Finished),
            (Finished, Finish, Finished),
        ] {
            assert_eq!(from.on(command), to, "{from:?} on {command:?}");
        }
    }
}
