//! Which case runs next: several lanes at a time, each of which stays with its host while there is work for it.

use crate::case::{Case, Failure, Kernel};
use crate::host::progress::say;
use crate::registry::{Lane, Registry};
use crate::route::{Kind, Place};
use crate::times::Took;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Where cases run one after another: an emulated host of some kind, or this machine.
type Spot = Option<Kind>;

/// So many cases have to wait for hosts of a kind that one more of that kind is worth its boot.
const WORTH_A_BOOT: usize = 4;

/// How a case ended.
type Ended = Result<(), Failure>;

/// The cases that are to run, in the order in which they begin where there is one lane.
pub struct Schedule<'a> {
    registry: &'a Registry,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Waiting>,
    /// Where each lane that still works is.
    at: Vec<Option<Spot>>,
    took: Vec<Took>,
}

struct Waiting {
    case: &'static Case,
    spot: Spot,
    done: Sender<Ended>,
}

impl<'a> Schedule<'a> {
    /// A schedule of no cases.
    pub fn new(registry: &'a Registry) -> Self {
        Self { registry, state: Mutex::default() }
    }

    /// Adds a case. What is returned hears how it ended.
    pub fn add(&self, case: &'static Case) -> Receiver<Ended> {
        let (done, ended) = mpsc::channel();
        let spot = match self.registry.place(case) {
            Place::Emulated(kind, _) => Some(kind),
            Place::Native | Place::Nowhere(_) => None,
        };
        self.state().waiting.push(Waiting { case, spot, done });
        ended
    }

    /// The kernels of the hosts that the cases need.
    pub fn kernels(&self) -> BTreeSet<Kernel> {
        self.state().waiting.iter().filter_map(|one| Some(one.spot?.kernel)).collect()
    }

    /// Works as lane `number` until no case waits for it. What cases print is shown at once with `shown`.
    pub fn work(&self, number: usize, shown: bool) {
        let mut lane = self.registry.lane();
        while let Some(Waiting { case, spot, done }) = self.next(number) {
            let begun = Instant::now();
            let ended = catch_unwind(AssertUnwindSafe(|| run(&mut lane, case, shown)))
                .unwrap_or_else(|_| Err(Failure::new("the harness panicked")));
            let prepared = lane.prepared();
            let took = begun.elapsed().saturating_sub(prepared);
            self.state().took.push(Took { case: case.name, spot, took, prepared });
            if let Err(failure) = &ended {
                // The whole of it comes when all is over.
                say(&format!("{} failed: {}", case.name, failure.0.lines().next().unwrap_or_default()));
            }
            // Who does not wait for it any more does not miss it.
            drop(done.send(ended));
        }
    }

    /// What has run, and for how long.
    pub fn took(&self) -> Vec<Took> {
        self.state().took.clone()
    }

    fn next(&self, number: usize) -> Option<Waiting> {
        let mut state = self.state();
        if state.at.len() <= number {
            state.at.resize(number + 1, None);
        }
        let own = state.at[number].take();
        let waiting: Vec<Spot> = state.waiting.iter().map(|one| one.spot).collect();
        let others: Vec<Spot> = state.at.iter().flatten().copied().collect();
        let index = choose(&waiting, own, &others)?;
        let chosen = state.waiting.remove(index);
        state.at[number] = Some(chosen.spot);
        Some(chosen)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(lane: &mut Lane<'_>, case: &Case, shown: bool) -> Ended {
    if shown { lane.run(case, &mut |text| print!("{text}")) } else { lane.run_quietly(case) }
}

/// Which of the `waiting` a lane takes that is at `own`, while other lanes are at `others`: one for the host that it has,
/// else the first that needs a host which nobody has, else one of many that need the same.
fn choose(waiting: &[Spot], own: Option<Spot>, others: &[Spot]) -> Option<usize> {
    let first = |wanted: &dyn Fn(&Spot) -> bool| waiting.iter().position(wanted);
    let many = |spot: &Spot| waiting.iter().filter(|one| *one == spot).count() >= WORTH_A_BOOT;
    first(&|spot| own == Some(*spot))
        .or_else(|| first(&|spot| !others.contains(spot)))
        // There is one of this machine.
        .or_else(|| first(&|spot| spot.is_some() && many(spot)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::CgroupVersion;

    const V1: Spot = Some(Kind { kernel: Kernel::V6_1, cgroup: CgroupVersion::V1 });
    const V2: Spot = Some(Kind { kernel: Kernel::V6_1, cgroup: CgroupVersion::V2 });
    const NATIVE: Spot = None;

    #[test]
    fn a_lane_stays_where_it_is_while_there_is_work() {
        assert_eq!(choose(&[V1, V2, V2], Some(V2), &[]), Some(1));
        assert_eq!(choose(&[V1, V2, V2], Some(V2), &[V2]), Some(1));
        assert_eq!(choose(&[V1, NATIVE], Some(NATIVE), &[V1]), Some(1));
    }

    #[test]
    fn a_lane_without_work_goes_where_nobody_is() {
        assert_eq!(choose(&[V1, V2], None, &[]), Some(0));
        assert_eq!(choose(&[V1, V2], None, &[V1]), Some(1));
        assert_eq!(choose(&[V1, V2], Some(NATIVE), &[V1]), Some(1));
        assert_eq!(choose(&[], Some(V1), &[V2]), None);
    }

    #[test]
    fn another_host_of_a_kind_is_for_many_cases() {
        assert_eq!(choose(&[V2; WORTH_A_BOOT], Some(V1), &[V2]), Some(0));
        assert_eq!(choose(&[V2; WORTH_A_BOOT - 1], Some(V1), &[V2]), None);
        // They would be in each other's way.
        assert_eq!(choose(&[NATIVE; 2 * WORTH_A_BOOT], Some(V1), &[NATIVE]), None);
    }
}
