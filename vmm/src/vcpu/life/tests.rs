use std::collections::{HashSet, VecDeque};

use super::*;
use Command::{Finish, Pause, Run};

#[test]
fn every_command_leads_somewhere_from_every_state() {
    use State::{Created, Finished, Interrupted, Paused, Running};
    for (from, command, to, answer) in [
        (Created, Run, Running, Some(Answer::Running)),
        (Created, Pause, Created, Some(Answer::Paused)),
        (Created, Finish, Finished, None),
        (Running, Run, Running, Some(Answer::Running)),
        (Running, Pause, Paused, Some(Answer::Paused)),
        (Running, Finish, Finished, None),
        (Interrupted, Run, Running, Some(Answer::Running)),
        (Interrupted, Pause, Paused, Some(Answer::Paused)),
        (Interrupted, Finish, Finished, None),
        (Paused, Run, Running, Some(Answer::Running)),
        (Paused, Pause, Paused, Some(Answer::Paused)),
        (Paused, Finish, Finished, None),
        (Finished, Run, Finished, None),
        (Finished, Pause, Finished, None),
        (Finished, Finish, Finished, None),
    ] {
        let mut life = Life(from);
        assert_eq!((life.follow(command), life.0), (answer, to), "{from:?} on {command:?}");
    }
}

/// Where the commanding thread is with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Commander {
    /// Puts it into the channel.
    Send,
    /// Signals the thread.
    Kick,
    /// Waits for the answer.
    Await,
}

/// Where the vCPU's thread is within a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Place {
    /// Before a step.
    Between,
    /// In KVM_RUN, behind its look at `immediate_exit`.
    Guest,
    /// `immediate_exit` is cleared, the command not looked for.
    Cleared,
    /// Gone.
    Ended,
}

/// Both threads, the channel between them, the signal and its flag.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    life: Life,
    place: Place,
    channel: VecDeque<Command>,
    answers: VecDeque<Answer>,
    /// A signal that has been sent and not handled.
    signal: bool,
    immediate_exit: bool,
    guest_has_ended: bool,
    commander: Commander,
    /// Commands to come, the present one first.
    script: Vec<Command>,
    /// The answer to the last command, as long as no other one is sent.
    known: Option<Answer>,
}

impl World {
    fn new(script: &[Command]) -> Self {
        Self {
            life: Life::new(),
            place: Place::Between,
            channel: VecDeque::new(),
            answers: VecDeque::new(),
            signal: false,
            immediate_exit: false,
            guest_has_ended: false,
            commander: Commander::Send,
            script: script.to_vec(),
            known: None,
        }
    }

    /// What can happen next. `guest` says whether it takes the guest to do something, which it may never.
    fn successors(&self, guest: bool) -> Vec<Self> {
        let mut all = Vec::new();
        let mut add = |change: &dyn Fn(&mut Self)| {
            let mut next = self.clone();
            change(&mut next);
            all.push(next);
        };
        if guest {
            if self.place == Place::Guest {
                // An exit that is served, and the end of the guest.
                add(&|next| next.place = Place::Between);
                add(&|next| {
                    next.life.guest_ended();
                    (next.place, next.guest_has_ended) = (Place::Between, true);
                });
            }
            return all;
        }
        if let Some(&command) = self.script.first() {
            match self.commander {
                Commander::Send => add(&|next| {
                    next.channel.push_back(command);
                    (next.commander, next.known) = (Commander::Kick, None);
                }),
                Commander::Kick => add(&|next| {
                    next.signal = next.place != Place::Ended;
                    next.commander = Commander::Await;
                }),
                // Finish has no answer: what is waited for is the end of the thread.
                Commander::Await if command == Finish && self.place == Place::Ended => {
                    add(&|next| next.script.clear());
                }
                Commander::Await if !self.answers.is_empty() => add(&|next| {
                    next.known = next.answers.pop_front();
                    next.script.remove(0);
                    next.commander = Commander::Send;
                }),
                Commander::Await => {}
            }
        }
        // The signal's handler runs at any moment; KVM_RUN returns for it.
        if self.signal && self.place != Place::Ended {
            add(&|next| {
                (next.signal, next.immediate_exit) = (false, true);
                if next.place == Place::Guest {
                    next.life.interrupted();
                    next.place = Place::Between;
                }
            });
        }
        match (self.place, self.life.step()) {
            (Place::Between, Step::Wait) if !self.channel.is_empty() => add(&|next| next.take()),
            (Place::Between, Step::Enter) => add(&|next| match next.immediate_exit {
                true => next.life.interrupted(),
                false => next.place = Place::Guest,
            }),
            (Place::Between, Step::Look) => add(&|next| {
                (next.immediate_exit, next.place) = (false, Place::Cleared);
            }),
            (Place::Between, Step::End) => add(&|next| next.place = Place::Ended),
            (Place::Cleared, _) => add(&|next| {
                next.place = Place::Between;
                next.take();
            }),
            _ => {}
        }
        all
    }

    fn take(&mut self) {
        match self.channel.pop_front() {
            Some(command) => self.answers.extend(self.life.follow(command)),
            None => self.life.nothing_to_follow(),
        }
    }

    fn check(&self) {
        // Whoever was told that it is paused can rely on it.
        if self.known == Some(Answer::Paused) {
            assert!(self.place != Place::Guest && self.life.step() != Step::Enter, "{self:?}");
        }
        // One command is answered once, so no answer is taken for another's.
        assert!(self.answers.len() <= 1 && (self.known.is_none() || self.answers.is_empty()), "{self:?}");
        // Nothing is left to happen by itself: then everything has been done, whatever the guest does.
        if self.successors(false).is_empty() {
            assert!(self.script.is_empty(), "a command waits for the guest's will: {self:?}");
            assert_eq!(self.place, Place::Ended, "{self:?}");
        }
    }
}

/// Every schedule of both threads, of the signal and of what the guest does, for every sequence of up to five commands.
#[test]
fn no_command_is_lost_in_any_schedule() {
    let mut scripts = vec![vec![]];
    for _ in 0..5 {
        let longer = scripts.iter().flat_map(|script: &Vec<Command>| {
            [Run, Pause].map(|command| script.iter().copied().chain([command]).collect())
        });
        scripts = longer.chain([vec![]]).collect();
    }
    let mut seen = HashSet::new();
    let (mut in_guest, mut ended) = (0, 0);
    let mut left: Vec<World> =
        scripts.iter().map(|script| World::new(&[script.as_slice(), &[Finish]].concat())).collect();
    while let Some(world) = left.pop() {
        if !seen.insert(world.clone()) {
            continue;
        }
        world.check();
        in_guest += usize::from(world.place == Place::Guest);
        ended += usize::from(world.place == Place::Ended && world.guest_has_ended);
        left.extend(world.successors(false));
        left.extend(world.successors(true));
    }
    assert!(seen.len() > 2000 && in_guest > 200 && ended > 5, "{} {in_guest} {ended}", seen.len());
}
