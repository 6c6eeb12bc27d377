//! The groups while the microVM lives: their limits follow what is declared, and what happens to them is told.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use api_server::Responder;
use cgroup::{EventKind, EventLog, EventNotifier, StatsError};
use event_manager::{EventOps, Events, MutEventSubscriber};
use resources::{CgroupSection, DiagnosisQuery, EventsQuery, Reply, WhatIfQuery};
use serde_json::{Value, json};
use vmm_sys_util::epoll::EventSet;

use crate::alarm::Alarm;
use crate::event_loop::{EventLoop, register};
use crate::exit::chain;
use crate::metrics::METRICS;
use crate::placement::Placement;
use crate::windows::Windows;
use crate::{prometheus, threads};

/// How often a limit that waits for memory to be freed is tried.
const RETRY: Duration = Duration::from_secs(1);
/// How long events are collected, so that a guest at its limit keeps nobody busy.
const COLLECT: Duration = Duration::from_millis(100);
/// How often events are looked for on v1, where the kernel tells nobody.
const POLL: Duration = Duration::from_secs(1);
/// Clients that wait for events at a time. When one more comes the first is told that there were none.
const WAITERS: usize = 4;

/// Why the groups cannot be looked after.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// No timer.
    #[error("cannot make a timer for the groups")]
    Timer(#[from] io::Error),
    /// Their events cannot be had.
    #[error("cannot watch the groups")]
    Watch(#[from] StatsError),
}

/// Our groups.
pub struct LiveGroups {
    groups: cgroup::Groups,
    limits: cgroup::Limits,
    events: EventLog,
    /// When the groups were taken over.
    begun: Instant,
    /// Set when there may be new events. `None` where the kernel does not tell.
    news: Option<Rc<Cell<bool>>>,
    waiters: Vec<Waiter>,
    windows: Windows,
    /// Rings at the earliest of the times below and of those of the waiters and windows.
    alarm: Alarm,
    retry_at: Option<Instant>,
    check_at: Option<Instant>,
}

/// A client that waits for events.
struct Waiter {
    since: u64,
    until: Instant,
    responder: Responder,
}

impl LiveGroups {
    /// The groups that the threads were placed in, if they were.
    pub fn of(placement: &Placement, event_loop: &mut EventLoop) -> Result<Option<Self>, LiveError> {
        let (Some(groups), Some(limits)) = (placement.groups(), placement.limits()) else { return Ok(None) };
        let (events, notifier) = limits.layout().watch()?;
        let news = notifier.map(|notifier| {
            let news = Rc::new(Cell::new(false));
            event_loop.add(News { notifier, news: Rc::clone(&news) });
            news
        });
        let mut live = Self {
            groups: groups.clone(),
            limits: limits.clone(),
            events,
            begun: Instant::now(),
            waiters: Vec::new(),
            windows: Windows::new(),
            alarm: Alarm::new(event_loop)?,
            retry_at: None,
            check_at: news.is_none().then(|| Instant::now() + POLL),
            news,
        };
        live.note_pending();
        live.set_alarm();
        Ok(Some(live))
    }

    /// Where the groups are, and their limits as they are now.
    pub fn in_force(&self) -> Result<Value, serde_json::Error> {
        Ok(merged(serde_json::to_value(&self.groups)?, serde_json::to_value(self.limits.in_force())?))
    }

    /// What the groups used, and what each thread did.
    pub fn stats(&self) -> Result<Value, StatsError> {
        let stats = self.limits.layout().stats()?;
        let (threads, roles) = threads::loads()?;
        let time_usec = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let rest = json!({ "time_usec": time_usec, "roles": roles, "threads": threads });
        Ok(merged(json!(stats), rest))
    }

    /// The same for Prometheus.
    pub fn prometheus(&self) -> Result<Reply, StatsError> {
        let (_, roles) = threads::loads()?;
        let text = prometheus::text(&self.limits.layout().stats()?, &roles);
        Ok(Reply::Text(prometheus::CONTENT_TYPE, text))
    }

    /// Makes the limits those that are declared. A refusal changes nothing.
    pub fn follow(&mut self, section: &CgroupSection) -> Result<(), cgroup::ChangeError> {
        let containers: Vec<_> =
            section.containers.iter().map(|container| container.resources.clone()).collect();
        self.limits.change(&containers, section.overhead.as_ref())?;
        METRICS.cgroup.limits_not_applied.store(self.limits.in_force().unapplied.len() as u64);
        self.note_pending();
        self.set_alarm();
        Ok(())
    }

    /// Answers a client that asks for events: now if there are some, else when there are, or when it does not want
    /// to wait longer.
    pub fn tell(&mut self, query: EventsQuery, responder: Responder) {
        self.check();
        if query.timeout_ms == 0 || self.events.since(query.since).next().is_some() {
            return responder.send(Ok(Reply::Json(self.events_since(query.since))));
        }
        if self.waiters.len() >= WAITERS {
            let first = self.waiters.remove(0);
            first.responder.send(Ok(Reply::Json(self.events_since(first.since))));
        }
        let until = Instant::now() + Duration::from_millis(query.timeout_ms);
        self.waiters.push(Waiter { since: query.since, until, responder });
        self.set_alarm();
    }

    /// Answers a client that asks what holds the microVM back, when it has been seen.
    pub fn diagnose(&mut self, query: DiagnosisQuery, responder: Responder) {
        self.windows.diagnose(query, self.limits.layout(), responder);
        self.set_alarm();
    }

    /// Answers a client that asks what other limits would do, when it has been seen what the vCPUs use.
    pub fn what_if(&mut self, query: WhatIfQuery, responder: Responder) {
        self.windows.what_if(query, self.limits.layout(), responder);
        self.set_alarm();
    }

    /// Does what its time has come for. To be called after each turn of the event loop.
    pub fn tend(&mut self) {
        let news = self.news.as_ref().is_some_and(|news| news.take());
        if news && self.check_at.is_none() {
            self.check_at = Some(Instant::now() + COLLECT);
            self.set_alarm();
        }
        if !self.alarm.rang() {
            return;
        }
        let now = Instant::now();
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.check_at) {
            self.check_at = self.news.is_none().then(|| now + POLL);
            self.check();
        }
        if due(self.retry_at) {
            match self.limits.retry() {
                Ok(true) => {}
                Ok(false) => log::info!("the memory limit that waited is in force"),
                Err(error) => log::warn!("the memory limit still waits: {}", chain(&error)),
            }
            self.note_pending();
        }
        for waiter in self.waiters.extract_if(.., |waiter| waiter.until <= now).collect::<Vec<_>>() {
            waiter.responder.send(Ok(Reply::Json(self.events_since(waiter.since))));
        }
        self.windows.tend(now, self.limits.layout());
        self.set_alarm();
    }

    /// Looks for new events, logs them and answers those who wait for them.
    fn check(&mut self) {
        let before = self.events.last_id();
        let (new, errors) = self.events.check();
        for error in errors {
            log::warn!("events of a group are not watched any more: {}", chain(&error));
        }
        if new == 0 {
            return;
        }
        for event in self.events.since(before) {
            let (group, count) = (&event.group, event.count);
            match event.kind {
                EventKind::Max => log::info!("memory of {group} was at its limit {count} times"),
                EventKind::Oom => log::warn!("memory of {group} could not be freed {count} times"),
                EventKind::OomKill => log::error!("processes in {group} killed for memory: {count}"),
            }
        }
        for Waiter { since, responder, .. } in std::mem::take(&mut self.waiters) {
            responder.send(Ok(Reply::Json(self.events_since(since))));
        }
    }

    fn events_since(&self, since: u64) -> Value {
        json!({ "events": self.events.since(since).collect::<Vec<_>>(), "last_id": self.events.last_id() })
    }

    fn note_pending(&mut self) {
        self.retry_at = self.limits.is_pending().then(|| Instant::now() + RETRY);
    }

    fn set_alarm(&self) {
        let times = [self.retry_at, self.check_at, self.windows.next()].into_iter().flatten();
        if let Some(next) = times.chain(self.waiters.iter().map(|waiter| waiter.until)).min() {
            // A timer of zero would never ring.
            let least = Duration::from_millis(1);
            self.alarm.set(next.saturating_duration_since(Instant::now()).max(least));
        }
    }
}

/// Notes that there may be new events.
struct News {
    notifier: EventNotifier,
    news: Rc<Cell<bool>>,
}

impl MutEventSubscriber for News {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        register(ops, Events::new(&self.notifier, EventSet::IN), "events of the groups");
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.notifier.drain();
        self.news.set(true);
    }
}

/// The members of both objects.
fn merged(mut one: Value, other: Value) -> Value {
    if let (Value::Object(one), Value::Object(other)) = (&mut one, other) {
        one.extend(other);
    }
    one
}
