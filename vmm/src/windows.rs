//! Questions whose answers take time: what the groups do is recorded for as long as asked for, and then judged. The
//! event loop goes on meanwhile; it is asked for nothing but a look now and then.

use std::time::{Duration, Instant};

use api_server::Responder;
use cgroup::{Bandwidth, Hypothesis, Layout, PERIOD, Sample, Scope, Snapshot, StatsError, diagnose, what_if};
use resources::{DiagnosisQuery, Fault, Outcome, Reply, WhatIfQuery};
use serde::Serialize;

use crate::exit::chain;
use crate::threads;

/// Questions at a time. When one more comes the first is answered with what has been seen so far.
const OPEN: usize = 4;

/// Samples of a record at most, and the least time between two.
const SAMPLES: u64 = 128;
const STEP: Duration = Duration::from_millis(10);

/// The questions that are being answered.
pub struct Windows {
    /// What times of records count from.
    begun: Instant,
    open: Vec<Window>,
}

struct Window {
    record: Record,
    until: Instant,
    responder: Responder,
}

enum Record {
    Diagnosis(Box<Snapshot>),
    WhatIf(Box<Demand>),
}

/// What the vCPUs use.
struct Demand {
    samples: Vec<Sample>,
    threads: usize,
    in_force: Hypothesis,
    asked: Hypothesis,
    every: Duration,
    next: Instant,
}

impl Windows {
    /// None are open.
    pub fn new() -> Self {
        Self { begun: Instant::now(), open: Vec::new() }
    }

    /// Begins to look what holds the microVM back.
    pub fn diagnose(&mut self, query: DiagnosisQuery, layout: &Layout, responder: Responder) {
        let record = self.snapshot(layout).map(|snapshot| Record::Diagnosis(Box::new(snapshot)));
        self.open(query.window_ms, record.map_err(|error| fault(&error)), layout, responder);
    }

    /// Begins to record what the vCPUs use.
    pub fn what_if(&mut self, query: WhatIfQuery, layout: &Layout, responder: Responder) {
        let window_ms = query.window_ms;
        let record = self.demand(query, layout).map(|demand| Record::WhatIf(Box::new(demand)));
        self.open(window_ms, record, layout, responder);
    }

    fn open(&mut self, ms: u64, record: Result<Record, Fault>, layout: &Layout, responder: Responder) {
        let record = match record {
            Ok(record) => record,
            Err(fault) => return responder.send(Err(fault)),
        };
        if self.open.len() >= OPEN {
            let Window { record, responder, .. } = self.open.remove(0);
            responder.send(self.close(record, layout));
        }
        self.open.push(Window { record, until: Instant::now() + Duration::from_millis(ms), responder });
    }

    /// The earliest time at which there is something to do.
    pub fn next(&self) -> Option<Instant> {
        let next = |window: &Window| match &window.record {
            Record::WhatIf(demand) => demand.next.min(window.until),
            Record::Diagnosis(_) => window.until,
        };
        self.open.iter().map(next).min()
    }

    /// Does what its time has come for by `now`.
    pub fn tend(&mut self, now: Instant, layout: &Layout) {
        for mut window in std::mem::take(&mut self.open) {
            if window.until <= now {
                window.responder.send(self.close(window.record, layout));
                continue;
            }
            if let Record::WhatIf(demand) = &mut window.record
                && demand.next <= now
            {
                // One that fails is missed; if the last fails, too, that is the answer.
                demand.samples.extend(self.sample(layout));
                demand.next = (demand.next + demand.every).max(now);
            }
            self.open.push(window);
        }
    }

    /// The answer at the end of a record.
    fn close(&self, record: Record, layout: &Layout) -> Outcome {
        match record {
            Record::Diagnosis(before) => {
                let after = self.snapshot(layout).map_err(|error| fault(&error))?;
                reply(&diagnose(&before, &after))
            }
            Record::WhatIf(demand) => {
                let Demand { mut samples, threads, in_force, asked, .. } = *demand;
                samples.push(self.sample(layout)?);
                let answer = what_if(&samples, threads, in_force, asked);
                reply(&answer.ok_or_else(|| Fault::from("no time has passed; ask again".to_owned()))?)
            }
        }
    }

    fn snapshot(&self, layout: &Layout) -> Result<Snapshot, StatsError> {
        let (vcpus, overhead) = threads::scheds()?;
        layout.snapshot(self.time_usec(), vcpus, overhead)
    }

    fn demand(&self, query: WhatIfQuery, layout: &Layout) -> Result<Demand, Fault> {
        let in_force = Hypothesis {
            bandwidth: layout.bandwidth(Scope::Vcpus).map_err(|error| fault(&error))?.unwrap_or_default(),
            cpus: layout.cpus(Scope::Vcpus),
        };
        let base = layout.base_cpus();
        if let (Some(asked), Some(base)) = (&query.cpus, &base)
            && !asked.is_subset(base)
        {
            return Err(
                format!("the CPUs {asked} are not all among the CPUs of the base group ({base})").into()
            );
        }
        let asked = Hypothesis {
            bandwidth: query.bandwidth.unwrap_or(in_force.bandwidth),
            cpus: query.cpus.or_else(|| in_force.cpus.clone()),
        };
        let (vcpus, _) = threads::scheds().map_err(|error| fault(&error))?;
        let every = step(asked.bandwidth, query.window_ms);
        let samples = vec![self.sample(layout)?];
        Ok(Demand { samples, threads: vcpus.len(), in_force, asked, every, next: Instant::now() + every })
    }

    fn sample(&self, layout: &Layout) -> Result<Sample, Fault> {
        let cpu = layout.cpu(Scope::Vcpus).map_err(|error| fault(&error))?;
        let usage_usec = cpu
            .usage_usec
            .ok_or_else(|| Fault::from("the kernel does not count the vCPUs' CPU time".to_owned()))?;
        Ok(Sample {
            time_usec: self.time_usec(),
            usage_usec,
            nr_periods: cpu.nr_periods.unwrap_or_default(),
            nr_throttled: cpu.nr_throttled.unwrap_or_default(),
            throttled_usec: cpu.throttled_usec.unwrap_or_default(),
        })
    }

    fn time_usec(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// The time between two samples: a period, unless these are too many or too close to each other.
fn step(bandwidth: Bandwidth, window_ms: u64) -> Duration {
    let period = if bandwidth.quota.is_some() { bandwidth.period } else { PERIOD };
    let least = Duration::from_micros(window_ms.saturating_mul(1000).div_ceil(SAMPLES)).max(STEP);
    Duration::from_micros(period).max(least)
}

fn reply(answer: &impl Serialize) -> Outcome {
    serde_json::to_value(answer).map(Reply::Json).map_err(|error| fault(&error))
}

fn fault(error: &dyn std::error::Error) -> Fault {
    chain(error).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_few_and_not_shorter_than_a_period() {
        for (quota, period, window_ms, wanted_ms) in [
            (Some(1000), 100_000, 2000, 100),
            (Some(1000), 1000, 100, 10),
            (Some(1000), 1_000_000, 2000, 1000),
            (Some(1000), 100_000, 60_000, 468),
            (None, 1000, 2000, 100),
        ] {
            let every = step(Bandwidth { quota, period }, window_ms);
            assert_eq!(every.as_millis(), wanted_ms, "{quota:?} {period} {window_ms}");
            assert!(Duration::from_millis(window_ms).as_micros() / every.as_micros() <= u128::from(SAMPLES));
        }
    }
}
