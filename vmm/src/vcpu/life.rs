//! What a vCPU's thread does next, as data: [`Vcpu::live`](super::run::Vcpu::live) does it, and the tests try every
//! order in which it and whoever commands it can be scheduled.

use super::Command;

/// Where a vCPU is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    /// Placed, and has never run.
    Created,
    /// In the guest, or on its way there.
    Running,
    /// Kicked out of the guest: there may be a command.
    Interrupted,
    /// Has run, and does not now.
    Paused,
    /// Will never run again.
    Finished,
}

/// What the thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Waits for a command.
    Wait,
    /// Enters the guest.
    Enter,
    /// Clears `immediate_exit`, and only then looks for a command: whoever sends one kicks afterwards.
    Look,
    /// Ends.
    End,
}

/// What a command is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The guest runs.
    Running,
    /// It does not.
    Paused,
}

/// The life of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Life(State);

impl Life {
    /// Before the first command.
    pub fn new() -> Self {
        Self(State::Created)
    }

    /// What is to be done.
    pub fn step(&self) -> Step {
        match self.0 {
            State::Created | State::Paused => Step::Wait,
            State::Running => Step::Enter,
            State::Interrupted => Step::Look,
            State::Finished => Step::End,
        }
    }

    /// There was a command. What to answer, if anything; before the guest is entered.
    pub fn follow(&mut self, command: Command) -> Option<Answer> {
        self.0 = match (self.0, command) {
            (State::Finished, _) | (_, Command::Finish) => State::Finished,
            (_, Command::Run) => State::Running,
            // What has never run has nothing to pause.
            (State::Created, Command::Pause) => State::Created,
            (State::Running | State::Interrupted | State::Paused, Command::Pause) => State::Paused,
        };
        match self.0 {
            State::Running | State::Interrupted => Some(Answer::Running),
            State::Created | State::Paused => Some(Answer::Paused),
            State::Finished => None,
        }
    }

    /// There was no command: back into the guest.
    pub fn nothing_to_follow(&mut self) {
        if self.0 == State::Interrupted {
            self.0 = State::Running;
        }
    }

    /// Nobody commands any more.
    pub fn abandoned(&mut self) {
        self.0 = State::Finished;
    }

    /// KVM_RUN was interrupted.
    pub fn interrupted(&mut self) {
        if self.0 == State::Running {
            self.0 = State::Interrupted;
        }
    }

    /// The guest is at its end. The thread waits to be told to finish.
    pub fn guest_ended(&mut self) {
        if self.0 == State::Running {
            self.0 = State::Paused;
        }
    }
}

#[cfg(test)]
mod tests;
