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
}
