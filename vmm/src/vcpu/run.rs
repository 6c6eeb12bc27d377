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
        let outcome = match self.fd.run() {
            Ok(exit) => answer(exit, &self.outside, self.exits),
            Err(failure) => match failure.errno() {
                libc::EINTR => Ok(Outcome::Interrupted),
                libc::EAGAIN => Ok(Outcome::Continue),
                _ => Err(format!("KVM_RUN failed: {failure}")),
            },
        };
        outcome.unwrap_or_else(|reason| {
            METRICS.vcpu.failures.inc();
            Outcome::Ended(ExitKind::Error(format!("vCPU {}: {reason}", self.index)))
        })
    }
}

/// Does what the guest left for, or says why it cannot go on.
fn answer(exit: VcpuExit<'_>, outside: &Outside, exits: &VcpuExits) -> Result<Outcome, String> {
    match exit {
        VcpuExit::IoIn(port, data) => {
            exits.io_in();
            outside.pio.read(u64::from(port), data);
            Ok(Outcome::Continue)
        }
        VcpuExit::IoOut(port, data) => {
            exits.io_out();
            outside.pio.write(u64::from(port), data);
            Ok(Outcome::Continue)
        }
        VcpuExit::MmioRead(address, data) => {
            exits.mmio_read();
            outside.mmio.read(address, data);
            Ok(Outcome::Continue)
        }
        VcpuExit::MmioWrite(address, data) => {
            exits.mmio_write();
            outside.mmio.write(address, data);
            Ok(Outcome::Continue)
        }
        VcpuExit::Intr => Ok(Outcome::Interrupted),
        // A triple fault: what a PC answers with a reset.
        VcpuExit::Shutdown => Ok(Outcome::Ended(ExitKind::Reset)),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Ok(Outcome::Ended(ExitKind::Reset)),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Ok(Outcome::Ended(ExitKind::PowerOff)),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
            Err("the guest reported a crash (KVM_SYSTEM_EVENT_CRASH)".to_owned())
        }
        VcpuExit::FailEntry(reason, cpu) => Err(format!(
            "the processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}, host CPU \
             {cpu})"
        )),
        VcpuExit::InternalError => {
            Err("KVM cannot go on (KVM_EXIT_INTERNAL_ERROR; see the host's kernel log)".to_owned())
        }
        other => Err(format!("KVM exit of a kind that nobody handles: {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use devices::bus::Bus;
    use devices::legacy::ExitSignal;

    use super::*;

    /// How a guest goes on that left for `exit`.
    fn after(exit: VcpuExit<'_>) -> Result<&'static str, String> {
        let outside = Outside {
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
            exit: Arc::new(ExitSignal::new().unwrap()),
        };
        answer(exit, &outside, METRICS.vcpu.exits(0)).map(|outcome| match outcome {
            Outcome::Continue => "on",
            Outcome::Interrupted => "interrupted",
            Outcome::Ended(ExitKind::Reset) => "reset",
            Outcome::Ended(ExitKind::PowerOff) => "off",
            Outcome::Ended(ExitKind::Error(_)) => "error",
        })
    }

    #[test]
    fn exits_that_end_the_guest() {
        assert_eq!(after(VcpuExit::Shutdown), Ok("reset"));
        assert_eq!(after(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, &[])), Ok("reset"));
        assert_eq!(after(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, &[])), Ok("off"));
        assert_eq!(after(VcpuExit::Intr), Ok("interrupted"));
        assert_eq!(after(VcpuExit::IoOut(0x80, &[1])), Ok("on"));
        assert_eq!(after(VcpuExit::MmioRead(0, &mut [0])), Ok("on"));
    }

    #[test]
    fn an_exit_that_nobody_expects_says_what_it_is() {
        for (exit, word) in [
            (VcpuExit::Unknown, "Unknown"),
            (VcpuExit::Unsupported(77), "77"),
            (VcpuExit::Exception, "Exception"),
            (VcpuExit::Hlt, "Hlt"),
            (VcpuExit::Nmi, "Nmi"),
            (VcpuExit::SystemEvent(99, &[]), "99"),
            (VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, &[]), "crash"),
            (VcpuExit::FailEntry(0x8000_0021, 3), "0x80000021"),
            (VcpuExit::InternalError, "KVM_EXIT_INTERNAL_ERROR"),
        ] {
            let reason = after(exit).unwrap_err();
            assert!(reason.contains(word), "{word}: {reason}");
        }
    }

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
